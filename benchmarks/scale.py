"""``python -m benchmarks.scale``: the tables of docs/scale.md, from a simulation of stragglers and failures.

Workers take units of work from a queue. Level one: GPUs of a node and the passes of one hour. Level two: the nodes of a
fleet and the pieces that a pool is cut into. Nothing here was measured: what is assumed stands in ``Passes`` and
``Fleet``, and ``benchmarks.scale_plan`` has the arithmetic without chance. Times are seconds.
"""

import argparse
import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from benchmarks import scale_plan
from lark_fast.tables import table

HOUR = 3600.0
SEEDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run took, in seconds; all but ``makespan`` are sums over workers."""

    workers: int
    makespan: float
    worked: float
    redone: float  # of work that was lost
    down: float  # starting or being restarted

    @property
    def idle(self) -> float:
        """Fit for work, with nothing to do."""
        return self.workers * self.makespan - self.worked - self.redone - self.down

    def share(self, name: str) -> float:
        """Of all workers' time until the end."""
        return getattr(self, name) / (self.workers * self.makespan)


def run_queue(
    work: Iterable[float],
    speeds: NDArray[np.float64],
    rng: np.random.Generator,
    *,
    mtbf: float = math.inf,
    restart: float = 0.0,
    startup: float = 0.0,
    loses: float = math.inf,
) -> Outcome:
    """Each worker takes the next unit whenever it is free; what a lost one had goes to whoever is free first.

    Args:
        work: of each unit, in seconds at speed 1, in the order of the queue.
        speeds: of each worker.
        rng: of the failures.
        mtbf: mean time between failures of a worker, exponential.
        restart: how long it is away then.
        startup: before each unit.
        loses: at a failure, of the work that was done on a unit at most so much is lost.
    """
    waiting, parked, speeds = deque(work), [], speeds.tolist()
    # (when a worker is free or fails, worker, what is left of the unit it was lost with)
    events: list[tuple[float, int, float | None]] = [(0.0, worker, None) for worker in range(len(speeds))]
    end = worked = redone = 0.0
    downs: list[tuple[float, float]] = []
    while events:
        now, worker, lost = heapq.heappop(events)
        if lost is not None:
            waiting.appendleft(lost)
            downs.append((now, restart))
            heapq.heappush(events, (now + restart, worker, None))
            if parked:
                heapq.heappush(events, (now, parked.pop(), None))
            continue
        if not waiting:
            parked.append(worker)
            continue
        left, speed = waiting.popleft(), speeds[worker]
        needs, fails = startup + left / speed, rng.exponential(mtbf) if mtbf < math.inf else math.inf
        downs.append((now, min(startup, fails)))
        if fails >= needs:
            worked += left / speed
            end = max(end, now + needs)
            heapq.heappush(events, (now + needs, worker, None))
        else:
            done = max(0.0, fails - startup) * speed
            kept = max(0.0, done - loses)
            worked, redone = worked + kept / speed, redone + (done - kept) / speed
            heapq.heappush(events, (now + fails, worker, left - kept))
    down = sum(min(end, start + seconds) - min(end, start) for start, seconds in downs)
    return Outcome(workers=len(speeds), makespan=end, worked=worked, redone=redone, down=down)


def run_shares(
    work: NDArray[np.float64], speeds: NDArray[np.float64], rng: np.random.Generator, **how: float
) -> Outcome:
    """Units are dealt out beforehand, to each worker as many."""
    own = [run_queue(work[worker :: len(speeds)], speeds[[worker]], rng, **how) for worker in range(len(speeds))]
    sums = {name: sum(getattr(one, name) for one in own) for name in ("workers", "worked", "redone", "down")}
    return Outcome(makespan=max(one.makespan for one in own), **sums)


