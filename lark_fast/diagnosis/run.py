"""``lark-fast diagnose``: a sample's gradients, what the scores say of them, and what real steps do."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from lark_fast.diagnosis.config import DiagnoseConfig
from lark_fast.diagnosis.exact import relative_rate
from lark_fast.diagnosis.figure import draw_diagnosis
from lark_fast.diagnosis.gradients import Gradients
from lark_fast.diagnosis.measures import BY_LOT, FULL, measure
from lark_fast.diagnosis.sample import Candidate, Sample, draw_sample
from lark_fast.diagnosis.summary import DiagnoseSummary
from lark_fast.errors import UserError
from lark_fast.files import atomic_open, refuse_overlap, write_json, writing_to
from lark_fast.interrupts import Interrupts
from lark_fast.intervals import refuse_without_scipy
from lark_fast.line_store import LineStore
from lark_fast.lock import refuse_taken
from lark_fast.pool.reading import Pool
from lark_fast.progress import track
from lark_fast.rendering.renderer import Rendered, Renderer
from lark_fast.scoring.learnability import g_hat
from lark_fast.scoring.scorer import Scorer
from lark_fast.selection.policies import POLICIES, RANDOM, PolicyOptions, random_draws
from lark_fast.selection.scored_rows import key_hash
from lark_fast.student import load_student
from lark_fast.student_files import find_student
from lark_fast.versions import versions

if TYPE_CHECKING:
    from lark_fast.student import Student

LINES, SUMMARY, TABLES, FIGURE = "problems.jsonl", "summary.json", "diagnosis.md", "diagnosis.png"
POLICY_NAMES = ("chi2", "topb", RANDOM)
DESCENT_FALL = 0.01  # the relative fall that the gradient foretells for a step of plain descent


def diagnose(config: DiagnoseConfig) -> DiagnoseSummary:
    """Measure what LARK's assumptions cost on some problems of a pool, and whether g_hat orders as gradients do.

    Writes ``problems.jsonl`` (a line a problem as soon as it is done), ``summary.json``, ``diagnosis.md`` and
    ``diagnosis.png`` into ``out``.

    Raises:
        UserError: bad input; no memory; the student's loss or gradients are not finite.
        KeyboardInterrupt: stopped; the finished problems are kept.
    """
    refuse_without_scipy("diagnose")
    files = find_student(config.student, config.base)
    refuse_overlap(config.out, {"--pool": Pool(config.pool).inputs, "--student": files.directories})
    refuse_taken(config.out)
    if files.quantised and config.parameters != "lora":
        raise UserError(f"--student {config.student}: is quantised, and has no gradients of its own; --parameters lora")
    student = load_student(files, device=config.device, dtype=config.dtype, trust_remote_code=config.trust_remote_code)
    options = config.options.fitting(student.max_positions)
    renderer = Renderer(student.tokenizer, options, vocab_size=student.vocab_size, chat_template=config.chat_template)
    sample = draw_sample(
        config.pool,
        renderer,
        problems=config.problems,
        candidates=config.candidates,
        seed=config.seed,
        where=config.where,
    )
    names = ("problems", "candidates", "where", "parameters", "budget", "lr", "steps", "top_k", "seed")
    identity = {
        "student": files.fingerprint(),
        "dtype": str(student.dtype).removeprefix("torch."),
        **{name: getattr(config, name) for name in names},
        **asdict(options),
        "template": renderer.template_hash,
        "sample": sample.content,
    }
    results = (SUMMARY, TABLES, FIGURE)
    with (
        _Store(config.out, identity, lines=LINES, results=results, overwrite=config.overwrite) as store,
        Interrupts(),
        writing_to(config.out),
    ):
        try:
            size = _measure_problems(store, student, sample, config)
        except torch.OutOfMemoryError as error:
            raise UserError("no memory for a backward pass: lower --max-length, or take --parameters lora") from error
        lines = [store.lines[problem] for problem in sample.problems if problem in store.lines]
        measured = measure(lines, budget=config.budget, dtype=identity["dtype"])
        facts = _facts(config, student, sample, size, sum(line.get("seconds", 0.0) for line in lines))
        summary = DiagnoseSummary(out=config.out, measured=measured, facts=facts)
        write_json(Path(config.out) / SUMMARY, summary.as_json())
        with atomic_open(Path(config.out) / TABLES) as file:
            file.write(summary.as_markdown())
        draw_diagnosis(summary, Path(config.out) / FIGURE)
        store.note(facts=facts)
    return summary


class _Store(LineStore):
    """The finished problems by their name."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.lines: dict[str, dict[str, Any]] = {}
        super().__init__(*arguments, **options)

    def take(self, entry: dict[str, Any]) -> None:
        """See ``LineStore``."""
        parts = () if not entry["nll"] else ("candidates", "brier", "gram", "stranger", "weights", "steps")
        if missing := [name for name in ("not_finite", *parts) if name not in entry]:
            raise KeyError(missing[0])
        self.lines[entry["problem_id"]] = entry


