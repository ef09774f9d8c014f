"""A few problems from nearest by: their candidates, why some were chosen, and their texts token by token."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lark_fast.errors import RejectError, UserError
from lark_fast.kernels.chi2 import effective_sample_size
from lark_fast.pool.reading import Pool
from lark_fast.pool.records import NOT_SCORED, Record
from lark_fast.rendering.inspection import pieces
from lark_fast.rendering.renderer import Renderer, RenderOptions
from lark_fast.report.texts import page_bytes, short, without_middle
from lark_fast.scoring.parts import part_files
from lark_fast.selection.matching import Matching, RowIndex

if TYPE_CHECKING:
    from lark_fast.report.sources import Scores, Selection
    from lark_fast.student_files import StudentFiles

MOST_PROBLEMS = 100
_BUDGET = 2_900_000  # bytes of the page for all problems
_CANDIDATE_BYTES = 1_200  # of a candidate without its text, its names as long as they may be
_TOKEN_BYTES = 60  # of a token without its text
_QUESTION_BYTES = 2_500
_PIECE_BYTES = 300  # of a token's text: blanks can be many
_MOST_CANDIDATES = 16  # of a problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A piece of a text and the student's nll of it, NaN where it is not known."""

    text: str
    nll: float
    rank: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A trajectory of a problem.

    Attributes:
        weight: None without a selection.
        g_hat: among the candidates that filters left.
        removed: the filter that took it out of the selection, "" where none did.
        text: what the assistant says, as it is shown; None where the pool is not at hand.
        tokens: the same by tokens; () where their nll is not known.
        cut: characters, or tokens, that were left out in the middle.
    """

    row: int
    candidate_id: str
    teacher: str
    n_tokens: int
    nll: float
    brier: float
    rho: float
    g_hat: float
    weight: float | None
    removed: str = ""
    text: str | None = None
    tokens: tuple[Token, ...] = ()
    cut: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A problem and its candidates, the most learnable first.

    Attributes:
        question: None where the pool is not at hand.
        left_out: candidates that are not shown.
        why: how its candidates came to their weights, "" where there is nothing to say.
    """

    problem_id: str
    question: str | None
    candidates: tuple[Candidate, ...]
    left_out: int
    effective_size: float | None
    why: str


def choose(scores: "Scores", selection: "Selection | None", count: int) -> list[Problem]:
    """Problems from all over the range: in order of how far apart their candidates' g_hat are, evenly spaced."""
    rows = scores.rows
    learnability = scores.column("g_hat") if selection is None else selection.g_hat
    order = np.argsort(rows.problem, kind="stable")
    sizes = np.bincount(rows.problem, minlength=rows.n_problems)
    starts = np.cumsum(sizes) - sizes
    g_hat = np.where(np.isfinite(learnability), learnability, np.nan)[order]
    with np.errstate(all="ignore"):
        spread = np.fmax.reduceat(g_hat, starts) - np.fmin.reduceat(g_hat, starts)
    several = np.flatnonzero((sizes > 1) & np.isfinite(spread))
    usable = several if len(several) else np.arange(rows.n_problems)
    ranked = usable[np.argsort(-spread[usable], kind="stable")]
    places = np.unique(np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int))
    members = {}
    for problem in ranked[places].tolist():
        of_problem = order[starts[problem] : starts[problem] + sizes[problem]]
        own = learnability[of_problem]
        members[problem] = of_problem[np.argsort(np.where(np.isfinite(own), -own, np.inf), kind="stable")]
    names = _candidate_ids(scores, {int(row) for rows in members.values() for row in rows[:_MOST_CANDIDATES]})
    return [_problem(scores, selection, problem, rows, learnability, names) for problem, rows in members.items()]


def _candidate_ids(scores: "Scores", rows: set[int]) -> dict[int, str]:
    """By row; one pass over the scores."""
    found, start = {}, 0
    for batch in scores.rows.batches("candidate_id"):
        for row in rows.intersection(range(start, start + len(batch))):
            found[row] = batch["candidate_id"][row - start].as_py()
        start += len(batch)
    return found


