"""What a scoring run will take, said before anything is spent: time, memory, disk."""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lark_fast.flop import ForwardCost, matrices, shape_of, three_digits, with_prefix
from lark_fast.progress import duration
from lark_fast.scoring.metrics import json_number

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of a trajectory in scores/: its row; with --per-token, each scored token's statistics.
ROW_BYTES, TOKEN_STATISTICS_BYTES = 200, 20
PAIRED_ROW_BYTES, PAIRED_TOKEN_BYTES = 24, 4  # more, of a pair
# Of a token in a forward pass, whatever the model: ids, positions, labels and rows as int64, six statistics as float32.
TOKEN_BYTES = 4 * 8 + 6 * 4
# What ``Estimate.as_json`` has, each with "estimated_" in front.
ESTIMATED = (
    *("seconds", "flop", "flop_per_second"),
    *("memory_bytes", "weights_bytes", "pack_bytes", "pack_tokens", "disk_bytes"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Memory of a forward pass without gradients, as constants of a model.

    A token of a pack has, at the fullest moment of the widest block (an MLP, an attention),

        4 D                  what the model still holds (the embedding, the layer's input, the residual stream) and
                             the normalised copy
        widths               an output of every matrix of the block; a matrix's other side is the residual's. In
                             an MLP these are gate, up and their product, in an attention q, k, v and the result
        2 x widest           in an attention besides: what the rotation of q makes on the way
        k x (2 D + widths)   of experts, for the k that the token is sent to, instead of widths: their inputs and
                             results too

    numbers in the model's dtype; or, where that is more, 3 D of them and 3 D in float32, in which a norm is computed.
    Nothing is kept from layer to layer. The head adds two blocks of float32 logits.

    Attributes:
        weights: bytes of all parameters, each counted once; of a model that is spread over ranks, of this rank's.
        token: bytes of a token of a pack.
        head: bytes of the head's workspace, whatever the pack.
    """

    weights: int
    token: float
    head: int

    @classmethod
    def of(cls, model: "PreTrainedModel") -> "Footprint":
        """The footprint of a Transformers causal language model; one on the ``meta`` device does as well."""
        from lark_fast.kernels.token_stats_torch import CPU_BLOCK, GPU_BLOCK
        from lark_fast.tensor_parallel import on_this_rank

        parameters = {id(parameter): parameter for parameter in model.parameters()}
        own = [on_this_rank(parameter) for parameter in parameters.values()]
        weights = sum(parameter.numel() * parameter.element_size() for parameter in own)
        head = model.get_output_embeddings().weight
        n_words, width = shape_of(model.get_output_embeddings(), head)
        rows, words = CPU_BLOCK if head.device.type == "cpu" else GPU_BLOCK
        size = model.dtype.itemsize  # of what is computed, whatever the weights are stored in
        numbers = max(4 * width + _widest_block(model, width), 3 * width + 3 * width * 4 / size)
        return cls(
            weights=weights,
            token=numbers * size + TOKEN_BYTES,
            head=2 * 4 * rows * min(words, n_words),
        )

    def __add__(self, other: "Footprint") -> "Footprint":
        """Of two models in one memory, through which packs pass one after the other."""
        return Footprint(
            weights=self.weights + other.weights,
            token=max(self.token, other.token),
            head=max(self.head, other.head),
        )

    def pack(self, tokens: int) -> float:
        """Bytes that a pack of so many tokens needs beside the weights."""
        return self.token * tokens + self.head


def _widest_block(model: "PreTrainedModel", width: int) -> float:
    """Numbers that a token has in the widest block beside the residual stream of this width."""
    sides: dict[str, list[float]] = defaultdict(list)
    for matrix in matrices(model):
        shape, met = matrix.own, matrix.active * matrix.experts  # by a token: 1, or k of the experts
        side = shape.numel() / matrix.experts / width if width in shape else shape[0]
        if matrix.experts > 1 and matrix.block not in sides:
            sides[matrix.block].append(2 * width * met)
        sides[matrix.block].append(side * met)
    rotated = {block: 2 * max(widths) for block, widths in sides.items() if "att" in block.rpartition(".")[2]}
    return max((sum(widths) + rotated.get(block, 0) for block, widths in sides.items()), default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a scoring run will take. Sizes are in bytes and leave out Python, torch and the device's own libraries."""

    records: int  # that can be scored
    input_tokens: int
    scored_tokens: int
    flop: float  # of all forward passes
    flop_per_second: float  # as measured; NaN: not known
    pack_tokens: int  # of the largest pack
    weights_bytes: int
    pack_bytes: int
    disk_bytes: int

    @property
    def seconds(self) -> float:
        """Of the forward passes; NaN where the speed is not known. Without workers, rendering comes on top."""
        return self.flop / self.flop_per_second if self.flop_per_second else math.nan

    @property
    def memory_bytes(self) -> int:
        """On the device, at the fullest moment."""
        return self.weights_bytes + self.pack_bytes

    def lines(self) -> list[str]:
        """For people."""
        speed = f"{with_prefix(self.flop, 'FLOP')} at {with_prefix(self.flop_per_second, 'FLOP/s')}, as measured here"
        time = f"time: about {duration(self.seconds)} ({speed})"
        return [
            time if math.isfinite(self.seconds) else f"time: not known ({with_prefix(self.flop, 'FLOP')})",
            f"memory: about {_size(self.memory_bytes)} (weights {_size(self.weights_bytes)}, "
            f"a pack of {self.pack_tokens:,} tokens {_size(self.pack_bytes)})",
            f"disk: about {_size(self.disk_bytes)}",
        ]

    def as_json(self) -> dict[str, Any]:
        """Flat, by name; what is not known is None."""
        return {f"estimated_{name}": json_number(getattr(self, name)) for name in ESTIMATED}


def estimate(
    cost: ForwardCost,
    lengths: np.ndarray,
    n_scored: int,
    flop_per_second: float,
    *,
    footprint: Footprint,
    tokens_per_batch: int,
    per_token: bool = False,
    paired: bool = False,
    local_tokens: int = 0,
    local_flop: float = 0.0,
) -> Estimate:
    """Time, memory and disk of scoring trajectories of these lengths.

    Args:
        cost: of the student.
        lengths: ``[N]`` tokens of each, 4 bytes a record as int32.
        n_scored: tokens that have statistics, of all together.
        flop_per_second: of a sample that was scored with this student on this device; NaN: not known.
        footprint: of the student, in the dtype it will run in.
        tokens_per_batch: of a pack; a longer trajectory is a pack of its own.
        per_token: every token's statistics are stored too.
        paired: of two states of the student, see ``paired``; ``cost`` and ``footprint`` are those of both.
        local_tokens, local_flop: of the passes that local scores take besides.
    """
    lengths = np.asarray(lengths)
    tokens, longest = int(lengths.sum(dtype=np.int64)), int(lengths.max(initial=0))
    row_bytes, token_bytes = ROW_BYTES, TOKEN_STATISTICS_BYTES
    if paired:
        row_bytes, token_bytes = row_bytes + PAIRED_ROW_BYTES, token_bytes + PAIRED_TOKEN_BYTES
    pack_tokens = max(min(tokens_per_batch, max(tokens, local_tokens)), longest)
    return Estimate(
        records=len(lengths),
        input_tokens=tokens,
        scored_tokens=n_scored,
        flop=cost.flop(lengths, n_scored) + local_flop,
        flop_per_second=flop_per_second,
        pack_tokens=pack_tokens,
        weights_bytes=footprint.weights,
        pack_bytes=round(footprint.pack(pack_tokens)),
        disk_bytes=row_bytes * len(lengths) + (token_bytes * n_scored if per_token else 0),
    )


def _size(n_bytes: float) -> str:
    """In the unit that leaves a number of few digits: "1.5 GiB"."""
    units = "bytes", "KiB", "MiB", "GiB", "TiB"
    power = min(int(math.log2(max(n_bytes, 1)) // 10), len(units) - 1)
    return f"{three_digits(n_bytes / 1024**power)} {units[power]}"
