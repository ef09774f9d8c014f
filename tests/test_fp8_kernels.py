"""Rows in FP8 and products of them: the definition against plain numbers, the kernel against the definition."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lark_fast.kernels.fp8 import (
    SMALLEST_PEAK,
    Quantised,
    dequantised,
    fp8_linear,
    fp8_product,
    quantise_rows,
    quantise_rows_naive,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E4M3 = np.array(
    [m * 2.0**-9 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]
)  # all that is not negative: the last pattern is NaN


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """What a kernel forgets to write shows up as NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else 0x7F)

    monkeypatch.setattr(torch, "empty", poisoned)


def some_rows(R, K, dtype=torch.float32, seed=0):
    """Rows of very different sizes."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(R, K, generator=g) * torch.exp(3 * torch.randn(R, K, generator=g))
    return (x * torch.logspace(-3, 2, R)[:, None]).to(DEVICE, dtype)


def assert_same(one, other):
    """The same bits; any NaN is as good as another."""
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_every_number_is_the_nearest_one(impl):
    """By numpy in float64: of the 127 sizes that e4m3 has, none is nearer; ties go to the even one."""
    x = some_rows(40, 131)
    codes, scale = quantise_rows(x, impl=impl)
    wide = x.double().cpu().numpy()
    np.testing.assert_allclose(scale[:, 0].cpu().numpy(), np.abs(wide).max(1) / 448, rtol=2e-7)
    targets = (x * (448 / x.abs().amax(1, keepdim=True))).double().cpu().numpy()
    apart = np.abs(np.abs(targets)[..., None] - E4M3)
    nearest = apart.min(-1)
    even = np.where(apart == nearest[..., None], np.arange(127) % 2, 2).argmin(-1)
    np.testing.assert_array_equal(codes.float().cpu().numpy(), np.sign(targets) * E4M3[even])


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_every_number_of_e4m3_and_all_halfway_between_come_out_right(impl):
    halves = (E4M3[1:] + E4M3[:-1]) / 2
    up = np.where(np.arange(126) % 2 == 0, E4M3[:-1], E4M3[1:])  # of two neighbours the one with an even code
    row = torch.tensor(np.concatenate([E4M3, -E4M3, halves, -halves]), dtype=torch.float32, device=DEVICE)
    codes, scale = quantise_rows(row[None], impl=impl)
    assert scale.item() == 1
    np.testing.assert_array_equal(codes[0].float().cpu().numpy(), np.concatenate([E4M3, -E4M3, up, -up]))


# Around a step of the kernel (8192), a single column, nothing at all.
@pytest.mark.parametrize(
    ("R", "K"), [(3, 1), (7, 17), (2, 8191), (2, 8192), (2, 8193), (1, 20000), (0, 16), (5, 0), (300, 48)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_against_the_definition(R, K, dtype):
    x = some_rows(R, K, torch.float32).clamp(-6e4, 6e4).to(dtype)
    result = quantise_rows(x, impl="triton")
    assert result.codes.dtype == torch.float8_e4m3fn
    assert result.scale.shape == (R, 1)
    assert_same(result, quantise_rows_naive(x))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_zeros_and_numbers_at_the_ends(impl):
    x = torch.zeros(6, 32, device=DEVICE)
    x[1, 3], x[2, 5], x[3] = 3.4e38, 1e-40, -0.0
    x[4] = torch.linspace(-1, 1, 32) * SMALLEST_PEAK
    result = quantise_rows(x, impl=impl)
    back = dequantised(result)
    assert (result.scale > 0).all()
    assert back.isfinite().all()
    assert (back[[0, 3, 5]] == 0).all()
    torch.testing.assert_close(back[1], x[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(back[4], x[4], rtol=2**-4, atol=SMALLEST_PEAK * 2**-18)
    assert abs(back[2, 5] - x[2, 5]) <= SMALLEST_PEAK / 448 * 2**-10


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_number_spoils_its_row_and_no_other(impl, broken):
    x = some_rows(4, 40)
    x[2, 39] = broken
    result = quantise_rows(x, impl=impl)
    assert dequantised(result).isnan().all(1).tolist() == [False, False, True, False]
    assert not dequantised(result)[[0, 1, 3]].isnan().any()
    product = fp8_product(result, quantise_rows(some_rows(16, 40, seed=1), impl="torch"), dtype=x.dtype, impl="torch")
    assert product.isnan().all(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_rows_that_are_strided(impl):
    x = some_rows(20, 64)
    for part in (x[::2], x[:, :32], x[:, ::2], x.T, x[:1].expand(5, 64)):
        assert_same(quantise_rows(part, impl=impl), quantise_rows_naive(part.contiguous()))


def test_a_row_does_not_depend_on_the_others():
    x = some_rows(9, 100)
    together = quantise_rows(x, impl="triton")
    for k in range(9):
        assert_same(quantise_rows(x[k : k + 1], impl="triton"), (part[k : k + 1] for part in together))


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_against_float64(impl, with_bias):
    """The product of the rounded operands is right; what rounding costs is what e4m3 says."""
    x, weight = some_rows(37, 64)[:, :64] / 10, some_rows(48, 64, seed=2)
    bias = torch.randn(48, generator=torch.Generator().manual_seed(3)).to(DEVICE) if with_bias else None
    rows = quantise_rows(weight)
    out = fp8_linear(x.view(1, 37, 64), *rows, bias, impl=impl)
    assert out.shape == (1, 37, 48)
    assert out.dtype == x.dtype
    exact = dequantised(quantise_rows(x)).double() @ dequantised(rows).double().T
    size = dequantised(quantise_rows(x)).double().abs() @ dequantised(rows).double().abs().T
    if with_bias:
        exact, size = exact + bias.double(), size + bias.double().abs()
    # bfloat16 where the library rounds the result and the bias; float32 sums of 64 numbers.
    allowed = 2**-8 * exact.abs() + 2**-8 * size * with_bias + 2**-12 * size if impl == "triton" else 1e-6 * size
    assert ((out[0].double() - exact).abs() <= allowed).all()
    plain = x.double() @ weight.double().T
    unbiased = exact - bias.double() if with_bias else exact
    # Each of two operands off by at most 2^-4 of itself, or of the row's largest number's 2^-14.8.
    widest = x.double().abs() @ weight.double().abs().T
    floor = 64 * 2**-13 * x.double().abs().amax(1, keepdim=True) * weight.double().abs().amax(1)
    assert ((unbiased - plain).abs() <= (2**-3 + 2**-8) * widest + floor).all()


def test_results_in_half_precision():
    x, weight = some_rows(5, 32).bfloat16(), quantise_rows(some_rows(16, 32, seed=1))
    out = fp8_linear(x, *weight, impl="torch")
    assert out.dtype == torch.bfloat16
    wide = fp8_product(quantise_rows(x), weight, dtype=torch.float32, impl="torch")
    assert torch.equal(out, wide.bfloat16())


def test_nothing_to_multiply():
    weight = quantise_rows(some_rows(16, 32))
    assert fp8_linear(torch.zeros(0, 32, device=DEVICE), *weight, impl="torch").shape == (0, 16)


def test_the_gpu_would_take_the_operands(monkeypatch):
    """Torch's own checks of layouts, sizes and scales, on tensors of a GPU that is not there."""
    monkeypatch.setattr("lark_fast.kernels.fp8.kernel_form", lambda *_: "triton")
    with FakeTensorMode():

        def matrix(rows, columns):
            codes = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn, device="cuda")
            return Quantised(codes, torch.zeros(rows, 1, device="cuda"))

        bias = torch.zeros(48, device="cuda", dtype=torch.bfloat16)
        for rows in (1, 37, 300):
            out = fp8_product(matrix(rows, 64), matrix(48, 64), bias, dtype=torch.bfloat16)
            assert out.shape == (rows, 48)
            assert out.device.type == "cuda"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: quantise_rows(x[0]), r"x is \[R, K\]"),
        (lambda x: quantise_rows(x.long()), "float32, bfloat16 or float16"),
        (lambda x: quantise_rows(x, impl="numpy"), "impl='numpy'"),
        (lambda x: fp8_linear(x[:, :31], *quantise_rows(x)), r"x is \[R, K\] with scales"),
        (lambda x: fp8_linear(x, quantise_rows(x)[0], quantise_rows(x)[1].T), r"weight \[N, K\] with \[N, 1\]"),
        (lambda x: fp8_linear(x, *quantise_rows(x), torch.zeros(4, device=DEVICE)), r"bias is \[N\] = \[5\]"),
        (lambda x: fp8_linear(x, *quantise_rows(x), impl="triton"), "multiples of 16"),
    ],
)
def test_bad_arguments_name_the_axes(call, message):
    with pytest.raises(ValueError, match=message):
        call(some_rows(5, 32))
