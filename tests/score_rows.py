"""Rows of a scores directory, and a run that writes them, without a pool or a student."""

import os

import pyarrow as pa
import pyarrow.parquet as pq

from lark_fast.scoring.parts import part_files
from lark_fast.scoring.store import ScoreStore

IDENTITY = {"student": "s", "top_k": None, "per_token": False}


def table(directory):
    """All finished rows of a scores directory."""
    return pa.concat_tables([pq.read_table(part) for part in part_files(directory)])


def row(problem, candidate, nll=1.0, brier=0.5, tokens=None):
    key = f"{problem}/{candidate}".encode()
    numbers = {"nll": nll, "brier": brier, "entropy": 1.0, "rank_mean": 2.0, "rsr": 3.0}
    return {
        "problem_id": str(problem),
        "candidate_id": str(candidate),
        "teacher": "t",
        "source": "pool.jsonl",
        "n_tokens": 5,
        "n_input_tokens": 9,
        "truncated": False,
        **numbers,
        "content_hash": key.ljust(16)[:16],
        "token_hash": (tokens or key).ljust(16)[:16],
    }


def key(made):
    """The key of a row."""
    return made["problem_id"], made["candidate_id"]


def write_window(store, rows):
    """One window that is one pack."""
    store.append(rows)
    store.close_window([key(r) for r in rows])


def go_on(directory, windows, identity=IDENTITY, **facts):
    """What a run does: pack by pack, backwards as a window is sorted by length, what no earlier run has appended."""
    with ScoreStore(directory, identity) as store:
        finished = dict(store.scored_keys())
        for window in windows:
            left = [r for r in window if key(r) not in finished]
            to_score = [r for r in left if key(r) not in store.unfinished][::-1]
            for start in range(0, len(to_score), 3):
                store.append(to_score[start : start + 3])
            store.close_window([key(r) for r in left])
        store.finish(**facts)


def call_around(patched, names, call):
    """Have ``call`` called before and after each of these functions of ``os``; ``patched``: a MonkeyPatch."""

    def around(real):
        def watched(*arguments, **how):
            call()
            try:
                return real(*arguments, **how)
            finally:
                call()

        return watched

    for name in names:
        patched.setattr(os, name, around(getattr(os, name)))
