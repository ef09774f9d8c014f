"""``lark-fast score``: what was asked for is put together, run, and summed up."""

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lark_fast.errors import UserError
from lark_fast.files import atomic_open, refuse_overlap, writing_to
from lark_fast.interrupts import Interrupts
from lark_fast.lock import refuse_taken
from lark_fast.pool.keys import KeyTable
from lark_fast.pool.reading import Pool
from lark_fast.progress import Progress, Throughput, track
from lark_fast.rendering.renderer import Renderer, RenderOptions
from lark_fast.scoring.export import export_lark_json
from lark_fast.scoring.feed import Feed, Trajectory, default_workers
from lark_fast.scoring.metrics import MetricsLog
from lark_fast.scoring.store import ScoreStore, read_manifest
from lark_fast.scoring.summary import ScoreSummary
from lark_fast.versions import versions

if TYPE_CHECKING:
    from lark_fast.scoring.facts import Facts
    from lark_fast.scoring.forward import Scored
    from lark_fast.scoring.place import Place
    from lark_fast.scoring.scorer import Scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreConfig:
    """What ``lark-fast score`` was asked to do."""

    pool: tuple[str, ...]
    student: str
    out: str
    top_k: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    options: RenderOptions = field(default_factory=RenderOptions)
    chat_template: str | None = None  # the template itself
    tokens_per_batch: int | None = None
    workers: int | None = None  # processes that render; None: by the device
    devices: str | None = None  # one process a device, see ``team.choose_devices``; None: ``device`` in this process
    compile: bool = False
    local_steps: int | None = None  # preceding steps that are context of local scores; None: none are made
    limit: int | None = None
    dry_run: bool = False
    strict: bool = False
    overwrite: bool = False
    per_token: bool = False
    export: str | None = None  # "lark-json"
    trust_remote_code: bool = False


def score_pool(config: ScoreConfig) -> ScoreSummary | None:
    """Score every trajectory of a pool that the store does not hold yet.

    Started by torchrun, the ranks are one student, see ``ranks.py``.

    Returns:
        Counts and timing; ``dry_run`` reads, renders, counts and estimates, and writes nothing. None on every rank but
        the first.

    Raises:
        UserError: bad input; what was finished stays in the store.
        KeyboardInterrupt: as above.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # what torchrun sets
        from lark_fast.scoring.ranks import score_over_ranks

        return score_over_ranks(config)
    return score_in(open_place, config)


def score_in(open_place: Callable[[ScoreConfig], AbstractContextManager["Place"]], config: ScoreConfig) -> ScoreSummary:
    """``score_pool`` with the student wherever ``open_place`` has it."""
    pool = Pool(config.pool)
    if config.dry_run:
        from lark_fast.scoring.dry_run import dry_run

        return dry_run(config, pool)
    refuse_overlap(config.out, {"--pool": pool.inputs})
    summary = ScoreSummary(out=config.out)
    refuse_taken(config.out)
    with (
        Interrupts() as interrupts,
        open_place(config) as place,
        ScoreStore(config.out, _identity(config, place), overwrite=config.overwrite) as store,
        writing_to(config.out),
    ):
        _score(config, pool, place, store, summary, interrupts)
        started = time.monotonic()
        _finish(config, place, store, summary)
        summary.account.finish_seconds = time.monotonic() - started
    return summary


@contextmanager
def open_place(config: ScoreConfig) -> Iterator["Place"]:
    """The student, ready: in this process, or in one a device."""
    from lark_fast.scoring.place import Here

    if config.devices is not None:
        from lark_fast.scoring.team import Team, choose_devices

        with Team(config, choose_devices(config.devices, config.device)) as team:
            yield team
        return
    place = Here(load_scorer(config))
    idle = place.idle_gpus(config.device)
    if idle:
        _say(f"{idle} more GPU{'s are' if idle > 1 else ' is'} idle; --devices all takes them too")
    yield place


def load_scorer(config: ScoreConfig, *, dtype: str | None = None, **options: Any) -> "Scorer":
    """The student and what goes with it, as asked for.

    Args:
        config: of the run.
        dtype: None: ``chosen_dtype``.
        options: more that ``load_student`` takes.
    """
    from lark_fast.scoring.scorer import Scorer
    from lark_fast.student import load_student

    student = load_student(
        config.student,
        device=config.device,
        dtype=dtype or chosen_dtype(config),
        trust_remote_code=config.trust_remote_code,
        **options,
    )
    return Scorer(
        student,
        top_k=config.top_k,
        options=config.options.fitting(student.max_positions),
        chat_template=config.chat_template,
        tokens_per_batch=config.tokens_per_batch,
        compile=config.compile,
    )


def chosen_dtype(config: ScoreConfig) -> str:
    """What was asked for; a store that has been begun goes on in its own precision, wherever it was begun."""
    if config.dtype != "auto" or config.overwrite:
        return config.dtype
    try:
        return read_manifest(config.out)["identity"].get("dtype", "auto")
    except UserError:
        return "auto"  # nothing has been begun, or the store will say what is wrong with it


def make_feed(
    config: ScoreConfig,
    pool: Pool,
    renderer: Renderer,
    device_type: str,
    known: KeyTable,
    rejects: "Rejects",
    resumed: bool | None = None,
    devices: int = 1,
) -> Feed:
    """The pool's trajectories that are not known yet."""
    workers = config.workers
    if workers is None:  # a tokenizer that came with code of its own cannot be sent to other processes
        workers = 0 if config.trust_remote_code else default_workers(device_type, devices)
    return Feed(
        pool,
        renderer,
        known=known,
        on_reject=rejects,
        limit=config.limit,
        workers=workers,
        resumed=resumed,
        find_steps=config.local_steps is not None,
    )


