"""The real command line, in a process of its own."""

import copy
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

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


# It has no thread but its own when it forks. A child ends as any Python program does (threads are waited for, what was
# registered with atexit runs) but for the modules, which are not taken apart: that takes twice as long as most tests.
_FORKING = """
import atexit, contextlib, json, os, sys, threading
with contextlib.suppress(ImportError):
    import typer._adapters  # at the first option; it imports pydantic
import pyarrow.parquet
import lark_fast.cli.app
import lark_fast.rendering.inspection, lark_fast.scoring.dry_run, lark_fast.scoring.engine, lark_fast.scoring.scorer
from lark_fast.__main__ import main
from lark_fast.scoring import run
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.llama import modeling_llama

get_checkpoint_conversion_mapping("llama")  # makes a table that it keeps
pyarrow.table({"": [""]})  # at the first table it imports pandas
gc.enable()
gc.freeze()  # or every child goes through all objects of the imports, half a second each
print("ready", flush=True)
while line := sys.stdin.readline():
    asked = json.loads(line)
    if "poll" in asked:
        pid, status = os.waitpid(asked["poll"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    if pid := os.fork():
        print(pid, flush=True)
        continue
    os.setsid()
    for number, name in enumerate(("/dev/null", asked["stdout"], asked["stderr"])):
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.argv = ["lark-fast", *asked["words"]]
    exec(asked["before"])
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""


# What commands that train and draw import besides, and a student over ranks.
EVIDENCE = ("lark_fast.training.run", "lark_fast.scoring.run", "lark_fast.flop", "scipy.stats", "matplotlib.figure")
RANKS = ("lark_fast.scoring.ranks", "torch.distributed.tensor", "transformers.distributed.tensor_parallel")
# For those that do it many times: measuring the machine takes longer than most of their runs.
NO_CEILING = """
lark_fast.flop.matmul_ceiling = lark_fast.training.run.matmul_ceiling = lambda *_: 1e12
"""


# A program to run before a command: SIGTERM at its seventh pass.
STOP = """
from lark_fast.scoring.forward import Passes
launch, n = Passes._launch, 0
def stopping(self, batch):
    global n
    n += 1
    n == 7 and os.kill(os.getpid(), 15)
    return launch(self, batch)
Passes._launch = stopping
"""


class Forks:
    """Starts lark-fast again and again without the seconds that its imports take, by forking a process that has them.

    Args:
        directory: for what the commands print.
        modules: that most of them import too.
        environment: of all of them, beside ENVIRONMENT.
    """

    def __init__(self, directory: Path, *modules: str, environment=None) -> None:
        self._directory, self._numbers, self._before = directory, itertools.count(), ""
        more = f"import {', '.join(modules)}\n" if modules else ""
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import gc; gc.disable()\n" + more + _FORKING],
            env={**ENVIRONMENT, "OMP_WAIT_POLICY": "passive", **(environment or {})},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout.readline() == "ready\n"

    def close(self) -> None:
        """No more commands."""
        self._process.communicate()

    def preceded_by(self, before: str) -> "Forks":
        """The same process, for commands that all run a program first."""
        other = copy.copy(self)
        other._before = before
        return other

    def ask(self, **what):
        """Send the process a line and read its answer."""
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, *words, before: str = "") -> "Fork":
        """Start a command, in a process group of its own; ``before`` is a program that it runs first."""
        prints = [self._directory / f"{next(self._numbers)}.{name}" for name in ("stdout", "stderr")]
        before = self._before + before
        pid = self.ask(words=list(map(str, words)), before=before, stdout=str(prints[0]), stderr=str(prints[1]))
        return Fork(self, pid, *prints)

    def run(self, *words, code: int = 0, before: str = "") -> "Fork":
        """Run a command to its end, which is checked."""
        return self.start(*words, before=before).ended(code)

    def start_ranks(self, befores, *words) -> "list[Fork]":
        """Start a command on ranks, as torchrun does, without its own process; ``befores``: the program of each."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(befores))}
        told["TORCHELASTIC_RUN_ID"] = "t"
        return [
            self.start(
                *words, before=f"os.environ.update({told | {'RANK': str(rank), 'LOCAL_RANK': str(rank)}})\n{before}"
            )
            for rank, before in enumerate(befores)
        ]


class Fork:
    """A command that was started."""

    def __init__(self, forks: Forks, pid: int, stdout: Path, stderr: Path) -> None:
        self.pid, self._forks, self._stdout, self._stderr, self._code = pid, forks, stdout, stderr, None

    def poll(self) -> int | None:
        """The exit code, None as long as it runs."""
        if self._code is None:
            self._code = self._forks.ask(poll=self.pid)
        return self._code

    def wait(self, seconds: float = 100) -> int:
        """The exit code, once there is one."""
        until = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > until:
                self.kill(signal.SIGKILL)
                raise TimeoutError(f"still running\n{self.stderr}")
            time.sleep(0.003)
        return self._code

    def kill(self, number: int) -> None:
        """Send it a signal, to itself alone."""
        os.kill(self.pid, number)

    def ended(self, code: int = 0) -> "Fork":
        """Wait for its end: the exit code is checked, and that no traceback is shown."""
        ended = self.wait()
        assert ended == code, f"exit {ended}\n{self.stdout}\n{self.stderr}"
        assert "Traceback" not in self.stderr, self.stderr
        return self

    @property
    def stdout(self) -> str:
        """What it has printed there so far."""
        return self._stdout.read_text() if self._stdout.exists() else ""

    @property
    def stderr(self) -> str:
        """What it has printed there so far."""
        return self._stderr.read_text() if self._stderr.exists() else ""


@contextmanager
def disk_of(size: str, mounted: Path):
    """A file system of that size at a new directory; skips the test where none can be had."""
    mounted.mkdir()
    how = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mounted)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(how, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    yield mounted
    subprocess.run(["umount", "-l", str(mounted)], check=True)
