"""Which constraints cannot hold together, and what would do, in words."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from lark_fast.selection.constraints import Bools
from lark_fast.selection.global_budget import GOOD, InfeasibleError, minimised
from lark_fast.selection.program import (
    NotSolvedError,
    Program,
    chi2_of_problems,
)

_FILTERED = 12  # fighting constraints are told apart one by one up to this many
SHOWN = 10


def conflict(program: Program, error: InfeasibleError) -> str:
    """Which constraints cannot hold together: a set that can hold once any of it is left out, and what would do."""
    sides, z = program.sides, np.abs(error.z)
    fighting = z > 1e-9 * z.max(initial=0.0)
    if error.least is not None:
        fighting = _irreducible(fighting, lambda chosen: _least_chi2(program, chosen) > program.radius * (1 + GOOD))
        texts = [f"chi2_radius {program.radius:g}", *(sides.texts[c] for c in np.flatnonzero(fighting))]
        least = f"with the rest kept, the mean chi2 is at least {error.least * (1 + 1e-6):.6g}"
        return f"{_cannot_hold(texts)}: {least}; loosen one of them"
    fighting = _irreducible(fighting, lambda chosen: not _feasible(program, chosen))
    members = np.flatnonzero(fighting)
    words = _cannot_hold([sides.texts[c] for c in members])
    # The total is what shares are taken of, so what would do is said of another one.
    bounded = [c for c in members if sides.names[c] != "budget.samples"]
    if len(members) > _FILTERED or not bounded:
        return f"{words}; loosen some of them"
    others = fighting.copy()
    others[bounded[0]] = False
    reach = _reach(program, int(bounded[0]), others, float(error.z[bounded[0]]))
    if len(members) == 1:
        return f"{words}: {reach}; {'lower' if sides.sign[members[0]] < 0 else 'raise'} it"
    return f"{words}{': with the rest kept, ' + reach if reach else ''}; loosen one of them"


def _cannot_hold(texts: list[str]) -> str:
    if len(texts) == 1:
        return f"{texts[0]} cannot hold"
    if len(texts) > SHOWN:
        return f"{', '.join(texts[:SHOWN])} and {len(texts) - SHOWN:,} more cannot all hold"
    return f"{', '.join(texts[:-1])} and {texts[-1]} cannot {'both' if len(texts) == 2 else 'all'} hold"


def _irreducible(fighting: Bools, still_fights: Callable[[Bools], bool]) -> Bools:
    """What is left when all that the fight does not need has been taken out, one by one (deletion filter)."""
    if np.count_nonzero(fighting) > _FILTERED:
        return fighting
    for c in np.flatnonzero(fighting):
        without = fighting.copy()
        without[c] = False
        if still_fights(without):
            fighting = without
    return fighting


def _feasible(program: Program, chosen: Bools) -> bool:
    part = replace(program, sides=program.sides.only(chosen))
    try:
        minimised(part, np.zeros_like(program.energy), np.zeros(len(part.sides)))
    except InfeasibleError:
        return False
    except NotSolvedError:
        return True
    return True


def _least_chi2(program: Program, chosen: Bools) -> float:
    part = replace(program, sides=program.sides.only(chosen))
    try:
        _, x = minimised(part, np.zeros_like(program.energy), np.zeros(len(part.sides)))
    except (InfeasibleError, NotSolvedError):
        return 0.0
    return float(chi2_of_problems(program, program.prior * x).mean())


def _reach(program: Program, side: int, others: Bools, z: float) -> str:
    """How far a side could go with the others kept, in words; empty where that was not found."""
    sides = program.sides
    sign = float(sides.sign[side]) * (1.0 if z > 0 else -1.0)
    a = sign * program.rows.row(int(sides.row[side]), slice(0, len(program.energy)))
    if others.any():
        # For tau small enough the penalty only chooses among the maximisers of the linear objective.
        part = replace(program, sides=sides.only(others))
        gain = -a * 1e4 / (float(np.ptp(a)) or 1.0)
        if not program.competing:
            gain -= np.repeat(np.maximum.reduceat(gain, program.starts), program.sizes)
        try:
            _, x = minimised(part, gain, np.zeros(len(part.sides)))
        except (InfeasibleError, NotSolvedError):
            return ""
        value = float(a @ (program.prior * x))
    else:
        lowest = np.sort(np.minimum.reduceat(a, program.starts))
        whole = int(program.total)
        value = float(lowest[:whole].sum())
        if whole < len(lowest):
            value += (program.total - whole) * float(lowest[whole])
    value *= sign
    if sides.names[side] == "budget.tokens":
        return f"no selection has fewer than {math.ceil(value * sides.unit[side] - 1e-6):,} tokens"
    # Rounded to what can be reached.
    share = 1e6 * value / program.total
    words = (
        f"less than {math.ceil(share - 1e-3) / 1e6:g}" if sign > 0 else f"more than {math.floor(share + 1e-3) / 1e6:g}"
    )
    return f"no selection gives {sides.names[side].rsplit(' ', 1)[0].removesuffix(' min =')} {words}"
