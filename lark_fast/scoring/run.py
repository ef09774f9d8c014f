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
from lark_fast.pool.shares import Share
from lark_fast.progress import Progress, Throughput, track
from lark_fast.racing.outcome import read_race
from lark_fast.racing.rules import RaceRules
from lark_fast.rendering.renderer import Renderer, RenderOptions
from lark_fast.scoring.delta import read_delta
from lark_fast.scoring.export import export_lark_json
from lark_fast.scoring.feed import Feed, Trajectory, default_workers
from lark_fast.scoring.head_summary import read_head_summary
from lark_fast.scoring.metrics import MetricsLog
from lark_fast.scoring.precision import fault_of_precision, refuse_precision, say_fallback, say_what_fp8_costs
from lark_fast.scoring.refusals import refuse_beside_race, refuse_with_a_sample
from lark_fast.scoring.store import ScoreStore, read_manifest
from lark_fast.scoring.summary import ScoreSummary
from lark_fast.student_files import StudentFiles, find_student, is_adapter
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
    student: str  # or the earlier of two states of one
    out: str
    after: str | None = None  # the later one, see ``paired``
    steps: int | None = None  # between the two; None: what ``after`` says of itself
    base: str | None = None  # of an adapter, instead of the one that it names
    top_k: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    precision: str | None = None  # "fp8": the layers' products, where the device has them, see ``lark_fast.fp8``
    device_map: str | None = None  # in place of a device, see ``lark_fast.loading.read_device_map``
    options: RenderOptions = field(default_factory=RenderOptions)
    chat_template: str | None = None  # the template itself
    tokens_per_batch: int | None = None
    workers: int | None = None  # processes that render; None: by the device
    devices: str | None = None  # one process a device, see ``team.choose_devices``; None: ``device`` in this process
    engine: str = "local"  # or "ray": ``devices`` is how many actors of a Ray cluster, see ``ray_cluster``
    ray_address: str | None = None  # None: the cluster that Ray finds, or one of this machine for the run
    compile: bool = False
    race: RaceRules | None = None  # candidates that cannot win stop early, see ``lark_fast.racing``; None: none do
    local_steps: int | None = None  # preceding steps that are context of local scores; None: none are made
    head_share: float | None = None  # of scored positions that meet the head, see ``head_sampling`` (races: ``race``)
    limit: int | None = None
    shard: str | None = None  # "3/8": that share of the pool, see ``pool.shares``; None: all of it
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
    refuse_precision(config)
    if "TORCHELASTIC_RUN_ID" in os.environ and config.race is None:  # what torchrun sets
        from lark_fast.scoring.ranks import score_over_ranks

        return score_over_ranks(config)
    return score_in(open_place, config)


def score_in(open_place: Callable[[ScoreConfig], AbstractContextManager["Place"]], config: ScoreConfig) -> ScoreSummary:
    """``score_pool`` with the student wherever ``open_place`` has it."""
    refuse_beside_race(config)
    refuse_with_a_sample(config)
    pool = Pool(config.pool, share=None if config.shard is None else Share.parse(config.shard))
    if config.ray_address is not None and config.engine != "ray":
        raise UserError("--ray-address: goes with --engine ray")
    if pool.share is not None and config.export is not None:
        raise UserError(f"--export {config.export}: takes all candidates of a problem; give it to `lark-fast merge`")
    if config.dry_run:
        from lark_fast.scoring.dry_run import dry_run

        return dry_run(config, pool)
    own = [directory for files in students_of(config) for directory in files.directories]
    refuse_overlap(config.out, {"--pool": pool.inputs, "--student": own})
    summary = ScoreSummary(out=config.out, share=pool.share)
    refuse_taken(config.out)
    with (
        Interrupts() as interrupts,
        open_place(config) as place,
        ScoreStore(config.out, _identity(config, place), overwrite=config.overwrite) as store,
        writing_to(config.out),
    ):
        steps = _steps(config, store)
        _score(config, pool, place, store, summary, interrupts)
        started = time.monotonic()
        _finish(config, pool, place, store, summary, steps)
        summary.account.finish_seconds = time.monotonic() - started
    return summary


@contextmanager
def open_place(config: ScoreConfig) -> Iterator["Place"]:
    """The student, ready: in this process, or in one a device, or in actors of a Ray cluster."""
    from lark_fast.scoring.place import Here

    if config.engine == "ray":
        if config.device_map is not None:
            raise UserError("--engine ray gives each actor a student of its own, --device-map spreads one")
        with _ray_team(config) as team:
            yield team
        return
    if config.devices is not None:
        if config.device_map is not None:
            raise UserError(
                "--devices gives each device a student of its own, --device-map spreads one: give one of them"
            )
        from lark_fast.scoring.team import Team, choose_devices

        with Team(config, choose_devices(config.devices, config.device)) as team:
            yield team
        return
    place = Here(load_scorer(config, keep_own=True))
    idle = 0 if config.device_map else place.idle_gpus(config.device)
    if idle:
        _say(f"{idle} more GPU{'s are' if idle > 1 else ' is'} idle; --devices all takes them too")
    yield place


