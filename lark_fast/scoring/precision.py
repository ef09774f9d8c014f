"""What bfloat16, or FP8, costs in accuracy, measured on the first trajectories of a run."""

import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lark_fast.errors import UserError
from lark_fast.memory import available_memory
from lark_fast.scoring.agreement import Agreement, Scores, agreement
from lark_fast.scoring.feed import Trajectory
from lark_fast.scoring.metrics import json_number

if TYPE_CHECKING:
    from lark_fast.scoring.place import Place
    from lark_fast.scoring.run import ScoreConfig
    from lark_fast.scoring.scorer import Scorer
    from lark_fast.scoring.store import ScoreStore
    from lark_fast.scoring.summary import ScoreSummary
    from lark_fast.student_files import StudentFiles

SAMPLE = 32  # trajectories
SAMPLE_TOKENS = 4096
# Of what is scored in FP8 and without: a few seconds of a GPU, and no more of a CPU than is needed to try it.
FP8_PROBLEMS, FP8_GPU_TOKENS, FP8_CPU_TOKENS = 64, 200_000, 4096
FP8_BUDGET = 3  # candidates of a problem that get weight, in what is said of selections
FP8 = ("speed", "spearman_g_hat", "same_top", "total_variation")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundingCost:
    """Relative differences of a sample's scores in bfloat16 from those in float32: root mean square and largest."""

    trajectories: int
    nll: tuple[float, float]
    brier: tuple[float, float]

    def __str__(self) -> str:
        scores = (("nll", self.nll), ("the Brier score", self.brier))
        parts = (f"{name} by {100 * mean:.1g} % ({100 * most:.1g} % at most)" for name, (mean, most) in scores)
        return f"{' and '.join(parts)} on the first {self.trajectories} trajectories"


def rounding_cost(
    scorer: "Scorer", items: Sequence[Trajectory], trust_remote_code: bool = False
) -> RoundingCost | None:
    """Score a sample in the scorer's own precision and, by the same student loaded anew, in float32.

    Args:
        scorer: of a student in lower precision, which knows where it was loaded from.
        items: trajectories; as many of the first as make a sample.
        trust_remote_code: as the scorer's student was loaded.

    Returns:
        None where there is nothing to score, or where the student cannot be had in float32: a gauge stops no run.
    """
    from lark_fast.scoring.scorer import Scorer
    from lark_fast.student import load_student

    n_parameters = sum(parameter.numel() for parameter in scorer.student.model.parameters())
    sizes = np.cumsum([len(item.input_ids) for item in items[:SAMPLE]])
    sample = items[: max(1, int(np.searchsorted(sizes, SAMPLE_TOKENS, side="right")))]
    if not sample or 4 * n_parameters > available_memory() / 2:
        return None
    try:
        loaded = load_student(
            scorer.student.files,
            device="cpu",
            dtype="float32",
            trust_remote_code=trust_remote_code,
            tokenizer=False,
            quiet=True,
        )
    except (UserError, MemoryError):
        return None
    exact = Scorer(loaded, head_share=scorer.head_share)
    rows = np.array(
        [[(one.nll, one.brier) for one in each.score_rendered(sample)] for each in (scorer, exact)]
    )  # [2, N, 2]
    apart = np.abs(rows[0] - rows[1]) / np.maximum(np.abs(rows[1]), 1e-30)
    (nll, brier) = ((float(np.sqrt((column**2).mean())), float(column.max())) for column in apart.T)
    return RoundingCost(trajectories=len(sample), nll=nll, brier=brier)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Cost:
    """A sample scored in the student's own precision and in FP8.

    Attributes:
        dtype: the own one, without "torch.".
        tokens: of the sample, prompts included.
        own_tokens_per_second, fp8_tokens_per_second: of each.
        layers: linear layers that are in FP8.
        share: of the numbers in the matrices between embedding and head, those in FP8.
        agreement: of the scores.
    """

    dtype: str
    tokens: int
    own_tokens_per_second: float
    fp8_tokens_per_second: float
    layers: int
    share: float
    agreement: Agreement

    def __str__(self) -> str:
        return (
            f"{self.fp8_tokens_per_second:,.0f} tokens/s where {self.dtype} does {self.own_tokens_per_second:,.0f}, on "
            f"the first {self.agreement.trajectories:,} trajectories; {self.agreement}"
        )

    def brief(self) -> str:
        """A few words for a table."""
        found = self.agreement
        same = f", the same top {found.budget} in {found.same_top:.0%}" if found.problems else ""
        return (
            f"{self.fp8_tokens_per_second / self.own_tokens_per_second:.2f}x the speed of {self.dtype} on a sample; "
            f"Spearman of g_hat {found.g_hat.spearman:.4f}{same}"
        )

    def as_json(self) -> dict[str, Any]:
        """Its fields by name."""
        return asdict(self) | {"agreement": self.agreement.as_json()}

    def in_summary(self) -> dict[str, float | None]:
        """What matters most, flat, by name; what is not known is None."""
        found = self.agreement
        numbers = (
            self.fp8_tokens_per_second / self.own_tokens_per_second,
            found.g_hat.spearman,
            found.same_top,
            found.total_variation,
        )
        return {f"fp8_{name}": json_number(number) for name, number in zip(FP8, numbers, strict=True)}


