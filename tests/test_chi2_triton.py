"""The kernel of the selection weights against the definition in numpy, and what tensors bring with them."""

import dataclasses
import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from lark_fast.kernels.chi2 import chi2_solve
from lark_fast.kernels.chi2_tensors import LARGEST_K, SIZES
from lark_fast.kernels.chi2_triton import tile

NAN, INF = math.nan, math.inf
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FIELDS = [field.name for field in dataclasses.fields(chi2_solve([1.0]))]
N = 36  # in tiles of 16 candidates: more than the 64 problems of a program are not needed to see its mask at work


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """What a kernel forgets to write shows up as NaN or as a huge integer."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def poisoned(make):
    def made(*args, **kwargs):
        tensor = make(*args, **kwargs)
        return tensor.fill_(NAN if tensor.is_floating_point() else 2**62)

    return made


def device(x):
    return torch.as_tensor(x, device=DEVICE)


def awkward(n=N, k=13, seed=0):
    """NaN inside and as padding, one candidate or none, ties at the boundary, the top, of all; an offset; 1e-12."""
    rng = np.random.default_rng(seed)
    e = rng.normal(size=(n, k))
    e[::3] = np.round(e[::3])
    e[rng.random(e.shape) < 0.15] = NAN
    e[1], e[2], e[3, 1:] = NAN, 1.5, NAN
    e[4] = np.arange(k) % 2
    e[5] = 7.0 + 1e-9 * e[5]
    e[6, :6] = [1.0, 1.0 - 5e-10, 1.0 - 3e-9, 0.0, 5e-10, 3e-9]
    e[7] *= 1e-12
    e[8, :2], e[8, 2:] = [0.0, -0.0], -1.0
    return e, rng.uniform(0.0, 1.0, size=e.shape) * (rng.random(e.shape) < 0.9) + np.where(np.arange(k) == 3, 1e-3, 0)


def assert_same(ours, truth, rtol=1e-12, atol=1e-13):
    for name in FIELDS:
        value = getattr(ours, name).cpu().numpy()
        np.testing.assert_allclose(value, getattr(truth, name), rtol=rtol, atol=atol, err_msg=name)
        assert value.dtype == getattr(truth, name).dtype, name


BUDGETS, TAUS = np.arange(N) % 15 + 1, 10.0 ** np.linspace(-3, 3, N)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"budget": 1},
        {"budget": 13},
        {"budget": BUDGETS},
        {"ties": "reference"},
        {"ties": "reference", "budget": BUDGETS},
        {"tau": 0.05},
        {"tau": TAUS},
    ],
)
@pytest.mark.parametrize("with_prior", [False, True])
def test_kernel_against_the_definition(kwargs, with_prior):
    e, prior = awkward()
    if with_prior and "ties" in kwargs:
        pytest.skip("the released code has no prior")
    if with_prior:
        e = np.where((~np.isnan(e) & (prior > 0)).any(axis=1, keepdims=True), e, NAN)
        kwargs = kwargs | {"prior": prior}
    arguments = {name: device(x) if isinstance(x, np.ndarray) else x for name, x in kwargs.items()}
    ours = chi2_solve(device(e), impl="triton", **arguments)
    assert_same(ours, chi2_solve(e, **kwargs))


@pytest.mark.parametrize("kwargs", [{}, {"tau": 0.3}], ids=str)
def test_every_run_has_the_same_bits(kwargs):
    e = device(awkward()[0])
    one, other = (chi2_solve(e, impl="triton", **kwargs) for _ in range(2))
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(one, name).cpu(), getattr(other, name).cpu())


@pytest.mark.parametrize("kwargs", [{}, {"ties": "reference"}, {"tau": 0.3}], ids=str)
def test_problems_of_all_sizes_one_behind_another(kwargs):
    rng = np.random.default_rng(1)
    sizes = np.array([0, 5, 0, 1, 33, 8, 9, 0, 3, 16, 60, 4, 0])
    offsets = np.concatenate([[0], sizes.cumsum()])
    e = rng.normal(size=offsets[-1])
    e[40:44] = e[36]
    e[offsets[5] : offsets[6]] = NAN
    truth = chi2_solve(e, offsets=offsets, **kwargs)
    assert_same(chi2_solve(device(e), offsets=offsets.astype(np.int32), impl="triton", **kwargs), truth)
    if "tau" in kwargs:
        prior = rng.uniform(0.1, 1, len(e))
        ours = chi2_solve(device(e), offsets=device(offsets), prior=device(prior), impl="triton", **kwargs)
        assert_same(ours, chi2_solve(e, offsets=offsets, prior=prior, **kwargs))


@pytest.mark.parametrize("k", [1, 2, 33, 700, LARGEST_K])
def test_sizes_of_tiles(k):
    rng = np.random.default_rng(k)
    e = rng.normal(size=(2, k))
    for kwargs in ({"budget": 2}, {"tau": 0.2}):
        assert_same(chi2_solve(device(e), impl="triton", **kwargs), chi2_solve(e, **kwargs))


def test_a_tile_holds_its_problem():
    for size in SIZES:
        cut = tile(size)
        assert cut.major * cut.minor == size
        assert size * cut.rows <= 16 * 32 * cut.num_warps


def test_a_prior_for_all_problems():
    e, _ = awkward()
    prior = np.linspace(0, 2, e.shape[1])
    e[np.isnan(e[:, 1:]).all(axis=1)] = NAN
    assert_same(chi2_solve(device(e), prior=device(prior), impl="triton"), chi2_solve(e, prior=prior))


@pytest.mark.parametrize("scale", [1e-305, 1e300])
def test_ends_of_float64(scale):
    e, prior = awkward(n=9)
    prior = np.where(np.arange(13) < 2, 1e-320, prior + 1e-3)
    for kwargs in ({}, {"tau": 0.3 * scale}, {"prior": prior}):
        ours = {name: device(x) if name == "prior" else x for name, x in kwargs.items()}
        with np.errstate(over="ignore"):
            truth = chi2_solve(e * scale, **kwargs)
        result = chi2_solve(device(e * scale), impl="triton", **ours)
        np.testing.assert_allclose(result.q.cpu(), truth.q, rtol=1e-12, atol=1e-300)
        np.testing.assert_allclose(result.nu.cpu(), truth.nu, rtol=1e-12)
        if "prior" not in kwargs:  # with it some tau are products of 1e-320, which has three digits
            np.testing.assert_allclose(result.tau.cpu(), truth.tau, rtol=1e-12)


def test_the_reference_mode_takes_infinities():
    e = np.array([[INF, 1.0, 2.0, 0.0], [-INF, 1.0, 2.0, 0.0], [INF, INF, 1.0, INF], [-INF, -INF, -INF, -INF]])
    for budget in (1, 2, 4):
        ours = chi2_solve(device(e), budget, ties="reference", impl="triton")
        truth = chi2_solve(e, budget, ties="reference")
        np.testing.assert_allclose(ours.q.cpu(), truth.q, rtol=1e-12)
        np.testing.assert_array_equal(ours.support.cpu(), truth.support)


@pytest.mark.parametrize("impl", ["triton", "numpy", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_tensors_keep_their_device_and_dtype(impl, dtype):
    e = (torch.arange(12.0).reshape(2, 6) * 5 % 7).to(DEVICE, dtype)
    result = chi2_solve(e, impl=impl)
    truth = chi2_solve(e.double().cpu().numpy())
    assert result.q.dtype == (dtype if dtype.is_floating_point else torch.float64)
    assert {getattr(result, name).device.type for name in FIELDS} == {DEVICE}
    tolerance = {torch.float32: 1e-7, torch.bfloat16: 4e-3}.get(dtype, 1e-13)
    np.testing.assert_allclose(result.q.double().cpu(), truth.q, rtol=tolerance)
    assert_same(dataclasses.replace(result, q=torch.from_numpy(truth.q)), truth)


@pytest.mark.parametrize("impl", ["triton", "numpy"])
def test_shapes_of_tensors(impl):
    one = chi2_solve(device([3.0, 1.0, 2.0, 0.0]), 2, impl=impl)
    assert one.q.shape == (4,)
    assert {getattr(one, name).shape for name in FIELDS if name != "q"} == {()}
    assert one.nu.item() == 1.0
    for shape in ((0, 5), (3, 0), (0,)):
        none = chi2_solve(torch.zeros(shape, device=DEVICE), impl=impl)
        assert none.q.shape == shape
        assert none.nu.isnan().all()
    flat = chi2_solve(torch.zeros(0, device=DEVICE), offsets=[0], impl=impl)
    assert flat.nu.shape == (0,)
    assert chi2_solve(torch.zeros(0, device=DEVICE), offsets=[0, 0, 0], impl=impl).support.tolist() == [0, 0]
    strided = torch.arange(24.0, device=DEVICE).reshape(4, 6).T
    assert_same(chi2_solve(strided.double(), impl=impl), chi2_solve(strided.double().cpu().numpy()))
    learns = torch.tensor([1.0, 2.0], device=DEVICE, requires_grad=True)
    assert not chi2_solve(learns, impl=impl).q.requires_grad


ENERGIES = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


@pytest.mark.parametrize("impl", ["triton", "numpy"])
@pytest.mark.parametrize(
    ("energies", "kwargs", "message"),
    [
        ([[1.0, 2.0], [INF, 0.0]], {}, r"energies: problem \(row\) 1, candidate \(column\) 0 is inf"),
        ([[1.0, -INF], [3.0, 0.0]], {"tau": 1.0}, r"problem \(row\) 0, candidate \(column\) 1 is -inf"),
        ([[1.0, -INF]], {"prior": [1.0, 0.0]}, r"candidate \(column\) 1 is -inf"),
        ([1.0, INF], {}, "energies: candidate 1 is inf"),
        ([1.0, 2.0, INF], {"offsets": [0, 1, 3]}, "energies: problem 1, candidate 1 is inf"),
        (ENERGIES, {"budget": torch.tensor([1, 0])}, "budget must be at least 1; got 0 for problem 1"),
        (ENERGIES, {"budget": torch.tensor(0)}, "budget must be at least 1; got 0"),
        (ENERGIES, {"budget": torch.tensor([1.0, 2.0])}, "budget must be a whole number"),
        (ENERGIES, {"budget": torch.tensor([1, 2, 3])}, r"one a problem, \(2,\); got the shape \(3,\)"),
        (ENERGIES, {"tau": torch.tensor([1.0, -1.0])}, "tau must be a finite number above 0; got -1.0 for problem 1"),
        (ENERGIES, {"tau": torch.tensor([INF, 1.0])}, "got inf for problem 0"),
        (
            ENERGIES,
            {"prior": torch.tensor([1.0, -1.0, 1.0])},
            r"prior: problem \(row\) 0, candidate \(column\) 1 is -1",
        ),
        (ENERGIES, {"prior": [[1.0, 1, 1], [0, 0, 0]]}, r"prior: problem \(row\) 1: 0 for every valid candidate"),
        (ENERGIES, {"prior": [1.0, 1.0]}, "prior must have the shape"),
        ([1.0, 2.0], {"offsets": torch.tensor([1, 2])}, "offsets must rise from 0 to M = 2; these go from 1 to 2"),
        ([1.0, 2.0], {"offsets": torch.tensor([0, 1])}, "these go from 0 to 1"),
        ([1.0, 2.0], {"offsets": torch.tensor([0, 2, 1, 2])}, "falling on the way"),
        ([1.0, 2.0], {"offsets": torch.tensor([0.0, 2.0])}, "numbers that are not whole"),
        (
            [1.0, 2.0],
            {"offsets": torch.zeros(0, dtype=torch.int64)},
            r"at least one; got whole numbers of shape \(0,\)",
        ),
        (ENERGIES, {"offsets": [0, 6]}, r"energies with offsets must have the axis \(M,\)"),
        (ENERGIES, {"budget": 2, "tau": 1.0}, "budget or tau, not both"),
        (ENERGIES, {"ties": "reference", "tau": 1.0}, "has no tau form"),
    ],
)
def test_what_is_wrong_with_tensors_is_named(impl, energies, kwargs, message):
    with pytest.raises(ValueError, match=message):
        chi2_solve(device(energies), impl=impl, **kwargs)


def test_more_candidates_than_the_kernel_takes():
    e = torch.arange(LARGEST_K + 1.0, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match="up to 4,096 candidates a problem; one has 4,097"):
        chi2_solve(e, impl="triton")
    with pytest.raises(ValueError, match="one has 4,097"):
        chi2_solve(e, offsets=[0, LARGEST_K + 1], impl="triton")
    np.testing.assert_array_equal(chi2_solve(e, impl="auto").q.cpu(), chi2_solve(e.cpu().numpy()).q)


def test_implementations_have_names():
    with pytest.raises(ValueError, match="one of 'auto', 'triton', 'numpy'"):
        chi2_solve(device([1.0]), impl="torch")
    with pytest.raises(ValueError, match="impl='triton' takes torch tensors"):
        chi2_solve([1.0], impl="triton")