def _ray_team(config: ScoreConfig) -> AbstractContextManager["Place"]:
    try:
        from lark_fast.scoring.ray_cluster import ray_team
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UserError("--engine ray: Ray is not installed; pip install 'lark-fast[ray]'") from None
    return ray_team(config)


def load_scorer(config: ScoreConfig, *, dtype: str | None = None, keep_own: bool = False, **options: Any) -> "Scorer":
    """The student, or two states of one, and what goes with it, as asked for.

    Args:
        config: of the run.
        dtype: None: ``chosen_dtype``.
        keep_own: see ``Scorer``.
        options: more that ``load_student`` takes.
    """
    from lark_fast.scoring.paired import PairedScorer
    from lark_fast.scoring.scorer import Scorer
    from lark_fast.student import choose_device, load_student

    dtype = dtype or chosen_dtype(config)
    files = students_of(config)
    if dtype == "auto" and config.after is not None and choose_device(config.device).type == "cpu":
        # What a few steps change can be less than what bfloat16 rounds off. Quantisers have a dtype of their own.
        dtype = "auto" if files[0].quantised else "float32"
    if config.compile and config.device_map is not None:
        raise UserError("--compile: does not go with --device-map, whose hooks no compiler sees through")
    fault = fault_of_precision(config, files[0])
    precision = config.precision if fault is None else None
    if precision is not None:
        dtype = "bfloat16"
    how = {
        "device": config.device,
        "device_map": config.device_map,
        "trust_remote_code": config.trust_remote_code,
        **options,
    }
    student = load_student(files[0], dtype=dtype, **how)
    made = {
        "top_k": config.top_k,
        "options": config.options.fitting(student.max_positions),
        "chat_template": config.chat_template,
        "tokens_per_batch": config.tokens_per_batch,
        "compile": config.compile,
        "head_share": config.head_share,
    }
    if config.after is None:
        scorer = Scorer(student, **made, precision=precision, keep_own=keep_own)
        scorer.precision_fault = fault
        return scorer
    after = load_student(files[1], dtype=str(student.dtype).removeprefix("torch."), **how)
    return PairedScorer(student, after, **made)


