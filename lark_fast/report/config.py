"""What ``lark-fast report`` was asked to do, and what it says at its end."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig:
    """Where everything is.

    Attributes:
        scores: what ``lark-fast score`` wrote.
        out: the HTML file; the PNGs go into a directory beside it.
        selection: what ``lark-fast select`` wrote from these scores.
        pool: what was scored; (): what the scores remember, where it still is.
        student: whose tokens are shown; None: what the scores remember, where it still is. Where it is given, and the
            scores have no tokens of their own, the trajectories that are shown are scored once more.
        base: of an adapter that was scored; None: what the scores remember, or the one that it names.
        checkpoints: what ``lark-fast train`` wrote.
        evaluations: what ``lark-fast eval`` wrote.
        problems: how many are shown one by one.
    """

    scores: str
    out: str
    selection: str | None = None
    pool: tuple[str, ...] = ()
    student: str | None = None
    base: str | None = None
    checkpoints: tuple[str, ...] = ()
    evaluations: tuple[str, ...] = ()
    problems: int = 24
    overwrite: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportSummary:
    """What was written."""

    out: str
    size: int  # bytes of the page
    figures: tuple[str, ...]  # PNGs
    notes: tuple[str, ...]  # what is missing, and what would bring it

    def lines(self) -> list[str]:
        """For people."""
        place = self.figures[0].rpartition("/")[0] if self.figures else ""
        figures = f"; {len(self.figures)} figures in {place}/" if place else ""
        return [*self.notes, f"{self.out}: {self.size / 1e6:.1f} MB, opens in any browser{figures}"]