def run_in_step(
    work: NDArray[np.float64],
    speeds: NDArray[np.float64],
    rng: np.random.Generator,
    *,
    mtbf: float = math.inf,
    restart: float = 0.0,
) -> Outcome:
    """A collective call behind every unit: all wait for the slowest, and a lost worker stops all.

    The step that it was lost in is done again.
    """
    n = len(speeds)
    times = work[: len(work) // n * n].reshape(-1, n) / speeds
    steps = times.max(axis=1)
    redone = down = 0.0
    for step in steps if mtbf < math.inf else ():
        while (fails := rng.exponential(mtbf / n)) < step:
            redone, down = redone + n * fails, down + n * restart
    makespan = steps.sum() + (redone + down) / n
    return Outcome(workers=n, makespan=float(makespan), worked=float(times.sum()), redone=redone, down=down)


def expected_without_journal(work: float, mtbf: float, restart: float) -> float:
    """How long a worker takes on average for a unit that begins anew after each failure: (M + r) (e^(w / M) - 1).

    A try fails with probability 1 - e^(-w/M). Let E be the mean time; conditioning on the first failure, E = w e^(-w/M)
    + integral_0^w (t + r + E) e^(-t/M) / M dt, solved for E.
    """
    return (mtbf + restart) * math.expm1(work / mtbf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """An hour of a node, assumed: a pass takes ``seconds``, spread by ``spread`` (standard deviation of its logarithm);
    one in ``1 / held_up`` is held up (a network disk, a clock turned down) for ``2 seconds`` or more, Pareto with index
    1.5, whose variance is infinite.
    """

    seconds: float = 1.3
    spread: float = 0.1
    held_up: float = 1 / 500
    speed_spread: float = 0.03  # among GPUs of one kind
    slow: float = 0.7  # speed of the slow GPU, where there is one
    restart: float = 180.0  # a process anew, the student loaded

    def draw(self, n: int, workers: int, slow: bool, rng: np.random.Generator) -> tuple[NDArray, NDArray, float]:
        """Work of each pass, speed of each GPU, and the makespan if nothing were held up and nobody waited."""
        plain = self.seconds * np.exp(rng.normal(0.0, self.spread, n))
        held = np.where(rng.random(n) < self.held_up, 2 * self.seconds * (1 + rng.pareto(1.5, n)), 0.0)
        speeds = np.exp(rng.normal(0.0, self.speed_spread, workers))
        speeds[0] = self.slow if slow else speeds[0]
        return plain + held, speeds, plain.sum() / speeds.sum()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Nodes that take pieces of the pool in turn, assumed."""

    nodes: int = 32
    speed_spread: float = 0.02  # among nodes
    slow: float = 0.8  # speed of one node
    startup: float = 180.0  # of a piece: a job begins, the student is loaded; finishing is in it
    restart: float = 900.0  # of a node that was lost

    def draw(self, node_hours: float, pieces: int, rng: np.random.Generator) -> tuple[NDArray, NDArray, float]:
        """As ``Passes.draw``, of pieces and nodes."""
        speeds = np.exp(rng.normal(0.0, self.speed_spread, self.nodes))
        speeds[0] = self.slow
        work = node_hours * HOUR
        return np.full(pieces, work / pieces), speeds, work / speeds.sum()


def node_rows(passes: Passes, seeds: int) -> list[list[str]]:
    """Eight GPUs for an hour; in step also 256, where nobody is slow."""
    rows = []
    for setting, slow, mtbf in (
        ("stragglers", False, math.inf),
        ("and a slow GPU", True, math.inf),
        ("and a process lost", True, 8 * HOUR),
    ):
        for name, run, workers in (
            ("equal shares", run_shares, 8),
            ("one queue", run_queue, 8),
            ("in step", run_in_step, 8),
            ("in step, 256", run_in_step, 256),
        ):
            if workers > 8 and slow:
                continue
            draw = partial(passes.draw, workers * int(HOUR / passes.seconds), workers, slow)
            how = {"mtbf": mtbf * workers / 8, "restart": passes.restart}  # one an hour, however many there are
            rows.append([setting, name, *_row(run, draw, how, seeds)])
    return rows


def fleet_rows(fleet: Fleet, node_hours: float, seeds: int) -> list[list[str]]:
    """All pieces of a pool, of several sizes."""
    rows = []
    for setting, hours in (("a GPU lost in 50,000 h", 50_000 / 8), ("a node lost a day", 24.0)):
        for pieces, run, loses in (
            (fleet.nodes, run_shares, 0.0),
            (fleet.nodes, run_shares, math.inf),
            (100, run_queue, 0.0),
            (300, run_queue, 0.0),
            (1_000, run_queue, 0.0),
            (1_000, run_queue, math.inf),
            (10_000, run_queue, 0.0),
        ):
            each = node_hours / pieces
            how = {"mtbf": hours * HOUR, "restart": fleet.restart, "startup": fleet.startup, "loses": loses}
            if loses and each > 3 * hours:  # it would be tried e^3 times and more
                told = [f"about {expected_without_journal(each, hours, fleet.restart / HOUR) / each:.0f}", "", "", ""]
            else:
                told = _row(run, partial(fleet.draw, node_hours, pieces), how, seeds)
            rows.append([setting, f"{pieces:,}", scale_plan.two_digits(each), "no" if loses else "yes", *told])
    return rows


def _row(run: Callable[..., Outcome], draw: Callable[..., tuple], how: dict[str, float], seeds: int) -> list[str]:
    """Makespan over ideal and the shares, with their range over seeds."""
    seen = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        work, speeds, ideal = draw(rng)
        outcome = run(work, speeds, rng, **how)
        seen.append([outcome.makespan / ideal, *(outcome.share(name) for name in ("idle", "down", "redone"))])
    over, *shares = np.array(seen).T
    return [f"{np.median(over):.3f} ({over.min():.3f} to {over.max():.3f})", *(f"{np.median(x):.1%}" for x in shares)]


def tables(seeds: int = SEEDS) -> dict[str, str]:
    """All tables of docs/scale.md, by name."""
    shares = ("idle", "down", "redone")
    return scale_plan.tables() | {
        "node": table(("setting", "passes", "time over ideal", *shares), node_rows(Passes(), seeds)),
        "fleet": table(
            ("setting", "pieces", "hours each", "journal", "time over ideal", *shares),
            fleet_rows(Fleet(), scale_plan.fleet_node_hours(), seeds),
        ),
    }


def main() -> None:
    """Print them."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs of each setting")
    for name, text in tables(parser.parse_args().seeds).items():
        print(f"{name}\n\n{text}")


if __name__ == "__main__":
    main()
