"""Running ahead in a thread: the order of items and errors, how far ahead, and that nothing is left behind."""

import gc
import subprocess
import sys
import threading
import time

import pytest

from lark_fast.scoring import prefetch as prefetch_module
from lark_fast.scoring.prefetch import prefetch

DEPTHS = [0, 1, 3]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


class Source:
    """Numbers; knows how many were made, in which thread it was closed, and ends as it is told."""

    def __init__(self, count, error=None):
        self.made, self.closed_in, self.count, self.error = 0, [], count, error

    def __iter__(self):
        try:
            for number in range(self.count):
                self.made += 1
                yield number
            if self.error is not None:
                raise self.error
        finally:
            self.closed_in.append(threading.current_thread())


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.001)


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_item_comes_once_and_in_order(depth):
    ahead = prefetch(range(1000), depth)
    assert list(ahead) == list(range(1000))
    assert list(ahead) == [], "it stays at its end"
    ahead.close()
    ahead.close()


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("error", [ValueError("damage"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_comes_behind_the_items_before_it_and_once(depth, error):
    source = Source(5, error)
    ahead, seen = prefetch(source, depth), []
    with pytest.raises(type(error)) as caught:
        seen.extend(ahead)
    assert caught.value is error
    assert seen == [0, 1, 2, 3, 4]
    assert next(ahead, "the end") == "the end"
    assert len(source.closed_in) == 1


@pytest.mark.parametrize("depth", DEPTHS)
def test_no_more_than_depth_items_wait(depth):
    source = Source(100)
    with prefetch(source, depth) as ahead:
        for taken in range(5):
            wait_until(lambda taken=taken: source.made == taken + depth)
            time.sleep(0.01)
            assert source.made == taken + depth
            assert next(ahead) == taken


@pytest.mark.parametrize("depth", DEPTHS)
def test_closing_early_runs_the_generators_finally_in_its_own_thread(depth):
    source = Source(100)
    ahead = prefetch(source, depth)
    assert next(ahead) == 0
    wait_until(lambda: source.made == 1 + depth)  # and so the thread is blocked
    started = time.monotonic()
    ahead.close()
    assert time.monotonic() - started < 1
    (thread,) = source.closed_in
    assert (thread is threading.current_thread()) == (depth == 0)
    assert next(ahead, "the end") == "the end"


def test_an_error_of_closing_is_not_lost_on_the_way():
    def source():
        try:
            yield 1
            raise ValueError("the first")
        finally:
            raise KeyError("the second")

    for depth in DEPTHS:
        ahead = prefetch(source(), depth)
        assert next(ahead) == 1
        with pytest.raises(KeyError, match="the second") as caught:
            next(ahead)
        assert isinstance(caught.value.__context__, ValueError)


def test_one_that_is_dropped_is_closed():
    source = Source(100)
    ahead = prefetch(source, 2)
    assert next(ahead) == 0
    del ahead
    gc.collect()
    assert len(source.closed_in) == 1


def test_a_waiting_consumer_is_let_go_by_closing():
    blocked, seen = threading.Event(), []

    def source():
        yield 1
        blocked.wait(20)
        yield 2

    ahead = prefetch(source(), 1)
    consumer = threading.Thread(target=lambda: seen.extend(ahead))
    consumer.start()
    wait_until(lambda: seen == [1])
    closer = threading.Thread(target=ahead.close)
    closer.start()
    consumer.join(5)
    assert not consumer.is_alive(), "while the source is still at its second item"
    blocked.set()
    closer.join(5)
    assert seen == [1]


def test_waiting_is_counted_and_running_ahead_is_not():
    def slow():
        for number in range(4):
            time.sleep(0.05)
            yield number

    inline = prefetch(slow(), 0)
    assert list(inline) == [0, 1, 2, 3]
    assert inline.waited_seconds >= 4 * 0.05
    with prefetch(slow(), 5) as ahead:
        thread = next(thread for thread in threading.enumerate() if thread.name == "prefetch")
        thread.join(20)  # the consumer is busy with other things until all is there
        assert list(ahead) == [0, 1, 2, 3]
        assert ahead.waited_seconds < 0.05
    with prefetch(slow(), 4) as ahead:
        assert next(ahead) == 0
        assert ahead.waited_seconds > 0


@pytest.mark.parametrize("source", ["itertools.count()", "forever()", "asleep()"])
def test_an_interpreter_that_forgets_to_close_ends_all_the_same(source):
    script = f"""
import itertools, time
from lark_fast.scoring import prefetch
prefetch._PATIENCE_SECONDS = 0.5
def forever():
    try:
        yield from itertools.count()
    finally:
        print("closed", flush=True)
def asleep():
    yield 0
    time.sleep(300)
ahead = prefetch.prefetch({source}, 2)
assert next(ahead) == 0
time.sleep(0.05)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ("closed\n" if source == "forever()" else "")


def test_closing_does_not_wait_forever_for_an_item(monkeypatch):
    monkeypatch.setattr(prefetch_module, "_PATIENCE_SECONDS", 0.1)
    reached, blocked, closed = threading.Event(), threading.Event(), threading.Event()

    def source():
        try:
            yield 1
            reached.set()
            blocked.wait(20)
            yield 2
        finally:
            closed.set()

    ahead = prefetch(source(), 1)
    assert next(ahead) == 1
    assert reached.wait(5)
    started = time.monotonic()
    ahead.close()
    assert time.monotonic() - started < 5
    assert not closed.is_set()
    blocked.set()
    assert closed.wait(5), "by the thread, when it gets there"
    wait_until(lambda: not any(thread.name == "prefetch" for thread in threading.enumerate()))


def test_a_negative_depth_is_refused():
    with pytest.raises(ValueError, match="at least 0"):
        prefetch([], -1)