def _measure_problems(store: _Store, student: "Student", sample: Sample, config: DiagnoseConfig) -> int:
    """Measure the problems that are not measured yet; returns how many parameters the gradients are of."""
    scorer = Scorer(student, top_k=config.top_k)
    gradients = Gradients(student, config.parameters, seed=config.seed)
    names = list(sample.problems)
    tokens = {
        name: sum(len(one.rendered.input_ids) for one in candidates) for name, candidates in sample.problems.items()
    }
    done, total = 0, sum(tokens.values())
    with track("measuring gradients", total) as progress:
        for number, name in enumerate(names):
            if name not in store.lines:
                # Of a single problem, there is none.
                stranger = names[(number + 1) % len(names)]
                other = sample.problems[stranger][0] if stranger != name else None
                untried = not any(line["nll"] for line in store.lines.values())
                started = time.monotonic()
                line = _measure_problem(
                    name, sample.problems[name], other, scorer, gradients, config, first_of_all=untried
                )
                line["seconds"] = round(time.monotonic() - started, 2)
                store.keep(line)
                store.take(line)
            done += tokens[name]
            progress.update(done, f"{number + 1:,} of {len(names):,} problems")
    return gradients.size


def _measure_problem(
    problem: str,
    candidates: Sequence[Candidate],
    stranger: Candidate | None,
    scorer: Scorer,
    gradients: Gradients,
    config: DiagnoseConfig,
    *,
    first_of_all: bool,
) -> dict[str, Any]:
    """A line of problems.jsonl; candidates whose loss or gradient is not finite are named in it and left out.

    ``stranger`` is a trajectory of another problem; ``first_of_all``: nothing has been measured yet.
    """
    stats = scorer.score_rendered([one.rendered for one in candidates])
    count = len(candidates)
    gram = gradients.gram([one.rendered for one in candidates], None if stranger is None else stranger.rendered)
    nll, brier = (np.array([getattr(one, name) for one in stats]) for name in ("nll", "brier_used"))
    usable = np.flatnonzero(np.isfinite(nll) & np.isfinite(brier) & np.isfinite(np.diag(gram)[:count]) & (nll > 0))
    if not len(usable) and first_of_all:
        first = candidates[0].record
        raise UserError(
            f"{first.source}:{first.line}: the student's loss or its gradient is not finite (nll {nll[0]:g}, squared "
            f"gradient {gram[0, 0]:g}), nor is that of any other candidate of problem {problem!r}, the first that was "
            "tried; nothing can be said of such a student. Look at its weights, or give --dtype float32"
        )
    named = [f"{one.record.source}:{one.record.line}" for one in candidates]
    not_finite = [name for index, name in enumerate(named) if index not in usable]
    if not len(usable):
        return {"problem_id": problem, "not_finite": not_finite, "nll": []}
    kept = [candidates[index] for index in usable]
    nll, brier, own = nll[usable], brier[usable], gram[np.ix_(usable, usable)]
    foreign = stranger is not None and bool(np.isfinite(gram[-1, -1]))
    weights = _weights(kept, g_hat(nll, brier, np.zeros(len(usable))), config)
    return {
        "problem_id": problem,
        "candidates": [
            {
                "candidate_id": one.record.key[1],
                "teacher": one.record.teacher,
                "source": one.record.source,
                "line": one.record.line,
                "n_tokens": one.rendered.n_scored,
            }
            for one in kept
        ],
        "not_finite": not_finite,
        "nll": nll.tolist(),
        "brier": brier.tolist(),
        "gram": own.tolist(),
        "stranger": {
            "problem_id": stranger.record.key[0] if foreign else None,
            "squared_norm": float(gram[-1, -1]) if foreign else None,
            "products": gram[usable, -1].tolist() if foreign else None,
        },
        "weights": {name: q.tolist() for name, q in weights.items()},
        "steps": _take_steps([one.rendered for one in kept], own, nll, weights, gradients, config),
    }