class Rejects:
    """What becomes of records that cannot be used: counted, shown, logged; any thread may call it."""

    def __init__(self, config: ScoreConfig, summary: ScoreSummary, log: IO[str] | None = None) -> None:
        self._strict, self._summary, self._log, self._lock = config.strict, summary, log, threading.Lock()

    def __call__(self, source: str, line: int, reason: str) -> None:
        """Note a record of ``source`` and why it cannot be used.

        Raises:
            UserError: with ``strict``, at the first.
        """
        where = f"{source}:{line}: {reason}"
        with self._lock:
            self._summary.note_reject(where)
            if self._log is not None:
                self._log.write(json.dumps({"source": source, "line": line, "reason": reason}) + "\n")
        if self._strict:
            raise UserError(f"{where} (--strict)")


def _score(
    config: ScoreConfig,
    pool: Pool,
    place: "Place",
    store: ScoreStore,
    summary: ScoreSummary,
    interrupts: Interrupts,
) -> None:
    from lark_fast.scoring.engine import Engine, cut_windows

    facts, known = place.facts, KeyTable()
    for key, content in store.scored_keys():
        known.add(key, content, met=False)
    summary.ceiling, summary.account.devices = place.devices * facts.ceiling, place.devices
    if facts.unpackable is not None:
        _say(f"{facts.unpackable}: trajectories are scored in padded batches")
    with (
        _reject_log(store.directory / "rejected.jsonl") as log,
        track("scoring", pool.total_bytes) as progress,
    ):
        rejects = Rejects(config, summary, log)
        resumed = bool(known or store.unfinished)
        feed = make_feed(
            config, pool, place.renderer, facts.device_type, known, rejects, resumed, devices=place.devices
        )
        watch = _Watch(config, place.options, summary, feed, progress, MetricsLog(store.directory / "metrics.jsonl"))
        engine = Engine(
            facts.cost,
            store,
            summary.account,
            row=lambda item, scored: _row(item, scored, config.per_token),
            reject=lambda item, reason: rejects(item.source, item.line, reason),
            progress=watch,
        )
        stream = _say_what_rounding_costs(config, place, feed) if _chose_bfloat16(config, store, facts) else feed
        try:
            with place.runner(config.local_steps, engine.on_piece) as runner:
                cut = cut_windows(stream, runner.layout, store.unfinished, facts.tokens_per_window)
                engine.run(cut, runner, interrupts)
        except BaseException:
            with suppress(OSError):  # what ended the run is what is to be told
                watch.close()
            raise
        watch.close()


def _chose_bfloat16(config: ScoreConfig, store: ScoreStore, facts: "Facts") -> bool:
    """Whether this run has decided on bfloat16 by itself, for a student that may be of another precision."""
    begun = bool(store.parts() or store.unfinished)
    return config.dtype == "auto" and not begun and facts.device_type == "cpu" and facts.dtype == "bfloat16"


def _say_what_rounding_costs(config: ScoreConfig, place: "Place", feed: Feed) -> Iterator[Trajectory]:
    """The feed, once its first trajectories have been scored in both precisions."""
    from lark_fast.scoring.precision import SAMPLE

    stream = iter(feed)
    first = list(itertools.islice(stream, SAMPLE))
    cost = place.rounding_cost(config, first)
    measured = f": it moves {cost}" if cost else " (what it costs was not measured: no room for the student in float32)"
    _say(f"scoring in bfloat16, which this processor has{measured}; --dtype float32 does without")
    yield from first
    yield from stream


