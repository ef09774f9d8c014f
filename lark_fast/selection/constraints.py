"""What a selection must keep to beyond one problem: a YAML file, read and checked, and the inequalities it comes to.

``Constraints`` is what the file says and knows nothing of the pool; ``linear_constraints`` makes of it the rows and
bounds of l <= A q <= u for given candidates. Whether all of it can hold at once is for the solver to find.
"""

import json
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lark_fast.errors import UserError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Groups = Mapping[str, tuple[NDArray[Any], Sequence[str]]]

TEACHER = "teacher"
OTHERS = "*"  # each value of a group that is not named
NO_VALUE = -1  # the code of a candidate that has no value in a group: no share of the group counts it

_TOP_KEYS = ("budget", "length_penalty", "chi2_radius", "groups")
_BUDGET_KEYS = ("samples", "tokens", "rows", "row_tokens")
_SHARE_KEYS = ("min", "max")
_ROUNDING = 1e-12  # shares are decimal fractions, and 0.1 + 0.2 + 0.7 shall not be above 1
_SHOWN_VALUES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Bounds on a group value's share of the total weight, both from 0 to 1; None is no bound."""

    min: float | None = None
    max: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """A constraints file. None, 0 for the penalty and no group stand for what the file does not say."""

    source: str  # the file, for messages
    samples: float | None = None  # total weight over all problems, each problem's at most 1
    tokens: float | None = None  # sum of weight x scored tokens at most
    rows: int | None = None  # rows of the selection at most, by a shared tau
    row_tokens: float | None = None  # scored tokens of those rows at most, by a shared tau
    length_penalty: float = 0.0  # energy for each scored token
    chi2_radius: float | None = None  # mean over the problems of chi2(q || p) at most
    groups: Mapping[str, Mapping[str, Share]] = field(default_factory=dict)  # column -> value or "*" -> share

    @property
    def columns(self) -> tuple[str, ...]:
        """The pool's columns that the groups are told by, besides the teacher."""
        return tuple(name for name in self.groups if name != TEACHER)

    def error(self, what: str) -> UserError:
        """A UserError about this file."""
        return UserError(f"--constraints {self.source}: {what}")

    def refuse_combination(self, *, budget: int | None = None, tau: float | None = None) -> None:
        """UserError where these constraints, or they and ``--budget`` or ``--tau``, do not go together."""
        own = [name for name in ("rows", "row_tokens") if getattr(self, name) is not None]
        sets_tau = [f"budget.{name}" for name in own] + (["chi2_radius"] if self.chi2_radius is not None else [])
        flags = [flag for flag, value in (("--budget", budget), ("--tau", tau)) if value is not None]
        if len(flags) == 2:
            raise UserError("--budget and --tau: give one of them; a budget sets tau itself")
        if sets_tau and flags:
            raise self.error(f"{sets_tau[0]} sets tau itself; leave {flags[0]} out, or take {sets_tau[0]} out")
        if own and self.chi2_radius is not None:
            raise self.error(f"budget.{own[0]} and chi2_radius: each sets the shared tau; keep one of them")
        if self.samples is not None and sets_tau:
            raise self.error(f"budget.samples and {sets_tau[0]}: samples needs --tau; take {sets_tau[0]} out")
        if self.samples is not None and tau is None:
            raise self.error(
                "budget.samples lets problems compete, which needs one tau for all; give --tau"
                + (" instead of --budget" if budget is not None else "")
            )
        if own and (self.tokens is not None or self.groups):
            other = "budget.tokens" if self.tokens is not None else "groups"
            raise self.error(
                f"budget.{own[0]} and {other}: rows can be counted beforehand only where nothing else moves weight; "
                f"keep one of them, or give --tau with {other}"
            )


