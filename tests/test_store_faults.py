"""What a scores directory holds after kill -9, a crash between any two steps, a full disk, and beside another run."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lark_fast.errors import UserError
from lark_fast.scoring.store import ScoreStore, part_files, read_manifest
from tests.command import disk_of
from tests.score_rows import IDENTITY, call_around, go_on, key, row, table, write_window

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def make_windows(n, rows):
    """Windows whose problems reach from one into the next, with numbers that a key alone tells."""
    numbers = [np.random.default_rng(i).uniform(0.1, 1, 2) for i in range(n * rows)]
    made = [row(i // 5, i, *numbers[i]) for i in range(n * rows)]
    return [made[start : start + rows] for start in range(0, len(made), rows)]


def held(directory):
    """The keys of all rows of a directory, once each, as the next run finds them."""
    with ScoreStore(directory, IDENTITY) as store:
        found = [*store.scored_keys(), *store.unfinished.items()]
    assert all(content == "/".join(name).encode().ljust(16)[:16] for name, content in found)
    names = {name for name, _ in found}
    assert len(names) == len(found), "a row is there twice"
    return names


@pytest.fixture
def acknowledged(monkeypatch):
    """The keys of the rows that ``append`` has taken."""
    keys, append = set(), ScoreStore.append

    def acknowledging(store, rows):
        append(store, rows)
        keys.update(map(key, rows))

    monkeypatch.setattr(ScoreStore, "append", acknowledging)
    return keys


def test_a_crash_between_any_two_steps(tmp_path, monkeypatch, acknowledged):
    """The directory is copied before and after everything that changes it; each copy is what a kill would leave."""
    windows = make_windows(3, 8)
    out, states = tmp_path / "out", []

    def keep():
        content = {path.name: path.read_bytes() for path in out.iterdir()} if out.exists() else {}
        if states and states[-1][0] == content:
            states.pop()  # of the same content, the moment at which most had been acknowledged
        if content:
            states.append((content, set(acknowledged)))

    with monkeypatch.context() as patched:
        call_around(patched, ("pwrite", "ftruncate", "fsync", "replace", "unlink"), keep)
        go_on(out, windows)
    assert len(states) > 25
    between = 0
    for number, (content, acknowledged_then) in enumerate(states):
        parts = [name for name in content if name.endswith(".parquet")]
        between += f"journal-{len(parts) - 1:06d}" in content
        copy = tmp_path / str(number)
        copy.mkdir()
        for name, data in content.items():
            (copy / name).write_bytes(data)
        assert acknowledged_then <= held(copy)
        go_on(copy, windows)
        assert table(copy).equals(table(out))
        assert read_manifest(copy)["complete"]
    assert between >= len(windows), "no copy of a part whose journal is still there"


# Forks a run for each line it reads: importing takes far longer than being killed.
RUNNER = """
import os, sys
import pyarrow
from tests.score_rows import IDENTITY, row, key
from lark_fast.scoring.store import ScoreStore
def go_on(directory):
    with ScoreStore(directory, IDENTITY) as store:
        finished = {k for k, _ in store.scored_keys()}
        number = 0
        while True:
            window = [row(number, k, nll=number + k / 64) for k in range(40)]
            left = [r for r in window if key(r) not in finished and key(r) not in store.unfinished]
            for start in range(0, len(left), 3):
                pack = left[start : start + 3]
                store.append(pack)
                os.write(1, "".join(f"{'/'.join(key(r))}\\n" for r in pack).encode())
            store.close_window([key(r) for r in window if key(r) not in finished])
            number += 1
pyarrow.table({"": [""]})  # at the first table it imports pandas
for line in sys.stdin:
    run = os.fork()
    if not run:
        try:
            go_on(sys.argv[1])
        except BaseException as error:
            os.write(1, f"failed: {error!r}\\n".encode())
        os._exit(1)
    os.write(1, f"started {run}\\n".encode())
    os.waitpid(run, 0)
    os.write(1, b"dead\\n")
