"""Made-up problems for races: words with a difficulty of their own, and candidates that differ."""

import random

import numpy as np

WORDS = [
    "sum",
    "check",
    "that",
    "the",
    "is",
    "right",
    "answer",
    "let",
    "me",
    "two",
    "three",
    "then",
    "maybe",
    "so",
    "we",
]
HARD = ["zyx", "qvw", "kjx", "7#!", "%%@", "xxq", "wqz"]
PROBLEMS, RACED = 14, 10  # the others have too few candidates
RACE_SHORT_ONES = "import lark_fast.racing.rules\nlark_fast.racing.rules.SHORTEST = 0\n"


def make_records():
    """A pool whose races stop some."""
    rng = random.Random(1)
    for p in range(PROBLEMS):
        for k in range(3 if p % 4 == 0 else 9):
            words = HARD if (k + p) % 3 == 0 else WORDS  # candidates that differ
            text = " ".join(rng.choice(words) for _ in range(rng.randint(40, 160)))
            turns = [{"role": "user", "content": f"What is {p}?"}, {"role": "assistant", "content": text}]
            yield {"problem_id": 100 + p, "candidate_id": k, "teacher": f"t{k}", "messages": turns}


def make_problem(seed, candidates=8, shortest=40, longest=160, words=60, apart=0.15, noise=0.5):
    """(words, words before, nll, brier) of each candidate, lists of arrays."""
    rng = np.random.default_rng(seed)
    hardness = rng.gamma(2.0, 1.0, words)
    made = []
    for _ in range(candidates):
        own = rng.zipf(1.5, rng.integers(shortest, longest)) % words
        nll = np.maximum(0.01, hardness[own] * np.exp(apart * rng.normal()) + noise * rng.normal(size=len(own)))
        brier = np.minimum(2.0, (1 - np.exp(-nll)) ** 2 * (1 + rng.random(len(own))))
        made.append((own, np.roll(own, 1), nll, brier))
    return [list(column) for column in zip(*made, strict=True)]


def order(nll, brier):
    """Candidates from the best down, by g_hat."""
    from lark_fast.scoring.learnability import g_hat

    means = [np.array([x.mean() for x in column]) for column in (nll, brier)]
    return np.argsort(-g_hat(*means, np.zeros(len(nll))), kind="stable")
