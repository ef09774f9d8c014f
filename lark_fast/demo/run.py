"""``lark-fast demo``: make a student and a pool, then score, select, train, and say what was gained."""

import json
import random
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from lark_fast.demo.figure import draw_gain
from lark_fast.demo.measures import selection_loss, solved
from lark_fast.demo.problems import make_problems
from lark_fast.demo.result import Outcome, Result, conclusion, result_table, share, teachers_table
from lark_fast.demo.student import make_student
from lark_fast.demo.teachers import TEACHERS, ask, make_pool, make_school
from lark_fast.errors import UserError

if TYPE_CHECKING:
    from lark_fast.selection.run import SelectionSummary
    from lark_fast.training.config import TrainSummary

# The held-out pool answers the first of the new problems; the student is asked all of them and trained on none.
SCHOOL_PROBLEMS, POOL_PROBLEMS, HELD_OUT_PROBLEMS, NEW_PROBLEMS = 8000, 400, 100, 300
EPOCHS = 4  # of training on a selection; school is one pass, for its problems cost nothing
POLICIES = {"chi2": "LARK's choice", "random": "any", "nll": "the most familiar"}
BUDGET = 2
MARKER = "made-by-lark-fast-demo"


def run_demo(out: Path, *, seed: int = 0, scale: float = 1.0) -> Result:
    """Run the whole path, print the result and draw it.

    Args:
        out: directory for everything that is made; an earlier demo there is overwritten.
        seed: of the problems, the answers, the student's first weights, the order of training and the policy random.
        scale: share of the problems and epochs to use; tests run a small part.

    Raises:
        UserError: ``out`` exists and was not made by a demo.
    """
    from lark_fast import Scorer

    console, started = Console(), time.monotonic()
    _claim(out)
    school, pool, held_out, new = (
        max(4, int(count * scale)) for count in (SCHOOL_PROBLEMS, POOL_PROBLEMS, HELD_OUT_PROBLEMS, NEW_PROBLEMS)
    )
    rng = random.Random(seed)
    problems = make_problems(school + pool + new, rng)
    of_school, of_pool, new_problems = problems[:school], problems[school:-new], problems[-new:]
    lessons = _write(out / "school.jsonl", make_school(of_school, rng))
    pools = {
        "pool": _write(out / "pool.jsonl", make_pool(of_pool, rng, prefix="pool")),
        "held-out": _write(out / "held-out.jsonl", make_pool(new_problems[:held_out], rng, prefix="held-out")),
    }

    _write(out / "new.jsonl", ({"messages": ask(one), "answer": str(one.answer)} for one in new_problems))

    console.rule("1. A student goes to school")
    untaught, student = out / "student-untaught", out / "student"
    parameters = make_student(untaught, _texts(lessons), seed=seed)
    _train(lessons, untaught, student, epochs=1, lr=3e-3, seed=seed)
    solved_before = solved(student, new_problems)
    console.print(
        f"A Llama of {parameters / 1e6:.1f} M parameters read {school:,} answers "
        f"and solves {share(solved_before)[0]:.0%} of {new} new problems."
    )

    console.rule("2. lark-fast score")
    for name, path in pools.items():
        summary = _score(path, student, out / f"scores-{name}")
        console.print(
            f"{name}: {summary.rows:,} answers to {summary.problems:,} problems by {len(TEACHERS)} teachers, "
            f"{summary.tokens_per_second:,.0f} tokens/s"
        )

    console.rule("3. lark-fast select, 4. lark-fast train")
    before, outcomes = Scorer.from_pretrained(str(student)), []
    for policy, choice in POLICIES.items():
        label = f"{policy} ({choice})"
        chosen = {name: out / f"selection-{policy}" / name for name in pools}
        selections = {
            name: _select(pools[name], out / f"scores-{name}", chosen[name], policy=policy, seed=seed) for name in pools
        }
        console.print(f"{label}: {selections['pool'].rows:,} answers")
        checkpoint = out / f"checkpoint-{policy}"
        epochs = max(1, round(EPOCHS * scale))
        trained = _train(chosen["pool"] / "train.jsonl", student, checkpoint, epochs=epochs, lr=1e-3, seed=seed)
        after = Scorer.from_pretrained(str(checkpoint))
        losses = {name: (selection_loss(before, chosen[name]), selection_loss(after, chosen[name])) for name in pools}
        outcomes.append(
            Outcome(
                policy=policy,
                label=label,
                rows=trained.trajectories,
                steps=trained.steps,
                tokens=epochs * selections["pool"].selected_tokens,
                teachers={name: shares["weight"] for name, shares in selections["pool"].teachers.items()},
                curve=_curve(checkpoint),
                training=losses["pool"],
                held_out=losses["held-out"],
                solved=solved(checkpoint, new_problems),
            )
        )

    result = Result(solved_before=solved_before, outcomes=outcomes)
    console.rule("What was gained")
    console.print(teachers_table(outcomes))
    console.print(result_table(result))
    console.print(Text(conclusion(result)))
    drawn = "gain.png, " if draw_gain(result, out / "gain.png") else ""
    reported = _report(pools["pool"], student, out)
    console.print(
        Text(f"{time.monotonic() - started:.0f} s. In {out}: {drawn}pool.jsonl, scores-*, selection-*, checkpoint-*")
    )
    if reported is not None:
        console.print(Text(f"What was scored and selected, to look at: {reported}"))
    console.print(Text("Another selection from these scores, and a checkpoint that answers:"))
    again = ("--scores", out / "scores-pool", "--pool", out / "pool.jsonl", "--out", out / "tried", "--budget", 2)
    # The student has been taught to answer at once, and eval would ask it to reason and box its answer.
    model, asked = out / f"checkpoint-{outcomes[0].policy}", ("--benchmark", out / "new.jsonl", "--instruction", "")
    for words in (("select", *again), ("eval", "--model", model, *asked, "--out", out / "evaluated")):
        console.print(Text(f"  {shlex.join(map(str, ('lark-fast', *words)))}"), soft_wrap=True)
    return result


