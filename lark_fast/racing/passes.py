"""Forward passes of a race: pieces of a problem's candidates go through the student, round by round.

A candidate that goes on sees its earlier pieces through their keys and values, where the model can (``Student.
continues``) and the device has room for them; else its tokens pass again from the first. Hidden states that the head
has passed over stay beside the keys and values, so that what wins is read in full without another pass through the
body. Pieces share packs with those of their own problem alone, so what comes out does not depend on which problem came
before or runs beside. On a GPU two problems take turns: while one is judged, the other's pieces are under way.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lark_fast.batch import Batch, Targets
from lark_fast.kernels.softmax_sums import concatenate
from lark_fast.kernels.token_stats import TokenStats
from lark_fast.kernels.trajectory_reduce import trajectory_reduce
from lark_fast.memory import available_memory
from lark_fast.past import Past
from lark_fast.racing.race import Outcome, Race, draw_samples, replay
from lark_fast.racing.rules import RaceRules
from lark_fast.scoring.forward import Passes, Scored, Until, columns_of
from lark_fast.student import Student

PAST_MEMORY_SHARE = 0.25  # of what is free, for the keys and values of the problems under way

OnPass = Callable[[Sequence[int], Sequence[int], int], None]  # tokens before the pieces, of the pieces, scored ones


class Entrant(Protocol):
    """What a member of a batch has to say of itself.

    Attributes:
        race: the problem whose race it runs in, or None: it is scored in full.
        copies: how many candidates have its tokens.
        token_hash: decides which tokens are in a sample, see ``head_sampling``.
    """

    race: str | None
    copies: int
    token_hash: bytes


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """What a pass over pieces calls a sequence."""

    heat: "_Heat"
    entrant: int
    tokens: NDArray[np.int64]  # that the head reads: places among those that are scored
    start: int  # tokens before the piece


@dataclass(slots=True, eq=False)
class _Heat:
    """A problem whose race is under way."""

    batch: Batch
    race: Race
    targets: list[Targets]
    audited: bool
    pasts: list[Past] | None  # None: pieces begin at the first token
    asked: list[NDArray[np.int64]] | None  # what the next round has to bring; None: it is under way
    left: int = 0  # pieces of the round that are still to come
    parts: list[list[tuple[NDArray[np.int64], TokenStats]]] = field(default_factory=list)  # of each entrant
    lost: bool = False  # there was no memory for a piece


class RacePasses:
    """Runs batches that are a problem each as races, and others as they are.

    Args:
        passes: the student, ready.
        rules: of the races.
        on_pass: hears of each pass of a race.
        sharing: how many processes have a part in the device's memory.

    Attributes:
        layout, ahead, work: see ``Passes``.
    """

    def __init__(self, passes: Passes, rules: RaceRules, on_pass: OnPass | None = None, sharing: int = 1) -> None:
        self.passes, self.rules, self._on_pass, self._sharing = passes, rules, on_pass, sharing
        self.layout, self.ahead, self.work = passes.layout, passes.ahead, passes.work
        self._heats: deque[_Heat] = deque()
        self._in_full: deque[Batch] = deque()  # of problems that no race can be run for

    def idle(self) -> bool:
        """Whether nothing is to be done before the next problem is there."""
        return not (self._heats or self._in_full)

    def run(self, batches: Iterable[Batch | None], until: Until = iter) -> Iterator[tuple[Batch, list[Scored] | None]]:
        """As ``Passes.run``, with ``n_raced``, ``winner`` and ``audited`` among the means.

        A race that is under way when ``until`` ends the batches does not come back.
        """
        self._heats.clear()
        self._in_full.clear()
        for batch, scored in self.passes.run(self._pieces(batches), until):
            if not isinstance(batch.members[0], _Piece):
                if scored is not None and batch.members[0].race is not None:
                    self._count(batch, [0] * len(batch.lengths))
                yield batch, scored and [_with(one, one.n_tokens, None, False) for one in scored]
                continue
            heat = batch.members[0].heat
            self._take(heat, batch, scored)
            if heat.left:
                continue
            if heat.lost:
                self._start_again(heat)
                continue
            heat.asked = None if heat.audited else heat.race.asks()
            if heat.asked is None:
                self._heats.remove(heat)
                done = heat.batch, self._results(heat)
                del heat, batch, scored  # and with them what the problem's tokens have left behind
                yield done

    def _pieces(self, batches: Iterable[Batch | None]) -> Iterator[Batch | None]:
        """What is to pass next; None where that depends on what is under way."""
        source, at_once = iter(batches), 1 + self.ahead
        more = True
        while more or self._heats or self._in_full:
            heat = next((heat for heat in self._heats if heat.asked is not None), None)
            if self._in_full:
                yield self._in_full.popleft()
            elif heat is not None:
                yield from self._round(heat)
            elif more and len(self._heats) < at_once:
                batch = next(source, False)
                if batch is False:
                    more = False
                elif batch is None or batch.members[0].race is None:
                    yield batch
                elif self.layout.border is not None and max(batch.lengths) > self.layout.border:
                    self._score_in_full(batch)  # positions are scaled by the length, so a piece is not as in the whole
                else:
                    self._heats.append(self._heat(batch))
            else:
                yield None

    def _heat(self, batch: Batch) -> _Heat:
        entrants: Sequence[Entrant] = batch.members
        targets = [marks if isinstance(marks, Targets) else Targets.of(marks) for _, marks in batch.sequences]
        before = [np.asarray(ids)[own.rows] for (ids, _), own in zip(batch.sequences, targets, strict=True)]
        samples = draw_samples(self.rules, (len(own.rows) for own in targets), (one.token_hash for one in entrants))
        copies = [one.copies for one in entrants]
        race = Race([own.words for own in targets], before, copies, self.rules, samples=samples)
        audited = self.rules.audits(entrants[0].race)
        keeps = not audited and self.passes.student.continues and self._has_room(sum(batch.lengths))
        return _Heat(
            batch=batch,
            race=race,
            targets=targets,
            audited=audited,
            pasts=[Past() for _ in entrants] if keeps else None,
            asked=[np.arange(length) for length in race.lengths] if audited else race.asks(),
            parts=[[] for _ in entrants],
        )

    def _has_room(self, n_tokens: int) -> bool:
        student = self.passes.student
        free = available_memory(student.device)
        each = student.past_bytes + (0 if self.rules.head_share is None else hidden_bytes(student))
        return n_tokens * each * (1 + self.ahead) * self._sharing <= PAST_MEMORY_SHARE * free

    def _round(self, heat: _Heat) -> Iterator[Batch]:
        """The passes of a round, longest pieces first."""
        asked, heat.asked = heat.asked, None
        pieces, sequences, later = [], [], []
        for entrant, tokens in enumerate(asked):
            if not len(tokens):
                continue
            if heat.pasts is not None:
                reached = int(heat.race.reached[entrant])
                passed_over, tokens = tokens[tokens < reached], tokens[tokens >= reached]
                if len(passed_over):
                    later.append(_Piece(heat, entrant, passed_over, heat.pasts[entrant].length))
                if not len(tokens):
                    continue
            pieces.append(_Piece(heat, entrant, tokens, 0 if heat.pasts is None else heat.pasts[entrant].length))
            sequences.append(self._piece_of(heat, pieces[-1]))
        heat.left = len(pieces) + len(later)
        for group in self.layout.plan([len(ids) for ids, _ in sequences]):
            chosen = [pieces[place] for place in group]
            pasts = None if heat.pasts is None else [heat.pasts[piece.entrant] for piece in chosen]
            yield self.layout.prepare(chosen, [sequences[place] for place in group], pasts)
        for group in self.layout.plan([len(piece.tokens) for piece in later]):
            chosen = [later[place] for place in group]
            hidden = [heat.pasts[piece.entrant].kept for piece in chosen]
            words = [heat.targets[piece.entrant].words[piece.tokens] for piece in chosen]
            yield self.layout.reading(chosen, hidden, words)

    @staticmethod
    def _piece_of(heat: _Heat, piece: _Piece) -> tuple[NDArray[np.int64], Targets]:
        """What passes; the entrant's past is told what is to stay of it."""
        ids, own = np.asarray(heat.batch.sequences[piece.entrant][0]), heat.targets[piece.entrant]
        end = int(piece.tokens[-1]) + 1
        if heat.pasts is not None:
            past, new = heat.pasts[piece.entrant], np.arange(heat.race.reached[piece.entrant], end)
            past.grows = end < len(own.rows)
            past.keeps = own.rows[np.setdiff1d(new, piece.tokens, assume_unique=True)] - piece.start
        asked = Targets(own.rows[piece.tokens] - piece.start, own.words[piece.tokens])
        return ids[piece.start : int(own.rows[end - 1]) + 1], asked

    def _take(self, heat: _Heat, batch: Batch, scored: list[Scored] | None) -> None:
        heat.left -= len(batch.members)
        if scored is None:
            heat.lost = True
            return
        for piece, one in zip(batch.members, scored, strict=True):
            heat.parts[piece.entrant].append((piece.tokens, one.tokens))
            if not heat.audited:
                heat.race.take(piece.entrant, piece.tokens, one.tokens.nll.numpy(), self._brier(one.tokens))
            if batch.hidden is not None:
                heat.pasts[piece.entrant].kept.clear()
        self._count(batch, [piece.start for piece in batch.members])

    def _count(self, batch: Batch, starts: Sequence[int]) -> None:
        if self._on_pass is not None:
            self._on_pass(starts, batch.lengths, batch.n_scored)

    def _start_again(self, heat: _Heat) -> None:
        """Without keys and values that may have taken the memory; and if that was not it, in full, without a race."""
        self._heats.remove(heat)
        batch, had_pasts = heat.batch, heat.pasts is not None
        heat.pasts = None
        if had_pasts:
            again = self._heat(batch)
            again.pasts = None
            self._heats.append(again)
        else:
            self._score_in_full(batch)

    def _score_in_full(self, batch: Batch) -> None:
        for group in self.layout.plan(batch.lengths):
            members = [batch.members[place] for place in group]
            self._in_full.append(self.layout.prepare(members, [batch.sequences[place] for place in group]))

    def _brier(self, tokens: TokenStats) -> NDArray[np.float32]:
        """What rho and g_hat are made of."""
        return (tokens.brier if tokens.brier_topk is None else tokens.brier_topk).numpy()

    def _results(self, heat: _Heat) -> list[Scored]:
        """One an entrant. Means of all its tokens; of one that has stopped, nll and the Brier score are forecasts, and
        the others of the tokens that were scored."""
        tokens = [_in_order(parts) for parts in heat.parts]
        lengths = [len(one.nll) for one in tokens]
        ends = torch.tensor([0, *np.cumsum(lengths)])
        columns = {
            name: None if column is None else column.tolist()
            for name, column in columns_of(trajectory_reduce(concatenate(tokens), ends)).items()
        }
        outcome = self._outcome(heat, tokens)
        used = "brier" if columns["brier_topk"] is None else "brier_topk"
        results = []
        for k, own in enumerate(tokens):
            means = {name: None if column is None else column[k] for name, column in columns.items()}
            if lengths[k] < heat.race.lengths[k]:
                means |= {"nll": float(outcome.nll[k]), used: float(outcome.brier[k])}
            one = Scored(means, int(heat.race.lengths[k]), lengths[k], own)
            results.append(_with(one, int(outcome.reached[k]), bool(outcome.winner[k]), heat.audited))
        return results

    def _outcome(self, heat: _Heat, tokens: Sequence[TokenStats]) -> Outcome:
        """How the race has ended, or of one that was audited, would have."""
        if not heat.audited:
            return heat.race.outcome()
        return replay(heat.race, [one.nll.numpy() for one in tokens], [self._brier(one) for one in tokens])


def _in_order(parts: Sequence[tuple[NDArray[np.int64], TokenStats]]) -> TokenStats:
    """An entrant's tokens as they lie in its text."""
    order = torch.from_numpy(np.argsort(np.concatenate([tokens for tokens, _ in parts])))
    return concatenate([stats for _, stats in parts]).map(lambda values: values[order])


def _with(one: Scored, n_raced: int, winner: bool | None, audited: bool) -> Scored:
    return one._replace(means=one.means | {"n_raced": n_raced, "winner": winner, "audited": audited})


def hidden_bytes(student: Student) -> int:
    """Of what the head reads of a token."""
    return student.head.weight.shape[1] * student.dtype.itemsize
