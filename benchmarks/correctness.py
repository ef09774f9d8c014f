"""Every implementation on fresh operands against float64, with outputs poisoned, before anything is timed."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks import chi2, fp8_rows, head, loss, trajectories
from benchmarks.accuracy import judge
from benchmarks.comparison import DEVICE
from lark_fast.fp8 import fp8_fault
from lark_fast.kernels.chi2 import chi2_solve
from lark_fast.kernels.dispatch import has_triton
from lark_fast.kernels.fp8 import quantise_rows
from lark_fast.kernels.linear_cross_entropy import linear_cross_entropy
from lark_fast.kernels.softmax_sums import STATISTICS, TokenStats
from lark_fast.kernels.token_stats import (
    IGNORE_INDEX,
    token_stats,
    token_stats_from_logits,
    token_stats_from_logits_naive,
    token_stats_naive,
)
from lark_fast.kernels.trajectory_reduce import trajectory_reduce

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
# No size divides a tile; the large ones are those that are timed. "broken": rows with NaN and inf, ignored labels;
# "transformed": rows=, a bias, a softcap and a scale.
SMALL_SHAPES = [
    ((33, 48, 257), (FLOAT, BF16, HALF), ("peaky", "flat", "broken", "transformed")),
    ((252, 507, 1231), (FLOAT, BF16), ("peaky", "flat")),
    # D is a multiple of the tensor cores' steps, as in every student: the configurations that count.
    ((300, 128, 1000), (BF16, HALF), ("peaky", "flat", "broken", "transformed")),
]
LARGE_SHAPES = [
    ((1000, 896, 151936), (BF16,), ("peaky", "flat")),
    ((515, 3584, 152064), (BF16,), ("peaky", "broken")),
]
MAX_TRUE_LOGITS = 30_000_000
CPU_LARGE_SHAPES = [((130, 256, 32003), (FLOAT, BF16), ("peaky",))]
HEADS = {  # by name: statistics, top_k
    head.ALL: (STATISTICS, None),
    head.LIGHT: (head.NLL_BRIER, None),
    head.TOPK: (STATISTICS, head.TOP_K),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One implementation on one set of operands."""

    name: str
    shape: str
    dtype: torch.dtype
    operands: str  # their kind
    run: Callable[[], list[dict]]  # its errors, statistic by statistic


def interpreted() -> bool:
    """Whether Triton's kernels run on the CPU, in Triton's interpreter: right or wrong, but of no speed."""
    return DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and has_triton()


def head_forms() -> tuple[str, ...]:
    """Forms of the head that run here at all."""
    return ("fused", "chunked", "torch") if interpreted() else head.forms()


def kernel_forms() -> tuple[str, ...]:
    """Implementations of the operations without a matrix product that run here at all."""
    return ("triton", "torch") if len(head_forms()) > 1 else ("torch",)


def cases(seed: int, tiny: bool = False) -> Iterator[Case]:
    """All that is checked on this device, or the smallest shape alone; operands are made anew from ``seed``."""
    g = head.generator(seed)
    shapes = SMALL_SHAPES + (LARGE_SHAPES if DEVICE.type == "cuda" else CPU_LARGE_SHAPES)
    for shape, dtypes, kinds in shapes[:1] if tiny or interpreted() else shapes:
        for dtype in dtypes:
            for kind in kinds:
                yield from _head_cases(*shape, dtype, kind, g)
                yield from _loss_cases(*shape, dtype, kind, g)
    for impl in kernel_forms():
        yield _trajectory_case(impl, seed)
        yield from _fp8_cases(impl, seed)
    for impl in ("triton", "numpy") if len(kernel_forms()) > 1 else ("numpy",):
        for dtype in (FLOAT, torch.float64):
            yield _selection_case(impl, dtype, seed, 60 if tiny or interpreted() else 20_000)


