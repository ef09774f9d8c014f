"""A student whose layers multiply in FP8: twice the products a second of bfloat16, on GPUs that have them.

The linear layers of the student's blocks have their weights in FP8 and bring every token's activations into it, with a
scale a row on either side (``kernels/fp8.py``), so nothing has to be calibrated. Everything else stays in the student's
own precision: embeddings, norms, the products of attention, the head and its statistics; of the layers those that are
no ``nn.Linear`` (experts in one tensor), that send tokens to experts, or whose sizes are no multiples of 16; and the
first block, whose errors pass through all others: of six it made half of the error of g_hat (docs/log.md).
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lark_fast.errors import UserError
from lark_fast.flop import matrices
from lark_fast.kernels.dispatch import has_triton, kernel_form
from lark_fast.kernels.fp8 import (
    MULTIPLE,
    Quantised,
    dequantised,
    fp8_product,
    fp8_product_naive,
    library_product,
    quantise_rows,
    quantise_rows_naive,
)
from lark_fast.student import Student
from lark_fast.student_files import one_line

BLOCKS_KEPT = 1  # at the beginning, in their own precision
LEAST_CAPABILITY = (8, 9)
MENDED_ADA = (2, 12)  # before this torch, products of rows on 8.9 may not wait for their operands (pytorch#177651)
TRIAL = (300, 256, 272)  # rows, K and N of a product that is tried; 300 is no multiple of a tile
TRIAL_ERROR = 1e-2  # of its norm, of which bfloat16 results take 2e-3
PROBE_TOKENS = 32
ROOM = 1.5  # of the FP8 weights, before both are held
MOST_APART = 0.5  # of a probe's hidden states, by norm; FP8 that is right moves them by some hundredths


class ActivationMemo:
    """The last tensor that was brought into FP8, and what came of it: q, k and v read the same, as gate and up do.

    It is known by being the same object, unchanged since; what it was made into is dropped with it.

    Args:
        impl: as in ``quantise_rows``.
    """

    def __init__(self, impl: str) -> None:
        self.impl = impl
        self.made = 0  # tensors that were brought into FP8
        self._known: weakref.ref[Tensor] | None = None
        self._version = 0
        self._rows: Quantised | None = None

    def rows(self, x: Tensor) -> Quantised:
        """``[..., K]`` -> its rows along K in FP8."""
        countable = not x.is_inference()  # such tensors do not say whether they were written to
        if countable and self._known is not None and self._known() is x and self._version == x._version:
            return self._rows
        rows = quantise_rows(_flat(x), impl=self.impl)
        self.made += 1
        self._known = weakref.ref(x, self._forget) if countable else None
        self._version, self._rows = (x._version, rows) if countable else (0, None)
        return rows

    def _forget(self, gone: "weakref.ref[Tensor]") -> None:
        if gone is self._known:
            self._known = self._rows = None


class Fp8Linear(nn.Module):
    """A linear layer in FP8, in the place of one that is not.

    Args:
        linear: what it stands for; its bias is shared.
        memo: of the activations, shared by all layers of a student.
    """

    def __init__(self, linear: nn.Linear, memo: ActivationMemo) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._memo = memo
        codes, scale = quantise_rows(linear.weight.detach(), impl=memo.impl)
        plain = kernel_form(memo.impl, codes.device) == "torch"
        self._product = fp8_product_naive if plain else library_product
        # A parameter, so that whoever counts a model's parameters and their bytes counts it.
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("weight_scale", scale)  # [N, 1]
        self.bias = linear.bias

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` -> ``[..., N]`` in the dtype of ``x``; carries no gradient."""
        # A compiler sees by itself what is the same, and fuses it into what is before.
        rows = quantise_rows_naive(_flat(x)) if torch.compiler.is_compiling() else self._memo.rows(x)
        product = self._product(rows, Quantised(self.weight, self.weight_scale), self.bias, x.dtype)
        return product.unflatten(0, x.shape[:-1])


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _Replaced(NamedTuple):
    parent: nn.Module
    name: str
    own: nn.Linear | None  # None: it was let go
    fp8: Fp8Linear


