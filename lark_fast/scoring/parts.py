"""The Parquet parts of a scores directory: their names, their columns, how one is written and read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lark_fast.errors import UserError
from lark_fast.files import atomic_path

LOCAL = ("local_nll", "local_step_nll")  # see ``local``
PAIRED = ("nll_after", "loss_delta")  # see ``paired``
# Of a race: the scored tokens that it came to, or in an audit would have; whether it won, null where nobody raced.
RACED = [("n_raced", pa.int32()), ("winner", pa.bool_()), ("audited", pa.bool_())]
SAMPLED = ("nll_se", "brier_se", "brier_topk_se", "nll_brier_cov")  # see ``head_sampling``
STATISTICS = ("nll", "brier", "brier_topk", "entropy", "rank_mean", "rsr", *LOCAL, *PAIRED, *SAMPLED)
OF_TOP_K = ("brier_topk", "brier_topk_se")
PER_TOKEN = {
    "token_nll": pa.float32(),
    "token_brier": pa.float32(),
    "token_brier_topk": pa.float32(),
    "token_entropy": pa.float32(),
    "token_rank": pa.int32(),
    "token_nll_after": pa.float32(),
}


def schema(
    *,
    top_k: int | None,
    per_token: bool = False,
    local: bool = False,
    paired: bool = False,
    sampled: bool = False,
    share: bool = False,
    race: bool = False,
    race_sampled: bool = False,
    final: bool = False,
) -> pa.Schema:
    """Columns of a part, raw or final. Those of a share of a pool know their places in the pool, see ``merging``."""
    groups = ((local, LOCAL), (paired, PAIRED), (sampled, SAMPLED), (top_k is not None, OF_TOP_K))
    left_out = {name for asked, names in groups if not asked for name in names}
    statistics = [name for name in STATISTICS if name not in left_out]
    tokens = [name for name in PER_TOKEN if per_token and name.removeprefix("token_") not in left_out]
    derived = ["rho", "g_hat", *(["g_hat_se"] if sampled else []), *(["rho_measured"] if paired else [])]
    return pa.schema(
        [
            ("problem_id", pa.string()),
            ("candidate_id", pa.string()),
            ("teacher", pa.string()),
            ("source", pa.string()),
            *([("line", pa.int64()), ("ordinal", pa.int64())] if share else []),
            ("n_tokens", pa.int32()),
            ("n_input_tokens", pa.int32()),
            ("truncated", pa.bool_()),
            *(RACED if race else []),
            *([("n_head", pa.int32())] if sampled or race_sampled else []),
            *[(name, pa.float64()) for name in (*statistics, *(derived if final else ()))],
            ("content_hash", pa.binary(16)),
            ("token_hash", pa.binary(16)),
            *[(name, pa.list_(PER_TOKEN[name])) for name in tokens],
        ]
    )


def schema_of(identity: dict[str, Any], *, final: bool = False) -> pa.Schema:
    """The columns that the parts of a store with this identity have."""
    return schema(
        top_k=identity["top_k"],
        per_token=identity["per_token"],
        # Stores begun before there were any do not say.
        local=identity.get("local_steps") is not None,
        paired=identity.get("after") is not None,
        sampled=is_sampled(identity),
        share=identity.get("shard") is not None,
        race=identity.get("race") is not None,
        race_sampled=(identity.get("race") or {}).get("head_share") is not None,
        final=final,
    )


def is_sampled(identity: dict[str, Any]) -> bool:
    """Whether the scores of a store with this identity are estimates, see ``head_sampling``."""
    return identity.get("head_share") is not None


def part_files(directory: str | Path) -> list[Path]:
    """The parts of a scores directory, in the order of the pool."""
    return sorted(Path(directory).glob("part-*.parquet"))


def part_path(directory: Path, number: int) -> Path:
    """Where the part with this number is."""
    return directory / f"part-{number:06d}.parquet"


def part_number(part: Path) -> int:
    """The number in a part's name."""
    return int(part.stem.removeprefix("part-"))


def number_of_rows(part: Path) -> int:
    """How many rows a part has.

    Raises:
        UserError: it cannot be read.
    """
    with reading(part):
        return pq.read_metadata(part).num_rows


def rows_of(directory: str | Path) -> int:
    """How many rows a directory's parts have; errors as ``number_of_rows``."""
    return sum(map(number_of_rows, part_files(directory)))


def write_part(path: Path, table: pa.Table) -> None:
    """Write or replace a part; it appears whole or not at all."""
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


@contextmanager
def reading(part: Path) -> Iterator[None]:
    """A part that a bad disk has damaged is named, with what to do about it.

    Raises:
        UserError: what is read inside the block cannot be.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())  # some of Arrow's end in a line break
        raise UserError(f"{part}: cannot be read ({reason}); remove it, and it is scored again") from error


def scored_keys(directory: str | Path) -> Iterator[tuple[tuple[str, str], bytes]]:
    """((problem_id, candidate_id), content_hash) of every row of a directory's parts, in their order.

    Raises:
        UserError: a part cannot be read.
    """
    for part in part_files(directory):
        with reading(part):
            names = ["problem_id", "candidate_id", "content_hash"]
            for batch in pq.ParquetFile(part).iter_batches(columns=names):
                problem, candidate, content = (column.to_pylist() for column in batch.columns)
                yield from zip(zip(problem, candidate, strict=True), content, strict=True)


def held_keys(directory: str | Path, keys: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those of the keys that a directory's parts have; a few, so that most rows need not be looked at.

    Raises:
        UserError: a part cannot be read.
    """
    if not keys:
        return set()
    held = set()
    candidates = pa.array({candidate for _, candidate in keys}, pa.string())
    for part in part_files(directory):
        with reading(part):
            table = pq.read_table(part, columns=["problem_id", "candidate_id"])
            ours = pc.and_(
                pc.is_in(table["problem_id"], pa.array({problem for problem, _ in keys}, pa.string())),
                pc.is_in(table["candidate_id"], candidates),
            )
            found = table.filter(ours)
            held |= keys.intersection(zip(*(column.to_pylist() for column in found.columns), strict=True))
    return held
