"""From a table of one's own to the weighted answers that a student learns fastest.

    python examples/own_pool.py [answers.csv STUDENT OUT]     # columns: question, teacher, answer

Without arguments on a student and answers made here, in ``example-run/``. The two calls in the middle are ``lark-fast
score`` and ``lark-fast select``: stopped in any way, they go on, and of a table that has grown they score what is new.
"""

import csv
import json
import sys
from pathlib import Path

from lark_fast.scoring.run import ScoreConfig, score_pool
from lark_fast.selection.run import SelectConfig, select


def write_pool(table: str, path: Path) -> None:
    """A record a row. Records with the same question are candidates of one problem."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(table, encoding="utf-8", newline="") as rows, path.open("w", encoding="utf-8") as file:
        for row in csv.DictReader(rows):
            messages = [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ]
            file.write(json.dumps({"teacher": row["teacher"], "messages": messages}) + "\n")


def own_pool(table: str, student: str, out: str, budget: int = 2) -> Path:
    """Table -> pool -> scores -> selection; returns train.jsonl."""
    pool, scores, selection = Path(out, "pool.jsonl"), str(Path(out, "scores")), str(Path(out, "selection"))
    write_pool(table, pool)
    scored = score_pool(ScoreConfig(pool=(str(pool),), student=student, out=scores))
    chosen = select(SelectConfig(scores=scores, pool=(str(pool),), out=selection, budget=budget, overwrite=True))
    print(*scored.lines(), *chosen.lines(), sep="\n")
    return Path(selection, "train.jsonl")


def example() -> Path:
    """The same on a student and answers made here."""
    import tiny

    student, table = tiny.student(), Path(tiny.FOLDER, "answers.csv")
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["question", "teacher", "answer"])
        writer.writeheader()
        writer.writerows(tiny.answers())
    return own_pool(str(table), student, tiny.FOLDER)


if __name__ == "__main__":
    train = own_pool(*sys.argv[1:]) if sys.argv[1:] else example()
    print(f"{train} begins:", train.read_text(encoding="utf-8").split("\n", 1)[0], sep="\n")