def read_constraints(path: str | Path) -> Constraints:
    """The constraints that a YAML file states.

    Raises:
        UserError: the file cannot be read, is not YAML or says nothing; an unknown key; a value of a wrong type or out
            of range; minima that sum to more than 1. The message names file, key (or line) and remedy.
    """
    reader = _Reader(str(path))
    top = reader.mapping("", _load(path), _TOP_KEYS)
    numbers: dict[str, Any] = {}
    if "budget" in top:
        budget = reader.mapping("budget", top["budget"], _BUDGET_KEYS)
        for name in ("samples", "tokens", "row_tokens"):
            if name in budget:
                numbers[name] = reader.number(f"budget.{name}", budget[name], above=True)
        if "rows" in budget:
            numbers["rows"] = reader.whole("budget.rows", budget["rows"])
    if "length_penalty" in top:
        numbers["length_penalty"] = reader.number("length_penalty", top["length_penalty"])
    if "chi2_radius" in top:
        numbers["chi2_radius"] = reader.number("chi2_radius", top["chi2_radius"], above=True)
    if "groups" in top:
        groups = reader.mapping("groups", top["groups"])
        numbers["groups"] = {name: reader.shares(f"groups.{name}", value) for name, value in groups.items()}
    return Constraints(source=str(path), **numbers)


def value_name(value: Any) -> str:
    """How a group's value is named: a string as it is, anything else as JSON has it (1, 0.5, true, null)."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _load(path: str | Path) -> Any:
    import yaml

    class OneOfAKey(yaml.SafeLoader):
        """Refuses a key that comes twice, of which YAML keeps the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            met = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                name = value_name(key)
                if name in met:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {name!r} comes twice", key_node.start_mark
                    )
                met.add(name)
            return super().construct_mapping(node, deep)

    try:
        with open(path, encoding="utf-8") as file:
            return yaml.load(file, Loader=OneOfAKey)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        raise UserError(f"--constraints {path}{line}: not YAML: {error.problem or error.context}; mend it") from error
    except yaml.YAMLError as error:
        message = " ".join(str(error).split())
        raise UserError(f"--constraints {path}: not YAML: {message}; mend it") from error
    except RecursionError as error:
        raise UserError(f"--constraints {path}: not YAML that can be read: nested too deeply; mend it") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--constraints {path}: not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise UserError(
            f"--constraints {path}: cannot be read: {error.strerror or error}; give another file"
        ) from error


