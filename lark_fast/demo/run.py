"""``lark-fast demo``: make a pool and a student, then score, select, train, and say what was gained."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lark_fast.demo.problems import make_pool
from lark_fast.demo.student import make_student
from lark_fast.errors import UserError

SCHOOL_PROBLEMS, POOL_PROBLEMS, HELD_OUT_PROBLEMS = 700, 250, 60
BUDGET = 2
MARKER = "made-by-lark-fast-demo"


@dataclass(frozen=True, slots=True)
class Gain:
    """What one selection did to the student."""

    policy: str
    rows: int
    train_loss: tuple[float, float]  # first and last step
    held_out: tuple[float, float]  # mean nll before and after
    solved: float  # share of held-out problems answered right after training


def run_demo(out: Path, *, scale: float = 1.0) -> list[Gain]:
    """Run the whole path and print the result.

    Args:
        out: directory for everything that is made; an earlier demo there is overwritten.
        scale: share of the problems and epochs to use; tests run a small part.

    Raises:
        UserError: ``out`` exists and was not made by a demo.
    """
    from lark_fast.scoring.run import ScoreConfig, score_pool
    from lark_fast.selection.run import SelectConfig, select

    console = Console()
    _claim(out)
    size = {"school": SCHOOL_PROBLEMS, "pool": POOL_PROBLEMS, "held-out": HELD_OUT_PROBLEMS}
    size = {name: max(4, int(problems * scale)) for name, problems in size.items()}
    school = _write(out / "school.jsonl", make_pool(size["school"], seed=1, prefix="school"))
    pool = _write(out / "pool.jsonl", make_pool(size["pool"], seed=2, prefix="pool"))
    right = (record for record in make_pool(size["held-out"], seed=3, prefix="held-out") if record["correct"])
    held_out = _write(out / "held_out.jsonl", right)

    console.rule("1. A student goes to school")
    untaught, student = out / "student-untaught", out / "student"
    make_student(untaught, _texts(school))
    _train(school, untaught, student, epochs=max(1, round(3 * scale)), lr=3e-3, global_batch=32)
    before = solved_share(student, held_out)
    console.print(
        f"A Llama of 0.9 M parameters read {size['school'] * 6:,} answers and solves {before:.0%} of new problems."
    )

    console.rule("2. lark-fast score")
    summary = score_pool(ScoreConfig(pool=(str(pool),), student=str(student), out=str(out / "scores"), overwrite=True))
    console.print(
        f"{summary.rows:,} trajectories of {summary.problems:,} problems by 6 teachers, "
        f"{summary.tokens_per_second:,.0f} tokens/s"
    )

    console.rule("3. lark-fast select, 4. lark-fast train")
    gains = []
    for policy in ("chi2", "random"):
        chosen = out / f"selection-{policy}"
        selection = select(
            SelectConfig(
                scores=str(out / "scores"),
                pool=(str(pool),),
                out=str(chosen),
                budget=BUDGET,
                policy=policy,
                overwrite=True,
            )
        )
        trained = _train(
            chosen / "train.jsonl",
            student,
            out / f"checkpoint-{policy}",
            eval_data=held_out,
            epochs=max(1, round(4 * scale)),
            lr=1e-3,
            global_batch=16,
        )
        losses = trained.eval_losses
        gains.append(
            Gain(
                policy,
                selection.rows,
                (trained.first_loss, trained.last_loss),
                (losses[0], losses[-1]),
                solved_share(out / f"checkpoint-{policy}", held_out),
            )
        )
        if policy == "chi2":
            console.print(_teachers(selection))

    console.rule("What was gained")
    console.print(_result(before, gains))
    console.print(Text(f"Everything is in {out}: scores/, selection-chi2/train.jsonl, checkpoint-chi2/ with loss.png"))
    return gains


def solved_share(student: Path, problems: Path, limit: int = 60) -> float:
    """Share of the problems in a pool that the student answers right, greedily."""
    import torch

    from lark_fast.student import load_student

    model = load_student(str(student))
    questions = {}
    for line in problems.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        answer = record["messages"][-1]["content"].rsplit("A: ", 1)[-1]
        questions.setdefault(record["problem_id"], (record["messages"][:-1], answer))
    asked = list(islice(questions.values(), limit))
    tokenizer = model.tokenizer
    tokenizer.padding_side = "left"
    prompts = [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for messages, _ in asked
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    with torch.no_grad():
        made = model.model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=160,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    texts = tokenizer.batch_decode(made[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    right = [text.rsplit("A: ", 1)[-1].strip() == answer for text, (_, answer) in zip(texts, asked, strict=True)]
    return sum(right) / len(right)


def _train(data: Path, student: Path, out: Path, **settings: Any) -> Any:
    from lark_fast.training.config import TrainConfig
    from lark_fast.training.run import train

    eval_data = settings.pop("eval_data", None)
    return train(
        TrainConfig(
            data=str(data),
            student=str(student),
            out=str(out),
            eval_data=None if eval_data is None else str(eval_data),
            save_every=0,
            overwrite=True,
            **settings,
        )
    )


def _claim(out: Path) -> None:
    """Take ``out`` for this demo; never write into a directory that holds something else."""
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise UserError(f"--out {out}: exists and holds something else; give another directory")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()


def _write(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def _texts(pool: Path) -> list[str]:
    return [
        message["content"]
        for line in pool.read_text(encoding="utf-8").splitlines()
        for message in json.loads(line)["messages"]
    ]


def _teachers(selection: Any) -> Table:
    table = Table("teacher", "share of the pool", "share of the chi2 weight", title="Whom the selection listens to")
    for teacher, share in sorted(selection.teachers.items(), key=lambda item: -item[1]["weight"]):
        table.add_row(Text(teacher), f"{share['candidates']:.0%}", f"{share['weight']:.0%}")
    return table


def _result(before: float, gains: list[Gain]) -> Table:
    table = Table("selection", "rows", "training loss", "held-out nll", "new problems solved")
    for gain in gains:
        table.add_row(
            gain.policy,
            f"{gain.rows:,}",
            f"{gain.train_loss[0]:.3f} -> {gain.train_loss[1]:.3f}",
            f"{gain.held_out[0]:.3f} -> {gain.held_out[1]:.3f}",
            f"{before:.0%} -> {gain.solved:.0%}",
        )
    return table
