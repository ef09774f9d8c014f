"""The feed against a plain loop over the pool, with real worker processes, and what happens when these are hurt."""

import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lark_fast.errors import RejectError, UserError
from lark_fast.pool.keys import KeyTable
from lark_fast.pool.reading import Pool, Rejected
from lark_fast.pool.records import NOT_SCORED
from lark_fast.rendering.renderer import Renderer, RenderOptions
from lark_fast.scoring import feed as feed_module
from lark_fast.scoring import workers as workers_module
from lark_fast.scoring.feed import Feed, Trajectory, default_workers, token_hash
from lark_fast.scoring.workers import map_in_workers
from tests.templates import gemma2

FIELDS = ("key", "teacher", "source", "line", "content_hash", "truncated", "token_hash", "position")

# Renderers without a tokenizer, in a module of their own: a worker that unpickles one imports next to nothing.
HELPERS = '''
import os, signal, time
from lark_fast.rendering.renderer import Rendered

class Words:
    """A token a character; what a candidate's id asks for happens first."""

    def __init__(self, log=None):
        self.log = log

    def __call__(self, record):
        candidate = str(record.candidate_id)
        if self.log:
            with open(self.log, "a") as file:
                file.write(candidate + "\\n")
        if candidate == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if candidate == "exit":
            os._exit(7)
        if candidate == "memory":
            raise MemoryError
        if candidate == "bug":
            raise ZeroDivisionError("a bug in a renderer")
        if candidate == "print":
            print("printed by a worker", flush=True)
        if candidate == "slow":
            time.sleep(300)
        ids = [ord(character) for character in record.messages[-1]["content"]]
        return Rendered(input_ids=ids, labels=[-100, *ids[1:]], truncated=False)

class OnlyHere(Words):
    """Pickles well and does not come back."""

    def __reduce__(self):
        return int, ("not a number",)
'''

# A run that is to be interrupted: it says when it starts and when it has something, and is quiet about Ctrl-C.
SCRIPT = """
import sys
from helpers_of_test_feed import Words
from lark_fast.pool.keys import KeyTable
from lark_fast.pool.reading import Pool
from lark_fast.scoring import prefetch
from lark_fast.scoring.feed import Feed

if __name__ == "__main__":
    prefetch._PATIENCE_SECONDS = 0.5
    known = KeyTable()
    known.add(("old", "old"), bytes(16), met=False)
    feed = Feed(Pool([sys.argv[1]]), Words(), known=known, workers=2, on_reject=print)
    try:
        print("starting", flush=True)
        with prefetch.prefetch(feed, int(sys.argv[2])) as trajectories:
            for trajectory in trajectories:
                print(trajectory.key, flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
"""


THERE_BEFORE: set[psutil.Process] = set()  # what other tests of this process keep, such as ``forks``


@pytest.fixture(autouse=True, scope="module")
def _there_before():
    THERE_BEFORE.update(psutil.Process().children())
    yield
    THERE_BEFORE.clear()


