"""Pools, scores without a student, and selections from them."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lark_fast.pool.records import normalise
from lark_fast.selection.run import SelectConfig, select


def raw(problem, candidate, teacher="alpha", **columns):
    messages = [
        {"role": "user", "content": f"Question {problem}?"},
        {"role": "assistant", "content": f"Answer {candidate} to {problem}: é, 漢, \u2028."},
    ]
    return {"problem_id": problem, "candidate_id": candidate, "teacher": teacher, "messages": messages} | columns


def write_pool(path, raws):
    path.write_text("".join(json.dumps(row) + "\n" for row in raws), encoding="utf-8")
    return path


NUMBERS = ("nll", "brier", "entropy", "rank_mean", "rsr", "rho", "g_hat")


def score_row(row, g_hat, *, source="pool.jsonl", n_tokens=10, ordinal=0, **numbers):
    record = normalise(row, ordinal=ordinal)
    return {
        "problem_id": record.key[0],
        "candidate_id": record.key[1],
        "teacher": record.teacher,
        "source": source,
        "n_tokens": n_tokens,
        **{name: numbers.get(name, 1.0) for name in NUMBERS},
        "g_hat": g_hat,
        "content_hash": record.content_hash(),
    }


COLUMNS = pa.schema(
    [(name, pa.string()) for name in ("problem_id", "candidate_id", "teacher", "source")]
    + [("n_tokens", pa.int32()), *((name, pa.float64()) for name in NUMBERS)]
    + [("content_hash", pa.binary(16))]
)


def write_scores(directory, rows, *, complete=True, parts=1, rejected=()):
    directory.mkdir(exist_ok=True)
    for number, share in enumerate(np.array_split(np.arange(len(rows)), parts)):
        table = pa.Table.from_pylist([rows[index] for index in share], COLUMNS)
        pq.write_table(table, directory / f"part-{number:06d}.parquet", compression="zstd")
    manifest = {"format": 1, "complete": complete, "brier": "brier", "identity": {"student": "abc"}}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    lines = [json.dumps({"source": str(s), "line": n, "reason": "no"}) + "\n" for s, n in rejected]
    (directory / "rejected.jsonl").write_text("".join(lines))
    return directory


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


class Setup:
    """A pool file, its scores, and a way to select from them."""

    def __init__(self, tmp_path, problems, *, shuffle=None, parts=1, rejected=(), extra_pool=()):
        """``problems``: {problem_id: [g_hat, ...]}."""
        self.path = tmp_path
        rng = np.random.default_rng(0)
        self.raws, self.rows = [], []
        for problem, energies in problems.items():
            for candidate, g_hat in enumerate(energies):
                row = raw(problem, candidate, teacher=("alpha", "beta")[candidate % 2], level=candidate)
                self.raws.append(row)
                numbers = {name: rng.uniform(0.1, 2) for name in NUMBERS[:-1]} | {"n_tokens": int(rng.integers(5, 50))}
                self.rows.append(score_row(row, g_hat, **numbers))
        pool = [*self.raws, *extra_pool]
        if shuffle is not None:
            pool = [pool[i] for i in np.random.default_rng(shuffle).permutation(len(pool))]
        self.pool = write_pool(tmp_path / "pool.jsonl", pool)
        self.scores = write_scores(tmp_path / "scores", self.rows, parts=parts, rejected=rejected)
        self.out = tmp_path / "selection"

    def config(self, **settings):
        defaults = {"scores": str(self.scores), "pool": (str(self.pool),), "out": str(self.out)}
        return SelectConfig(**(defaults | settings))

    def select(self, **settings):
        """(summary, lines)"""
        settings.setdefault("overwrite", True)
        summary = select(self.config(**settings))
        return summary, read_lines(self.out / "train.jsonl")

    def weights(self, **settings):
        """{(problem, candidate): weight}"""
        lines = self.select(**settings)[1]
        return {(line["meta"]["problem_id"], line["meta"]["candidate_id"]): line["weight"] for line in lines}


RAGGED = {
    "many": list(np.random.default_rng(1).normal(size=37)),
    7: [0.5, -0.25, 0.125, 2.0, 1.0],
    "few": [0.1, 0.3],
    "one": [0.2],
    8: list(np.random.default_rng(2).normal(size=5)),
}
