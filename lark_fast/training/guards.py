"""A run that blows up is stopped with a word, before the step that would spoil the weights."""

import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

RECENT, FEWEST = 64, 8  # steps that a step is compared with, at most and at least


class Fault(NamedTuple):
    """What is wrong with a step, and the way out."""

    what: str
    remedy: str


class Guard:
    """Compares each step with the steps before it.

    Args:
        max_loss_jump: nats that a loss may lie above the median of recent losses; 0 for any.
        max_norm_ratio: gradient norm over the median of recent ones; 0 for any.
        past: lines of metrics.jsonl, so that a resumed run stops where an undisturbed one would.
    """

    def __init__(self, max_loss_jump: float, max_norm_ratio: float, past: Sequence[dict[str, Any]] = ()) -> None:
        self.max_loss_jump, self.max_norm_ratio = max_loss_jump, max_norm_ratio
        steps = [line for line in past if "loss" in line]
        self._losses = deque((line["loss"] for line in steps), maxlen=RECENT)
        self._norms = deque((line["grad_norm"] for line in steps), maxlen=RECENT)

    def fault(self, loss: float, norm: float) -> Fault | None:
        """What is wrong with a step; None where nothing is, and the step counts from then on."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return Fault(f"the loss is {loss:.6g}, the gradient norm {norm:.6g}", "Lower --lr")
        if len(self._losses) >= FEWEST:
            usual_loss, usual_norm = median(self._losses), median(self._norms)
            if self.max_loss_jump and loss > usual_loss + self.max_loss_jump:
                return Fault(
                    f"the loss jumps to {loss:.4g} from {usual_loss:.4g}",
                    "Lower --lr, or go on with a larger --max-loss-jump (0: any)",
                )
            if self.max_norm_ratio and norm > usual_norm * self.max_norm_ratio:
                return Fault(
                    f"the gradient norm jumps to {norm:.4g} from {usual_norm:.4g}",
                    "Lower --lr, or go on with a larger --max-norm-ratio (0: any)",
                )
        self._losses.append(loss)
        self._norms.append(norm)
        return None