@pytest.fixture(autouse=True)
def _nothing_hangs():
    def give_up(*_):
        raise TimeoutError("a test of the feed hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert children() == [], "no test may leave a process behind"


@pytest.fixture
def helpers(tmp_path, monkeypatch):
    directory = tmp_path / "helpers"
    directory.mkdir()
    (directory / "helpers_of_test_feed.py").write_text(HELPERS)
    monkeypatch.syspath_prepend(directory)
    monkeypatch.delitem(sys.modules, "helpers_of_test_feed", raising=False)
    import helpers_of_test_feed

    yield helpers_of_test_feed
    del sys.modules["helpers_of_test_feed"]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(feed_module, "_CHUNK_RECORDS", 3)


def children() -> list[psutil.Process]:
    # Python's own tracker, which any spawned process brings along, stays as long as its parent.
    own = [process for process in psutil.Process().children() if process not in THERE_BEFORE]
    below = [process for child in own for process in child.children(recursive=True)]
    return [process for process in (*own, *below) if not is_tracker(process)]


def is_tracker(process: psutil.Process) -> bool:
    try:
        return "resource_tracker" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def conversation(answer: str, *, system: str | None = None, question: str = "How many apples?", **columns) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if system:
        turns.insert(0, {"role": "system", "content": system})
    return {**columns, "messages": turns}


def answers(number: int, **columns) -> list[dict]:
    return [
        conversation(f"The answer is {i}.", problem_id=i // 3, candidate_id=i, teacher=f"t{i % 3}", **columns)
        for i in range(number)
    ]


def write_lines(path: Path, raws) -> str:
    path.write_text("".join((raw if isinstance(raw, str) else json.dumps(raw)) + "\n" for raw in raws))
    return str(path)


def write_pool(directory: Path) -> list[str]:
    """All that a pool may hold, the first record good: formats, broken lines, duplicates, faults of all kinds."""
    good = answers(24)
    a = [*good[:5], "{broken", *good[3:9], conversation("It is 4.", system="Be brief.", problem_id=0, candidate_id="s")]
    a += [conversation("It is 4.", problem_id=0, candidate_id="s"), conversation("", problem_id=1), '"text"', "", "[1"]
    write_lines(directory / "a.jsonl", a)
    with_ids = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "problem_id": "ids"}
    beyond = {"input_ids": [5, 6, 10**6], "labels": [-100, 6, 10**6], "problem_id": "beyond the vocabulary"}
    short = {"input_ids": [5, 6, 7], "labels": [-100, -100, 7], "problem_id": "one token"}
    lists = [*good[8:14], with_ids, with_ids, conversation("and so on " * 40, problem_id="long"), beyond, short]
    (directory / "b.json.gz").write_bytes(gzip.compress(json.dumps(lists, indent=1).encode()))
    sink = io.BytesIO()
    rows = [*good[12:18], conversation("It is 5.", system="Be brief.", problem_id=9, candidate_id=99, teacher="t")]
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=2)
    (directory / "c.parquet").write_bytes(sink.getvalue())
    (directory / "d.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(r) + "\n" for r in good[18:]).encode())[:-9]
    )
    return [str(directory)]


def comparable(trajectory: Trajectory) -> tuple:
    assert trajectory.input_ids.dtype == trajectory.labels.dtype == np.int32
    assert trajectory.input_ids.flags.c_contiguous
    ids, labels = trajectory.input_ids.tolist(), trajectory.labels.tolist()
    return (*(getattr(trajectory, name) for name in FIELDS), ids, labels)


def fed(paths, renderer, *, known=(), workers=0, limit=None, **options):
    """What a feed yields and rejects, and the feed; ``known`` are pairs of key and content hash."""
    table, rejects = KeyTable(), []
    for key, content in known:
        table.add(key, content, met=False)
    feed = Feed(
        Pool(paths),
        renderer,
        known=table,
        workers=workers,
        limit=limit,
        on_reject=lambda *reject: rejects.append(reject),
        **options,
    )
    return [comparable(trajectory) for trajectory in feed], rejects, feed


def plainly(paths, renderer, known):
    """The same by the shortest loop that says what is meant."""
    old, met, yielded, rejects, kept = dict(known), set(), [], [], 0
    for item in Pool(paths).read():
        if isinstance(item, Rejected):
            rejects.append((item.source, item.line, item.reason))
        elif item.key in met:
            problem, candidate = item.key
            reason = f"problem {problem!r} has a candidate {candidate!r} already (duplicate)"
            rejects.append((item.source, item.line, reason))
        elif old.get(item.key) == item.content_hash():
            met.add(item.key)
            kept += 1
        else:
            try:
                rendered = renderer(item)
            except RejectError as error:
                rejects.append((item.source, item.line, str(error)))
            else:
                assert item.key not in old, "a changed text is an error"
                met.add(item.key)
                yielded.append((item.key, item.source, item.line, rendered.input_ids, rendered.labels))
    return yielded, rejects, kept


