"""``chi2_solve`` for tensors: what goes into its kernel, checked and laid out, and the way over the host."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lark_fast.kernels.chi2 import Chi2Solution, chi2_solve
from lark_fast.kernels.chi2_operands import (
    as_budgets,
    as_taus,
    check_choices,
    check_offsets,
    check_offsets_shape,
    check_prior_shape,
    check_setting_shape,
)
from lark_fast.kernels.dispatch import kernel_form

FIELDS = tuple(Chi2Solution.__dataclass_fields__)
SIZES = tuple(2**bits for bits in range(3, 13))  # of the kernel's tiles, in candidates
LARGEST_K = SIZES[-1]


def solve_tensors(
    energies: Tensor, budget: Any, prior: Any, tau: Any, ties: str, offsets: Any, impl: str
) -> Chi2Solution:
    """``chi2_solve`` of a tensor; other arguments may be tensors on any device, arrays or plain numbers.

    Raises:
        ValueError: as ``chi2_solve``.
    """
    check_choices(tuple(energies.shape), budget, prior, tau, ties, offsets is not None)
    if kernel_form("torch" if impl == "numpy" else impl, energies.device) == "torch":
        return _on_host(energies, budget, prior, tau, ties, offsets)
    e = energies.detach()
    if e.dtype not in (torch.float32, torch.float64):
        e = e.float() if e.is_floating_point() else e.double()
    single = offsets is None and e.ndim == 1
    if prior is not None:
        prior = _on(e.device, prior, None if isinstance(prior, Tensor) else torch.float64)
        check_prior_shape(tuple(prior.shape), tuple(e.shape))
    if offsets is None:
        e = torch.atleast_2d(e)
        n, longest, counts = len(e), e.shape[1], None
    else:
        offsets = _on(e.device, offsets, None)
        whole = not (offsets.is_floating_point() or offsets.is_complex())
        check_offsets_shape(tuple(offsets.shape), whole)
        offsets = offsets.long()
        n, longest, counts, classes = _sizes(offsets, len(e))
    settings = _settings(budget, tau, n, e.device)
    if longest > LARGEST_K:
        if impl == "triton":
            raise ValueError(f"impl='triton' takes up to {LARGEST_K:,} candidates a problem; one has {longest:,}")
        return _on_host(energies, budget, prior, tau, ties, offsets)

    from lark_fast.kernels.chi2_triton import launch  # Triton may be missing

    q = torch.empty_like(e, memory_format=torch.contiguous_format)
    support = torch.empty(n, dtype=torch.int64, device=e.device)
    numbers = torch.empty(4, n, dtype=torch.float64, device=e.device)
    form = "tau" if tau is not None else ties
    operands = e.contiguous(), None if prior is None else prior.contiguous(), settings, (q, support, numbers)
    if offsets is None:
        launch(form, next(size for size in SIZES if size >= longest), *operands)
    else:
        # Problems of about one size together: the longest one does not make all tiles wide.
        order = torch.argsort(classes, stable=True) if sum(count > 0 for count in counts) > 1 else None
        start = 0
        for size, count in zip(SIZES, counts, strict=True):
            here = None if order is None else order[start : start + count]
            if count:
                launch(form, size, *operands, offsets=offsets, order=here)
            start += count
    if n and support.min().item() < 0:
        _on_host(energies, budget, prior, tau, ties, offsets)  # raises, and says why
        raise AssertionError("the kernel refused what the definition takes")
    q = q.to(energies.dtype) if energies.is_floating_point() else q.double()
    nu, tau, effective_sample_size, chi2_divergence = numbers
    values = (q, nu, tau, support, effective_sample_size, chi2_divergence)
    return Chi2Solution(**{name: x[0] if single else x for name, x in zip(FIELDS, values, strict=True)})


def _on_host(energies: Tensor, *others: Any) -> Chi2Solution:
    """By way of arrays."""
    budget, prior, tau, ties, offsets = map(_array, others)
    solution = chi2_solve(energies.detach().cpu().double().numpy(), budget, prior, tau, ties, offsets=offsets)
    values = {name: torch.from_numpy(np.asarray(getattr(solution, name))).to(energies.device) for name in FIELDS}
    if energies.is_floating_point():
        values["q"] = values["q"].to(energies.dtype)
    return Chi2Solution(**values)


def _array(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return value.double().numpy() if value.is_floating_point() else value.numpy()


def _on(device: torch.device, value: Any, dtype: torch.dtype | None) -> Tensor:
    if not isinstance(value, Tensor):
        value = torch.from_numpy(np.array(value))
    return value.detach().to(device, dtype)


def _sizes(offsets: Tensor, n_energies: int) -> tuple[int, int, list[int], Tensor]:
    """N, the largest size, how many problems belong to each of the kernel's sizes, and which each one does ``[N]``."""
    n = len(offsets) - 1
    sizes = offsets.diff()
    bounds = torch.tensor(SIZES, device=offsets.device)
    classes = torch.bucketize(sizes, bounds)
    extremes = torch.stack([sizes.min(), sizes.max()]) if n else offsets.new_zeros(2)
    counts = torch.bincount(classes, minlength=len(bounds))[: len(bounds)]
    first, last, least, longest, *counts = torch.cat([offsets[[0, -1]], extremes, counts]).tolist()
    check_offsets(first, last, least < 0, n_energies)
    return n, longest, counts, classes


def _settings(budget: Any, tau: Any, n: int, device: torch.device) -> Tensor:
    """Budgets or taus for the kernel, which looks at the values of those that came as tensors: ``[N]`` or ``[1]``."""
    given, name = (budget, "budget") if tau is None else (tau, "tau")
    if isinstance(given, Tensor) and given.ndim == 1:
        check_setting_shape(name, tuple(given.shape), n)
        if tau is None and given.is_floating_point():
            raise ValueError(f"budget must be a whole number for every problem; got {given.dtype}")
        return given.detach().to(device, torch.int64 if tau is None else torch.float64).contiguous()
    given = as_budgets(_array(given), n) if tau is None else as_taus(_array(given), n)
    return torch.from_numpy(np.atleast_1d(np.asarray(given))).to(device)
