"""Local naturalness: each reasoning step's nll with only the prompt and a few preceding steps as context.

LALP (arXiv 2510.03988) averages log-probabilities over the tokens of a step, and then over steps, so that a short step
counts as much as a long one; ``local_step_nll`` is that with its sign turned, and ``local_nll`` the mean over all
scored tokens, which stands beside ``nll``:

    nll_t          = -log p(y_t | prompt, the K steps before the step of t, the tokens of that step before t)
    local_nll      = mean_t nll_t
    local_step_nll = mean over steps of (mean over the tokens t of the step) nll_t

A step ends behind blank lines of the assistant's turn. Blank lines in front of a turn's first word open no step, and
what holds no word behind the last one (blanks, the end-of-turn token) belongs to the step before. A token that reaches
across the border belongs to the step it begins in. The prompt is all that stands before the turn, earlier turns with
it, and preceding steps are those of the same turn.

The first K + 1 steps of a turn have the same context in the trajectory's ordinary pass, and take their numbers from
it. Each later step is a piece of its own: prompt, K steps and the step, at positions from 0 on, packed with others as
trajectories are, so that none sees another.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lark_fast.pool.records import NOT_SCORED

if TYPE_CHECKING:
    from lark_fast.batch import Batch
    from lark_fast.rendering.renderer import Rendered, Renderer
    from lark_fast.scoring.forward import Passes, Scored, Until

BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")


class Piece(NamedTuple):
    """A step with its local context, by positions in its trajectory: tokens [0, prompt) and [start, end)."""

    prompt: int
    start: int  # of the first of the preceding steps
    first: int  # of the step's tokens, which are the scored ones
    end: int

    @property
    def n_tokens(self) -> int:
        """Tokens that pass through the student."""
        return self.prompt + self.end - self.start

    @property
    def n_scored(self) -> int:
        """Tokens that have a number in the end."""
        return self.end - self.first


def step_starts(rendered: "Rendered", renderer: "Renderer") -> NDArray[np.int32]:
    """Where the steps of a trajectory begin.

    Blank lines are looked for in the rendered text and found among the tokens by the tokenizer's offsets. Where there
    is no text (records of token ids) or there are no offsets, the text is that of the tokens, decoded one by one.

    Args:
        rendered: what ``renderer`` made of a record.
        renderer: with the tokenizer.

    Returns:
        ``[S]`` positions among the tokens, rising, at least one for each run of scored tokens: its first token.
    """
    ids = rendered.input_ids
    text, offsets = rendered.text, renderer.tokenise(rendered.text)[1] if rendered.text else None
    if offsets is None:
        text, offsets = _decoded(ids, renderer)
    begins, ends = np.asarray(offsets[: len(ids)], dtype=np.int64).T
    borders = [found.end() for found in BLANK_LINES.finditer(text)]
    behind = np.searchsorted(begins, borders)
    special = set(renderer.tokenizer.all_special_ids)

    def has_word(start: int, end: int) -> bool:
        return any(
            ids[token] not in special and text[begins[token] : ends[token]].strip() for token in range(start, end)
        )

    starts: list[int] = []
    for first, end in scored_runs(rendered.labels):
        own = [first]
        for border in np.unique(behind[(behind > first) & (behind < end)]).tolist():
            if has_word(own[-1], border):
                own.append(border)
        if len(own) > 1 and not has_word(own[-1], end):
            own.pop()
        starts += own
    return np.asarray(starts, dtype=np.int32)


def scored_runs(labels: ArrayLike) -> list[tuple[int, int]]:
    """Runs of scored tokens, which are a trajectory's assistant turns: (position of the first, behind the last)."""
    scored = np.concatenate([[False], np.asarray(labels) != NOT_SCORED, [False]])
    return [tuple(edges) for edges in np.flatnonzero(scored[1:] != scored[:-1]).reshape(-1, 2).tolist()]


def local_pieces(labels: ArrayLike, starts: NDArray[np.int32], k: int) -> list[Piece]:
    """The steps that need a pass of their own: those with more than ``k`` steps of their turn before them.

    Args:
        labels: ``[T]``, NOT_SCORED where not scored.
        starts: see ``step_starts``.
        k: preceding steps that are context, at least 1.
    """
    pieces: list[Piece] = []
    for first, end in scored_runs(labels):
        bounds = [*starts[(starts >= first) & (starts < end)].tolist(), end]
        pieces += [Piece(first, bounds[j - k], bounds[j], bounds[j + 1]) for j in range(k + 1, len(bounds) - 1)]
    return pieces


def local_means(
    scored: "Scored", labels: ArrayLike, starts: NDArray[np.int32], parts: Iterable[tuple[Piece, ArrayLike]]
) -> dict[str, float]:
    """``local_nll`` and ``local_step_nll`` of a trajectory, in nats.

    Args:
        scored: its ordinary pass.
        labels: ``[T]``, NOT_SCORED where not scored.
        starts: see ``step_starts``.
        parts: each of ``local_pieces`` with the nll of its scored tokens.
    """
    positions = np.flatnonzero(np.asarray(labels) != NOT_SCORED)
    nll, whole = scored.tokens.nll.double().numpy().copy(), True
    for piece, values in parts:
        at, whole = np.searchsorted(positions, piece.first), False
        nll[at : at + piece.n_scored] = values
    bounds = np.searchsorted(positions, starts)
    steps = np.add.reduceat(nll, bounds) / np.diff(bounds, append=len(nll))
    return {
        "local_nll": scored.means["nll"] if whole else float(nll.mean()),
        "local_step_nll": float(steps.mean()),
    }