class Fp8Layers:
    """The linear layers of a student's blocks, replaced by FP8 ones.

    Args:
        student: on its device. It scores, and is not trained.
        impl: as in ``quantise_rows``; "torch" stands for FP8 on any device, slowly and in the same numbers.
        blocks_kept: so many at the beginning stay as they are, where there are more.
        keep: hold the layers' own weights too, until ``let_go``, where there is room for half as much again.

    Attributes:
        replaced: how many layers.
        share: of the numbers in the matrices between embedding and head, those that are in FP8.

    Raises:
        UserError: it has no layer to replace, or cannot be run with them.
    """

    def __init__(
        self, student: Student, *, impl: str = "auto", blocks_kept: int = BLOCKS_KEPT, keep: bool = False
    ) -> None:
        _ = student.unpackable  # found by comparing bits that FP8 rounds away, and the same in both precisions
        ids = torch.arange(PROBE_TOKENS, device=student.device).remainder(student.vocab_size).unsqueeze(0)
        exact = _probe(student, ids)
        found = _linear_layers(student, blocks_kept)
        if not found:
            raise UserError(
                f"--precision fp8: {_called(student)} has no linear layer that FP8 can take (nn.Linear, both sizes "
                f"multiples of {MULTIPLE}); leave it out"
            )
        own = sum(matrix.shape.numel() for matrix in matrices(student.model))
        keep = keep and _has_room(student.device, found)
        memo, made = ActivationMemo(impl), {}
        self._places: list[_Replaced] = []
        while found:  # one after the other, so that what is not kept makes room for the next
            parent, name, linear = found.pop(0)
            if id(linear) not in made:
                made[id(linear)] = Fp8Linear(linear, memo)
            self._places.append(_Replaced(parent, name, linear if keep else None, made[id(linear)]))
            setattr(parent, name, made[id(linear)])
        self.replaced = len(made)
        self.share = sum(layer.weight.numel() for layer in made.values()) / own
        fault = self._fault(student, ids, exact)
        if fault is not None:
            raise UserError(f"--precision fp8: {_called(student)} cannot be scored in FP8: {fault}; leave it out")

    @property
    def kept(self) -> bool:
        """Whether the layers' own weights are there too."""
        return all(place.own is not None for place in self._places)

    @property
    def held_bytes(self) -> int:
        """Of the layers' own weights, which ``let_go`` gives back."""
        own = {id(place.own): place.own.weight for place in self._places if place.own is not None}
        return sum(weight.numel() * weight.element_size() for weight in own.values())

    @contextmanager
    def own_precision(self) -> Iterator[None]:
        """Inside the block the student is as it was.

        Raises:
            ValueError: its own weights were let go.
        """
        if not self.kept:
            raise ValueError("the layers' own weights are not there any more")
        self._put(fp8=False)
        try:
            yield
        finally:
            self._put(fp8=True)

    def let_go(self) -> None:
        """Drop the layers' own weights."""
        self._places = [place._replace(own=None) for place in self._places]

    def _put(self, *, fp8: bool) -> None:
        for place in self._places:
            setattr(place.parent, place.name, place.fp8 if fp8 else place.own)

    @staticmethod
    def _fault(student: Student, ids: Tensor, exact: Tensor) -> str | None:
        """What a few tokens say: models may do more with a linear layer than to call it."""
        try:
            ours = _probe(student, ids)
        except Exception as error:
            return f"it fails with it ({type(error).__name__}: {one_line(error)})"
        apart = float((ours - exact).norm() / exact.norm())
        return None if apart <= MOST_APART else f"its hidden states are {apart:.0%} off"


def fp8_fault(device: torch.device, impl: str = "auto") -> str | None:
    """Why a device cannot multiply in FP8, or None where it can; found by trying.

    Args:
        device: where the student is.
        impl: as in ``Fp8Layers``.
    """
    if impl == "torch":
        return None
    if device.type != "cuda":
        return f"a {device.type.upper()} has no FP8 products"
    if torch.version.hip:
        return "its FP8 has another range (AMD)"
    if not has_triton():
        return "Triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has none (compute capability {_dotted(capability)}, not 8.9)"
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if capability == LEAST_CAPABILITY and release < MENDED_ADA:
        return f"FP8 products of this GPU need torch {_dotted(MENDED_ADA)}"
    return _trial(device)


def _trial(device: torch.device) -> str | None:
    """What is wrong with a product; some builds of torch lack it, or have it for another chip."""
    rows, k, n = TRIAL
    g = torch.Generator(device).manual_seed(0)
    x, weight = (torch.randn(size, k, generator=g, device=device).bfloat16() for size in (rows, n))
    try:
        a, b = (quantise_rows(part, impl="triton") for part in (x, weight))
        product = fp8_product(a, b, dtype=torch.bfloat16, impl="triton").float()
        exact = dequantised(a) @ dequantised(b).T
        off = float((product - exact).norm() / exact.norm())
    except Exception as error:  # whatever torch, Triton or the driver fail with
        return f"its FP8 products fail ({type(error).__name__}: {one_line(error)})"
    return None if off <= TRIAL_ERROR else f"its FP8 products are {off:.0%} off"


def _linear_layers(student: Student, blocks_kept: int) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Each that FP8 takes, with the module and the name that it has there."""
    of_text = set(student.model.get_decoder().modules())  # what reads images has blocks too
    blocks = [layer for layer in student.layers if layer in of_text]
    found, seen = [], set()
    for layer in blocks[blocks_kept:] or blocks:
        for parent in layer.modules():
            if hasattr(parent, "experts"):  # beside these stands what sends tokens to them
                continue
            for name, child in parent.named_children():
                plain = type(child) is nn.Linear and child.weight.is_floating_point()
                fits = plain and child.in_features % MULTIPLE == 0 and child.out_features % MULTIPLE == 0
                if fits and (id(parent), name) not in seen:
                    seen.add((id(parent), name))
                    found.append((parent, name, child))
    return found


def _has_room(device: torch.device, found: list[tuple[nn.Module, str, nn.Linear]]) -> bool:
    """For FP8 weights beside the own ones, and a pass."""
    if device.type != "cuda":
        return True
    needed = sum(linear.weight.numel() for linear in {id(layer): layer for _, _, layer in found}.values())
    return torch.cuda.mem_get_info(device)[0] > ROOM * needed


@torch.no_grad()
def _probe(student: Student, ids: Tensor) -> Tensor:
    """``[1, T, D]`` float32 hidden states, in evaluation mode."""
    training = student.model.training
    student.model.eval()
    try:
        return student.hidden(ids).float()
    finally:
        student.model.train(training)


def _called(student: Student) -> str:
    return student.path or type(student.model).__name__


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
