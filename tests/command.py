"""The real command line, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.templates import CHATML
from tests.tiny import byte_level_tokenizer, tiny_llama

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def command(*arguments):
    """The words that start lark-fast."""
    return [sys.executable, "-m", "lark_fast", *map(str, arguments)]


def run(*arguments, code=0):
    """Run lark-fast to its end; its exit code is checked, and that no traceback is ever shown."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


def write_jsonl(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_student(directory: Path, *, seed: int = 0, template: str = CHATML, tokenizer=None, **changes) -> Path:
    """A tiny checkpoint on disk; ``changes`` are to its config."""
    tokenizer = tokenizer or byte_level_tokenizer(template)
    tiny_llama(len(tokenizer), seed=seed, **changes).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_records(problems: int, candidates: int = 3, words: int = 4):
    """A small pool: several candidates of different lengths a problem."""
    for p in range(problems):
        for k in range(candidates):
            answer = f"The answer is {p + k}. " + "Let me check that the sum is right. " * ((p + k * k) % words)
            turns = [{"role": "user", "content": f"What is {p} and {k}?"}, {"role": "assistant", "content": answer}]
            yield {"problem_id": p, "candidate_id": k, "teacher": f"teacher-{k}", "messages": turns}