def test_any_number_of_workers_yields_what_a_plain_loop_does(tmp_path, small_chunks):
    paths = write_pool(tmp_path)
    tokenizer = gemma2()  # its template refuses the system role: a fault of the template, not of the record
    renderer = Renderer(tokenizer, RenderOptions(max_length=64), vocab_size=len(tokenizer))
    everything, _, _ = fed(paths, renderer)
    # Among them ("0", "s"), which the first pass takes from the second record that has the key: the first is a reject,
    # and stays one. Not "long", so that something is truncated.
    known = [(row[0], row[4]) for row in everything[1::4] if row[0][0] != "long"]
    known += [(row[0], row[4]) for row in everything if row[0] == ("0", "s") and (row[0], row[4]) not in known]
    assert ("0", "s") in dict(known)
    expected, expected_rejects, kept = plainly(paths, renderer, known)
    reasons = " ".join(reason for _, _, reason in expected_rejects)
    for part in ("invalid JSON", "duplicate", "system role", "vocabulary", "at least 2", "truncated gzip", "empty"):
        assert part in reasons, "the pool is to hold it"

    before, counts = dict(os.environ), set()
    for workers in (0, 1, 3):
        rows, rejects, feed = fed(paths, renderer, known=known, workers=workers)
        assert [(row[0], row[2], row[3], row[-2], row[-1]) for row in rows] == expected, workers
        assert rejects == expected_rejects
        assert feed.render_seconds > 0
        assert 0 < feed.position <= Pool(paths).total_bytes
        counts.add((feed.records, feed.kept, feed.yielded, feed.truncated, feed.input_tokens, tuple(map(str, rows))))
    assert len(counts) == 1, "every field and every count, whatever the number of workers"
    ((records, kept_by_feed, yielded, truncated, input_tokens, _),) = counts
    assert (kept_by_feed, yielded, truncated) == (kept, len(expected), 1)
    assert kept == len(known) > 3
    assert records == len(expected) + len(expected_rejects) + kept
    assert input_tokens == sum(len(row[-2]) for row in rows)
    positions = [row[7] for row in rows]
    assert all(one <= other for one, other in pairwise(positions))
    assert 0 < positions[0] < positions[-1] <= Pool(paths).total_bytes
    assert before == dict(os.environ)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_limit_counts_records_that_are_read(tmp_path, helpers, small_chunks, workers):
    path = write_lines(tmp_path / "pool.jsonl", ["{broken", *answers(8), "{broken"])
    for limit in (0, 1, 5) if workers == 0 else (5,):
        rows, rejects, feed = fed([path], helpers.Words(), workers=workers, limit=limit)
        assert (len(rows), len(rejects), feed.records) == (max(limit - 1, 0), min(limit, 1), limit)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_known_is_not_rendered_again(tmp_path, helpers, workers):
    path = write_lines(tmp_path / "pool.jsonl", answers(40))
    rows, _, _ = fed([path], helpers.Words())
    log = tmp_path / "rendered"
    known = [(row[0], row[4]) for row in rows if int(row[0][1]) % 2]
    again, _, feed = fed([path], helpers.Words(log), known=known, workers=workers)
    assert again == rows[::2]
    assert feed.kept == 20
    assert feed.position >= again[-1][7]
    assert sorted(map(int, log.read_text().split())) == list(range(0, 40, 2))


@pytest.mark.parametrize("workers", [0, 1])
def test_another_text_under_a_known_key_stops_the_run_there(tmp_path, helpers, workers):
    path = write_lines(tmp_path / "pool.jsonl", answers(6))
    seen = []
    feed = Feed(Pool([path]), helpers.Words(), known=(known := KeyTable()), workers=workers, on_reject=print)
    known.add(("1", "4"), bytes(16), met=False)
    with pytest.raises(UserError, match=r"pool\.jsonl:5: this record's text is not the one that was scored.*overwr"):
        seen.extend(feed)
    assert [trajectory.line for trajectory in seen] == [1, 2, 3, 4]


def test_a_template_at_fault_stops_a_run_that_has_nothing_yet(tmp_path):
    renderer = Renderer(gemma2())
    faulty = conversation("It is 4.", system="Be brief.", problem_id=0)
    first = write_lines(tmp_path / "first.jsonl", ["{broken", faulty, *answers(2)])
    later = write_lines(tmp_path / "later.jsonl", [*answers(1), faulty, *answers(3)[1:]])
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"first\.jsonl:2: .*refuses the system role.*--system"):
            fed([first], renderer, workers=workers)
        rows, rejects, _ = fed([later], renderer, workers=workers)
        assert ([row[3] for row in rows], [reject[1] for reject in rejects]) == ([1, 3, 4], [2])
    rows, rejects, _ = fed([first], renderer, resumed=True)
    assert ([row[3] for row in rows], [reject[1] for reject in rejects]) == ([3, 4], [1, 2])
    rows, rejects, _ = fed([first], renderer, known=[(("elsewhere", ""), bytes(16))])
    assert ([row[3] for row in rows], [reject[1] for reject in rejects]) == ([3, 4], [1, 2])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_reject_may_end_the_run_in_its_place(tmp_path, helpers, small_chunks, workers):
    path = write_lines(tmp_path / "pool.jsonl", [*answers(7), "{broken", *answers(30)[7:]])

    def strict(source, line, reason):
        raise UserError(f"{source}:{line}: {reason} (--strict)")

    seen = []
    feed = Feed(Pool([path]), helpers.Words(), known=KeyTable(), workers=workers, on_reject=strict)
    with pytest.raises(UserError, match=r"pool\.jsonl:8: invalid JSON.*--strict"):
        seen.extend(feed)
    assert [trajectory.line for trajectory in seen] == list(range(1, 8))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_has_gone_takes_nothing_with_it(tmp_path, helpers, workers):
    paths = [write_lines(tmp_path / f"{name}.jsonl", raws) for name, raws in (("a", answers(5)), ("b", answers(9)))]
    pool, seen = Pool(paths), []
    os.remove(paths[1])
    feed = Feed(pool, helpers.Words(), known=KeyTable(), workers=workers, on_reject=print)
    with pytest.raises(UserError, match=r"b\.jsonl' cannot be read: No such file"):
        seen.extend(feed)
    assert [trajectory.line for trajectory in seen] == [1, 2, 3, 4, 5]