def students_of(config: ScoreConfig) -> list[StudentFiles]:
    """Where the student is, or two states of one, of which ``--base`` is for the adapters."""
    if config.after is None:
        return [find_student(config.student, config.base)]
    paths = (config.student, config.after)
    adapters = [is_adapter(path) for path in paths]
    given = [config.base if adapter or not any(adapters) else None for adapter in adapters]
    return [find_student(path, base) for path, base in zip(paths, given, strict=True)]


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
    beside: int | None = None,
) -> Feed:
    """The pool's trajectories that are not known yet."""
    workers = config.workers
    if workers is None:  # a tokenizer that came with code of its own cannot be sent to other processes
        workers = 0 if config.trust_remote_code else default_workers(device_type, devices, beside)
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
    from lark_fast.racing.windows import cut_race_windows, problem_key
    from lark_fast.scoring.engine import Engine, cut_windows

    facts, known, begun = place.facts, KeyTable(), set()
    for key, content in store.scored_keys():
        known.add(key, content, met=False)
        if config.race is not None:
            begun.add(problem_key(key[0]))
    summary.ceiling, summary.account.devices = place.devices * facts.ceiling, place.devices
    if config.after is not None and config.dtype == "auto" and not _begun(store):
        _say_in_what_precision(facts)
    if facts.unpackable is not None:
        _say(f"{facts.unpackable}: trajectories are scored in padded batches")
    with (
        _reject_log(store.directory / "rejected.jsonl") as log,
        track("scoring", pool.total_bytes) as progress,
    ):
        rejects = Rejects(config, summary, log)
        resumed = bool(known or store.unfinished)
        feed = make_feed(
            config, pool, place.renderer, facts.device_type, known, rejects, resumed, place.devices, place.beside
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
        say_fallback(facts.precision_fault, facts.dtype)
        stream = feed
        if facts.precision is not None:
            stream = feed if _begun(store) else say_what_fp8_costs(place, feed, store, summary)
        elif _chose_bfloat16(config, store, facts):
            stream = _say_what_rounding_costs(config, place, feed)
        try:
            with place.runner(config, engine) as runner:
                how = (stream, runner.layout, store.unfinished, facts.tokens_per_window)
                if config.race is None:
                    cut = cut_windows(*how, config.head_share)
                else:
                    cut = cut_race_windows(*how, config.race, begun)
                engine.run(cut, runner, interrupts)
        except BaseException:
            with suppress(OSError):  # what ended the run is what is to be told
                watch.close()
            raise
        watch.close()
    if pool.share is not None and known.unmet():
        raise UserError(
            f"--out {config.out}: {known.unmet():,} of its trajectories are not of share {pool.share} of this pool; "
            "a pool that is scored in shares may grow at its end alone"
        )


def _begun(store: ScoreStore) -> bool:
    return bool(store.parts() or store.unfinished)


def _chose_bfloat16(config: ScoreConfig, store: ScoreStore, facts: "Facts") -> bool:
    """Whether this run has decided on bfloat16 by itself, for a student that may be of another precision."""
    return config.dtype == "auto" and not _begun(store) and facts.device_type == "cpu" and facts.dtype == "bfloat16"


def _say_what_rounding_costs(config: ScoreConfig, place: "Place", feed: Feed) -> Iterator[Trajectory]:
    """The feed, once its first trajectories have been scored in both precisions."""
    from lark_fast.scoring.precision import SAMPLE

    stream = iter(feed)
    first = list(itertools.islice(stream, SAMPLE))
    cost = place.rounding_cost(config, first)
    measured = f": it moves {cost}" if cost else " (what it costs was not measured)"
    _say(f"scoring in bfloat16, which this processor has{measured}; --dtype float32 does without")
    yield from first
    yield from stream


def _say_in_what_precision(facts: "Facts") -> None:
    """Two states of a student are compared, and nobody has chosen a precision."""
    rounding = "what a few steps change can be less than bfloat16 rounds off"
    if facts.dtype != "float32":
        _say(f"the two are compared in {facts.dtype}; {rounding}, and --dtype float32 does not")
    elif facts.multiplies_bfloat16:
        _say(f"the two are compared in float32: {rounding}; --dtype bfloat16 is faster")


def _steps(config: ScoreConfig, store: ScoreStore) -> int | None:
    """Between two states of a student; None where there is one."""
    if config.after is None or config.steps is not None:
        return config.steps
    from lark_fast.training.state import MANIFEST, steps_from

    identity = store.identity
    steps = steps_from({"weights": identity["student"], "adapter": identity.get("adapter")}, config.after)
    if steps is None:
        _say(
            "how many steps lie between the two is not known, so rho_measured is of all of them together; --steps N "
            "makes it a step's"
        )
        return 1
    _say(f"{steps:,} steps lie between the two, as {Path(config.after) / MANIFEST} says: rho_measured is a step's")
    return steps


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
    prints, *later = (files.fingerprint() for files in students_of(config))
    # Of the later of two states; the two have one tokenizer.
    after = {
        f"after_{part}".removesuffix("_weights"): other[part]
        for other in later
        for part in other.keys() - {"tokenizer"}
    }
    return {
        "student": prints.pop("weights"),
        **prints,
        **after,
        "template": place.renderer.template_hash,
        "dtype": place.facts.dtype,
        "top_k": config.top_k,
        "per_token": config.per_token,
        "local_steps": config.local_steps,
        **asdict(place.options),
        **({} if config.head_share is None else {"head_share": config.head_share}),
        **({} if config.shard is None else {"shard": config.shard}),
        **({} if config.race is None else {"race": config.race.as_json()}),
        **({} if place.facts.precision is None else {"precision": place.facts.precision}),
    }


def _row(item: Trajectory, scored: "Scored", per_token: bool) -> dict[str, Any]:
    row = {
        "problem_id": item.key[0],
        "candidate_id": item.key[1],
        "teacher": item.teacher,
        "source": item.source,
        "line": item.line,
        "ordinal": item.ordinal,
        "n_tokens": scored.n_tokens,
        "n_head": scored.n_head,
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
        if scored.nll_after is not None:
            row["token_nll_after"] = scored.nll_after.numpy()
    return row


def _finish(
    config: ScoreConfig, pool: Pool, place: "Place", store: ScoreStore, summary: ScoreSummary, steps: int | None
) -> None:
    account = summary.account.as_json(summary.ceiling)
    timing = {
        name: account[name]
        for name in ("seconds", "input_tokens", "scored_tokens", "tokens_per_second", "ceiling_share")
    }
    manifest = store.finish(
        steps=steps,
        config={
            "student": config.student,
            "base": config.base,
            "after": config.after,
            "pool": list(config.pool),
            "limit": config.limit,
            "max_length": config.options.max_length,
            "device": config.device,
            "engine": config.engine,
            "devices": place.devices,
            "device_map": config.device_map,
            "ranks": place.facts.ranks,
            "tokens_per_batch": place.facts.tokens_per_batch,
            "compile": config.compile,
        },
        counts={"records": summary.records, "rejected": summary.rejected},
        timing=timing if summary.scored else store.manifest.get("timing", timing),
        versions=versions("torch", "transformers", "numpy", "pyarrow"),
        **({} if pool.share is None else {"share": {"pool": pool.sizes, "records": pool.ordinals}}),
    )
    for name in ("rows", "problems", "not_finite"):
        setattr(summary, name, manifest["counts"].get(name))
    if config.race is not None:
        summary.race = read_race(store.directory, config.race)
    if steps is not None and pool.share is None:
        summary.delta = read_delta(store.directory, steps)
    if config.head_share is not None:
        summary.sample = read_head_summary(store.directory, place.facts.cost, manifest["brier"])
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
