"""``lark-fast score``: a pool streams through the renderer and the scorer into a store, one window at a time."""

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

import lark_fast
from lark_fast.errors import RejectError, UserError
from lark_fast.files import atomic_open, refuse_overlap, writing_to
from lark_fast.packing import windows
from lark_fast.pool.keys import KeyTable
from lark_fast.pool.reading import Pool, Rejected
from lark_fast.pool.records import Record
from lark_fast.progress import Progress, track
from lark_fast.rendering.renderer import Rendered, Renderer, RenderOptions, TemplateError
from lark_fast.scoring.export import export_lark_json
from lark_fast.scoring.store import ScoreStore

SHOWN_REJECTS = 3


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
    limit: int | None = None
    dry_run: bool = False
    strict: bool = False
    overwrite: bool = False
    per_token: bool = False
    export: str | None = None  # "lark-json"
    trust_remote_code: bool = False


@dataclass(slots=True, kw_only=True)
class ScoreSummary:
    """What came of a run."""

    out: str
    records: int = 0  # read from the pool
    scored: int = 0  # in this run
    kept: int = 0  # scored by an earlier run
    truncated: int = 0  # in this run
    rejected: int = 0
    first_rejects: list[str] = field(default_factory=list)
    input_tokens: int = 0  # of the trajectories scored in this run
    scored_tokens: int = 0
    seconds: float = 0.0  # of rendering, forward passes and writing
    rows: int = 0  # in the store
    problems: int = 0
    not_finite: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Input tokens a second, rendering and writing included."""
        return self.input_tokens / self.seconds if self.seconds else 0.0


def score_pool(config: ScoreConfig) -> ScoreSummary:
    """Score every trajectory of a pool that the store does not hold yet.

    Returns:
        Counts and timing; ``dry_run`` reads, renders and counts, and writes nothing.

    Raises:
        UserError: bad input; what was finished stays in the store.
        KeyboardInterrupt: as above.
    """
    pool = Pool(config.pool)
    if config.dry_run:
        return _dry_run(config, pool)
    refuse_overlap(config.out, {"--pool": pool.inputs})
    from lark_fast.scoring.scorer import Scorer
    from lark_fast.student import load_student

    student = load_student(
        config.student, device=config.device, dtype=config.dtype, trust_remote_code=config.trust_remote_code
    )
    options = config.options.fitting(student.max_positions)
    scorer = Scorer(
        student,
        top_k=config.top_k,
        options=options,
        chat_template=config.chat_template,
        tokens_per_batch=config.tokens_per_batch,
    )
    store = ScoreStore(config.out, _identity(config, scorer), overwrite=config.overwrite)
    summary = ScoreSummary(out=config.out)
    rejects = store.directory / "rejected.jsonl"
    with writing_to(config.out), _reject_log(rejects) as log, track("scoring", pool.total_bytes) as progress:
        display = _Display(progress, pool, summary)
        stream = _Stream(config, pool, store, scorer.renderer, summary, log)
        for window in windows(((item, len(item[1].input_ids)) for item in stream), max_tokens=scorer.tokens_per_window):
            rendered = [rendered for _, rendered in window]
            stats = scorer.score_rendered(rendered, display.inside_window(sum(len(r.input_ids) for r in rendered)))
            store.append([_row(record, s, config) for (record, _), s in zip(window, stats, strict=True)])
            summary.scored += len(window)
            summary.input_tokens += sum(s.n_input_tokens for s in stats)
            summary.scored_tokens += sum(s.n_tokens for s in stats)
            display.after_window()
    with writing_to(config.out):
        _finish(config, store, summary)
    return summary


class _Stream:
    """The records of the pool that are still to be scored, rendered; rejects go to the log on the way."""

    def __init__(
        self,
        config: ScoreConfig,
        pool: Pool,
        store: ScoreStore | None,
        renderer: Renderer,
        summary: ScoreSummary,
        log: IO[str] | None,
    ) -> None:
        self.config, self.pool, self.renderer, self.summary, self.log = config, pool, renderer, summary, log
        self.known = KeyTable()
        for key, content in store.keys() if store else ():
            self.known.add(key, content, met=False)
        self.resumed = len(self.known) > 0

    def __iter__(self) -> Iterator[tuple[Record, Rendered]]:
        for item in self.pool.read(self.config.limit):
            self.summary.records += 1
            if isinstance(item, Rejected):
                self.reject(item.source, item.line, item.reason)
            elif self._is_new(item):
                try:
                    rendered = self.renderer(item)
                except TemplateError as error:
                    # The template is at fault, so others will follow: say so before hours are spent. A run that has
                    # got somewhere goes on instead, since another rendering could not share its directory.
                    if not self.resumed and not self.summary.scored:
                        raise UserError(f"{item.source}:{item.line}: {error}") from error
                    self.reject(item.source, item.line, str(error))
                except RejectError as error:
                    self.reject(item.source, item.line, str(error))
                else:
                    self._note_truncation(rendered)
                    self.known.add(item.key, item.content_hash(), met=True)
                    yield item, rendered

    def _note_truncation(self, rendered: Rendered) -> None:
        self.summary.truncated += rendered.truncated
        limit, asked = self.renderer.options.max_length, self.config.options.max_length
        if self.summary.truncated == 1 and rendered.truncated and limit < asked:
            print(
                f"lark-fast: trajectories are cut at the student's {limit} positions (--max-length is {asked}); "
                "--long reject leaves such records out",
                file=sys.stderr,
            )

    def _is_new(self, record: Record) -> bool:
        entry = self.known.find(record.key)
        if entry is None:
            return True
        if entry.met:
            problem, candidate = record.key
            self.reject(
                record.source, record.line, f"problem {problem!r} has a candidate {candidate!r} already (duplicate)"
            )
            return False
        if entry.content != KeyTable.short_content(record.content_hash()):
            # A stored score must not stand for a text that is no longer there.
            raise UserError(
                f"{record.source}:{record.line}: this record's text is not the one that was scored; "
                "give a changed pool a directory of its own, or --overwrite"
            )
        self.known.mark(record.key)
        self.summary.kept += 1
        return False

    def reject(self, source: str, line: int, reason: str) -> None:
        """Count and log a record that cannot be used."""
        self.summary.rejected += 1
        where = f"{source}:{line}: {reason}"
        if self.config.strict:
            raise UserError(f"{where} (--strict)")
        if len(self.summary.first_rejects) < SHOWN_REJECTS:
            self.summary.first_rejects.append(where)
        if self.log is not None:
            self.log.write(json.dumps({"source": source, "line": line, "reason": reason}) + "\n")


def _dry_run(config: ScoreConfig, pool: Pool) -> ScoreSummary:
    from lark_fast.student import load_config, load_tokenizer

    student = load_config(config.student, config.trust_remote_code)
    options = config.options.fitting(getattr(student, "max_position_embeddings", None))
    tokenizer = load_tokenizer(config.student, config.trust_remote_code)
    renderer = Renderer(tokenizer, options, vocab_size=student.vocab_size, chat_template=config.chat_template)
    summary = ScoreSummary(out=config.out)
    with track("rendering", pool.total_bytes) as progress:
        display = _Display(progress, pool, summary)
        for _, rendered in _Stream(config, pool, None, renderer, summary, None):
            summary.scored += 1
            summary.input_tokens += len(rendered.input_ids)
            summary.scored_tokens += rendered.n_scored
            display.after_window()
    return summary


def _identity(config: ScoreConfig, scorer: Any) -> dict[str, Any]:
    """Everything that decides the numbers."""
    from lark_fast.student import fingerprint

    prints = fingerprint(config.student)
    return {
        "student": prints["weights"],
        "tokenizer": prints["tokenizer"],
        "template": scorer.renderer.template_hash,
        "dtype": str(scorer.student.dtype).removeprefix("torch."),
        "top_k": config.top_k,
        "per_token": config.per_token,
        **asdict(scorer.options),
    }


def _row(record: Record, stats: Any, config: ScoreConfig) -> dict[str, Any]:
    row = {
        "problem_id": record.key[0],
        "candidate_id": record.key[1],
        "teacher": record.teacher,
        "source": record.source,
        "n_tokens": stats.n_tokens,
        "n_input_tokens": stats.n_input_tokens,
        "truncated": stats.truncated,
        "nll": stats.nll,
        "brier": stats.brier,
        "brier_topk": stats.brier_topk,
        "entropy": stats.entropy,
        "rank_mean": stats.rank_mean,
        "rsr": stats.rsr,
        "content_hash": record.content_hash(),
        "token_hash": stats.token_hash,
    }
    if config.per_token:
        row |= {
            f"token_{name}": values.numpy()
            for name in ("nll", "brier", "brier_topk", "entropy", "rank")
            if (values := getattr(stats.tokens, name)) is not None
        }
    return row


def _finish(config: ScoreConfig, store: ScoreStore, summary: ScoreSummary) -> None:
    import torch
    import transformers

    timing = {
        "seconds": round(summary.seconds, 3),
        "input_tokens": summary.input_tokens,
        "scored_tokens": summary.scored_tokens,
        "tokens_per_second": round(summary.tokens_per_second, 1),
    }
    manifest = store.finish(
        config={
            "student": config.student,
            "pool": list(config.pool),
            "limit": config.limit,
            "max_length": config.options.max_length,
            "device": config.device,
            "tokens_per_batch": config.tokens_per_batch,
        },
        counts={"records": summary.records, "rejected": summary.rejected},
        timing=timing if summary.scored else store.manifest.get("timing", timing),
        versions={
            "lark_fast": lark_fast.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
            "pyarrow": pa.__version__,
            "python": platform.python_version(),
        },
    )
    summary.rows = manifest["counts"]["rows"]
    summary.problems = manifest["counts"]["problems"]
    summary.not_finite = manifest["counts"]["not_finite"]
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


class _Display:
    """How far through the pool's bytes the run is, and at what rate, between windows and inside them."""

    def __init__(self, progress: Progress, pool: Pool, summary: ScoreSummary) -> None:
        self.progress, self.pool, self.summary, self.started = progress, pool, summary, time.monotonic()

    def inside_window(self, tokens: int) -> Callable[[float], None]:
        """What a scorer calls with the share it has done of a window of so many tokens."""
        behind, ahead = self.progress.done, self.pool.bytes_read
        return lambda share: self._show(behind + share * (ahead - behind), self.summary.input_tokens + share * tokens)

    def after_window(self) -> None:
        """Note the time and show where the run stands."""
        self.summary.seconds = time.monotonic() - self.started
        self._show(self.pool.bytes_read, self.summary.input_tokens)

    def _show(self, done: float, tokens: float) -> None:
        rejected = self.summary.rejected
        rate = tokens / max(time.monotonic() - self.started, 1e-9)
        self.progress.update(done, f"{rate:,.0f} tokens/s" + (f", {rejected:,} rejected" if rejected else ""))