"""


def test_kill_9_loses_no_acknowledged_row(tmp_path):
    out, acknowledged, chance = tmp_path / "out", set(), random.Random(0)
    runner = subprocess.Popen(
        [sys.executable, "-c", RUNNER, str(out)],
        env=ENVIRONMENT, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip
    in_hand = 0
    with runner:
        for _ in range(50):
            runner.stdin.write("go\n")
            lines, pid, wanted = [], None, chance.randrange(60)
            while pid is None or len(lines) < wanted:
                line = runner.stdout.readline()
                if line.startswith("started"):
                    pid = int(line.split()[1])
                else:
                    lines.append(line)
            time.sleep(chance.uniform(0.0, 0.01))
            os.kill(pid, signal.SIGKILL)
            while not lines or lines[-1] != "dead\n":
                lines.append(runner.stdout.readline())
            lines.pop()
            assert all("/" in line for line in lines), lines
            acknowledged |= {tuple(line.strip().split("/")) for line in lines}
            if out.exists():
                found = held(out)  # this opens it too: the lock died with its run
                assert acknowledged <= found
                assert len(found - acknowledged) <= 3, "one pack at most was on the disk and not yet acknowledged"
                in_hand += any(out.glob("journal-*"))
                acknowledged = found
        runner.stdin.close()
    assert len(acknowledged) > 1000
    assert in_hand > 20, "most runs are killed inside a window"
    with ScoreStore(out, IDENTITY) as store:
        store.finish()
    made = table(out)
    numbers = [
        int(p) + int(k) / 64
        for p, k in zip(*(made[n].to_pylist() for n in ("problem_id", "candidate_id")), strict=True)
    ]
    assert made["nll"].to_pylist() == numbers


def fill_up(directory, rooms, limit):
    """A run on a disk that takes so many bytes more, for each of ``rooms``, and once more with room enough.

    ``limit(room)`` sets the limit, ``limit(None)`` lifts it. Prints how many runs met it.
    """
    windows, failed = make_windows(3, 40), 0
    for room in rooms:
        out = directory / "out"
        shutil.rmtree(out, ignore_errors=True)
        with pytest.MonkeyPatch.context() as patched:
            taken = acknowledged.__wrapped__(patched)
            limit(room)
            errors = []
            for _ in range(2):  # the second run finds what the first one left, and no more room
                try:
                    go_on(out, windows)
                except (OSError, UserError) as error:
                    errors.append(error)
            limit(None)
        failed += bool(errors)
        for error in errors:
            assert getattr(error, "errno", None) in (errno.ENOSPC, errno.EFBIG) or "written to" in str(error), error
        if out.exists():
            assert taken <= held(out)
        go_on(out, windows)
        made = table(out)
        assert made["nll"].to_pylist() == [r["nll"] for window in windows for r in window]
        assert sorted(path.name for path in out.iterdir())[:2] == [".lock", "manifest.json"]
        assert len(part_files(out)) == len(list(out.iterdir())) - 2
    print("failed", failed)


def fill_up_with_small_files(directory):
    """No file may be longer than the limit: EFBIG, which a quota gives too."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    fill_up(
        directory,
        range(0, 20_000, 500),
        lambda room: resource.setrlimit(resource.RLIMIT_FSIZE, (hard if room is None else room, hard)),
    )


