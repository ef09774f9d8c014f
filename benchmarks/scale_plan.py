"""The arithmetic of docs/scale.md: a billion trajectories in bytes, hours and money. No chance and no measuring in it.

Rates marked "measured" are those of docs/log.md: one of two cores of an Intel Xeon, processor time, others at work;
``FSYNC`` and ``SELECT`` on an AMD EPYC. What a GPU does is assumed: a ceiling that was given, and a share of it.
"""

import math
from dataclasses import dataclass

from lark_fast.flop import ForwardCost
from lark_fast.packing import WINDOW_RECORDS, window_tokens
from lark_fast.scoring.finishing import GROUP_ROWS
from lark_fast.tables import table

TRAJECTORIES, TOKENS = 10**9, 3_000
SCORED_SHARE = 0.98  # measured: of the long pool's tokens
GPU_FLOP = 790e12  # a second, bf16, given for an H200: the ceiling
SHARES = (0.75, 0.5, 0.3)  # of it, assumed
GPU_HOUR = 3.0  # USD, assumed
GPUS_A_NODE, TOKENS_A_PASS = 8, 32_768

TEXT_A_TOKEN, ZSTD_A_TOKEN = 4.1, 0.83  # bytes, measured: JSONL of long answers, Qwen2's tokenizer, zstd level 3
RENDER = 170_000  # tokens a second and core, measured: the same
READ_ZSTD = 290e6  # bytes of text a second and core, measured: found, split, made ready to be sent
FSYNC = 1.2e-3  # seconds of a journal's frame, measured: 0.4 to 1.2 ms on a local disk
ROW, PART = (
    106,
    4_600,
)  # bytes on disk of a row and of a part besides, measured: random statistics, zstd
TOKEN_COLUMNS = 16  # bytes a scored token with --per-token, before compression: four columns
KEY, KEY_GROWING = 20, 60  # bytes, see ``lark_fast.pool.keys``
MERGE, MERGED_ROWS = 40, 1 << 16  # bytes a row in memory and rows of a part, see ``lark_fast.scoring.merging``
# Seconds of finishing, measured: a row, and a part, each also for every group of GROUP_ROWS.
FINISH_ROW, FINISH_ROW_GROUP, FINISH_PART, FINISH_PART_GROUP = 2.1e-6, 0.35e-6, 4.7e-3, 1.5e-3
SELECT, SELECT_BYTES = 8e-7, 110  # seconds and bytes a row, measured: 10,000,000 in 8 s and 1.1 GB


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder as Llama and Qwen2 have it."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """Of matrices, the embedding among them."""
        return int(self.cost().body / 2) + 2 * self.hidden * self.vocabulary

    def cost(self) -> ForwardCost:
        """As ``ForwardCost.of`` finds it for the model."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return ForwardCost(
            body=2.0 * self.layers * (attention + 3 * self.hidden * self.ffn),
            attention=(("full", math.inf, 4.0 * self.layers * self.heads * self.head_dim),),
            head=2.0 * self.hidden * self.vocabulary,
        )

    def flop_a_token(self, tokens: int = TOKENS) -> float:
        """Of a trajectory of so many."""
        return self.cost().flop([tokens], round(SCORED_SHARE * tokens)) / tokens


STUDENTS = {
    "0.5B": Shape(hidden=896, layers=24, heads=14, kv_heads=2, head_dim=64, ffn=4864, vocabulary=151_936),
    "7B": Shape(hidden=3584, layers=28, heads=28, kv_heads=4, head_dim=128, ffn=18_944, vocabulary=152_064),
    "70B": Shape(hidden=8192, layers=80, heads=64, kv_heads=8, head_dim=128, ffn=28_672, vocabulary=128_256),
}


def tokens_a_second(student: str, share: float, tokens: int = TOKENS) -> float:
    """Of one GPU, at a share of the ceiling."""
    return share * GPU_FLOP / STUDENTS[student].flop_a_token(tokens)


def gpu_hours(student: str, share: float, tokens: int = TOKENS) -> float:
    """For all trajectories."""
    return TRAJECTORIES * tokens / tokens_a_second(student, share, tokens) / 3600


def rows_of_a_part(student: str, tokens: int = TOKENS) -> int:
    """A part is a window."""
    in_window = window_tokens(STUDENTS[student].parameters, TOKENS_A_PASS, "cuda")
    return min(WINDOW_RECORDS, math.ceil(in_window / tokens))


def store_bytes(rows: int, in_part: int) -> float:
    """Of final parts."""
    return rows * (ROW + PART / in_part)


def fleet_node_hours() -> float:
    """What the simulated fleet has to do: the 7B student at half of the ceiling."""
    return gpu_hours("7B", 0.5) / GPUS_A_NODE


