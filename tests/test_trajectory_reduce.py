"""The reduction over trajectories: its definition against plain Python, the kernel against its definition."""

import math
from dataclasses import astuple, fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lark_fast.kernels.softmax_sums import TokenStats
from lark_fast.kernels.trajectory_reduce import (
    TOKEN_FIELDS,
    TrajectoryValues,
    trajectory_reduce,
    trajectory_reduce_naive,
)

VALUES = [field.name for field in fields(TrajectoryValues)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEP = 256  # of the kernel: two blocks


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """What a kernel forgets to write shows up as NaN or as a huge integer."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else 2**62)

    monkeypatch.setattr(torch, "empty", poisoned)


def token_statistics(R, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    values = {
        "nll": torch.rand(R, generator=g, dtype=dtype) * 9,
        "brier": torch.rand(R, generator=g, dtype=dtype) * 2,
        "entropy": torch.rand(R, generator=g, dtype=dtype) * 5,
        "rank": torch.randint(1, 300, (R,), generator=g),
        "agreement": torch.rand(R, generator=g) < 0.5,
        "brier_topk": torch.rand(R, generator=g, dtype=dtype) * 2,
    }
    return TokenStats(**{name: value.to(DEVICE) for name, value in values.items()})


def ends(lengths, dtype=torch.int64):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(dtype)


def before(T, seed=1):
    return (torch.rand(T, generator=torch.Generator().manual_seed(seed)) * 9).to(DEVICE)


def values_of(result):
    """Every tensor of a result by name."""
    sums = {f"sum of {name}": getattr(result.sums, name) for name in VALUES}
    means = {f"mean of {name}": getattr(result.means, name) for name in VALUES}
    return {"n_tokens": result.n_tokens, "rsr": result.rsr} | sums | means


def assert_close(ours, truth):
    ours, truth = values_of(ours), values_of(truth)
    for name, value in truth.items():
        if value is None:
            assert ours[name] is None, name
        else:
            torch.testing.assert_close(
                ours[name], value, rtol=1e-13, atol=1e-13, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )


def assert_same_bits(one, other):
    again = values_of(other)
    for name, value in values_of(one).items():
        assert (value is None) == (again[name] is None), name
        assert value is None or torch.equal(value.view(torch.int64), again[name].view(torch.int64)), name


# Lengths around the edges of a block and of a step, runs of empty trajectories, and batches of nothing.
LENGTHS = st.lists(
    st.one_of(st.integers(0, 40), st.sampled_from([0, 127, 128, 129, STEP - 1, STEP, STEP + 1, 1000])), max_size=9
)


@settings(max_examples=30, deadline=None)
@given(
    LENGTHS,
    st.sampled_from([torch.int32, torch.int64]),
    st.sampled_from([torch.float32, torch.float64]),
    st.sets(st.sampled_from([name for name in TOKEN_FIELDS if name != "nll"])),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 7, 100, 2**40]),
)
def test_kernel_against_the_definition(lengths, index_dtype, dtype, left_out, gather, with_before, max_rank):
    T = sum(lengths)
    R = T + 13 if gather else T
    stats = replace(token_statistics(R, dtype=dtype), **dict.fromkeys(left_out))
    options = {
        "rows": torch.randperm(R, generator=torch.Generator().manual_seed(T))[:T].to(DEVICE) if gather else None,
        "nll_before": before(T) if with_before else None,
        "max_rank": max_rank,
    }
    cu_seqlens = ends(lengths, index_dtype)
    result = trajectory_reduce(stats, cu_seqlens, impl="triton", **options)
    assert_close(result, trajectory_reduce_naive(stats, cu_seqlens, **options))
    assert_same_bits(result, trajectory_reduce(stats, cu_seqlens, impl="triton", **options))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_against_plain_python(impl):
    lengths, earlier = [3, 0, 41, 1, 0, 1100], before(1145)
    stats = token_statistics(1200)
    rows = torch.randperm(1200, generator=torch.Generator().manual_seed(5))[:1145].to(DEVICE)
    result = trajectory_reduce(stats, ends(lengths), rows=rows, nll_before=earlier, impl=impl)
    columns = dict(zip(TOKEN_FIELDS, (value[rows].tolist() for value in astuple(stats)), strict=True))
    columns["rank"] = [min(rank, 100) for rank in columns["rank"]]
    columns["loss_delta"] = [b - a for b, a in zip(earlier.tolist(), columns["nll"], strict=True)]
    assert result.n_tokens.tolist() == lengths
    start = 0
    for k, n in enumerate(lengths):
        own = {name: math.fsum(column[start : start + n]) for name, column in columns.items()}
        for name, total in own.items():
            assert getattr(result.sums, name)[k].item() == pytest.approx(total, rel=1e-12, abs=1e-12)
            mean = total / n if n else math.nan
            assert getattr(result.means, name)[k].item() == pytest.approx(mean, rel=1e-12, abs=1e-12, nan_ok=True)
        rsr = own["rank"] / max(own["nll"], 1e-12) if n else math.nan
        assert result.rsr[k].item() == pytest.approx(rsr, rel=1e-12, nan_ok=True)
        start += n


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_nothing_to_reduce(impl, lengths):
    stats = token_statistics(0)
    result = trajectory_reduce(stats, ends(lengths), nll_before=before(0), impl=impl)
    for name, value in values_of(result).items():
        assert value.shape == (len(lengths),), name
        assert (value == 0 if name.startswith("sum") or name == "n_tokens" else value.isnan()).all(), name


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_token_without_nll_makes_its_own_trajectory_nan_and_no_other(impl):
    lengths = [5, 1200, 3, 7]
    stats = token_statistics(1215)
    broken = torch.tensor([3, 1204], device=DEVICE)  # one in trajectory 0, the last of trajectory 1
    for name in TOKEN_FIELDS:
        filler = {"rank": 0, "agreement": False}.get(name, float("nan"))
        getattr(stats, name)[broken] = filler
    result = trajectory_reduce(stats, ends(lengths), nll_before=before(1215), impl=impl)
    for name, value in values_of(result).items():
        if name != "n_tokens":
            assert value.isnan().tolist() == [True, True, False, False], name
    assert result.n_tokens.tolist() == lengths


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_an_unknown_earlier_nll_spoils_the_loss_delta_alone(impl):
    earlier = before(8)
    earlier[6] = float("nan")
    result = trajectory_reduce(token_statistics(8), ends([5, 3]), nll_before=earlier, impl=impl)
    for name, value in values_of(result).items():
        assert value.isnan().tolist() == [False, name.endswith("loss_delta")], name


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_rsr_of_a_sure_student_does_not_divide_by_zero(impl):
    stats = replace(
        token_statistics(4), nll=torch.zeros(4, device=DEVICE), rank=torch.ones_like(token_statistics(4).rank)
    )
    assert trajectory_reduce(stats, ends([4]), impl=impl).rsr.item() == 4 / 1e-12


def test_bits_of_a_trajectory_do_not_depend_on_its_place_or_its_company():
    lengths = [2000, 17, 1500, 300]
    stats, earlier = token_statistics(sum(lengths)), before(sum(lengths))
    together = values_of(trajectory_reduce(stats, ends(lengths), nll_before=earlier, impl="triton"))
    starts = ends(lengths).tolist()
    for k, n in enumerate(lengths):
        own = torch.arange(starts[k], starts[k] + n, device=DEVICE)
        alone = trajectory_reduce(stats, ends([n]), rows=own, nll_before=earlier[own], impl="triton")
        for name, value in values_of(alone).items():
            assert value.item() == together[name][k].item(), name


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_strided_arguments(impl):
    def spread(x):
        return torch.stack([x, x], 1).flatten()[::2]

    stats, cu_seqlens, rows, earlier = token_statistics(90), ends([30, 0, 19]), torch.arange(49).flip(0), before(49)
    rows = rows.to(DEVICE)
    wide = TokenStats(*(spread(value) for value in astuple(stats)))
    result = trajectory_reduce(wide, spread(cu_seqlens), rows=spread(rows), nll_before=spread(earlier), impl=impl)
    assert not wide.nll.is_contiguous()
    assert_same_bits(result, trajectory_reduce(stats, cu_seqlens, rows=rows, nll_before=earlier, impl=impl))


def test_auto_is_torch_on_a_cpu():
    stats = TokenStats(*(value.cpu() for value in astuple(token_statistics(30))))
    cu_seqlens = torch.tensor([0, 11, 30])
    assert_same_bits(
        trajectory_reduce(stats, cu_seqlens, nll_before=stats.nll),
        trajectory_reduce_naive(stats, cu_seqlens, nll_before=stats.nll),
    )


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_one_launch_reads_nothing_on_the_host(impl, monkeypatch):
    # The values are checked on a CPU only; without that check no body may look at one.
    monkeypatch.setattr("lark_fast.kernels.trajectory_reduce._check_values", lambda *args: None)
    if impl == "triton" and DEVICE == "cpu":
        pytest.skip("the interpreter itself reads on the host")
    stats = token_statistics(9)
    for name in ("item", "tolist", "cpu", "nonzero", "__bool__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *args, n=name: pytest.fail(f"{n} reads a tensor"))
    trajectory_reduce(stats, torch.tensor([0, 4, 9], device=DEVICE), nll_before=before(9), impl=impl)


def test_unchecked_places_beyond_the_tensors_are_not_read(monkeypatch):
    # On a GPU nobody checks the values: what is out of range must end as NaN, not as a read of foreign memory.
    monkeypatch.setattr("lark_fast.kernels.trajectory_reduce._check_values", lambda *args: None)
    stats = token_statistics(9)
    rows = torch.tensor([0, 1, 2**40, 3, -1, 5, 6, 7, 8], device=DEVICE)
    result = trajectory_reduce(stats, torch.tensor([0, 4, 6, 9], device=DEVICE), rows=rows, impl="triton")
    for name, value in values_of(result).items():
        if name != "n_tokens" and value is not None:
            assert value.isnan().tolist() == [True, True, False], name
    result = trajectory_reduce(stats, torch.tensor([-3, 4, 2**40, 2], device=DEVICE), impl="triton")
    assert result.n_tokens.tolist() == [4, 5, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"impl": "numpy"}, "impl='numpy'"),
        ({"max_rank": 0}, "max_rank=0"),
        ({"cu_seqlens": torch.tensor([[0, 6]])}, r"cu_seqlens is \[N \+ 1\]"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int64)}, r"at least \[1\]"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "int32 or int64"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "from 0 to T = 6; this one goes from 0 to 5"),
        ({"cu_seqlens": torch.tensor([1, 6])}, "goes from 1 to 6"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, "falls on its way"),
        ({"rows": torch.tensor([0, 1, 2, 3, 4, 6])}, r"rows lie in \[0, R\) = \[0, 6\), but one is 6"),
        ({"rows": torch.tensor([0, 1, 2, 3, 4, -1])}, "one is -1"),
        ({"rows": torch.arange(6, dtype=torch.int32)}, r"rows is \[T\] int64"),
        ({"rows": torch.zeros(2, 3, dtype=torch.int64)}, r"rows is \[T\] int64"),
        ({"rows": torch.arange(5)}, "from 0 to T = 5"),
        ({"nll_before": torch.zeros(5)}, r"nll_before is \[T\] = \[6\]"),
        ({"nll_before": torch.zeros(6, dtype=torch.int64)}, r"nll_before is \[T\] = \[6\] of a floating dtype"),
        ({"nll_before": torch.zeros(6, device="meta")}, "one device, not on cpu, meta"),
        ({"stats": {"brier": torch.zeros(5)}}, r"brier is \[5\]"),
        ({"stats": {"nll": torch.zeros(2, 3)}}, r"nll is \[2, 3\]"),
    ],
)
def test_bad_arguments_name_the_axes(changes, message):
    stats = TokenStats(*(value.cpu() for value in astuple(token_statistics(6))))
    arguments = {"stats": stats, "cu_seqlens": torch.tensor([0, 4, 6])} | changes
    if "stats" in changes:
        arguments["stats"] = replace(stats, **changes["stats"])
    with pytest.raises(ValueError, match=message):
        trajectory_reduce(**arguments)