def test_closing_early_ends_the_workers_and_little_was_read_ahead(tmp_path, helpers, small_chunks):
    path = write_lines(tmp_path / "pool.jsonl", answers(9000))
    pool = Pool([path])
    items = iter(Feed(pool, helpers.Words(), known=KeyTable(), workers=2, on_reject=print))
    assert next(items).line == 1
    at_work = children()
    assert len(at_work) == 2
    time.sleep(0.3)
    # 2 workers, 4 chunks each, 3 records a chunk, and what one read from the file gives.
    assert pool.bytes_read <= 2 * 4 * 3 * 300 + (1 << 14)
    for _ in range(100):
        next(items)
    assert pool.bytes_read < pool.total_bytes / 4
    items.close()
    assert not any(psutil.pid_exists(process.pid) for process in at_work)


def test_workers_are_deaf_to_interruptions_from_the_first_moment(tmp_path, helpers, small_chunks):
    # Ctrl-C goes to every process of a terminal, SIGTERM to every one of a job; the parent decides what they mean.
    path = write_lines(tmp_path / "pool.jsonl", answers(300))
    items = iter(Feed(Pool([path]), helpers.Words(), known=KeyTable(), workers=2, on_reject=print))
    seen, stop = [], threading.Event()

    def interrupt():
        while not stop.wait(0.002):
            for worker in children():
                with suppress(psutil.NoSuchProcess):
                    worker.send_signal(signal.SIGINT)
                    worker.send_signal(signal.SIGTERM)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    try:
        seen.extend(items)
    finally:
        stop.set()
        interrupter.join()
    assert [trajectory.line for trajectory in seen] == list(range(1, 301))


def test_workers_do_not_load_torch_and_keep_tokenizers_to_one_thread(tmp_path):
    path = write_lines(tmp_path / "pool.jsonl", answers(3))
    items = iter(Feed(Pool([path]), Renderer(gemma2()), known=KeyTable(), workers=1, on_reject=print))
    next(items)
    (worker,) = children()
    assert worker.environ()["TOKENIZERS_PARALLELISM"] == "false"
    maps = {entry.path for entry in worker.memory_maps()}
    assert any("tokenizers" in path for path in maps), "it is the process that tokenises"
    assert not any("libtorch" in path for path in maps)
    items.close()


def test_bytes_under_way_are_bounded_too(monkeypatch):
    monkeypatch.setattr(workers_module, "_BYTES_A_WORKER", 1000)
    taken = []

    def chunks():
        for size in (900, 900, 1500, 100, 100, 100, 100, 100):
            taken.append(size)
            yield bytes(size), size

    results = map_in_workers(len, chunks(), 1)
    # One chunk waits in hand; a chunk beyond all bounds goes alone.
    assert [(next(results), len(taken)) for _ in range(8)] == [
        (900, 2), (900, 3), (1500, 4), (100, 8), (100, 8), (100, 8), (100, 8), (100, 8)
    ]  # fmt: skip
    assert list(results) == []


