"""A scoring run that is killed, interrupted, out of space, or whose input changes: through the command line."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lark_fast.scoring.journal import Journal
from lark_fast.scoring.parts import part_files
from lark_fast.scoring.store import read_manifest
from tests.command import disk_of, make_records, write_jsonl, write_student
from tests.score_rows import table

# Windows of four packs, whatever the student: many moments inside a window to be stopped at. And the matrix product
# that is timed before every run only for a figure of its summary would take most of the time of these.
SMALL_WINDOWS = "import math, lark_fast.flop as f, lark_fast.packing as p; p.CPU_WINDOW_FLOP = 0;"
QUICK = SMALL_WINDOWS + "f.matmul_ceiling = lambda *_: math.nan\n"
# Also tell, in a file that only grows, each pass that begins (a dot) and the rows that the store has taken.
TELLING = (
    QUICK
    + """
from lark_fast.scoring.forward import Passes
from lark_fast.scoring.store import ScoreStore
told, launch, append, launched = os.open({told!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND), *real, 0
def telling_launch(self, batch):
    global launched
    launched += 1
    os.write(told, b".\\n")
    {at_launch}
    return launch(self, batch)
def telling_append(self, rows, ahead):
    append(self, rows, ahead)
    os.write(told, ("\\n" + json.dumps([[r["problem_id"], r["candidate_id"]] for r in rows]) + "\\n").encode())
Passes._launch, ScoreStore.append = telling_launch, telling_append
""".replace("*real", "Passes._launch, ScoreStore.append")
)
KEY = ("problem_id", "candidate_id")
PACK = ("--tokens-per-batch", 256)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return write_student(tmp_path_factory.mktemp("student"))


def write_pool(path, problems):
    """Four records a problem, with twins and rejects among them."""
    records = list(make_records(problems, 4))
    for at in (700, 150):
        records.insert(at, {"messages": "broken"})
        records.insert(at, {**records[at + 1], "problem_id": "twin", "candidate_id": at})
    return write_jsonl(path, records)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Some 1,200 records: many windows."""
    return write_pool(tmp_path_factory.mktemp("pool") / "pool.jsonl", 300)


def score(pool, student, out, *more):
    """The words of the command; float32, so that what differs differs for a reason."""
    return ("score", "--pool", pool, "--student", student, "--out", out, "--dtype", "float32", *PACK, *more)


@pytest.fixture(scope="module")
def whole(forks, pool, student, tmp_path_factory):
    """The directory of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "s"
    forks.run(*score(pool, student, out), before=QUICK)
    assert len(part_files(out)) > 20
    records = [json.loads(line) for line in pool.read_text().splitlines()]
    in_order = [tuple(str(record[name]) for name in KEY) for record in records if record["messages"] != "broken"]
    assert list(rows_of(out)) == in_order
    return out


def journal_tables(out):
    """What the journals hold, as a reader of the frames finds it; nothing is changed."""
    for path in sorted(out.glob("journal-*")):
        yield from (pa.ipc.open_stream(frame).read_all() for frame in Journal(path).frames)


def rows_of(out):
    """{key: nll} of all rows in parts and journals; a row that is in both has one nll."""
    found = {}
    for rows in (*map(pq.read_table, part_files(out)), *journal_tables(out)):
        for problem, candidate, nll in zip(*(rows[name].to_pylist() for name in (*KEY, "nll")), strict=True):
            assert found.setdefault((problem, candidate), nll) == nll
    return found


def same(out, whole):
    """Bit for bit the store of a run that nothing happened to."""
    assert table(out).equals(table(whole))
    assert [p.name for p in part_files(out)] == [p.name for p in part_files(whole)]
    assert not list(out.glob("journal-*"))
    assert (out / "rejected.jsonl").read_bytes() == (whole / "rejected.jsonl").read_bytes()
    ours, theirs = read_manifest(out), read_manifest(whole)
    assert ours["complete"]
    assert {k: v for k, v in ours.items() if k != "timing"} == {k: v for k, v in theirs.items() if k != "timing"}


def wait_for(what, run, seconds=60):
    """Until ``what()`` holds; the run must not end before."""
    until = time.monotonic() + seconds
    while not what():
        assert run.poll() is None, f"ended too early\n{run.stdout}\n{run.stderr}"
        assert time.monotonic() < until
        time.sleep(0.001)


def journalled(out, n=1):
    """Whether so many packs of the window in hand are on the disk."""
    return any(len(Journal(path).frames) >= n for path in out.glob("journal-*"))


def tree(pid):
    """The processes that a command has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def gone(processes):
    """Wait for their end."""
    psutil.wait_procs(processes, timeout=10)
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def _is_whole(line):
    """Of what was told: kill -9 may tear a line, and then the next one begins behind its rest."""
    try:
        return isinstance(json.loads(line), list)
    except json.JSONDecodeError:  # nothing, the dot of a pass, or half a line
        return False


class Told:
    """What runs with ``TELLING`` have told."""

    def __init__(self, path):
        self.path = path

    def before(self, at_launch="pass"):
        return TELLING.format(told=str(self.path), at_launch=at_launch)

    def lines(self):
        return self.path.read_text().splitlines() if self.path.exists() else []

    @property
    def launched(self):
        return sum(line == "." for line in self.lines())

    @property
    def packs(self):
        return [[tuple(key) for key in json.loads(line)] for line in self.lines() if _is_whole(line)]

    @property
    def rows(self):
        return {key for pack in self.packs for key in pack}


@pytest.fixture
def told(tmp_path):
    return Told(tmp_path / "told")


def test_fifty_kills_and_bit_for_bit_an_uninterrupted_run(tmp_path, forks, student, told):
    pool, whole, out = write_pool(tmp_path / "pool.jsonl", 500), tmp_path / "whole", tmp_path / "s"
    forks.run(*score(pool, student, whole), before=QUICK)
    chance, expected = random.Random(0), rows_of(whole)
    there, in_window = {}, 0
    for _ in range(50):
        run = forks.start(*score(pool, student, out), before=told.before())
        if chance.random() < 0.8:  # else it is still starting
            wanted = len(told.packs) + chance.randint(1, 5)
            wait_for(lambda: len(told.packs) >= wanted, run)  # noqa: B023
            time.sleep(chance.uniform(0, 0.01))
        else:
            time.sleep(chance.uniform(0, 0.5))
        run.kill(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, f"ended by itself\n{run.stdout}\n{run.stderr}"
        found = rows_of(out)
        assert told.rows <= found.keys(), "the store had taken it"
        assert there.items() <= found.items() <= expected.items()
        there = found
        in_window += journalled(out)
    assert in_window > 50 / 3, in_window
    assert len(there) > len(expected) / 4
    assert not read_manifest(out)["complete"]
    forks.run(*score(pool, student, out), before=told.before())
    same(out, whole)
    scored = [key for pack in told.packs for key in pack]
    assert len(scored) == len(set(scored)), "what the store had was scored again"


@pytest.mark.parametrize("how", ["killed", "interrupted twice"])
def test_workers_do_not_outlive_their_run(tmp_path, forks, pool, student, whole, told, how):
    out = tmp_path / "s"
    # Interrupted twice in one pass: the second does not wait for its end.
    twice = "launched == 6 and (os.killpg(0, 2), os.killpg(0, 2))"
    run = forks.start(
        *score(pool, student, out, "--workers", 2), before=told.before("pass" if how == "killed" else twice)
    )
    wait_for(lambda: told.packs, run)
    workers = tree(run.pid)
    assert len(workers) == 2
    if how == "killed":
        run.kill(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    else:
        run.ended(130)
        assert (told.launched, len(told.packs)) == (6, 5)
    assert gone(workers)
    assert told.rows <= rows_of(out).keys()
    forks.run(*score(pool, student, out, "--workers", 0), before=QUICK)
    same(out, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_lets_the_pack_in_hand_be_finished(tmp_path, forks, pool, student, whole, told, number, workers):
    out = tmp_path / "s"
    words = score(pool, student, out, "--workers", workers)
    # To the whole group, as a terminal and many schedulers do: in the second pass of the second window.
    run = forks.run(*words, code=130, before=told.before(f"launched == 6 and os.killpg(0, {int(number)})"))
    assert run.stdout == ""
    assert run.stderr.splitlines()[-1].startswith("lark-fast: interrupted; what is on disk is kept")
    assert (told.launched, len(told.packs)) == (6, 6)
    assert told.rows == rows_of(out).keys()
    (part,) = part_files(out)
    in_hand = set(told.rows) - set(zip(*(pq.read_table(part)[n].to_pylist() for n in KEY), strict=True))
    assert [key in in_hand for key in (told.packs[0][0], told.packs[-1][0])] == [False, True]
    assert sum(len(rows) for rows in journal_tables(out)) == len(in_hand)
    assert not read_manifest(out)["complete"]
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["end"]
    assert (last["packs"], last["scored"]) == (6, len(told.rows))
    forks.run(*score(pool, student, out, "--workers", int(number == signal.SIGTERM)), before=told.before())
    same(out, whole)
    assert sum(map(len, told.packs)) == len(told.rows), "what the store had was scored again"


def test_a_signal_in_the_last_pass_of_a_window(tmp_path, forks, pool, student, whole, told):
    out = tmp_path / "s"
    forks.run(*score(pool, student, out), code=130, before=told.before("launched == 8 and os.killpg(0, 15)"))
    assert told.rows == rows_of(out).keys()
    forks.run(*score(pool, student, out), before=QUICK)
    same(out, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_waits_for_input(tmp_path, forks, pool, student, number):
    out = tmp_path / "s"
    run = forks.start(*score(pool, student, out, "--workers", 1), before=QUICK)
    # Not before it is a program of its own: until then it runs in its parent's memory, and the parent waits for it.
    wait_for(lambda: any("lark_fast.scoring.workers" in " ".join(p.cmdline()) for p in tree(run.pid)), run)
    (worker,) = tree(run.pid)
    worker.suspend()
    time.sleep(0.3)
    run.kill(number)
    run.ended(130)
    assert gone([worker])
    assert "goes on from there" in run.stderr
    assert rows_of(out) == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_loads(tmp_path, forks, pool, student, whole, told, number):
    """And at any moment after that, up to the first passes."""
    loading = """
import lark_fast.student
load_student = lark_fast.student.load_student
def telling_load(*words, **more):
    os.write(told, b"[]\\n")
    return load_student(*words, **more)
lark_fast.student.load_student = telling_load
"""
    out, chance, moments = tmp_path / "s", random.Random(int(number)), [0, 0, 0.1, 0.2, 0.3, 0.4]
    for n, moment in enumerate(moments, 1):
        run = forks.start(*score(pool, student, out), before=told.before() + loading)
        wait_for(lambda: len(told.packs) == n, run)  # noqa: B023
        time.sleep(moment and chance.uniform(moment - 0.1, moment))
        run.kill(number)
        run.ended(130)
        assert run.stdout == ""
        assert len([line for line in run.stderr.splitlines() if not line.startswith("scoring: ")]) == 1, run.stderr
        told.path.write_text("[]\n" * n)
    forks.run(*score(pool, student, out), before=QUICK)
    same(out, whole)


@pytest.fixture
def small_disk(tmp_path):
    with disk_of("256k", tmp_path / "disk") as mounted:
        yield mounted


def remount(disk, how):
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


def refused(run, says):
    """The run has ended with 2 and one line that says so, and what a log's live line may be before it."""
    run.ended(2)
    lines = [line for line in run.stderr.splitlines() if not line.startswith("scoring: ")]
    assert len(lines) == 1, run.stderr
    assert lines[0].startswith("lark-fast: ")
    assert says in lines[0]
    assert run.stdout == ""


def test_a_disk_that_fills_up(forks, pool, student, whole, told, small_disk):
    out = small_disk / "s"
    words = score(pool, student, out)
    for _ in range(2):  # the second run finds no more room than the first
        refused(
            forks.start(*words, before=told.before()), f"--out {out}: cannot be written to: No space left on device"
        )
        found = rows_of(out)
        assert told.rows <= found.keys()
        assert 100 < len(found) < 1200
    remount(small_disk, "ro")
    refused(forks.start(*words, before=QUICK), f"--out {out}: cannot be written to: Read-only file system")
    remount(small_disk, "rw,size=16m")
    forks.run(*words, before=told.before())
    same(out, whole)


@pytest.mark.parametrize("at_the_end", [False, True])
def test_files_that_may_not_grow(tmp_path, forks, pool, student, whole, told, at_the_end):
    """In the middle of a window's journal; and where g_hat's scratch file of 8 bytes a row finds no room."""
    out = tmp_path / "s"
    small = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
"""
    if at_the_end:
        small += "f = ScoreStore.finish\nScoreStore.finish = lambda self, **facts: (limit(), f(self, **facts))\n"
    else:
        small += "limit()\n"
    run = forks.start(*score(pool, student, out), before=told.before() + small)
    refused(run, f"--out {out}: cannot be written to: File too large")
    assert told.rows
    assert told.rows <= rows_of(out).keys() <= rows_of(whole).keys()
    assert (len(rows_of(out)) == len(rows_of(whole))) == at_the_end
    assert not read_manifest(out)["complete"]
    forks.run(*score(pool, student, out), before=QUICK)
    same(out, whole)


def test_what_cannot_be_written_to_is_one_line(tmp_path, forks, pool, student):
    file = tmp_path / "file"
    file.write_text("mine")
    refused(forks.start(*score(pool, student, file), before=QUICK), f"--out {file}: cannot be written to: ")
    refused(forks.start(*score(pool, student, file / "s"), before=QUICK), f"--out {file / 's'}: cannot be written to")
    assert file.read_text() == "mine"
    for name in ("metrics.jsonl", "rejected.jsonl", "manifest.json", "journal-000000", ".lock"):
        out = tmp_path / f"with a directory {name}"
        (out / name).mkdir(parents=True)
        says = f"--out {out}: cannot be written to: Is a directory"
        if name == "journal-000000":
            says = f"{out}: no manifest.json there"
        elif name == "manifest.json":
            says = f"{out / name}: cannot be read: "
        refused(forks.start(*score(pool, student, out), before=QUICK), says)
        assert os.listdir(out) == [name] or name in ("metrics.jsonl", "rejected.jsonl")


def test_a_second_run_on_one_directory_is_refused(tmp_path, forks, pool, student, whole, told):
    out = tmp_path / "s"
    first = forks.start(*score(pool, student, out), before=told.before())
    wait_for(lambda: len(told.packs) > 7, first)
    first.kill(signal.SIGSTOP)
    for more in ((), ("--overwrite",)):
        second = forks.start(*score(pool, student, out, *more), before=QUICK)
        refused(second, f"--out {out}: another run (pid {first.pid} on ")
    first.kill(signal.SIGCONT)
    first.ended()
    same(out, whole)


def test_an_input_that_vanishes_takes_nothing_with_it(tmp_path, forks, pool, student, whole, told):
    inputs, out = tmp_path / "pool", tmp_path / "s"
    inputs.mkdir()
    lines = pool.read_text().splitlines(keepends=True)
    (inputs / "a.jsonl").write_text("".join(lines[:600]))
    (inputs / "b.jsonl").write_text("".join(lines[600:]))
    words = score(inputs, student, out)
    run = forks.start(*words, before=told.before())
    wait_for(lambda: len(told.packs) > 7, run)
    run.kill(signal.SIGSTOP)
    (inputs / "b.jsonl").rename(tmp_path / "b.jsonl")
    run.kill(signal.SIGCONT)
    refused(run, f"pool '{inputs / 'b.jsonl'}' cannot be read: No such file")
    assert told.rows <= rows_of(out).keys()
    assert not read_manifest(out)["complete"]
    (tmp_path / "b.jsonl").rename(inputs / "b.jsonl")
    forks.run(*words, before=QUICK)
    assert rows_of(out) == pytest.approx(rows_of(whole), rel=1e-6)


def test_a_student_without_weights(tmp_path, forks, pool, student):
    bare = tmp_path / "bare"
    shutil.copytree(student, bare)
    (bare / "model.safetensors").unlink()
    refused(forks.start(*score(pool, bare, tmp_path / "s"), before=QUICK), f"{bare}: cannot be loaded as a student")
    assert not (tmp_path / "s").exists()
