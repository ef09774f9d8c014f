"""Signals wait where they are held, the second one does not, and everybody gets his own handlers back."""

import signal
import threading

import pytest

from lark_fast.interrupts import Interrupts

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture(autouse=True)
def plain_handlers():
    before = [
        (n, signal.signal(n, h))
        for n, h in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL))
    ]
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    for number, handler in before:
        signal.signal(number, handler)


@BOTH
def test_at_once_where_nothing_is_held(number):
    with Interrupts(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)


@BOTH
def test_the_first_waits_for_the_end_of_the_block(number):
    done = []

    def work():
        with interrupts.held():
            signal.raise_signal(number)
            done.append("the block")
        done.append("behind it")

    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            work()
        assert done == ["the block"]


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_does_not_wait_and_then_both_are_answered(second):
    done = []

    def work(*signals):
        with interrupts.held():
            for number in signals:
                signal.raise_signal(number)
                done.append(number)

    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            work(signal.SIGINT, second)
        assert done == [signal.SIGINT]
        # A block that saves what there is, say: it is neither ended by the signals before it nor has it seen one.
        work()
        with pytest.raises(KeyboardInterrupt):
            work(signal.SIGTERM)
        assert done == [signal.SIGINT, signal.SIGTERM]


def test_a_loop_inside_ends_early():
    done = []

    def work():
        with interrupts.held():
            for item in interrupts.until_asked(range(10)):
                done.append(item)
                if item == 3:
                    signal.raise_signal(signal.SIGTERM)

    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        work()
    assert done == [0, 1, 2, 3]


def test_an_error_inside_is_not_hidden():
    def work():
        with interrupts.held():
            signal.raise_signal(signal.SIGINT)
            raise LookupError

    with Interrupts() as interrupts, pytest.raises(LookupError):
        work()


def test_a_handler_of_somebody_else_stays():
    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append("theirs"))
    with Interrupts() as interrupts, interrupts.held():
        signal.raise_signal(signal.SIGTERM)
        assert seen == ["theirs"]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_outside_the_main_thread_nothing_changes():
    seen = []

    def work():
        with Interrupts() as interrupts, interrupts.held():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
