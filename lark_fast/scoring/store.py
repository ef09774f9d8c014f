"""The scores directory: Parquet parts that appear whole, a journal of what is in hand, and a manifest.

    scores/part-000000.parquet ...   one row a trajectory, in the order of the pool: a part a window
    scores/journal-000007            rows of the window that will be part 7, pack by pack; gone once the part is there
    scores/manifest.json             student, config, counts, timing; "complete" once every row has its g_hat
    scores/rejected.jsonl            {source, line, reason}
    scores/.lock                     held by the run that writes here

Parts are only ever replaced by rename, and a frame of the journal counts once it is whole, so at any moment the
directory holds exactly the packs that were finished. Readers need neither the lock nor the journal.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from lark_fast.errors import UserError
from lark_fast.files import TEMPORARY_SUFFIX, write_json, writing_to
from lark_fast.lock import DirectoryLock
from lark_fast.scoring.finishing import add_learnability
from lark_fast.scoring.journal import Journal
from lark_fast.scoring.parts import part_files, part_number, part_path, schema_of, scored_keys, write_part

FORMAT = 1
LARK_JSON = "lark_ghat.json"  # of ``export``; stale once the store changes

Key = tuple[str, str]  # (problem_id, candidate_id)


class ScoreStore:
    """One scores directory, open for writing until ``close`` or the end of a ``with`` block.

    A run appends the rows of each pack as it is done and closes each window. What a stopped run had appended to a
    window that it did not close is in ``unfinished`` when the directory is opened again.

    Args:
        directory: where it is; made when it does not exist.
        identity: everything that decides the numbers (student, dtype, rendering, ...). A directory that was begun with
            another identity is refused.
        overwrite: throw away what is there.

    Attributes:
        unfinished: content_hash of each row that the journal held when the directory was opened. The window it belongs
            to is cut again and closed with these rows; the dict stays as it is meanwhile.

    Raises:
        UserError: the directory holds scores of another student or config, or something that is not a score store;
            another run is writing to it; it cannot be written to.
    """

    def __init__(self, directory: str | Path, identity: dict[str, Any], *, overwrite: bool = False) -> None:
        self.directory, self.identity = Path(directory), identity
        self.manifest: dict[str, Any] = {"complete": False}
        self._columns = schema_of(identity)
        self._tables: list[pa.Table] = []  # the rows of the journal
        self._place: dict[Key, int] = {}  # where in them a row is; the last one of a key counts
        self._written_early: set[Key] = set()  # rows of the journal that were in no window when it was closed
        self._lock = DirectoryLock(self.directory)
        with writing_to(directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            if not self._lock.path.exists():
                self._read_manifest()  # nothing is written to a directory that is somebody else's, not even a lock
            self._lock.acquire()
            try:
                self._open(overwrite)
            except BaseException:
                self._lock.release()
                raise
        contents = ((_keys(table), table["content_hash"].to_pylist()) for table in self._tables)
        self.unfinished = {key: content for rows in contents for key, content in zip(*rows, strict=True)}

    def __enter__(self) -> "ScoreStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another run have the directory. What was appended stays in the journal."""
        self._journal.close()
        self._lock.release()

    @property
    def manifest_path(self) -> Path:
        """Where the manifest is."""
        return self.directory / "manifest.json"

    def parts(self) -> list[Path]:
        """The finished parts, in the order of the pool."""
        return part_files(self.directory)

    def scored_keys(self) -> Iterator[tuple[Key, bytes]]:
        """((problem_id, candidate_id), content_hash) of every row of the finished parts."""
        return scored_keys(self.directory)

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows, in any order, to the window in hand; after this returns they survive anything.

        Args:
            rows: a dict a row; columns of tokens may be arrays. A row that is there already is replaced.

        Raises:
            OSError: the disk is full or cannot be written to; what was appended before is kept.
            ValueError: a part has one of these rows already.
        """
        if not rows:
            return
        table = pa.Table.from_pylist(list(rows), self._columns)
        twice = self._written_early.intersection(_keys(table))
        if twice:
            raise ValueError(f"{twice.pop()} is in a part already: rows of `unfinished` are not scored again")
        self._not_complete()
        self._journal.append(_to_bytes(table))
        self._take_in(table)

    def close_window(self, keys: Sequence[Key]) -> None:
        """Make the rows of the window in hand a part and drop the journal; no rows, no part.

        Args:
            keys: of all rows of the window, in the order of the pool. What the journal holds besides, of a pool that
                has changed or is cut otherwise since, goes to the end of the part; a later window may name it still.

        Raises:
            OSError: the disk is full or cannot be written to; the journal is kept.
            ValueError: a row was never appended.
        """
        if not keys:
            return
        places = []
        for key in dict.fromkeys(keys):
            if key in self._place:
                places.append(self._place[key])
            elif key not in self._written_early:
                raise ValueError(f"{key} was never appended to its window")
        self._write_part(places)

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Add rho and g_hat to every row, then call the store complete; returns the manifest.

        Rows of a window that was never closed become a part first.
        """
        self._write_part([])
        self._journal.remove()
        counts = facts.pop("counts", {}) | add_learnability(self.directory, self.identity)
        return self.write_manifest(complete=True, counts=counts, **facts)

    def write_manifest(self, *, complete: bool, **facts: Any) -> dict[str, Any]:
        """Write manifest.json; ``facts`` are counts, timing, versions."""
        self.manifest = {
            "format": FORMAT,
            "complete": complete,
            "brier": "brier" if self.identity["top_k"] is None else "brier_topk",
            "identity": self.identity,
            **facts,
        }
        write_json(self.manifest_path, self.manifest)
        return self.manifest

    def _open(self, overwrite: bool) -> None:
        """Everything that needs the lock: check, clear, sweep, and take up the journal of a stopped run."""
        if self._read_manifest() and overwrite:
            self._clear()
        elif self.parts() or any(journal.stat().st_size for journal in self._journals()):
            self._refuse_another_identity(self.manifest["identity"])
        for name in ("part-*.parquet", "manifest.json", "rejected.jsonl", LARK_JSON):
            for leftover in self.directory.glob(name + TEMPORARY_SUFFIX):
                leftover.unlink()
        if not self.parts():
            self.write_manifest(complete=False)
        self._take_up_journal()

    def _take_up_journal(self) -> None:
        numbers = {part_number(part) for part in self.parts()}
        self._start_window(max(numbers, default=-1) + 1)
        for journal in self._journals():
            number = int(journal.name.removeprefix("journal-"))
            if number in numbers:
                journal.unlink()  # its run was stopped between the part and this
                continue
            self._write_part([])  # of another journal: only a hand that moves files leaves two
            self._start_window(number)
            for frame in self._journal.frames:
                self._take_in(pa.ipc.open_stream(frame).read_all())

    def _start_window(self, number: int) -> None:
        self._number, self._journal = number, Journal(self.directory / f"journal-{number:06d}")
        self._tables, self._place, self._rows = [], {}, 0

    def _take_in(self, table: pa.Table) -> None:
        self._place.update(zip(_keys(table), range(self._rows, self._rows + len(table)), strict=True))
        self._tables.append(table)
        self._rows += len(table)

    def _write_part(self, places: list[int]) -> None:
        """Write the journal's rows, those at ``places`` first, as the part it belongs to; begin the next."""
        if not self._place:
            return
        named = set(places)
        others = {key: place for key, place in self._place.items() if place not in named}
        self._not_complete()
        rows = pa.concat_tables(self._tables).combine_chunks().take([*places, *others.values()])
        write_part(part_path(self.directory, self._number), rows)
        self._written_early.update(others)
        written = self._journal
        self._start_window(self._number + 1)
        written.remove()

    def _not_complete(self) -> None:
        """Before a row comes in: what was made of all rows no longer holds."""
        if self.manifest["complete"]:
            self.write_manifest(complete=False)
            (self.directory / LARK_JSON).unlink(missing_ok=True)

    def _journals(self) -> list[Path]:
        return sorted(self.directory.glob("journal-" + "[0-9]" * 6))

    def _read_manifest(self) -> bool:
        """Whether a store was begun here."""
        # Without a manifest of ours they are somebody else's files, and nothing of that is thrown away.
        begun = bool(self.parts() or self._journals() or self.manifest_path.exists())
        if begun:
            self.manifest = read_manifest(self.directory)
        return begun

    def _refuse_another_identity(self, stored: dict[str, Any]) -> None:
        differing = [name for name in {**stored, **self.identity} if stored.get(name) != self.identity.get(name)]
        if differing:
            changes = "; ".join(
                f"{name} was {stored.get(name)!r}, is {self.identity.get(name)!r}" for name in differing
            )
            raise UserError(
                f"--out {self.directory}: holds scores made otherwise ({changes}); "
                "give another directory, or --overwrite to throw them away"
            )

    def _clear(self) -> None:
        others = (self.directory / name for name in ("rejected.jsonl", LARK_JSON))
        for file in [*self.parts(), *self._journals(), *others, self.manifest_path]:
            file.unlink(missing_ok=True)


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a scores directory.

    Raises:
        UserError: there is none, or it is of another format.
    """
    path = Path(directory) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{directory}: no manifest.json there; is it what `lark-fast score --out` wrote?") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    ours = isinstance(manifest, dict) and {"format", "identity", "complete", "brier"} <= manifest.keys()
    if not ours or manifest["format"] != FORMAT:
        found = f", but of format {manifest['format']!r}: use the version that wrote it" if ours else ""
        raise UserError(f"{path}: not a manifest of this version of lark-fast (format {FORMAT}){found}")
    return manifest


def _keys(table: pa.Table) -> list[Key]:
    return list(zip(table["problem_id"].to_pylist(), table["candidate_id"].to_pylist(), strict=True))


def _to_bytes(table: pa.Table) -> memoryview:
    """A table as an Arrow stream, which says its columns itself."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return memoryview(sink.getvalue())