class _Place(int):
    """A piece's place among those of its group: what its passes call it."""


@dataclass(slots=True, eq=False)
class _Group:
    """A batch of trajectories whose results are held back until those of all their pieces are there."""

    pieces: list[tuple[Any, Piece]]  # each with the member it is of
    left: int  # trajectories and pieces that are still to come
    passes: list[tuple["Batch", "list[Scored] | None"]] = field(default_factory=list)  # of the trajectories
    nll: dict[int, NDArray[np.float32]] = field(default_factory=dict)  # of pieces, by their place
    lost: set[Any] = field(default_factory=set)  # members with a piece that the memory could not hold


class LocalPasses:
    """Forward passes over trajectories and then over their pieces.

    Trajectories share passes exactly as they do without local scores, and each batch of them is followed by its own
    pieces: what a run that is stopped has to do again is one batch and its pieces, and it does them in the same packs.

    Args:
        passes: the student, ready.
        k: preceding steps that are context.
        starts: ``step_starts`` of a member of the batches.
        on_pass: hears of each pass over pieces: their lengths, and how many tokens had a number.

    Attributes:
        layout, ahead, work: see ``Passes``.
    """

    def __init__(
        self,
        passes: "Passes",
        k: int,
        starts: Callable[[Any], NDArray[np.int32]],
        on_pass: Callable[[Sequence[int], int], None] | None = None,
    ) -> None:
        self.passes, self.k, self.starts, self.on_pass = passes, k, starts, on_pass
        self.layout, self.ahead, self.work = passes.layout, passes.ahead, passes.work
        self._groups: deque[_Group] = deque()

    def run(
        self, batches: Iterable["Batch | None"], until: "Until" = iter
    ) -> Iterator[tuple["Batch", "list[Scored] | None"]]:
        """As ``Passes.run``, with ``local_nll`` and ``local_step_nll`` among the means.

        Args:
            batches: of trajectories, or None, as in ``Passes.run``.
            until: as there. A batch whose pieces are not all done then does not come back.
        """
        self._groups.clear()
        for batch, scored in self.passes.run(self._with_pieces(batches), until):
            group = self._groups[0]
            group.left -= len(batch.members)
            if isinstance(batch.members[0], _Place):
                self._take(group, batch, scored)
            else:
                group.passes.append((batch, scored))
            if not group.left:
                self._groups.popleft()
                yield from self._completed(group)

    def _with_pieces(self, batches: Iterable["Batch | None"]) -> Iterator["Batch | None"]:
        for batch in batches:
            if batch is None:
                yield None
                continue
            sequences = dict(zip(batch.members, batch.sequences, strict=True))
            pieces = [
                (member, piece)
                for member, (_, labels) in sequences.items()
                for piece in local_pieces(labels, self.starts(member), self.k)
            ]
            self._groups.append(_Group(pieces, len(batch.members) + len(pieces)))
            yield batch
            # Laid out one pass at a time: together they may be a hundred times as long as their trajectories.
            for places in self.layout.plan([piece.n_tokens for _, piece in pieces]):
                chosen = [_sequence(pieces[place][1], sequences[pieces[place][0]][0]) for place in places]
                yield self.layout.prepare([_Place(place) for place in places], chosen)

    def _take(self, group: _Group, batch: "Batch", scored: "list[Scored] | None") -> None:
        if scored is None:
            group.lost.update(group.pieces[place][0] for place in batch.members)
            return
        group.nll.update((place, one.tokens.nll.numpy()) for place, one in zip(batch.members, scored, strict=True))
        if self.on_pass is not None:
            self.on_pass(batch.lengths, batch.n_scored)

    def _completed(self, group: _Group) -> Iterator[tuple["Batch", "list[Scored] | None"]]:
        parts: dict[Any, list[tuple[Piece, NDArray[np.float32]]]] = {}
        for place, nll in group.nll.items():
            member, piece = group.pieces[place]
            parts.setdefault(member, []).append((piece, nll))
        for batch, scored in group.passes:
            if scored is None:
                yield batch, None
                continue
            made = [
                one._replace(means=one.means | local_means(one, labels, self.starts(member), parts.get(member, ())))
                for member, (_, labels), one in zip(batch.members, batch.sequences, scored, strict=True)
            ]
            if group.lost.isdisjoint(batch.members):
                yield batch, made
                continue
            for member, sequence, one in zip(batch.members, batch.sequences, made, strict=True):
                yield self.layout.prepare([member], [sequence]), None if member in group.lost else [one]


def _sequence(piece: Piece, ids: ArrayLike) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Token ids and labels of a piece."""
    ids = np.asarray(ids, dtype=np.int32)
    own = np.concatenate([ids[: piece.prompt], ids[piece.start : piece.end]])
    labels = np.full(len(own), NOT_SCORED, dtype=np.int32)
    labels[-piece.n_scored :] = own[-piece.n_scored :]
    return own, labels


def _decoded(ids: Sequence[int], renderer: "Renderer") -> tuple[str, list[tuple[int, int]]]:
    """The text of tokens, decoded one by one, and where in it each stands."""
    known: dict[int, str] = {}
    words = []
    for token in ids:
        if token not in known:
            known[token] = renderer.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        words.append(known[token])
    ends = np.cumsum([len(word) for word in words]).tolist()
    return "".join(words), list(zip([0, *ends], ends, strict=False))