def _weights(
    candidates: Sequence[Candidate], g: NDArray[np.float64], config: DiagnoseConfig
) -> dict[str, NDArray[np.float64]]:
    """``[K]`` each: all alike, and where there are more than the budget, what policies would choose, and by lot."""
    found = {FULL: np.full(len(candidates), 1 / len(candidates))}
    if len(candidates) <= config.budget:
        return found
    by_chance = random_draws(np.array([key_hash(one.record.key) for one in candidates], dtype=np.uint64), config.seed)
    columns = {"g_hat": g[None], RANDOM: by_chance[None]}
    for name in POLICY_NAMES:
        found[name] = POLICIES[name].weigh(columns, PolicyOptions(budget=config.budget))[0][0]
    # The same weights, the largest to whom chance puts first: what is left of chi2's effect without its choice.
    found[BY_LOT] = np.empty(len(candidates))
    found[BY_LOT][np.argsort(by_chance)] = np.sort(found["chi2"])[::-1]
    return found


def _take_steps(
    rows: Sequence[Rendered],
    gram: NDArray[np.float64],
    nll: NDArray[np.float64],
    weights: Mapping[str, NDArray[np.float64]],
    gradients: Gradients,
    config: DiagnoseConfig,
) -> dict[str, dict[str, Any]]:
    """By optimiser: the loss before and after, of each trajectory alone and of each weighting."""

    def around(q: NDArray[np.float64], adaptive: bool) -> dict[str, Any]:
        rate = relative_rate(gram, nll, q)
        lr = config.lr if adaptive else DESCENT_FALL / rate if rate > 0 else 0.0
        steps = config.steps if adaptive else 1
        before, after = gradients.losses_around_step(rows, q, lr=lr, steps=steps, adaptive=adaptive)
        return {"lr": lr, "steps": steps, "before": _number(before), "after": _number(after)}

    found = {}
    for name, adaptive in (("sgd", False), ("adamw", True)):
        alone = [around(np.eye(len(rows))[index], adaptive) for index in range(len(rows))]
        found[name] = {"alone": alone, **{policy: around(q, adaptive) for policy, q in weights.items()}}
    return found


def _number(value: float) -> float | None:
    """None for what JSON cannot hold."""
    return value if np.isfinite(value) else None


def _facts(config: DiagnoseConfig, student: "Student", sample: Sample, size: int, seconds: float) -> dict[str, Any]:
    return {
        "student": Path(config.student).name,
        "pool": [Path(path).name for path in config.pool],
        "where": config.where,
        "parameters": config.parameters,
        "n_parameters": size,
        "budget": config.budget,
        "lr": config.lr,
        "steps": config.steps,
        "descent_fall": DESCENT_FALL,
        "top_k": config.top_k,
        "seed": config.seed,
        "dtype": str(student.dtype).removeprefix("torch."),
        "device": str(student.device),
        "rejected": sample.rejected,
        "first_reject": sample.first_reject,
        "seconds": round(seconds, 1),
        "versions": versions("torch", "transformers"),
    }
