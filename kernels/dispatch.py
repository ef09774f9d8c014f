"""Which form of the head runs where, and how it is cut: the one table that a tuned device is entered in.

``python -m benchmarks.record --tune`` times the candidates on the device at hand.
"""

import functools
import warnings
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from lark_fast.kernels.head import Head

FORMS = ("fused", "chunked", "torch")
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig:
    """How the fused head is cut into tiles."""

    rows: int  # of a tile
    words: int  # of a tile
    inner: int  # of D, in one step of a tile's product
    slices: int = 1  # in which the statistics take a tile's logits: two need fewer registers
    boxes: bool = False  # whether the copy engine brings the operands (tensor descriptors: sm_90 and later)
    flatten: bool = False  # whether the loads of the next tile start during the statistics of this one
    num_warps: int
    num_stages: int


# For half-precision operands whose product is the logits, in order of preference. "sm_90" is the H100 and H200,
# "sm_100" the B200, "sm_80" the A100 and its kin with less shared memory, "gfx942" the MI300X. Chosen by what the
# compiler says (benchmarks/aot.py); docs/log.md tells which have been timed.
CONFIGS = {
    "sm_80": (
        HeadConfig(rows=128, words=128, inner=32, slices=2, flatten=True, num_warps=8, num_stages=4),
        HeadConfig(rows=64, words=128, inner=32, flatten=True, num_warps=4, num_stages=4),
    ),
    "sm_90": (
        HeadConfig(rows=128, words=256, inner=64, slices=2, boxes=True, flatten=True, num_warps=8, num_stages=4),
        HeadConfig(rows=128, words=128, inner=64, boxes=True, num_warps=8, num_stages=3),  # two programs a processor
        HeadConfig(rows=256, words=128, inner=64, slices=2, boxes=True, num_warps=8, num_stages=4),
        HeadConfig(rows=128, words=128, inner=64, num_warps=8, num_stages=4),
    ),
    "sm_100": (
        HeadConfig(rows=128, words=256, inner=64, slices=2, boxes=True, num_warps=8, num_stages=4),
        HeadConfig(rows=128, words=128, inner=64, slices=2, boxes=True, num_warps=8, num_stages=3),
    ),
    "gfx942": (
        HeadConfig(rows=128, words=128, inner=64, slices=2, num_warps=8, num_stages=3),
        HeadConfig(rows=128, words=128, inner=32, slices=2, num_warps=8, num_stages=3),
    ),
}
# For heads with a bias, a cap or a scale, whose statistics take more registers.
FINISHING_CONFIGS = {
    "sm_80": HeadConfig(rows=128, words=128, inner=32, slices=2, flatten=True, num_warps=8, num_stages=4),
    "sm_90": HeadConfig(rows=128, words=128, inner=64, boxes=True, num_warps=8, num_stages=3),
    "sm_100": HeadConfig(rows=128, words=128, inner=64, slices=2, boxes=True, num_warps=8, num_stages=3),
    "gfx942": HeadConfig(rows=128, words=128, inner=64, slices=2, num_warps=8, num_stages=3),
}
# float32, which is multiplied without tensor cores, and sizes of D that those above do not take.
PLAIN_CONFIG = HeadConfig(rows=64, words=64, inner=16, num_warps=4, num_stages=2)
# Where Triton's interpreter runs: every loop takes more than one turn on small problems.
INTERPRETER_CONFIG = HeadConfig(rows=16, words=64, inner=16, slices=2, boxes=True, num_warps=1, num_stages=1)


def head_config(hidden: Tensor, head: Head) -> HeadConfig:
    """How the fused head is cut for hidden ``[N, D]`` on their device."""
    if hidden.device.type == "cpu":
        return replace(INTERPRETER_CONFIG, boxes=_aligned(hidden) and _aligned(head.weight))
    if hidden.dtype not in HALF or not _tidy(hidden, head.weight):
        return PLAIN_CONFIG
    arch = architecture(hidden.device)
    bare = head.bias is None and head.softcap is None and head.logit_scale is None
    return CONFIGS[arch][0] if bare else FINISHING_CONFIGS[arch]


