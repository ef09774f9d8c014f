"""Windows for races: the candidates of a problem stay together, and a problem that is raced is a batch by itself."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from lark_fast.batch import Targets
from lark_fast.errors import UserError
from lark_fast.hashing import hash_fields
from lark_fast.packing import windows
from lark_fast.racing.rules import RaceRules
from lark_fast.scoring.engine import Unit, Window, batches_in_full
from lark_fast.scoring.feed import Trajectory, changed_text
from lark_fast.scoring.layout import Layout
from lark_fast.scoring.store import Key


def problem_key(problem: str) -> int:
    """A number for a problem, small where there are many."""
    return int.from_bytes(hash_fields(problem.encode("utf-8", "surrogatepass"), size=8), "big")


def cut_race_windows(
    feed: Iterable[Trajectory],
    layout: Layout,
    unfinished: Mapping[Key, bytes],
    tokens_per_window: int,
    rules: RaceRules,
    begun: set[int],
) -> Iterator[Window]:
    """As ``cut_windows``, for races.

    Problems with too few candidates, or too short ones, run in none. Candidates of a problem that the store has
    candidates of already are scored in full: the race has been run without them. The rows of a race come into a journal
    together, so that a journal with some of them has had no race.

    Args:
        feed, layout, unfinished, tokens_per_window: see ``cut_windows``.
        rules: of the races.
        begun: ``problem_key`` of the problems that the store's parts have candidates of.

    Raises:
        UserError: as there; the candidates of a problem do not lie together in the pool.
    """
    cuts = windows(_problems(feed), max_tokens=tokens_per_window)
    for number, problems in enumerate(cuts):
        races: list[list[Unit]] = []
        others: list[list[Trajectory]] = []
        for items in problems:
            for item in items:
                if item.key in unfinished and unfinished[item.key] != item.content_hash:
                    raise changed_text(item.source, item.line)
            name, done = items[0].key[0], [item.key in unfinished for item in items]
            twins: dict[bytes, list[Trajectory]] = {}
            for item in items:
                twins.setdefault(item.token_hash, []).append(item)
            runs = (
                rules.races(len(items))
                and len(twins) > 1
                and problem_key(name) not in begun
                and rules.long_enough([len(Targets.of(item.labels).rows) for item in items])
            )
            if runs and not any(done):
                races.append([Unit(number, same, same[0].step_starts, name) for same in twins.values()])
            elif not (runs and all(done)):
                others += twins.values()
        batches = [layout.prepare(units, [_tokens(unit) for unit in units]) for units in races]
        batches += batches_in_full(others, layout, unfinished, number)
        flat = [item for items in problems for item in items]
        yield Window(
            number,
            [item.key for item in flat],
            batches,
            flat[0].position,
            flat[-1].position,
        )


def _tokens(unit: Unit) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    return unit.trajectories[0].input_ids, unit.trajectories[0].labels


def _problems(feed: Iterable[Trajectory]) -> Iterator[tuple[list[Trajectory], int]]:
    """The candidates of each problem, and how many tokens they have."""
    met: set[int] = set()
    for problem, group in groupby(feed, key=lambda item: item.key[0]):
        items, key = list(group), problem_key(problem)
        if key in met:
            raise UserError(
                f"{items[0].source}:{items[0].line}: problem {problem} has candidates further up, with others between; "
                "--race needs a problem's candidates together: sort the pool by problem_id"
            )
        met.add(key)
        yield items, sum(len(item.input_ids) for item in items)
