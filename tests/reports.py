"""What reports are made of: a pool full of text that means harm, scored by a real student, and large made-up scores."""

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pyarrow as pa

from lark_fast.__main__ import main
from lark_fast.hashing import hash_fields
from lark_fast.scoring.learnability import g_hat
from lark_fast.scoring.parts import part_path, schema, write_part
from tests.command import write_jsonl, write_student

HARMFUL = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "<!-- {{ 7*7 }} {% raw %} ${7*7} `x` &lt;b&gt; &amp;",
    "\x1b[31mred\x1b]0;title\x07 and \x08back",
    "right to left \u202e evil \u2066 and back \u200b zero\ufeff",
    "nothing \x00, a line\u2028break, \x9b31m",
    'javascript:alert(3) "onmouseover="alert(4)" \'',
]
NAMES = ["datum.x", "a.b[0]", 'it\'s "quoted"', "<b>bold</b>", "constructor", "\u202eright", "</script>"]


class Printed(NamedTuple):
    stdout: str
    stderr: str


def run(*words, code=0):
    """The real command line, in this process: what it imports, and what draws the figures, is there already."""
    out, err = io.StringIO(), io.StringIO()
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        patch.object(sys, "argv", ["lark-fast", *map(str, words)]),
    ):
        try:
            main()
            ended = 0
        except SystemExit as end:
            ended = end.code or 0
    assert ended == code, err.getvalue()
    return Printed(out.getvalue(), err.getvalue())


def harmful_records(problems=4):
    for problem in range(problems):
        for candidate, (text, teacher) in enumerate(zip(HARMFUL, NAMES, strict=True)):
            yield {
                "problem_id": f"p<{problem}>",
                "candidate_id": f"{candidate}&{teacher}",
                "teacher": teacher,
                "messages": [
                    {"role": "user", "content": f"Problem {problem}: {HARMFUL[(problem + 1) % len(HARMFUL)]}?"},
                    {"role": "assistant", "content": f"<think>{text}</think>\n" + "It is so. " * (candidate + problem)},
                ],
                "correct": candidate % 2 == 0,
            }


def write_harmful(directory):
    """(pool, student) on disk; the last two records are rejects."""
    half = {"problem_id": 1, "messages": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "?"}]}
    records = [*harmful_records(), {"problem_id": "<i>bad</i>", "messages": "<script>alert(5)</script>"}, half]
    pool = directory / "pool.jsonl"
    write_jsonl(pool, records)
    return pool, write_student(directory / "student")


def write_large(directory, problems, candidates=7, teachers=7):
    """A finished scores directory of made-up numbers; nothing of it was ever a text."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    rows = problems * candidates
    problem = np.repeat(np.arange(problems), candidates)
    nll = rng.gamma(9, 0.3, rows)
    brier = np.clip(nll * rng.normal(0.25, 0.02, rows), 0.01, 1.9)
    keys = [hash_fields(str(row).encode(), size=16) for row in range(rows)]
    ones = np.ones(rows)
    columns = {
        "problem_id": [str(one) for one in problem],
        "candidate_id": [str(one) for one in np.tile(np.arange(candidates), problems)],
        "teacher": [f"teacher-{one}" for one in rng.integers(teachers, size=rows)],
        "source": ["pool.jsonl"] * rows,
        "n_tokens": rng.lognormal(5, 0.8, rows).astype(np.int32) + 2,
        "n_input_tokens": np.full(rows, 4000, dtype=np.int32),
        "truncated": np.zeros(rows, dtype=bool),
        "nll": nll,
        "brier": brier,
        "entropy": ones,
        "rank_mean": ones,
        "rsr": ones,
        "rho": brier / nll,
        "g_hat": g_hat(nll, brier, problem),
        "content_hash": keys,
        "token_hash": keys,
    }
    kinds = schema(top_k=None, final=True)
    write_part(
        part_path(directory, 0), pa.table([pa.array(columns[one], kinds.field(one).type) for one in kinds.names], kinds)
    )
    (directory / "rejected.jsonl").touch()
    manifest = {"format": 1, "complete": True, "brier": "brier", "identity": {"student": "s", "per_token": False}}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory
