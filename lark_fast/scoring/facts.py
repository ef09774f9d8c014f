"""What a run has to know of a student, wherever the student is."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lark_fast.flop import ForwardCost, matmul_ceiling
from lark_fast.packing import window_tokens
from lark_fast.scoring.layout import Layout
from lark_fast.student import multiplies_bfloat16

if TYPE_CHECKING:
    from lark_fast.scoring.scorer import Scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """A student that is ready to score, and its device; small, and the same for every process that has loaded it.

    Attributes:
        device_type: "cpu" or "cuda".
        dtype: of its parameters, without "torch.".
        multiplies_bfloat16: whether its device does.
        length_regime, max_positions, vocab_size: see ``Student``.
        n_parameters: of the model.
        unpackable, tokens_per_batch, cost: see ``Scorer``.
        one_shape: see ``Layout``.
        ranks: that it is spread over, see ``tensor_parallel``; 1: it is whole.
        ceiling: FLOP/s of the best matrix product of its device, or of those of its ranks.
        precision, precision_fault: see ``Scorer``.
    """

    device_type: str
    dtype: str
    multiplies_bfloat16: bool
    unpackable: str | None
    length_regime: int | None
    max_positions: int | None
    vocab_size: int
    n_parameters: int
    tokens_per_batch: int
    one_shape: bool
    cost: ForwardCost
    ranks: int
    ceiling: float
    precision: str | None = None
    precision_fault: str | None = None

    @classmethod
    def of(cls, scorer: "Scorer") -> "Facts":
        """What there is to know; the device has to be idle."""
        student = scorer.student
        ranks = 1 if student.ranks is None else student.ranks.talk.size
        return cls(
            device_type=student.device.type,
            dtype=str(student.dtype).removeprefix("torch."),
            multiplies_bfloat16=multiplies_bfloat16(student.device),
            unpackable=scorer.unpackable,
            length_regime=student.length_regime,
            max_positions=student.max_positions,
            vocab_size=student.vocab_size,
            n_parameters=scorer.n_parameters,
            tokens_per_batch=scorer.tokens_per_batch,
            one_shape=scorer.compile,
            cost=scorer.cost,
            ranks=ranks,
            ceiling=ranks * matmul_ceiling(student.device, scorer.product_dtype),
            precision=scorer.precision,
            precision_fault=scorer.precision_fault,
        )

    @property
    def tokens_per_window(self) -> int:
        """How many tokens are best brought together before they are scored; see ``lark_fast.packing``."""
        return window_tokens(self.n_parameters, self.tokens_per_batch, self.device_type)

    def layout(self) -> Layout:
        """How its passes are put together, on the host."""
        return Layout(
            packed=self.unpackable is None,
            border=self.length_regime,
            tokens_per_batch=self.tokens_per_batch,
            one_shape=self.one_shape,
        )
