"""The scores directory: Parquet parts that appear whole, a journal of what is in hand, and a manifest.

    scores/part-000000.parquet ...   one row a trajectory, in the order of the pool: a part a window
    scores/journal-000007            rows of the window that will be part 7, pack by pack; gone once the part is there.
                                     Several windows may be in hand, each with its journal
    scores/manifest.json             student, config, counts, timing; "complete" once every row has its g_hat. Of a
                                     share of a pool: "share" once all of it is scored, see ``merging``
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
from lark_fast.scoring.parts import (
    held_keys,
    part_files,
    part_number,
    part_path,
    rows_of,
    schema_of,
    scored_keys,
    write_part,
)

FORMAT = 1
LARK_JSON = "lark_ghat.json"  # of ``export``; stale once the store changes

NOTES = ("precision_cost",)  # in a manifest, measured once and never again

Key = tuple[str, str]  # (problem_id, candidate_id)


class ScoreStore:
    """One scores directory, open for writing until ``close`` or the end of a ``with`` block.

    A run appends the rows of each pack as it is done and closes the windows one after the other. What a stopped run had
    appended to windows that it did not close is in ``unfinished`` when the directory is opened again.

    Args:
        directory: where it is; made when it does not exist.
        identity: everything that decides the numbers (student, dtype, rendering, ...). A directory that was begun with
            another identity is refused.
        overwrite: throw away what is there.

    Attributes:
        unfinished: content_hash of each row that the journals held when the directory was opened. The windows they
            belong to are cut again and closed with these rows; the dict stays as it is meanwhile.

    Raises:
        UserError: the directory holds scores of another student or config, or something that is not a score store;
            another run is writing to it; it cannot be written to.
    """

    def __init__(self, directory: str | Path, identity: dict[str, Any], *, overwrite: bool = False) -> None:
        self.directory, self.identity = Path(directory), identity
        self.manifest: dict[str, Any] = {"complete": False}
        self._notes: dict[str, Any] = {}  # in every manifest from now on
        self._columns = schema_of(identity)
        self._windows: list[_Window] = []  # in hand, at least one, in the order of the pool
        self._written_early: set[Key] = set()  # rows of a journal that were in no window when it was closed
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
        self.unfinished = {key: content for window in self._windows for key, content in window.contents()}

    def __enter__(self) -> "ScoreStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another run have the directory. What was appended stays in the journal."""
        for window in self._windows:
            window.journal.close()
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

    def append(self, rows: Sequence[dict[str, Any]], ahead: int = 0) -> None:
        """Add rows, in any order, to a window in hand; after this returns they survive anything.

        Args:
            rows: a dict a row; columns of tokens may be arrays. A row that is there already is replaced.
            ahead: which window: 0 is the one that will be closed first.

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
        while len(self._windows) <= ahead:
            self._windows.append(_Window(self.directory, self._windows[-1].number + 1))
        self._windows[ahead].append(table)

    def close_window(self, keys: Sequence[Key]) -> None:
        """Make the rows of the first window in hand a part and drop its journal; no rows, no part.

        Args:
            keys: of all rows of the window, in the order of the pool, in whatever journal they are. What its own
                journal holds besides, of a pool that has changed or is cut otherwise since, goes to the end of the
                part; a later window may name it still.

        Raises:
            OSError: the disk is full or cannot be written to; the journal is kept.
            ValueError: a row was never appended.
        """
        if not keys and len(self._windows) == 1:
            return
        for key in dict.fromkeys(keys):
            if key not in self._written_early and not any(key in window.place for window in self._windows):
                raise ValueError(f"{key} was never appended to its window")
        self._write_part(keys)

    def finish(self, *, steps: int | None = None, **facts: Any) -> dict[str, Any]:
        """Add rho and g_hat to every row, then call the store complete; returns the manifest.

        Of a pair rho_measured too, for which ``steps`` is needed. Rows of windows that were never closed become parts
        first. A ``share`` of a pool is never complete: it has some of a problem's candidates, and g_hat is made of all.
        """
        while len(self._windows) > 1 or self._windows[0].place:
            self._write_part([])
        self._windows[0].journal.remove()
        counts, complete = facts.pop("counts", {}), "share" not in facts
        if steps is not None:
            facts["steps"] = steps
            if self.manifest.get("steps") != steps:
                self._not_complete()
        made = add_learnability(self.directory, self.identity, steps) if complete else {"rows": rows_of(self.directory)}
        return self.write_manifest(complete=complete, counts=counts | made, **facts)

    def write_manifest(self, *, complete: bool, **facts: Any) -> dict[str, Any]:
        """Write manifest.json; ``facts`` are counts, timing, versions."""
        self.manifest = {
            "format": FORMAT,
            "complete": complete,
            "brier": "brier" if self.identity["top_k"] is None else "brier_topk",
            "identity": self.identity,
            **self._notes,
            **facts,
        }
        write_json(self.manifest_path, self.manifest)
        return self.manifest

    def note(self, **facts: Any) -> None:
        """Facts of NOTES that outlive this run: later ones that go on here keep them."""
        self._notes |= facts
        self.write_manifest(complete=False)

    def _open(self, overwrite: bool) -> None:
        """Everything that needs the lock: check, clear, sweep, and take up the journal of a stopped run."""
        if self._read_manifest() and overwrite:
            self._clear()
        elif self.parts() or any(journal.stat().st_size for journal in self._journals()):
            self._refuse_another_identity(self.manifest["identity"])
            self._notes = {name: self.manifest[name] for name in NOTES if name in self.manifest}
        for name in ("part-*.parquet", "manifest.json", "rejected.jsonl", LARK_JSON):
            for leftover in self.directory.glob(name + TEMPORARY_SUFFIX):
                leftover.unlink()
        if not self.parts():
            self.write_manifest(complete=False)
        self._take_up_journals()

    def _take_up_journals(self) -> None:
        """The windows that a stopped run had in hand; of some of them no row may have been there yet."""
        written = {part_number(part) for part in self.parts()}
        following = max(written, default=-1) + 1
        numbers = {int(journal.name.removeprefix("journal-")) for journal in self._journals()}
        for number in numbers & written:  # its run was stopped between the part and the removal
            _journal_path(self.directory, number).unlink()
        left = numbers - written
        first, last = (min(following, *left), max(following, *left)) if left else (following, following)
        in_hand = [number for number in range(first, last + 1) if number not in written]
        self._windows = [_Window(self.directory, number) for number in in_hand]
        # A part may have taken rows out of a later window's journal.
        for key in held_keys(self.directory, {key for window in self._windows for key in window.place}):
            for window in self._windows:
                window.place.pop(key, None)

    def _write_part(self, keys: Sequence[Key]) -> None:
        """Write the rows of the keys and what else the first window has as its part; go on to the next window."""
        window = self._windows[0]
        tables, place, start = [], {}, 0
        for other in self._windows:
            own = {key: start + other.place[key] for key in keys if key in other.place}
            if own or other is window:
                tables += other.tables
                start += other.rows
            place = own | place
        named = [place[key] for key in dict.fromkeys(keys) if key in place]
        others = {key: row for key, row in window.place.items() if key not in place}
        if named or others:
            self._not_complete()
            rows = pa.concat_tables(tables).combine_chunks().take([*named, *others.values()])
            write_part(part_path(self.directory, window.number), rows)
            self._written_early.update(others)
            for other in self._windows[1:]:
                for key in place:
                    other.place.pop(key, None)
        elif len(self._windows) == 1:
            return
        self._windows.pop(0)
        if not self._windows:
            self._windows.append(_Window(self.directory, window.number + 1))
        window.journal.remove()

    def _not_complete(self) -> None:
        """Before a row comes in: what was made of all rows no longer holds."""
        if self.manifest["complete"] or "share" in self.manifest:
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


class _Window:
    """A window in hand: what its journal holds.

    Attributes:
        tables: the rows of the journal.
        place: where in them a row is; the last one of a key counts.
    """

    def __init__(self, directory: Path, number: int) -> None:
        self.number, self.journal = number, Journal(_journal_path(directory, number))
        self.tables: list[pa.Table] = []
        self.place: dict[Key, int] = {}
        self.rows = 0
        for frame in self.journal.frames:
            self._take_in(pa.ipc.open_stream(frame).read_all())

    def append(self, table: pa.Table) -> None:
        """Add rows, on the disk too."""
        self.journal.append(_to_bytes(table))
        self._take_in(table)

    def contents(self) -> Iterator[tuple[Key, bytes]]:
        """Each row's key and content_hash."""
        hashes = [value for table in self.tables for value in table["content_hash"].to_pylist()]
        return ((key, hashes[row]) for key, row in self.place.items())

    def _take_in(self, table: pa.Table) -> None:
        self.place.update(zip(_keys(table), range(self.rows, self.rows + len(table)), strict=True))
        self.tables.append(table)
        self.rows += len(table)


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


def read_finished(directory: str | Path, option: str = "--scores") -> dict[str, Any]:
    """The manifest of a scores directory in which every row has its g_hat.

    Args:
        directory: of the scores.
        option: that named it, for messages.

    Raises:
        UserError: it is not finished, or ``read_manifest`` says it is none.
    """
    manifest = read_manifest(directory)
    shard = manifest["identity"].get("shard")
    if shard is not None:
        raise UserError(
            f"{option} {directory}: is shard {shard} of a pool; `lark-fast merge` makes one store of them all"
        )
    if not manifest["complete"]:
        raise UserError(f"{option} {directory}: scoring was not finished; run the same `lark-fast score` command again")
    return manifest


def _journal_path(directory: Path, number: int) -> Path:
    return directory / f"journal-{number:06d}"


def _keys(table: pa.Table) -> list[Key]:
    return list(zip(table["problem_id"].to_pylist(), table["candidate_id"].to_pylist(), strict=True))


def _to_bytes(table: pa.Table) -> memoryview:
    """A table as an Arrow stream, which says its columns itself."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return memoryview(sink.getvalue())