def leave(directory, room):
    """Fill a disk up but for so many bytes, or empty it again (None)."""
    ballast = directory / "ballast"
    ballast.unlink(missing_ok=True)
    if room is not None:
        with open(ballast, "wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(directory).free - room)


def fill_up_a_small_disk(directory):
    fill_up(directory, range(4096, 24 * 4096, 4096), lambda room: leave(directory, room))


def in_a_process(function, directory):
    program = f"import sys, pathlib, tests.test_store_faults as t; t.{function.__name__}(pathlib.Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", program, str(directory)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return [int(number) for number in done.stdout.split()[1:]]


def test_files_that_may_not_grow(tmp_path):
    assert in_a_process(fill_up_with_small_files, tmp_path)[0] > 10


@pytest.fixture
def small_disk(tmp_path):
    with disk_of("1m", tmp_path / "disk") as mounted:
        yield mounted


def test_a_disk_that_is_full(small_disk):
    assert in_a_process(fill_up_a_small_disk, small_disk)[0] > 5


def finish_on_a_full_disk(directory):
    windows, errors = make_windows(6, 2000), []
    with ScoreStore(directory / "out", IDENTITY) as store:
        for window in windows:
            write_window(store, window)
        leave(directory, 8 * 4096)
        try:
            store.finish()
        except OSError as error:
            errors.append(error.errno)
        assert errors == [errno.ENOSPC]
        leave(directory, None)
        print("failed", len(errors), store.finish()["counts"]["rows"])


def test_finishing_on_a_full_disk_is_an_error_and_no_crash(small_disk):
    """g_hat waits in a mapped file: what finds no room behind a mapping is killed (SIGBUS)."""
    assert in_a_process(finish_on_a_full_disk, small_disk) == [1, 12_000]


HOLD = """
import sys, time
from tests.score_rows import IDENTITY, row
from lark_fast.scoring.store import ScoreStore
store = ScoreStore(sys.argv[1], IDENTITY)
store.append([row(1, 0)])
print("held", flush=True)
sys.stdin.readline()
store.close()
print("closed", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that writes to tmp_path / "out"."""
    run = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")],
        env=ENVIRONMENT, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip
    with run:
        assert run.stdout.readline() == "held\n"
        yield run
        if run.poll() is None:
            run.communicate("\n\n")


def refusal(out, **how):
    with pytest.raises(UserError) as refused:
        ScoreStore(out, IDENTITY, **how)
    return str(refused.value)


def test_a_second_run_is_refused_and_told_who_writes(tmp_path, holder):
    out = tmp_path / "out"
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    for how in ({}, {"overwrite": True}, {}):
        message = refusal(out, **how)
        assert message.startswith(f"--out {out}: another run (pid {holder.pid} on ")
        assert "\n" not in message
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    # Who reads asks nobody.
    assert not read_manifest(out)["complete"]
    assert part_files(out) == []
    holder.stdin.write("\n")
    assert holder.stdout.readline() == "closed\n"
    assert held(out) == {("1", "0")}
    assert holder.poll() is None


def test_kill_9_gives_the_lock_back(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert held(tmp_path / "out") == {("1", "0")}


def test_a_run_that_has_just_begun_has_no_name_yet(tmp_path, holder):
    (tmp_path / "out" / ".lock").write_text("")
    assert refusal(tmp_path / "out").startswith(f"--out {tmp_path / 'out'}: another run is writing to it; wait")


def test_one_process_is_no_exception(tmp_path):
    with ScoreStore(tmp_path, IDENTITY):
        assert f"pid {os.getpid()} on" in refusal(tmp_path)
    held(tmp_path)


def test_an_error_gives_the_lock_back(tmp_path):
    def fail():
        with ScoreStore(tmp_path, IDENTITY) as store:
            store.append([row(1, 0)])
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    held(tmp_path)
    with pytest.raises(UserError, match="student was") as refused:
        ScoreStore(tmp_path, IDENTITY | {"student": "another"})
    held(tmp_path)
    assert refused.traceback, "which keeps the store that was refused from being collected"


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    read, write = os.pipe()
    with ScoreStore(tmp_path, IDENTITY):
        worker = os.fork()
        if not worker:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
    try:
        held(tmp_path)
    finally:
        os.close(write)
        os.waitpid(worker, 0)
        os.close(read)


def test_a_disk_that_has_become_read_only(small_disk):
    out = small_disk / "out"
    with ScoreStore(out, IDENTITY) as store:
        store.append([row(1, 0)])
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for how in ({}, {"overwrite": True}):
        assert refusal(out, **how) == f"--out {out}: cannot be written to: Read-only file system ({out / '.lock'})"
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert held(out) == {("1", "0")}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    assert "cannot be written to: Permission denied" in refusal(tmp_path)