class _Watch:
    """Keeps the summary, the live line and metrics.jsonl up to date while the engine runs."""

    def __init__(
        self,
        config: ScoreConfig,
        options: RenderOptions,
        summary: ScoreSummary,
        feed: Feed,
        progress: Progress,
        metrics: MetricsLog,
    ) -> None:
        self.summary, self.feed, self.progress, self.metrics = summary, feed, progress, metrics
        self.limit, self.asked = options.max_length, config.options.max_length
        self.rate = Throughput(summary.ceiling)
        self.started, self.first = time.monotonic(), True

    def __call__(self, position: float) -> None:
        """How many bytes of the pool are done."""
        self._take_over()
        if self.first:  # what lies before has been scored by an earlier run
            self.progress.pace_from(position)
            self.first = False
        account = self.summary.account
        detail = self.rate.detail(account.input_tokens, account.forward_flop, account.rejected)
        self.progress.update(position, detail)
        self.metrics.update(account, self.summary.ceiling)

    def close(self) -> None:
        """The run has ended, well or not."""
        self._take_over()
        self.metrics.finish(self.summary.account, self.summary.ceiling)

    def _take_over(self) -> None:
        account, feed = self.summary.account, self.feed
        account.seconds = time.monotonic() - self.started
        account.records, account.kept = feed.records, feed.kept
        account.rendered_tokens, account.render_seconds = feed.input_tokens, feed.render_seconds
        if feed.truncated and not self.summary.truncated and self.limit < self.asked:
            _say(
                f"trajectories are cut at the student's {self.limit} positions (--max-length is {self.asked}); "
                "--long reject leaves such records out"
            )
        self.summary.truncated = feed.truncated


def _say(text: str) -> None:
    print(f"lark-fast: {text}", file=sys.stderr)


def _identity(config: ScoreConfig, place: "Place") -> dict[str, Any]:
    """Everything that decides the numbers."""
    from lark_fast.student import fingerprint

    prints = fingerprint(config.student)
    return {
        "student": prints["weights"],
        "tokenizer": prints["tokenizer"],
        "template": place.renderer.template_hash,
        "dtype": place.facts.dtype,
        "top_k": config.top_k,
        "per_token": config.per_token,
        "local_steps": config.local_steps,
        **asdict(place.options),
    }


def _row(item: Trajectory, scored: "Scored", per_token: bool) -> dict[str, Any]:
    row = {
        "problem_id": item.key[0],
        "candidate_id": item.key[1],
        "teacher": item.teacher,
        "source": item.source,
        "n_tokens": scored.n_tokens,
        "n_input_tokens": len(item.input_ids),
        "truncated": item.truncated,
        **scored.means,
        "content_hash": item.content_hash,
        "token_hash": item.token_hash,
    }
    if per_token:
        row |= {
            f"token_{name}": values.numpy()
            for name in ("nll", "brier", "brier_topk", "entropy", "rank")
            if (values := getattr(scored.tokens, name)) is not None
        }
    return row


def _finish(config: ScoreConfig, place: "Place", store: ScoreStore, summary: ScoreSummary) -> None:
    account = summary.account.as_json(summary.ceiling)
    timing = {
        name: account[name]
        for name in ("seconds", "input_tokens", "scored_tokens", "tokens_per_second", "ceiling_share")
    }
    manifest = store.finish(
        config={
            "student": config.student,
            "pool": list(config.pool),
            "limit": config.limit,
            "max_length": config.options.max_length,
            "device": config.device,
            "devices": place.devices,
            "ranks": place.facts.ranks,
            "tokens_per_batch": place.facts.tokens_per_batch,
            "compile": config.compile,
        },
        counts={"records": summary.records, "rejected": summary.rejected},
        timing=timing if summary.scored else store.manifest.get("timing", timing),
        versions=versions("torch", "transformers", "numpy", "pyarrow"),
    )
    for name in ("rows", "problems", "not_finite"):
        setattr(summary, name, manifest["counts"][name])
    summary.complete = True
    if config.export == "lark-json":
        export_lark_json(store.directory)


@contextmanager
def _reject_log(path: Path) -> Iterator[IO[str]]:
    """rejected.jsonl of this pass over the pool; what a stopped run has found so far is kept too."""
    stopped: BaseException | None = None
    with atomic_open(path) as log:
        try:
            yield log
        except (UserError, KeyboardInterrupt) as error:
            stopped = error
    if stopped is not None:
        raise stopped