def _problem(
    scores: "Scores",
    selection: "Selection | None",
    problem: int,
    ranked: NDArray[np.integer],
    g_hat: NDArray[np.float64],
    names: dict[int, str],
) -> Problem:
    weight = None if selection is None else selection.weight
    shown = [
        Candidate(
            row=int(row),
            candidate_id=short(names[int(row)]),
            teacher=short(scores.rows.teachers[scores.rows.teacher[row]]),
            n_tokens=int(scores.rows.n_tokens[row]),
            nll=float(scores.column("nll")[row]),
            brier=float(scores.column(scores.brier)[row]),
            rho=float(scores.column("rho")[row]),
            g_hat=float(g_hat[row]),
            weight=None if weight is None else float(weight[row]),
            removed="" if selection is None else short(selection.removed_rows.get(int(row), "")),
        )
        for row in ranked[:_MOST_CANDIDATES]
    ]
    return Problem(
        problem_id=short(scores.rows.problem_name(problem)),
        question=None,
        candidates=tuple(shown),
        left_out=len(ranked) - len(shown),
        effective_size=None if weight is None else _effective(weight[ranked]),
        why="" if selection is None else _why(selection, ranked[np.isfinite(g_hat[ranked])]),
    )


def _effective(weights: NDArray[np.float64]) -> float:
    total = weights.sum()
    return float(effective_sample_size(weights / total)) if total else 0.0


def _why(selection: "Selection", ranked: NDArray[np.integer]) -> str:
    """What a problem's weights follow from, in words.

    Args:
        selection: whose policy it was.
        ranked: rows that could be chosen, by their g_hat from the highest down.
    """
    config = selection.manifest.get("config") or {}
    budget, policy = config.get("budget"), config.get("policy")
    if config.get("constraints"):
        return "Its weights follow from the constraints, which tie all problems together."
    if budget and len(ranked) <= budget and (selection.weight[ranked] > 0).all():
        return f"There are no more candidates than the budget of {budget}: none is left out."
    if policy != "chi2" or not budget or len(ranked) <= budget:
        return ""
    if selection.weight[ranked[budget]] > 0:
        return "The best candidates are equal in g_hat, and share the weight."
    # nu of SPEC 3: the first g_hat that gets no weight.
    return (
        f"Weight begins above g_hat {selection.g_hat[ranked[budget]]:.4g}, that of the best candidate left out, and "
        "grows with the distance from it."
    )


def add_texts(problems: Sequence[Problem], scores: "Scores", pool: Pool) -> tuple[list[Problem], dict[int, Record]]:
    """The problems with what was asked and answered, and the records by row; the pool passes once.

    Raises:
        UserError: it is not the pool that was scored.
    """
    wanted = {candidate.row for problem in problems for candidate in problem.candidates}
    records: dict[int, Record] = {}
    matching = Matching(RowIndex(scores.rows))
    for row, record in matching.pairs(pool, "reading the pool"):
        if row in wanted:
            records[row] = record
    if not wanted <= records.keys():
        matching.refuse_another_pool()
    found = []
    for problem in problems:
        candidates = []
        for candidate in problem.candidates:
            text, cut = without_middle(_said(records[candidate.row]), _text_budget(problems))
            candidates.append(replace(candidate, text=text, cut=cut))
        question, _ = without_middle(_asked(records[problem.candidates[0].row]), _QUESTION_BYTES)
        found.append(replace(problem, question=question, candidates=tuple(candidates)))
    return found, records


def _text_budget(problems: Sequence[Problem]) -> int:
    """Bytes of the page for a candidate's text."""
    candidates = sum(len(problem.candidates) for problem in problems)
    return max(0, _BUDGET - _QUESTION_BYTES * len(problems)) // max(1, candidates) - _CANDIDATE_BYTES


def _said(record: Record) -> str:
    return "\n\n".join(m["content"] for m in record.messages or () if m["role"] == "assistant")


def _asked(record: Record) -> str:
    return "\n\n".join(m["content"] for m in record.messages or () if m["role"] == "user")


