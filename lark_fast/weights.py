"""Which weights a trajectory may have."""

import math
from typing import Any

from lark_fast.errors import RejectError

# Weights that lie further apart cannot be told from 0 beside each other in float32.
SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-15, 1e15
ALLOWED_WEIGHTS = f"it must be 0, which leaves the row out, or lie between {SMALLEST_WEIGHT:g} and {LARGEST_WEIGHT:g}"


def checked_weight(value: Any, name: str = "weight") -> float:
    """The weight as a number.

    Raises:
        RejectError: it is not a number, NaN, negative, or too far from 1; the message calls it ``name``.
    """
    if value is None:
        raise RejectError(f"{name} is null, NaN or infinite; {ALLOWED_WEIGHTS}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RejectError(f"{name} is {value!r:.40}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if number != 0 and not SMALLEST_WEIGHT <= number <= LARGEST_WEIGHT:
        raise RejectError(f"{name} is {number:g}; {ALLOWED_WEIGHTS}")
    return number
