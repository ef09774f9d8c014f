"""What one pass over the pool finds out before a selection: which records hold what, and which have to go.

The filters of ``hygiene`` are such filters too.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lark_fast.errors import UserError
from lark_fast.pool.records import Record
from lark_fast.selection.constraints import NO_VALUE, value_name
from lark_fast.selection.hygiene.removals import Removal

_SHOWN_VALUES = 5
_YES, _NO = ("true", "yes", "1"), ("false", "no", "0", "")


class Filter(Protocol):
    """Sees every scored record once, then says which are to be removed."""

    name: str

    def see(self, row: int, problem: int, record: Record) -> None:
        """Take note of the record that made this row of the scores."""

    def removals(self, gone: NDArray[np.bool_] | None = None) -> Iterator[Removal]:
        """What is to go, in the order in which it was seen. Rows that are ``gone`` (``[R]``) already take no part."""

    def notes(self) -> list[str]:
        """What is to be said of them beside their number."""

    def close(self) -> None:
        """Let go of files."""


class Condition:
    """Whether a column of the pool holds: COLUMN for a true one, COLUMN=VALUE for an equal one.

    Args:
        text: as above.
        option: that it was given with.
    """

    def __init__(self, text: str, option: str = "--where") -> None:
        self.name, self._option = f"{option} {text}", option
        self._column, equals, self._value = text.partition("=")
        self._has_value, self._values, self._held = bool(equals), dict[str, None](), False  # some that were met

    def holds(self, record: Record) -> bool:
        """Of a record; not where it has no such column.

        Raises:
            UserError: a text that is to be true or false is neither.
        """
        value = _value_of(record, self._column)
        if value is None:
            return False
        name = value_name(value)
        if len(self._values) < _SHOWN_VALUES:
            self._values[name] = None
        holds = name == self._value if self._has_value else self._is_true(value, record)
        self._held |= holds
        return holds

    def refuse_unmet(self) -> None:
        """After all records.

        Raises:
            UserError: no record has the column, or the value.
        """
        if not self._values:
            raise UserError(f"{self.name}: no record of the pool has a column {self._column!r}")
        if self._has_value and not self._held:
            values = ", ".join(map(repr, self._values))
            more = ", ..." if len(self._values) == _SHOWN_VALUES else ""
            raise UserError(f"{self.name}: is so for no record; {self._column} is {values}{more}")

    def _is_true(self, value: Any, record: Record) -> bool:
        if isinstance(value, str):
            word = value.strip().lower()
            if word not in _YES + _NO:
                raise UserError(
                    f"{record.source}:{record.line}: {self._column} is {value!r}, neither true nor false; "
                    f"say {self._option} {self._column}=VALUE"
                )
            return word in _YES
        return bool(value)


class Where:
    """Keeps the records for which a condition holds; a record without the column goes.

    Args:
        condition: see ``Condition``.
        size: rows of the scores.
    """

    def __init__(self, condition: str, size: int) -> None:
        self._condition = Condition(condition)
        self.name = self._condition.name
        self._fails = np.zeros(size, dtype=bool)
        self._seen, self._count = np.zeros(size, dtype=np.int32 if size < 2**31 else np.int64), 0  # rows as they came

    def see(self, row: int, problem: int, record: Record) -> None:
        """See ``Filter``.

        Raises:
            UserError: a text that is to be true or false is neither.
        """
        self._seen[self._count], self._count = row, self._count + 1
        self._fails[row] = not self._condition.holds(record)

    def removals(self, gone: NDArray[np.bool_] | None = None) -> Iterator[Removal]:
        """See ``Filter``.

        Raises:
            UserError: no record has the column, or the value.
        """
        self._condition.refuse_unmet()
        seen = self._seen[: self._count]
        for row in seen[self._fails[seen] if gone is None else self._fails[seen] & ~gone[seen]].tolist():
            yield Removal(row=row, reason=self.name)

    def notes(self) -> list[str]:
        """Nothing."""
        return []

    def close(self) -> None:
        """Nothing is open."""


class ColumnValues:
    """The values of a column of the pool, as text: a number each, NO_VALUE for records without it.

    Args:
        column: its name.
        size: rows of the scores.
    """

    def __init__(self, column: str, size: int) -> None:
        self.column = column
        self._codes: dict[str, int] = {}
        self._of_row = np.full(size, NO_VALUE, dtype=np.int32)

    def see(self, row: int, problem: int, record: Record) -> None:
        """Take note of the record that made this row of the scores.

        Raises:
            UserError: there it holds more than one value.
        """
        value = _value_of(record, self.column)
        if isinstance(value, list | dict):
            raise UserError(f"{record.source}:{record.line}: {self.column} holds more than one value; a group has one")
        if value is not None:
            self._of_row[row] = self._codes.setdefault(value_name(value), len(self._codes))

    def groups(self) -> tuple[NDArray[np.int32], list[str]]:
        """``[R]`` positions among the values, and these."""
        return self._of_row, list(self._codes)


def _value_of(record: Record, column: str) -> Any:
    own = {"problem_id": record.problem_id, "candidate_id": record.candidate_id, "teacher": record.teacher or None}
    return own[column] if column in own else record.extra.get(column)