def add_tokens(
    problems: Sequence[Problem], scores: "Scores", records: dict[int, Record], student: "StudentFiles", *, rescore: bool
) -> list[Problem]:
    """The problems with the nll of every scored token.

    Args:
        problems: with texts.
        scores: whose ``token_nll`` is taken, where it has any.
        records: by row.
        student: where the student is that was scored; its tokenizer alone where the scores have tokens.
        rescore: load the student and score once more where they have none.

    Raises:
        UserError: the student cannot be loaded, or another one was scored.
    """
    from lark_fast.student import load_config, load_student, load_tokenizer

    identity = scores.manifest["identity"]
    prints = student.fingerprint()
    if prints["tokenizer"] != identity["tokenizer"]:
        raise UserError(f"--student {student.name}: has another tokenizer than the student that was scored")
    options = RenderOptions(**{name: identity[name] for name in RenderOptions.__dataclass_fields__})
    stored = _stored_tokens(scores, set(records)) if identity.get("per_token") else {}
    scorer = None
    if not stored:
        if not rescore:
            return list(problems)
        if (prints["weights"], prints.get("adapter")) != (identity["student"], identity.get("adapter")):
            raise UserError(f"--student {student.name}: is not the student that was scored, its weights are others")
        from lark_fast.scoring.scorer import Scorer

        scorer = Scorer(load_student(student, dtype=identity["dtype"]), options=options)
    if scorer is None:
        renderer = Renderer(load_tokenizer(student), options, vocab_size=load_config(student).vocab_size)
    else:
        renderer = scorer.renderer
    found = []
    for problem in problems:
        candidates = []
        for candidate in problem.candidates:
            tokens = _tokens(records[candidate.row], renderer, stored.get(candidate.row), scorer)
            shown, cut = _ends(tokens, _text_budget(problems))
            candidates.append(replace(candidate, tokens=shown, cut=cut if shown else candidate.cut))
        found.append(replace(problem, candidates=tuple(candidates)))
    return found


def _ends(tokens: Sequence[Token], budget: int) -> tuple[tuple[Token, ...], int]:
    """(tokens, how many are left out in the middle) where all take more than ``budget`` bytes of the page."""
    sizes = np.cumsum([_TOKEN_BYTES + page_bytes(token.text) for token in tokens])
    if not len(sizes) or sizes[-1] <= budget:
        return tuple(tokens), 0
    first = int(np.searchsorted(sizes, budget // 2, side="right"))
    last = int(np.searchsorted(sizes, sizes[-1] - budget // 2, side="left")) + 1
    gap = Token(text=f"\n[... {last - first:,} tokens ...]\n", nll=float("nan"))
    return (*tokens[:first], gap, *tokens[last:]), last - first


def _stored_tokens(scores: "Scores", rows: set[int]) -> dict[int, tuple[Sequence[float], Sequence[int]]]:
    """(nll, rank) of every scored token, by row."""
    found, start = {}, 0
    for part in part_files(scores.directory):
        for batch in pq.ParquetFile(part).iter_batches(columns=["token_nll", "token_rank"], batch_size=1 << 10):
            for row in rows.intersection(range(start, start + len(batch))):
                place = row - start
                found[row] = (batch["token_nll"][place].as_py(), batch["token_rank"][place].as_py())
            start += len(batch)
    return found


def _tokens(record: Record, renderer: Renderer, stored: tuple | None, scorer: object | None) -> list[Token]:
    """The scored tokens; none where the record can no longer be rendered."""
    try:
        rendered = renderer(record)
    except RejectError:
        return []
    scored = [place for place, label in enumerate(rendered.labels) if label != NOT_SCORED]
    if stored is None:
        stats = scorer.score_tokens(rendered.input_ids, rendered.labels)
        stored = (stats.nll.tolist(), stats.rank.tolist())
    texts = pieces(rendered, renderer)
    if len(stored[0]) != len(scored):
        return []
    return [
        Token(text=short(texts[place], _PIECE_BYTES), nll=float(nll), rank=int(rank))
        for place, nll, rank in zip(scored, *stored, strict=True)
    ]