@pytest.mark.parametrize(
    ("candidate", "error", "message"),
    [
        ("kill", UserError, r"was killed \(SIGKILL\), perhaps for want of memory; use fewer --workers"),
        ("exit", UserError, "ended with exit code 7; use fewer --workers"),
        ("memory", UserError, "ran out of memory; use fewer --workers"),
        ("bug", RuntimeError, "ZeroDivisionError: a bug in a renderer"),
    ],
)
def test_a_worker_that_fails_is_one_clear_error(tmp_path, helpers, small_chunks, capfd, candidate, error, message):
    bad = conversation("The end.", problem_id="bad", candidate_id=candidate)
    path = write_lines(tmp_path / "pool.jsonl", [*answers(6), bad, *answers(60)[6:]])
    seen = []
    feed = Feed(Pool([path]), helpers.Words(), known=KeyTable(), workers=2, on_reject=print)
    with pytest.raises(error, match=message):
        seen.extend(feed)
    lines = [trajectory.line for trajectory in seen]
    if candidate in ("memory", "bug"):
        assert lines == [1, 2, 3, 4, 5, 6]
    else:
        # A dead worker takes along what it had not yet sent, and nothing comes out of its place.
        assert lines in ([], [1, 2, 3], [1, 2, 3, 4, 5, 6])
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_sent_names_the_way_out(tmp_path, helpers, capfd):
    path = write_lines(tmp_path / "pool.jsonl", answers(3))
    with pytest.raises(UserError, match=r"cannot be sent to worker processes \(ValueError: .*; use --workers 0"):
        fed([path], helpers.OnlyHere(), workers=1)
    with pytest.raises(UserError, match=r"cannot be sent to worker processes .*; use --workers 0"):
        fed([path], lambda record: None, workers=1)
    assert capfd.readouterr() == ("", "")


def test_what_a_worker_prints_stays_out_of_the_output(tmp_path, helpers, capfd):
    path = write_lines(tmp_path / "pool.jsonl", [conversation("The end.", candidate_id="print")])
    assert len(fed([path], helpers.Words(), workers=1)[0]) == 1
    assert capfd.readouterr() == ("", "printed by a worker\n")


def test_no_room_for_the_keys_names_the_way_out(tmp_path, helpers, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = write_lines(tmp_path / "pool.jsonl", answers(3))
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(UserError, match=r"No space left on device.*TMPDIR.*--workers 0"):
        fed([path], helpers.Words(), known=[(("a", "b"), bytes(16))], workers=1)


@pytest.mark.parametrize(
    ("moment", "depth"), [("at once", 0), ("at once", 4), ("later", 0), ("later", 4), ("killed", 4)]
)
def test_workers_end_with_their_parent_and_say_nothing(tmp_path, helpers, moment, depth):
    slow = conversation("The end.", candidate_id="slow")
    path = write_lines(tmp_path / "pool.jsonl", [*answers(600), slow, slow, *answers(600)])
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    parent = subprocess.Popen(
        [sys.executable, str(script), path, str(depth)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group of its own, as a terminal gives one to a command
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(helpers.__file__).parent), *sys.path])},
    )
    assert parent.stdout.readline() == "starting\n"
    while len(workers := psutil.Process(parent.pid).children(recursive=True)) < (1 if moment == "at once" else 2):
        time.sleep(0.001)
    if moment != "at once":
        assert parent.stdout.readline()
    started = time.monotonic()
    if moment == "killed":
        parent.kill()
    else:
        os.killpg(parent.pid, signal.SIGINT)
    # Workers hold the parent's stderr: it has no end before they have ended.
    _, stderr = parent.communicate(timeout=30)
    assert time.monotonic() - started < 10
    assert stderr == ""
    assert parent.returncode == (-signal.SIGKILL if moment == "killed" else 130)
    psutil.wait_procs(workers, timeout=10)
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in workers)


def test_token_hash_is_that_of_stores_already_written():
    ids, labels = [1, 2**31 - 1, 3], [NOT_SCORED, 2**31 - 1, 3]
    stored = hashlib.blake2b(np.array(ids + labels, dtype="<i8").tobytes(), digest_size=16).digest()
    assert token_hash(ids, labels) == stored
    for dtype in (np.int32, np.int64):
        assert token_hash(np.array(ids, dtype), np.array(labels, dtype)) == stored
    assert token_hash(ids, ids) != stored


def test_default_workers_leave_cores_to_the_main_process(monkeypatch):
    assert default_workers("cpu") == 0
    for cores, workers in ((1, 1), (2, 1), (3, 1), (4, 2), (9, 7), (10, 8), (96, 8)):
        monkeypatch.setattr(feed_module, "_usable_cores", lambda cores=cores: cores)
        assert default_workers("cuda") == workers
    with pytest.raises(ValueError, match="at least 0"):
        Feed(None, None, known=KeyTable(), on_reject=print, workers=-1)
