"""Records that cannot be used: how many, and the first."""


class Faults:
    """Counts them; a pool may have millions.

    Attributes:
        count: how many.
        first: the first one's file, line and reason; "" where there is none.
    """

    def __init__(self) -> None:
        self.count, self.first = 0, ""

    def add(self, source: str, line: int, reason: str) -> None:
        """One more."""
        self.count += 1
        self.first = self.first or f"{source}:{line}: {reason}"

    def told(self) -> str:
        """For the end of an error message; "" where there is none."""
        return f"; the first of {self.count:,} that cannot be used: {self.first}" if self.count else ""


def duplicate(key: tuple[str, str]) -> str:
    """Why a record goes whose key (problem, candidate) an earlier one of the pool has."""
    problem, candidate = key
    return f"problem {problem!r} has a candidate {candidate!r} already (duplicate)"


def rejected_line(count: int, first: str) -> str:
    """For the end of a run; records' own text in it is not escaped."""
    return f"{count:,} record(s) cannot be used; the first: {first}"