@dataclass(frozen=True, slots=True)
class _Reader:
    path: str

    def error(self, key: str, what: str) -> UserError:
        return UserError(f"--constraints {self.path}: {key + ': ' if key else ''}{what}")

    def mapping(self, key: str, value: Any, known: tuple[str, ...] | None = None) -> dict[str, Any]:
        """A mapping that says something, its keys as names, all of them known."""
        if value is None or (isinstance(value, dict) and not value):
            names = ", ".join(known) if known else "a pool column, such as teacher"
            raise self.error(key, f"{'' if key else 'the file '}says nothing; give at least one of: {names}")
        if not isinstance(value, dict):
            raise self.error(key, f"must be a mapping (key: value lines); got {_shown(value)}")
        named = {value_name(name): entry for name, entry in value.items()}
        for name in named:
            if known is not None and name not in known:
                where = f"{key}.{name}" if key else name
                raise self.error(where, f"unknown key; known are {', '.join(known)}")
        return named

    def number(self, key: str, value: Any, *, above: bool = False) -> float:
        """A finite number of at least 0, or above it. YAML 1.1 takes 1e-6 and 2.0e7 for text, so text is tried."""
        range_name = "above 0" if above else "of at least 0"
        number = math.nan
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                number = float(value)
            except (ValueError, OverflowError):
                number = math.nan
        if not math.isfinite(number) or number < 0 or (above and number == 0):
            raise self.error(key, f"must be a finite number {range_name}; got {_shown(value)}")
        return number

    def whole(self, key: str, value: Any) -> int:
        number = self.number(key, value, above=True)
        if not number.is_integer():
            raise self.error(key, f"must be a whole number of at least 1; got {_shown(value)}")
        try:
            return operator.index(value)
        except TypeError:
            return int(number)

    def shares(self, key: str, value: Any) -> dict[str, Share]:
        """The shares of one group."""
        if value is None or value == {}:
            raise self.error(key, 'says nothing; give shares, such as "*": {max: 0.5}')
        shares = {name: self.share(f"{key}.{name}", entry) for name, entry in self.mapping(key, value).items()}
        least = math.fsum(share.min for name, share in shares.items() if share.min is not None and name != OTHERS)
        if least > 1 + _ROUNDING:
            raise self.error(key, f"the minima sum to {least:g}, and shares sum to 1; lower some of them")
        return shares

    def share(self, key: str, value: Any) -> Share:
        bounds = {}
        for name, entry in self.mapping(key, value, _SHARE_KEYS).items():
            bounds[name] = self.number(f"{key}.{name}", entry)
            if bounds[name] > 1:
                raise self.error(f"{key}.{name}", f"is a share of the total weight, from 0 to 1; got {_shown(entry)}")
        share = Share(**bounds)
        if share.min is not None and share.max is not None and share.min > share.max:
            raise self.error(key, f"min {share.min:g} is above max {share.max:g}; lower min or raise max")
        return share


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of A: first those with a coefficient a candidate, then each group's, which pick out one value.

    Attributes:
        columns: ``[C]`` coefficients each.
        codes: for each group the value of every candidate, ``[C]``; the last of its ``sizes`` is "no value".
        sizes: how many rows each group has.
    """

    columns: tuple[Floats, ...] = ()
    codes: tuple[NDArray[np.int32], ...] = ()
    sizes: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.columns) + sum(self.sizes)

    def adjoint(self, values: Floats, cells: slice) -> Floats:
        """A^T values for some candidates: ``[rows]`` -> ``[cells]``."""
        out = np.zeros(cells.stop - cells.start)
        for value, column in zip(values, self.columns, strict=False):
            if value:
                out += value * column[cells]
        first = len(self.columns)
        for codes, size in zip(self.codes, self.sizes, strict=True):
            of_value = values[first : first + size]
            if of_value.any():
                out += of_value[codes[cells]]
            first += size
        return out

    def times(self, q: Floats, cells: slice) -> Floats:
        """A q of some candidates: ``[cells]`` -> ``[rows]``."""
        parts = [np.array([column[cells] @ q for column in self.columns])]
        for codes, size in zip(self.codes, self.sizes, strict=True):
            parts.append(np.bincount(codes[cells], weights=q, minlength=size))
        return np.concatenate(parts)

    def row(self, index: int, cells: slice) -> Floats:
        """Row ``index`` of A for some candidates, ``[cells]``."""
        if index < len(self.columns):
            return self.columns[index][cells]
        index -= len(self.columns)
        for codes, size in zip(self.codes, self.sizes, strict=True):
            if index < size:
                return (codes[cells] == index).astype(np.float64)
            index -= size
        raise IndexError(index)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """The inequalities sign * (A q)_row <= bound, ``[M]`` of each, and equalities where ``free``.

    Multipliers z have their order: not negative but where ``free``, and stationarity is q = argmax of the objective
    less sum_c z_c sign_c (A q)_row_c.
    """

    row: Ints
    sign: Floats
    bound: Floats
    free: Bools
    scale: Floats  # what a violation is measured in: the bound, or the total weight
    unit: Floats  # z / unit is the multiplier of the constraint as its file states it
    names: tuple[str, ...]  # "groups.teacher.a max"
    texts: tuple[str, ...]  # "groups.teacher.a max 0.3"

    def __len__(self) -> int:
        return len(self.names)

    def only(self, chosen: Bools) -> "Sides":
        """Some of the sides."""
        arrays = {name: getattr(self, name)[chosen] for name in ("row", "sign", "bound", "free", "scale", "unit")}
        kept = np.flatnonzero(chosen)
        return Sides(**arrays, names=tuple(self.names[c] for c in kept), texts=tuple(self.texts[c] for c in kept))


def linear_constraints(constraints: Constraints, groups: Groups, tokens: Floats, total: float) -> tuple[Rows, Sides]:
    """A, and what is asked of it.

    Args:
        constraints: what the file says.
        groups: name -> (the value of each candidate as a code, ``[C]``, -1 for none; the values' names).
        tokens: ``[C]`` scored tokens.
        total: the sum of all weights, which shares are shares of.

    Raises:
        UserError: a share of a value that no candidate has; minima that sum to more than 1 with "*" spelt out.
        ValueError: a group of the constraints is not among ``groups``.
    """
    columns, codes, sizes = [], [], []
    sides: list[tuple[int, float, float, bool, float, float, str, str]] = []
    if constraints.samples is not None:
        sides.append((0, 1.0, total, True, total, 1.0, "budget.samples", f"budget.samples {total:g}"))
        columns.append(np.broadcast_to(1.0, len(tokens)))
    if constraints.tokens is not None:
        # In units of the mean: rows of like size make a well-scaled dual.
        unit = float(tokens.mean()) or 1.0
        bound = constraints.tokens / unit
        text = f"budget.tokens {constraints.tokens:g}"
        sides.append((len(columns), 1.0, bound, False, bound, unit, "budget.tokens", text))
        columns.append(tokens / unit)
    first = len(columns)
    for group, shares in constraints.groups.items():
        if group not in groups:
            raise ValueError(f"groups: lacks {group!r}, which {constraints.source} asks for")
        code, names = groups[group]
        code = np.where(code == NO_VALUE, len(names), code).astype(np.int32)
        of_value = _share_of_values(constraints, group, shares, names, np.bincount(code, minlength=len(names) + 1))
        for value, share in of_value.items():
            name, row = f"groups.{group}.{names[value]}", first + value
            if share.min is not None and share.min == share.max:
                text = f"{name} min = max {share.min:g}"
                sides.append((row, 1.0, share.min * total, True, total, 1.0, f"{name} min = max", text))
                continue
            for word, bound, sign in (("min", share.min, -1.0), ("max", share.max, 1.0)):
                if bound is not None and not (sign < 0 and bound == 0) and not (sign > 0 and bound == 1):
                    text = f"{name} {word} {bound:g}"
                    sides.append((row, sign, sign * bound * total, False, total, 1.0, f"{name} {word}", text))
        codes.append(code)
        sizes.append(len(names) + 1)
        first += len(names) + 1
    row, sign, bound, free, scale, unit, names, texts = zip(*sides, strict=True) if sides else ((),) * 8
    return Rows(columns=tuple(columns), codes=tuple(codes), sizes=tuple(sizes)), Sides(
        row=np.array(row, dtype=np.int64),
        sign=np.array(sign, dtype=np.float64),
        bound=np.array(bound, dtype=np.float64),
        free=np.array(free, dtype=bool),
        scale=np.array(scale, dtype=np.float64),
        unit=np.array(unit, dtype=np.float64),
        names=names,
        texts=texts,
    )


def _share_of_values(
    constraints: Constraints, group: str, shares: Mapping[str, Share], names: Sequence[str], counts: Ints
) -> dict[int, Share]:
    """Each value's share by its code, with "*" spelt out over the values that some candidate has."""
    code_of = {name: code for code, name in enumerate(names) if counts[code]}
    of_value = {}
    for name, share in shares.items():
        if name == OTHERS:
            continue
        if name not in code_of:
            known = sorted(code_of)
            shown = ", ".join(map(repr, known[:_SHOWN_VALUES])) + (", ..." if len(known) > _SHOWN_VALUES else "")
            raise constraints.error(
                f"groups.{group}.{name}: no candidate has this value; "
                + (f"mend or remove it; there are {shown}" if known else f"no candidate has any {group}; remove it")
            )
        of_value[code_of[name]] = share
    if OTHERS in shares:
        if not code_of:
            raise constraints.error(f"groups.{group}: no candidate has any {group}; mend or remove it")
        of_value |= {code: shares[OTHERS] for name, code in code_of.items() if name not in shares}
        least = math.fsum(share.min or 0.0 for share in of_value.values())
        if least > 1 + _ROUNDING * len(of_value):
            raise constraints.error(
                f'groups.{group}: with "*" for each value that is not named the minima sum to {least:g}, and shares '
                "sum to 1; lower some of them"
            )
    return of_value
