"""What ``lark-fast select`` can be asked for, checked, and what came of it."""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lark_fast.errors import UserError
from lark_fast.kernels.chi2 import TIES
from lark_fast.selection.exporters import find_format
from lark_fast.selection.policies import RANDOM, TEACHER_RANK, find_policy

SHOWN_PROBLEMS = 3
SWEPT = ("budget", "tau", "policy", "ties", "seed")
_MOST_VARIANTS = 100
_NEED_POOL = {
    "--where": "where",
    "--near-duplicates": "near_duplicates",
    "--decontaminate": "decontaminate",
    "--export": "export",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectConfig:
    """What ``lark-fast select`` was asked to do."""

    scores: str
    pool: tuple[str, ...] = ()  # without one there is no text: weights.parquet only
    out: str
    budget: int | None = None  # 3 when there is no tau either
    tau: float | None = None  # chi2 and kl only, in the units of g_hat
    policy: str = "chi2"
    ties: str = "exact"  # or "reference", chi2 only
    seed: int = 0  # of random draws
    band: tuple[float, float] | None = None  # of exp(nll), policy "perplexity" only; default: the pool's quartiles
    teacher_order: tuple[str, ...] = ()  # policy "teacher" only
    constraints: str | None = None  # a YAML file, chi2 only
    where: tuple[str, ...] = ()  # COLUMN or COLUMN=VALUE of the pool, all of which must hold
    near_duplicates: str | None = None  # "exact" or "minhash"
    near_duplicate_threshold: float | None = None  # Jaccard similarity, minhash only; 0.8
    decontaminate: tuple[str, ...] = ()  # files of benchmark items
    ngram: int | None = None  # words, of decontaminate; 13
    export: tuple[str, ...] = ()  # of exporters.FORMATS
    sweep: tuple[str, ...] = ()  # KEY=VALUE,VALUE,...: one selection for each combination
    overwrite: bool = False

    @property
    def filters(self) -> bool:
        """Whether candidates may be removed before the selection."""
        return bool(self.where or self.near_duplicates or self.decontaminate)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionSummary:
    """What came of a run. Trajectories count once each, means are over the problems that have a row."""

    out: str
    problems: int
    candidates: int  # scored trajectories
    rows: int  # chosen
    without_g_hat: int  # scored trajectories that were dropped for it
    removed: Mapping[str, int]  # by each filter
    problems_kept_whole: int  # no more candidates than the budget
    problems_without_row: int
    first_problems_without_row: tuple[str, ...]
    pool_records: int
    never_scored: int  # pool records that are neither in the scores nor in rejected.jsonl
    duplicates: int  # pool records whose key came before
    columns_left_out: tuple[str, ...]  # unknown columns of the pool that bear a name the selection writes itself
    selected_tokens: int  # scored tokens of the rows
    mean_effective_sample_size: float
    mean_chi2_divergence: float  # from the uniform prior
    teachers: Mapping[str, Mapping[str, float]]  # share of the candidates, of the rows, of the weight
    notes: tuple[str, ...] = ()  # of the constraints, of the exporters

    def lines(self) -> list[str]:
        """The summary for a reader, a line a fact."""
        said = [
            f"{self.out}: {self.rows:,} of {self.candidates:,} trajectories for {self.problems:,} problems, "
            f"{self.selected_tokens:,} tokens, mean effective sample size {self.mean_effective_sample_size:.2f}"
        ]
        if self.without_g_hat:
            said.append(f"{self.without_g_hat:,} scored trajectories have no g_hat and were dropped")
        said += [f"{count:,} trajectories removed: {reason}" for reason, count in self.removed.items()]
        if self.problems_kept_whole:
            said.append(
                f"{self.problems_kept_whole:,} of {self.problems:,} problems have no more candidates than the budget: "
                "all of theirs are kept, with equal weights"
            )
        if self.problems_without_row:
            names = ", ".join(map(repr, self.first_problems_without_row))
            more = ", ..." if self.problems_without_row > len(self.first_problems_without_row) else ""
            said.append(f"{self.problems_without_row:,} problems have no row: {names}{more}")
        if self.never_scored:
            said.append(
                f"{self.never_scored:,} of {self.pool_records:,} pool records were never scored and were left out; "
                "`lark-fast score` would add them"
            )
        if self.duplicates:
            said.append(f"{self.duplicates:,} pool records repeat the key of an earlier one and were left out")
        if self.columns_left_out:
            said.append(f"pool columns left out, for the selection writes its own: {', '.join(self.columns_left_out)}")
        return [*said, *self.notes]


def variants(config: SelectConfig) -> dict[str, SelectConfig]:
    """The selections to make by the name of their directory: one named "" without a sweep.

    Raises:
        UserError: a setting out of range, or settings that do not go together.
    """
    if not config.sweep:
        _refuse_unused(config, [config.policy])
        return {"": _checked(config)}
    axes: dict[str, list[Any]] = {}
    for axis in config.sweep:
        key, equals, values = axis.partition("=")
        if key not in SWEPT or not equals or key in axes:
            fault = "comes twice" if key in axes else "is no KEY=VALUE,VALUE,... of " + ", ".join(SWEPT)
            raise UserError(f"--sweep {axis}: {fault}")
        axes[key] = [_value(axis, key, value) for value in values.split(",")]
        if len(set(axes[key])) < len(axes[key]):
            raise UserError(f"--sweep {axis}: names a value twice")
    number = math.prod(map(len, axes.values()))
    if number > _MOST_VARIANTS:
        raise UserError(f"--sweep: {number:,} combinations; at most {_MOST_VARIANTS} are made at a time")
    found = {}
    for values in itertools.product(*axes.values()):
        settings = dict(zip(axes, values, strict=True))
        name = "-".join(f"{key}={value}" for key, value in settings.items()).replace("/", "_").replace(":", ".")
        found[name] = _checked(replace(config, **settings))
    _refuse_unused(config, [variant.policy for variant in found.values()])
    return found


def _refuse_unused(config: SelectConfig, policies: Iterable[str]) -> None:
    """UserError for what none of the policies would look at."""
    found = [find_policy(name) for name in policies]
    columns = {column for policy in found for column in policy.columns}
    seeds = any(axis.startswith("seed=") for axis in config.sweep)
    for option, given, used, owner in (
        ("--teacher-order", config.teacher_order, TEACHER_RANK in columns, "teacher"),
        ("--band", config.band, any(policy.has_band for policy in found), "perplexity"),
        ("--sweep seed", seeds, RANDOM in columns, "random or perplexity"),
    ):
        if given and not used:
            raise UserError(f"{option}: is for the policy {owner} only")


def _value(axis: str, key: str, value: str) -> Any:
    kinds = {"budget": int, "seed": int, "tau": float}
    try:
        return kinds.get(key, str)(value)
    except ValueError:
        raise UserError(f"--sweep {axis}: {value!r} is no number") from None


def _checked(config: SelectConfig) -> SelectConfig:
    """The config, or a UserError for what does not go together."""
    if not config.out:
        raise UserError("--out: is empty; give a directory")
    policy = find_policy(config.policy)
    if config.ties not in TIES:
        raise UserError(f"--ties {config.ties}: unknown; known are {', '.join(TIES)}")
    if config.budget is not None and config.tau is not None and config.policy == "chi2":
        raise UserError("--budget and --tau: give one of them; a budget sets tau itself")
    if config.budget is not None and config.budget < 1:
        raise UserError(f"--budget {config.budget}: must be at least 1")
    if config.tau is not None and not (math.isfinite(config.tau) and config.tau > 0):
        raise UserError(f"--tau {config.tau}: must be a finite number above 0")
    if config.tau is not None and not policy.has_tau:
        raise UserError(f"--tau: only the policies chi2 and kl have one; give --budget to {config.policy}")
    if config.ties == "reference" and (config.policy != "chi2" or config.tau is not None):
        raise UserError("--ties reference: is for the policy chi2 with a budget only")
    if config.policy == "teacher" and not config.teacher_order:
        raise UserError("--policy teacher: needs --teacher-order TEACHER,TEACHER,...")
    if config.band is not None:
        low, high = config.band
        if not 0 <= low < high < math.inf:
            raise UserError(f"--band {low:g}:{high:g}: LOW:HIGH are finite perplexities, from 0 up, LOW below HIGH")
    if config.constraints is not None and (config.policy != "chi2" or config.ties != "exact"):
        raise UserError("--constraints: are for the policy chi2 with exact ties only")
    threshold = config.near_duplicate_threshold
    if threshold is not None and not 0 < threshold <= 1:
        raise UserError(f"--near-duplicate-threshold {threshold}: must be above 0 and at most 1")
    if threshold is not None and config.near_duplicates != "minhash":
        raise UserError("--near-duplicate-threshold: is for --near-duplicates minhash only")
    if config.ngram is not None and config.ngram < 1:
        raise UserError(f"--ngram {config.ngram}: must be at least 1")
    if config.ngram is not None and not config.decontaminate:
        raise UserError("--ngram: is for --decontaminate only")
    for name in config.export:
        find_format(name)
    if not config.pool and (config.filters or config.export):
        given = [option for option, value in _NEED_POOL.items() if getattr(config, value)]
        raise UserError(f"{', '.join(given)}: needs the records, give --pool too")
    return config
