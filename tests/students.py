"""Tiny students on disk, and commands run on them in this process."""

import warnings

import pyarrow.parquet as pq
import torch

from lark_fast.__main__ import main
from lark_fast.scoring.parts import part_files
from lark_fast.scoring.scorer import Scorer
from lark_fast.student import load_student
from tests.templates import CHATML
from tests.tiny import byte_level_tokenizer, tiny_llama, tiny_qwen2

TOKENIZER = byte_level_tokenizer(CHATML)
WORDS = 416  # rows of the embedding: more than the tokenizer has, and a multiple of 32, as bitsandbytes wants
SEQUENCES = [[(7 * n + 3 * t) % 90 for t in range(length)] for n, length in enumerate((9, 20, 13))]


class Command:
    """The command line, in this process: what most of these tests need takes seconds to import."""

    def __init__(self, monkeypatch, capfd):
        self._monkeypatch, self._capfd = monkeypatch, capfd

    def run(self, *words, code=0):
        """Run lark-fast to its end; its exit code is checked. Returns what it has printed."""
        self._monkeypatch.setattr("sys.argv", ["lark-fast", *map(str, words)])
        self._capfd.readouterr()
        ended = 0
        with warnings.catch_warnings(record=True) as told:
            try:
                main()
            except SystemExit as end:
                ended = end.code or 0
        out, err = self._capfd.readouterr()
        assert ended == code, f"exit {ended}\n{out}\n{err}"
        return out, err + "".join(f"{one.message}\n" for one in told)

    def refused(self, words, *said):
        """One line that says it, and exit code 2."""
        out, err = self.run(*words, code=2)
        for part in said:
            assert part in err
        assert err.startswith("lark-fast: ")
        assert err.count("\n") == 1, err
        assert out == ""


def with_tokenizer(directory):
    TOKENIZER.save_pretrained(directory)
    return directory


def write_base(directory):
    tiny_llama(WORDS).save_pretrained(directory)
    return with_tokenizer(directory)


def write_tied(directory):
    tiny_qwen2(WORDS).save_pretrained(directory)
    return with_tokenizer(directory)


def score(pool, student, out, *more):
    words = ("score", "--pool", pool, "--student", student, "--out", out, "--workers", 0, "--dtype", "float32", *more)
    return words if "--device" in more or "--device-map" in more else (*words, "--device", "cpu")


def scores_of(out):
    columns = ("nll", "brier", "entropy", "rank_mean")
    return [tuple(row[name] for name in columns) for row in pq.read_table(part_files(out)).to_pylist()]


def load(student, **options):
    options = {"dtype": "float32", "tokenizer": False} | options
    return load_student(student, **options, **({} if "device_map" in options else {"device": "cpu"}))


def our_nll(student, sequences=SEQUENCES):
    """Of every token but each sequence's first."""
    return [one.nll for one in Scorer(student, tokens_per_batch=64).score_tokens(sequences, sequences)]


def same(ours, theirs, tolerance=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