def check(case: Case) -> list[dict]:
    """What the record says of a case: one entry a statistic, or one with the error that it raised."""
    base = {"name": case.name, "shape": case.shape, "dtype": str(case.dtype).removeprefix("torch.")}
    base["operands"] = case.operands
    try:
        with poisoned_outputs():
            return [base | entry for entry in case.run()]
    except Exception as error:  # whatever a kernel fails with belongs into the record
        return [base | {"error": None, "budget": None, "ok": False, "problem": f"{type(error).__name__}: {error}"}]


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Memory that was allocated and not written is NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _head_cases(T: int, D: int, V: int, dtype: torch.dtype, kind: str, g: torch.Generator) -> Iterator[Case]:
    hidden, weight, labels = head.inputs(T, D, V, dtype, g, "flat" if kind == "flat" else "peaky")
    rows, options = None, {}
    if kind == "broken":
        # Of large shapes few rows are judged: row 0 and others, among them some that are multiples of 6.
        hidden[0, 0], hidden[6], hidden[12, D - 1], hidden[T // 2] = math.nan, math.inf, -math.inf, math.nan
        labels[2::7] = IGNORE_INDEX
    if kind == "transformed":
        rows = torch.randperm(T, generator=g, device=DEVICE)[: T - 5]
        bias = torch.randn(V, generator=g, device=DEVICE).to(dtype)
        labels, options = labels[rows], {"bias": bias, "softcap": 30.0, "logit_scale": 0.5}
    picked = hidden if rows is None else hidden[rows]
    # Truth takes several [T, V] of float64: of large shapes it is made of some of the tokens only.
    some = torch.arange(0, len(labels), math.ceil(len(labels) * V / MAX_TRUE_LOGITS), device=DEVICE)
    truth = token_stats_naive(picked[some], weight, labels[some], top_k=head.TOP_K, **options)
    logits = _eager_logits(picked, weight, **options)
    base = {"shape": f"T={len(labels)} D={D} V={V}", "dtype": dtype, "operands": kind}

    def run_head(impl: str, statistics: tuple[str, ...], top_k: int | None) -> list[dict]:
        out = token_stats(hidden, weight, labels, rows=rows, statistics=statistics, top_k=top_k, impl=impl, **options)
        return judge(head.pick(out, some), _only(truth, statistics, top_k), logits[some], labels[some], dtype, top_k)

    def run_from_logits(impl: str) -> list[dict]:
        masked = logits.clone()
        masked[3, V // 2 :] = -math.inf
        masked[3, labels[3]] = logits[3, labels[3]]
        out = token_stats_from_logits(masked, labels, top_k=head.TOP_K, impl=impl)
        part, label = masked[some], labels[some]
        exact = token_stats_from_logits_naive(part, label, top_k=head.TOP_K)
        # Both start from the same logits, so as float32 ones they are judged.
        return judge(head.pick(out, some), exact, part, label, torch.float32, head.TOP_K)

    for impl in head_forms():
        for workload, (statistics, top_k) in HEADS.items():
            if top_k is None or impl != "fused":  # top-k has no fused form
                run = partial(run_head, impl, statistics, top_k)
                yield Case(name=f"{workload}/{impl}", run=run, **base)
    for impl in kernel_forms():
        yield Case(name=f"{head.FROM_LOGITS}/{impl}", run=partial(run_from_logits, impl), **base)


def _loss_cases(T: int, D: int, V: int, dtype: torch.dtype, kind: str, g: torch.Generator) -> Iterator[Case]:
    hidden, weight, labels = head.inputs(T, D, V, dtype, g, "flat" if kind == "flat" else "peaky")
    token_weights = torch.rand(T, generator=g, device=DEVICE)
    broken, bias, options = torch.zeros(T, dtype=torch.bool, device=DEVICE), (), {}
    if kind == "broken":
        broken[[0, 6, T // 2]] = True
        hidden[0, 0], hidden[6, D - 1], hidden[T // 2] = math.nan, math.inf, -math.inf
        token_weights[broken] = 1.0
    counts = ~broken
    if kind == "transformed":
        bias, options = (torch.randn(V, generator=g, device=DEVICE).to(dtype),), {"softcap": 30.0, "logit_scale": 0.5}
        labels[2::7], token_weights[3::11] = IGNORE_INDEX, 0.0
        counts = (labels != IGNORE_INDEX) & (token_weights != 0)
    operands = hidden[counts], labels[counts], token_weights[counts], weight, *bias
    exact, eager = loss.truth(*operands, **options), loss.eager_gradients(*operands, **options)
    largest, confident = loss.about_logits(hidden[counts], weight, labels[counts], *bias, **options)

    def run(impl: str) -> list[dict]:
        def weighted(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return linear_cross_entropy(hidden, weight, labels, token_weights, bias=bias, impl=impl, **options)

        total, of_hidden, *of_others = loss.with_gradients(weighted, hidden, weight, *bias)
        outside = of_hidden[~counts]
        blank = outside.isnan() if kind == "broken" else outside == 0
        out = (total, of_hidden[counts], *of_others)
        if kind != "broken":
            entries = loss.judge(out, exact, eager, largest, confident, dtype)
        else:  # of the loss and the other gradients, NaN is the truth
            [_, entry, *_] = loss.judge((exact[0], *out[1:2]), exact, eager, largest, confident, dtype)
            entries = [entry]
            blank = blank & total.isnan() & of_others[0].isnan().all()
        if not blank.all():
            problem = "a number on a row that does not count or is broken"
            entries = [entry | {"ok": False, "problem": problem} for entry in entries]
        return entries

    base = {"shape": f"T={T} D={D} V={V}", "dtype": dtype, "operands": kind}
    for impl in head_forms():
        yield Case(name=f"{loss.NAME}/{impl}", run=partial(run, impl), **base)


def _trajectory_case(impl: str, seed: int) -> Case:
    stats, starts = trajectories.inputs(2000, seed)

    def run() -> list[dict]:
        out = trajectory_reduce(stats, starts, max_rank=trajectories.MAX_RANK, impl=impl)
        return trajectories.errors(out, stats, starts)

    shape = f"N=2000 T={len(stats.nll)}"
    return Case(name=f"{trajectories.NAME}/{impl}", shape=shape, dtype=torch.float32, operands="random", run=run)


def _fp8_cases(impl: str, seed: int) -> Iterator[Case]:
    # 300 rows are no multiple of a tile, 20,000 columns take several steps.
    for (rows, columns), dtype in (((300, 272), BF16), ((7, 20_000), BF16), ((33, 17), FLOAT)):
        x = fp8_rows.inputs(rows, columns, dtype, seed)
        base = {"shape": f"R={rows} K={columns}", "dtype": dtype, "operands": "random"}
        yield Case(
            name=f"{fp8_rows.NAME}/{impl}",
            run=lambda x=x: fp8_rows.errors(quantise_rows(x, impl=impl), x),
            **base,
        )
    multiplies = impl == "torch" or DEVICE.type == "cpu" or fp8_fault(DEVICE) is None
    if multiplies:
        x, weight = (fp8_rows.inputs(n, 256, BF16, seed + n) for n in (300, 272))
        yield Case(
            name=f"fp8_linear/{impl}",
            shape="T=300 N=272 K=256",
            dtype=BF16,
            operands="random",
            run=lambda: fp8_rows.product_errors(x, weight, impl),
        )


def _selection_case(impl: str, dtype: torch.dtype, seed: int, n: int) -> Case:
    energies = torch.from_numpy(chi2.inputs(n, ragged=True, seed=seed)).to(DEVICE, dtype)

    def run() -> list[dict]:
        return chi2.errors(chi2_solve(energies, chi2.BUDGET, impl=impl), energies.double().cpu().numpy())

    return Case(name=f"{chi2.NAME}/{impl}", shape=f"N={n} K={chi2.K}", dtype=dtype, operands="ragged", run=run)


def _eager_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, softcap: float = 0.0, logit_scale: float = 1.0
) -> Tensor:
    """As a model makes them, in the dtype of its operands."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = (logits + bias) * logit_scale
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _only(stats: TokenStats, statistics: tuple[str, ...], top_k: int | None) -> TokenStats:
    """Without what was not asked for."""
    left_out = {name: None for name in STATISTICS if name not in statistics}
    return replace(stats, **left_out, **({"brier_topk": None} if top_k is None else {}))