def whole_problems(
    stream: Iterator[Trajectory], problems: int, tokens: int
) -> tuple[list[Trajectory], list[Trajectory]]:
    """The beginning of a stream, and the trajectories of it that a sample takes.

    As far as candidates of a problem stand side by side, the sample has all of them: the problem that the limit cuts
    through is left out.

    Args:
        stream: is read so far.
        problems, tokens: at most, but for one problem that has more.
    """
    taken, seen, n_tokens = [], set(), 0
    for item in stream:
        taken.append(item)
        seen.add(item.key[0])
        n_tokens += len(item.input_ids)
        if len(seen) > problems or n_tokens > tokens:
            break
    else:
        return taken, taken
    whole = [item for item in taken if item.key[0] != taken[-1].key[0]]
    return taken, whole or taken


def fp8_cost(scorer: "Scorer", items: Sequence[Trajectory]) -> Fp8Cost | None:
    """Score a sample both ways, and time it.

    Args:
        scorer: in FP8.
        items: the sample.

    Returns:
        None where there is nothing to score, or no room for the student's own weights beside those in FP8.
    """
    if not items or not scorer.fp8.kept:
        return None
    fp8, fp8_seconds = _timed(scorer, items)
    with scorer.fp8.own_precision():
        own, own_seconds = _timed(scorer, items)
    tokens = sum(len(item.input_ids) for item in items)
    return Fp8Cost(
        dtype=str(scorer.student.dtype).removeprefix("torch."),
        tokens=tokens,
        own_tokens_per_second=tokens / own_seconds,
        fp8_tokens_per_second=tokens / fp8_seconds,
        layers=scorer.fp8.replaced,
        share=scorer.fp8.share,
        agreement=agreement(own, fp8, [item.key[0] for item in items], FP8_BUDGET),
    )


def _timed(scorer: "Scorer", items: Sequence[Trajectory]) -> tuple[Scores, float]:
    """Scores, and seconds once libraries have chosen their kernels."""
    scorer.score_rendered(items[:1])
    started = time.perf_counter()
    scored = scorer.score_rendered(items)
    seconds = time.perf_counter() - started
    return Scores([one.nll for one in scored], [one.brier_used for one in scored]), seconds


def refuse_precision(config: "ScoreConfig") -> None:
    """What FP8 does not go with.

    Raises:
        UserError: it was asked for together with that.
    """
    if config.precision is None:
        return
    asked = f"--precision {config.precision}"
    if config.after is not None:
        raise UserError(f"{asked}: rounds off more than a few steps change; leave it or --before and --after away")
    if config.dtype not in ("auto", "bfloat16"):
        raise UserError(f"{asked}: all else is bfloat16 then; leave it or --dtype {config.dtype} away")
    if config.device_map is not None:
        raise UserError(f"{asked}: takes a student that is whole on a device; leave it or --device-map away")


def fault_of_precision(config: "ScoreConfig", files: "StudentFiles") -> str | None:
    """Why the device cannot compute as asked for; None where it can, or nothing was asked for.

    Raises:
        UserError: the student's weights are not such that FP8 could take them.
    """
    if config.precision is None:
        return None
    if files.quantised:
        raise UserError(f"--precision {config.precision}: {files.name} is quantised already; leave it out")
    from lark_fast.fp8 import fp8_fault
    from lark_fast.student import choose_device

    return fp8_fault(choose_device(config.device))


def say_fallback(fault: str | None, dtype: str) -> None:
    """Of a precision that was asked for and is not in force, in one line."""
    if fault is not None:
        print(f"lark-fast: --precision fp8: {fault}; scoring in {dtype} without it", file=sys.stderr)


def say_what_fp8_costs(
    place: "Place", feed: Iterable[Trajectory], store: "ScoreStore", summary: "ScoreSummary"
) -> Iterator[Trajectory]:
    """The feed, once its first problems have been scored with FP8 and without."""
    stream = iter(feed)
    tokens = FP8_CPU_TOKENS if place.facts.device_type == "cpu" else FP8_GPU_TOKENS
    first, sample = whole_problems(stream, FP8_PROBLEMS, tokens)
    cost = summary.fp8 = place.fp8_cost(sample)
    if cost is not None:
        store.note(precision_cost=cost.as_json())
    elif sample:
        cost = "what it costs was not measured" + (
            " (a run in one process measures it)" if place.devices > 1 else " (no room for both precisions)"
        )
    if sample:
        print(f"lark-fast: scoring in FP8: {cost}", file=sys.stderr)
    return itertools.chain(first, stream)