def _report(pool: Path, student: Path, out: Path) -> Path | None:
    """The report on the first policy's selection; None, and a line that says so, where it cannot be drawn."""
    from lark_fast.report.run import ReportConfig, make_report

    first, path = next(iter(POLICIES)), out / "report.html"
    try:
        make_report(
            ReportConfig(
                scores=str(out / "scores-pool"),
                selection=str(out / f"selection-{first}" / "pool"),
                pool=(str(pool),),
                student=str(student),
                checkpoints=tuple(str(out / f"checkpoint-{policy}") for policy in POLICIES),
                out=str(path),
                overwrite=True,
            )
        )
    except UserError as error:
        print(f"lark-fast: no report: {error}", file=sys.stderr)
        return None
    return path


def _score(pool: Path, student: Path, out: Path) -> Any:
    from lark_fast.scoring.run import ScoreConfig, score_pool

    config = ScoreConfig(
        pool=(str(pool),), student=str(student), out=str(out), dtype="float32", per_token=True, overwrite=True
    )
    return score_pool(config)


def _select(pool: Path, scores: Path, out: Path, *, policy: str, seed: int) -> "SelectionSummary":
    from lark_fast.selection.run import SelectConfig, select

    return select(
        SelectConfig(
            scores=str(scores),
            pool=(str(pool),),
            out=str(out),
            budget=BUDGET,
            policy=policy,
            seed=seed,
            overwrite=True,
        )
    )


def _train(data: Path, student: Path, out: Path, *, epochs: int, lr: float, seed: int) -> "TrainSummary":
    from lark_fast.training.config import TrainConfig
    from lark_fast.training.run import train

    return train(
        TrainConfig(
            data=str(data),
            student=str(student),
            out=str(out),
            epochs=epochs,
            lr=lr,
            global_batch=16,
            seed=seed,
            save_every=0,
            overwrite=True,
        )
    )


def _curve(checkpoint: Path) -> tuple[float, ...]:
    """The loss of each step."""
    lines = (checkpoint / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line)["loss"] for line in lines)


def _claim(out: Path) -> None:
    """Take ``out`` for this demo; never write into a directory that holds something else."""
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise UserError(f"--out {out}: exists and holds something else; give another directory")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()


def _write(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def _texts(conversations: Path) -> list[str]:
    return [
        message["content"]
        for line in conversations.read_text(encoding="utf-8").splitlines()
        for message in json.loads(line)["messages"]
    ]
