"""``lark-fast pilot``: short training runs of equal tokens on what each policy selects, from one student, side by side.

DIR/pool.jsonl, held-out.jsonl, measured.jsonl   what is trained on, what is not, and of that whose loss counts
DIR/scores, scores-held-out, selections          as ``score`` and ``select`` write them
DIR/runs/                                        runs under way, and checkpoints that are to stay
DIR/runs.jsonl                                   a line a run, as soon as it is done
DIR/pilot.json, pilot.md, pilot.png              what they say together
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lark_fast.errors import UserError
from lark_fast.files import atomic_open, refuse_overlap, write_json, writing_to
from lark_fast.interrupts import Interrupts
from lark_fast.intervals import refuse_without_scipy
from lark_fast.line_store import LineStore
from lark_fast.lock import refuse_taken
from lark_fast.pilot import runs as training_runs
from lark_fast.pilot import selections as making
from lark_fast.pilot.config import DEFAULT_STEPS, FULL, PilotConfig
from lark_fast.pilot.figure import draw_pilot
from lark_fast.pilot.measures import measure
from lark_fast.pilot.runs import Run, carry_out, folder_of, lengths_in, remove
from lark_fast.pilot.selections import Selections, fitting_buckets, score_split
from lark_fast.pilot.split import FILES, HELD_OUT, Split, choose_problems, write_split
from lark_fast.pilot.summary import PilotSummary
from lark_fast.pool.reading import Pool
from lark_fast.progress import duration
from lark_fast.rendering.renderer import Renderer
from lark_fast.selection.policies import find_policy
from lark_fast.student import choose_device, dtype_on, load_config, load_tokenizer
from lark_fast.student_files import find_student
from lark_fast.training.model import refuse_untrainable
from lark_fast.versions import versions

LINES, RESULT, TABLES, FIGURE = "runs.jsonl", "pilot.json", "pilot.md", "pilot.png"
_FOLDERS = (making.SCORES, making.SCORES_HELD_OUT, making.FOLDER, training_runs.FOLDER)
# What decides a run; policies, seeds and buckets only decide which runs there are.
_IDENTITY = (
    "budget", "tokens", "lr", "global_batch", "evaluations", "where", "held_out_where", "top_k",
)  # fmt: skip


def pilot(config: PilotConfig, say: Callable[[str], None] = lambda line: None) -> PilotSummary:
    """Train on what each policy selects, and on each bucket of g_hat, and compare; see the files above.

    Args:
        config: what to do.
        say: hears of every run that ends.

    Raises:
        UserError: bad input, or every run's loss explodes; finished runs are kept.
        KeyboardInterrupt: stopped; finished runs, and steps of the one under way, are kept.
    """
    refuse_without_scipy("pilot")
    for policy in config.policies:
        if policy != FULL:
            find_policy(policy)
    files = find_student(config.student, config.base)
    refuse_untrainable(files, config.lora)
    inputs = {"--pool": Pool(config.pool).inputs, "--student": files.directories}
    if config.held_out:
        inputs["--held-out"] = Pool([config.held_out]).inputs
    refuse_overlap(config.out, inputs)
    refuse_taken(config.out)
    with Interrupts():
        student, tokenizer = (load(files, config.trust_remote_code) for load in (load_config, load_tokenizer))
        options = config.options.fitting(getattr(student, "max_position_embeddings", None))
        renderer = Renderer(tokenizer, options, vocab_size=student.vocab_size, chat_template=config.chat_template)
        names = choose_problems(config)
        identity = {
            "student": files.fingerprint(),
            "problems": names.hash,
            "template": renderer.template_hash,
            **{name: getattr(config, name) for name in _IDENTITY},
            "dtype": dtype_on(choose_device(config.device), config.dtype),
            "lora": config.lora and asdict(config.lora),
            **asdict(options),
        }
        with _Store(config, identity) as store, writing_to(config.out):
            if config.overwrite:
                for name in _FOLDERS:
                    remove(Path(config.out, name))
            split = write_split(config, names, renderer)
            if store.runs and store.facts.get("content") != split.content:
                raise UserError(
                    f"--out {config.out}: the pool's or the held-out trajectories are not what they were; give another "
                    "directory or --overwrite"
                )
            store.note(content=split.content)
            score_split(config)
            buckets = fitting_buckets(config.out, config.buckets)
            if buckets != config.buckets:
                say(f"{buckets} buckets instead of {config.buckets}: the problems have too few candidates for more")
                if not (buckets or config.policies):
                    raise UserError("--buckets: no problem has two candidates with a g_hat; give --policies")
                config = replace(config, buckets=buckets)
            selections = Selections(config)
            tokens = _train(store, config, selections, renderer, say)
            return _finish(store, config, selections, split, tokens)


class _Store(LineStore):
    """The finished runs by contender and seed."""

    def __init__(self, config: PilotConfig, identity: Mapping[str, Any]) -> None:
        self.runs: dict[tuple[str, int], Run] = {}
        super().__init__(
            config.out,
            identity,
            lines=LINES,
            results=(*FILES, RESULT, TABLES, FIGURE),
            folders=_FOLDERS,
            overwrite=config.overwrite,
        )

    def take(self, entry: dict[str, Any]) -> None:
        """See ``LineStore``."""
        run = Run.from_json(entry)
        self.runs[run.contender, run.seed] = run


def _train(
    store: _Store, config: PilotConfig, selections: Selections, renderer: Renderer, say: Callable[[str], None]
) -> int:
    """All runs that are not done yet, a seed of every contender after the other; returns the tokens of a run."""
    lengths = dict[Path, NDArray[np.int64]]()

    def lengths_of(contender: str, seed: int) -> NDArray[np.int64]:
        selection = selections.of(contender, seed)
        if selection.path not in lengths:
            lengths[selection.path] = lengths_in(selection, renderer)
        return lengths[selection.path]

    for contender in config.contenders:  # what cannot be selected is told before anything is trained
        selections.of(contender, 0)
    tokens = config.tokens
    if tokens is None:
        tokens = round(DEFAULT_STEPS * config.global_batch * float(lengths_of(FULL, 0).mean()))
    wanted = [(contender, seed) for seed in range(config.seeds) for contender in config.contenders]
    if not config.keep_checkpoints:  # of a pilot that was killed behind its line
        for contender, seed in store.runs:
            remove(folder_of(config, contender, seed))
    missing, started = [one for one in wanted if one not in store.runs], time.monotonic()
    for number, (contender, seed) in enumerate(missing, 1):
        own = selections.of(contender, seed), lengths_of(contender, seed)
        run = carry_out(config, contender, seed, *own, tokens)
        store.keep(run.as_json())
        store.runs[contender, seed] = run
        if not config.keep_checkpoints:
            remove(folder_of(config, contender, seed))
        left = (time.monotonic() - started) / number * (len(missing) - number)
        ahead = f"; about {duration(left)} left" if number < len(missing) else ""
        say(f"{len(store.runs)} of {len(wanted)} runs: {_told(run)}{ahead}")
    return tokens


def _told(run: Run) -> str:
    if run.diverged is not None:
        return f"{run.contender}, seed {run.seed}: {run.diverged}"
    first, last = run.held_out[0][1], run.held_out[-1][1]
    speed = f" at {run.tokens_per_second:,.0f} tokens/s" if run.tokens_per_second else ""
    return (
        f"{run.contender}, seed {run.seed}: {run.steps:,} step(s), {run.tokens:,} tokens{speed}, held-out loss "
        f"{first:.4f} -> {last:.4f}"
    )


def _finish(store: _Store, config: PilotConfig, selections: Selections, split: Split, tokens: int) -> PilotSummary:
    """Measure, and write what is to be read."""
    out = Path(config.out)
    runs = [store.runs[contender, seed] for seed in range(config.seeds) for contender in config.contenders]
    if all(run.diverged is not None for run in runs):
        raise UserError(f"every run blows up; the first, at {runs[0].diverged}. Lower --lr")
    held_out = [record.key for record in Pool([str(out / HELD_OUT)]).read()]
    counted = set(split.measured)
    own_weights = {
        (policy, seed): [selections.of(policy, seed).held_out.get(key, 0.0) for key in held_out]
        for policy in config.policies
        for seed in range(config.seeds)
    }
    take_all = tuple(policy for policy in config.policies if selections.of(policy, 0).takes_all)
    measured = measure(
        runs,
        contenders=config.contenders,
        baseline=config.baseline,
        problems=[problem for problem, _ in held_out],
        measured=[key in counted for key in held_out],
        own_weights=own_weights,
        take_all=take_all,
    )
    facts = {
        "student": Path(config.student).name,
        "pool": [Path(path).name for path in config.pool],
        "where": config.where,
        "held_out_where": config.held_out_where,
        "trained_problems": split.pool_problems,
        "trained_trajectories": split.pool_trajectories,
        "held_out_problems": len({problem for problem, _ in split.measured}),
        "held_out_trajectories": split.held_out_trajectories,
        "measured_trajectories": len(split.measured),
        "rejected": split.rejected,
        "first_reject": split.first_reject,
        "budget": config.budget,
        "take_all": take_all,
        "seeds": config.seeds,
        "tokens": tokens,
        "steps": min(run.steps for run in runs if run.diverged is None),
        "lr": config.lr,
        "global_batch": config.global_batch,
        "lora": config.lora and asdict(config.lora),
        "dtype": config.dtype,
        "device": config.device,
        "versions": versions("torch", "transformers"),
    }
    summary = PilotSummary(out=config.out, measured=measured, runs=tuple(runs), facts=facts)
    write_json(out / RESULT, summary.as_json())
    with atomic_open(out / TABLES) as file:
        file.write(summary.as_markdown())
    draw_pilot(summary, out / FIGURE)
    store.note(content=split.content, facts=facts)
    return summary