def finishing_seconds(rows: int, in_part: int) -> float:
    """Of ``add_learnability``, which reads all parts once for every GROUP_ROWS rows, and then writes them anew."""
    groups, parts = 1 + rows // GROUP_ROWS, math.ceil(rows / in_part)
    return rows * (FINISH_ROW + FINISH_ROW_GROUP * groups) + parts * (FINISH_PART + FINISH_PART_GROUP * groups)


def tables() -> dict[str, str]:
    """By name."""
    return {
        "students": _students(),
        "lengths": _lengths(),
        "parts": _parts(),
        "feeding": _feeding(),
        "pieces": _pieces(),
        "shards": _shards(),
    }


def _students() -> str:
    header = (
        "student",
        "GFLOP a token",
        "tokens/s at the ceiling",
        *(f"GPU-hours at {x:.0%}" for x in SHARES),
        "USD at 50%",
    )
    return table(
        header,
        [
            [
                name,
                f"{shape.flop_a_token() / 1e9:.2f}",
                f"{tokens_a_second(name, 1.0):,.0f}",
                *(two_digits(gpu_hours(name, share)) for share in SHARES),
                two_digits(GPU_HOUR * gpu_hours(name, 0.5)),
            ]
            for name, shape in STUDENTS.items()
        ],
    )


def _lengths() -> str:
    header = ("tokens each", "tokens", "text", "zstd", "--per-token", *(f"GPU-hours, {name}" for name in STUDENTS))
    rows = []
    for tokens in (1_000, TOKENS, 10_000):
        total = TRAJECTORIES * tokens
        sizes = (TEXT_A_TOKEN * total, ZSTD_A_TOKEN * total, TOKEN_COLUMNS * SCORED_SHARE * total)
        hours = (two_digits(gpu_hours(student, 0.5, tokens)) for student in STUDENTS)
        rows.append([f"{tokens:,}", f"{total:.0e}".replace("e+", "e"), *map(_bytes, sizes), *hours])
    return table(header, rows)


def _parts() -> str:
    header = ("student", "rows of a part", "parts", "scores", "merged: parts", "scores")
    rows = []
    for student in STUDENTS:
        own = rows_of_a_part(student)
        told = [
            cell
            for in_part in (own, MERGED_ROWS)
            for cell in (f"{math.ceil(TRAJECTORIES / in_part):,}", _bytes(store_bytes(TRAJECTORIES, in_part)))
        ]
        rows.append([student, f"{own:,}", *told])
    return table(header, rows)


def _feeding() -> str:
    header = ("student", "tokens/s", "cores that render", "MB/s of text", "passes/s", "time in fsync", "rows/s")
    rows = []
    for student in STUDENTS:
        rate = GPUS_A_NODE * tokens_a_second(student, 0.5)
        text, passes = rate * TEXT_A_TOKEN, rate / TOKENS_A_PASS
        rows.append(
            [
                student,
                f"{rate:,.0f}",
                f"{rate / RENDER:.1f}",
                f"{text / 1e6:.1f}",
                f"{passes:.1f}",
                f"{passes * FSYNC:.1%}",
                f"{rate / TOKENS:,.0f}",
            ]
        )
    return table(header, rows)


def _pieces() -> str:
    finishing = ("finishing", "in parts of a merge")
    header = ("trajectories", "node-hours", "parts", "keys in memory", *finishing, "select", "its memory")
    rows = []
    for size in (10**6, 10**7, 10**8, 10**9):
        own = rows_of_a_part("7B")
        rows.append(
            [
                f"{size:,}",
                two_digits(fleet_node_hours() * size / TRAJECTORIES),
                f"{math.ceil(size / own):,}",
                f"{_bytes(KEY * size)} to {_bytes(KEY_GROWING * size)}",
                _duration(finishing_seconds(size, own)),
                _duration(finishing_seconds(size, MERGED_ROWS)),
                _duration(SELECT * size),
                _bytes(SELECT_BYTES * size),
            ]
        )
    return table(header, rows)


def _shards() -> str:
    header = ("shards", "node-hours each, 0.5B", "7B", "70B", "hours of reading each", "text read by all")
    text = TEXT_A_TOKEN * TRAJECTORIES * TOKENS
    return table(
        header,
        [
            [
                f"{n:,}",
                *(two_digits(gpu_hours(student, 0.5) / GPUS_A_NODE / n) for student in STUDENTS),
                two_digits(text / READ_ZSTD / 3600),
                _bytes(n * text),
            ]
            for n in (8, 32, 128, 1_000)
        ],
    )


def two_digits(value: float) -> str:
    """Two digits that count."""
    digits = max(0, 1 - math.floor(math.log10(value)))
    return f"{round(value, 1 - math.floor(math.log10(value))):,.{digits}f}"


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if value < 1000 or unit == "PB":
            return f"{two_digits(value)} {unit}"
        value /= 1000
    raise AssertionError


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{two_digits(seconds / size)} {unit}"
    return f"{two_digits(seconds)} s"