@functools.cache
def architecture(device: torch.device) -> str:
    """The key of ``CONFIGS`` for a GPU; one that has no entry is taken for the one with the least shared memory."""
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {8: "sm_80", 9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def _aligned(matrix: Tensor) -> bool:
    """Whether rows lie apart and start on multiples of 16 bytes, as the copy engine wants them."""
    apart = matrix.stride(0) >= matrix.shape[1] or len(matrix) <= 1
    return apart and matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0


def _tidy(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the configurations for tensor cores take these operands: aligned, and D a multiple of their steps."""
    return hidden.shape[1] % 64 == 0 and _aligned(hidden) and _aligned(weight)


def head_form(impl: str, hidden: Tensor, weight: Tensor) -> str:
    """Which of ``FORMS`` runs the head; ``impl`` as in ``token_stats``.

    Half-precision operands go to the fused form. float32 ones, which it would multiply without tensor cores, and odd
    sizes of D go to the library's product; float64 and mixed dtypes to torch.

    Raises:
        ValueError: an unknown ``impl``, or one that cannot run on this device or these dtypes.
    """
    same = hidden.dtype == weight.dtype and hidden.dtype in (*HALF, torch.float32)
    return _form(impl, hidden.device, same, hidden.dtype in HALF and _tidy(hidden, weight))


def loss_form(impl: str, hidden: Tensor, weight: Tensor, operand: torch.dtype) -> str:
    """Which of ``FORMS`` makes the loss and its gradients, their products reading ``operand``.

    "chunked" makes three products and keeps the gradient of weight in float32; "fused" makes four and needs no more
    than that gradient in its own dtype. So a half-precision weight that learns goes to the second, where the first
    would take more than twice the memory; all others, frozen ones above all, to the first (arithmetic: docs/log.md).

    Raises:
        ValueError: as ``head_form``.
    """
    lean = weight.requires_grad and weight.dtype == operand and operand in HALF and _tidy(hidden, weight)
    return _form(impl, hidden.device, operand in (*HALF, torch.float32), lean)


def _form(impl: str, device: torch.device, fits: bool, fused: bool) -> str:
    """``impl`` as one of ``FORMS``; ``fits``: Triton's take the operands; ``fused``: that is the better one."""
    if impl == "auto" and not (fits and device.type == "cuda" and has_triton()):
        return "torch"
    if impl in ("auto", "triton"):
        impl = "fused" if fused else "chunked"
    if impl not in FORMS:
        raise ValueError(f"impl={impl!r}: one of 'auto', 'triton', {', '.join(map(repr, FORMS))}")
    if impl != "torch":
        require_triton(impl, device)
        if not fits:
            raise ValueError(f"impl={impl!r} takes hidden and weight of one dtype: bfloat16, float16, float32")
    return impl


def logits_form(impl: str, logits: Tensor) -> str:
    """ "triton" or "torch" for an operation on ``logits`` that exist; errors as in ``head_form``."""
    return kernel_form(impl, logits.device, logits.dtype in (*HALF, torch.float32))


def kernel_form(impl: str, device: torch.device, fits: bool = True) -> str:
    """ "triton" or "torch" for an operation with these two forms; ``fits``: whether the kernel takes its operands."""
    if impl == "auto":
        return "triton" if fits and device.type == "cuda" and has_triton() else "torch"
    if impl not in ("triton", "torch"):
        raise ValueError(f"impl={impl!r}: one of 'auto', 'triton', 'torch'")
    if impl == "triton":
        require_triton(impl, device)
        if not fits:
            raise ValueError("impl='triton' takes bfloat16, float16 or float32")
    return impl


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; said once where it is not."""
    if find_spec("triton") is not None:
        return True
    warnings.warn("Triton is not installed: the GPU runs the slower torch form of the kernels", stacklevel=2)
    return False


def require_triton(impl: str, device: torch.device) -> None:
    """Raises ValueError where Triton's kernels cannot run on tensors of this device."""
    if find_spec("triton") is None:
        raise ValueError(f"impl={impl!r} needs Triton, which is not installed; impl='auto' does without")
    import triton

    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise ValueError(f"impl={impl!r} needs a GPU (or TRITON_INTERPRET=1 for a trial); the tensors are on {device}")
