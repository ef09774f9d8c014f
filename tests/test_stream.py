"""A queue before the scorer: the same scores, in order, never more pending than allowed, and nobody waits for ever."""

import asyncio
import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, as_completed

import pytest
import torch

from lark_fast import Scorer, ScoringQueue, g_hat
from lark_fast.attention import NAME
from tests.command import ENVIRONMENT, make_records
from tests.templates import chatml
from tests.tiny import tiny_decoder, tiny_llama

TOKENIZER = chatml()
RECORDS = list(make_records(problems=14))  # 42 of 22 to 60 tokens
BAD = {"prompt": "What is two and two?", "completion": ""}
IDS = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9], "problem_id": "ids"}
NEVER = 600.0  # seconds: what is due by waiting alone would let a test run into its own limit


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lark-fast")]


@pytest.fixture
def scorer():
    return Scorer(tiny_llama(len(TOKENIZER)), TOKENIZER, tokens_per_batch=200)


def with_batches_of(tokens, model=None):
    return Scorer(model or tiny_llama(len(TOKENIZER)), TOKENIZER, tokens_per_batch=tokens)


def values(score):
    return (score.nll, score.brier, score.entropy, score.rank_mean, score.rsr)


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.001)


class Gate:
    """Stands before the model: holds passes up until it is opened, and knows how many tokens each has."""

    def __init__(self, scorer, error=None):
        self.open, self.passes, self.error = threading.Event(), [], error
        assert scorer.student.unpackable is None  # found by trial, with passes of its own
        self.handle = scorer.student.model.get_input_embeddings().register_forward_pre_hook(self)

    def __call__(self, _, args):
        self.passes.append(args[0].numel())
        assert self.open.wait(20)
        if self.error is not None:
            raise self.error

    def wait_for_a_pass(self):
        wait_until(lambda: self.passes)


class TestScores:
    def test_to_the_bit_in_the_same_pass(self):
        scorer = with_batches_of(10**6)
        expected, alone = scorer.score([*RECORDS, IDS]), [scorer.score([record])[0] for record in RECORDS[:5]]
        with ScoringQueue(scorer, max_pending=len(expected), max_wait=NEVER) as queue:  # full: no more can come
            assert list(queue.map([*RECORDS, IDS])) == expected
        with ScoringQueue(scorer, max_wait=0) as queue:
            assert [queue.submit(record).result() for record in RECORDS[:5]] == alone

    @pytest.mark.parametrize("name", ["llama", "bloom"])
    def test_nearly_so_in_others_and_in_order(self, name):
        model = tiny_decoder(name, len(TOKENIZER)) if name == "bloom" else None
        scorer = with_batches_of(200, model)
        assert (scorer.student.unpackable is None) == (name == "llama")
        expected = scorer.score(RECORDS)
        with ScoringQueue(scorer, max_pending=9) as queue:
            scores = list(queue.map(RECORDS))
        for score, other in zip(scores, expected, strict=True):
            assert (score.problem_id, score.candidate_id) == (other.problem_id, other.candidate_id)
            assert values(score) == pytest.approx(values(other), rel=1e-6)

    def test_those_with_the_same_tokens_tie(self, scorer):
        gate = Gate(scorer)
        gate.open.set()
        with ScoringQueue(scorer, max_pending=6, max_wait=NEVER) as queue:
            twins = [RECORDS[0] | {"candidate_id": number} for number in range(3)]
            scores = list(queue.map([*twins, *RECORDS[3:6]]))
        assert sum(gate.passes) == sum(score.n_input_tokens for score in scores[2:]), "they go once"
        assert values(scores[0]) == values(scores[1]) == values(scores[2])
        g = g_hat(*zip(*((score.nll, score.brier, score.problem_id) for score in scores), strict=True))
        assert g[0] == g[1] == g[2] != g[3]

    def test_records_without_ids_are_numbered(self, scorer):
        with ScoringQueue(scorer) as queue:
            bare = [{"messages": record["messages"]} for record in RECORDS[:4]]
            assert [score.candidate_id for score in queue.map(bare)] == [0, 1, 2, 3]

    def test_a_pass_begins_when_it_is_full_or_somebody_has_waited(self):
        scorer = with_batches_of(100)
        gate = Gate(scorer)
        gate.open.set()
        with ScoringQueue(scorer, max_wait=NEVER) as queue:
            futures = [queue.submit(record) for record in RECORDS[:5]]
            wait_until(futures[0].done)
        del gate.passes[:]
        with ScoringQueue(scorer, max_wait=0.2) as queue:
            started = time.monotonic()
            queue.submit(RECORDS[0]).result()
            assert time.monotonic() - started >= 0.2


class TestUnderLoad:
    def test_many_threads_with_bad_records_among_theirs(self):
        scorer = with_batches_of(400)
        records = [BAD if number % 7 == 3 else RECORDS[number % len(RECORDS)] for number in range(800)]
        expected = [None if record is BAD else record for record in records]
        by_record = dict(zip(map(id, RECORDS), scorer.score(RECORDS), strict=True))
        most, futures, lock = [], {}, threading.Lock()
        with ScoringQueue(scorer, max_pending=50, max_wait=0.01) as queue:

            def hand_over(own):
                for number in own:
                    future = queue.submit(records[number])
                    with lock:
                        futures[number] = future
                        most.append(queue.pending)

            threads = [threading.Thread(target=hand_over, args=(range(first, 800, 8),)) for first in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert 8 <= max(most) <= 50
        assert queue.pending == 0
        for number, record in enumerate(expected):
            if record is None:
                assert str(futures[number].exception()).startswith("record ")
            else:
                wanted = by_record[id(record)]
                assert futures[number].result().candidate_id == wanted.candidate_id
                assert values(futures[number].result()) == pytest.approx(values(wanted), rel=1e-6)

    def test_a_slow_consumer_of_an_endless_source(self, scorer):
        taken = itertools.count()
        last = 0

        def source():
            nonlocal last
            for last in taken:
                yield RECORDS[last % len(RECORDS)] | {"candidate_id": last}

        with ScoringQueue(scorer, max_pending=6) as queue:
            scores = queue.map(source())
            for number in range(40):
                assert next(scores).candidate_id == number
                assert last - number <= 6
                if number % 10 == 0:
                    time.sleep(0.02)
            scores.close()

    def test_a_slow_source_does_not_hold_scores_back(self, scorer):
        came = []

        def source():
            for number in range(4):
                yield RECORDS[number]
                wait_until(lambda: queue.pending == 0)
                came.append(number)

        with ScoringQueue(scorer, max_wait=0) as queue:
            for number, _ in enumerate(queue.map(source())):
                assert len(came) <= number + 1

    def test_a_full_queue_does_not_wait(self, scorer):
        with ScoringQueue(scorer, max_pending=2, max_wait=NEVER) as queue:
            assert len(list(queue.map(RECORDS[:20]))) == 20


class TestFaults:
    def test_a_bad_record_fails_alone_and_says_what_the_scorer_says(self, scorer):
        records = [RECORDS[0], BAD, RECORDS[1], "text", RECORDS[2]]
        with pytest.raises(ValueError, match="record 1") as told:
            scorer.score(records)
        with ScoringQueue(scorer) as queue:
            futures = [queue.submit(record) for record in records]
            assert [future.exception() is None for future in futures] == [True, False, True, False, True]
            assert type(futures[1].exception()) is ValueError
            assert str(futures[1].exception()) == str(told.value)
            outcomes = list(queue.map(records, return_exceptions=True))
            assert [isinstance(one, ValueError) for one in outcomes] == [False, True, False, True, False]
            scores = queue.map(records)
            assert next(scores).problem_id == RECORDS[0]["problem_id"]
            with pytest.raises(ValueError, match="record 11"):
                next(scores)
            assert queue.submit(RECORDS[0]).result()

    def test_whatever_rendering_raises_is_the_records_own(self, scorer, monkeypatch):
        own, render = SystemExit(3), scorer.renderer

        def odd(record):
            if record.candidate_id == 1:
                raise own
            return render(record)

        scorer.renderer = odd
        with ScoringQueue(scorer) as queue:
            futures = [queue.submit(record) for record in RECORDS[:3]]
            assert futures[1].exception() is own
            assert futures[0].result()
            assert futures[2].result()

    def test_what_does_not_fit_into_memory_fails_alone(self, scorer):
        lengths = [score.n_input_tokens for score in scorer.score(RECORDS)]
        most = sorted(lengths)[-3]

        def too_much(_, args):
            if args[0].numel() > most:
                raise torch.OutOfMemoryError("out of memory")

        scorer.student.model.get_input_embeddings().register_forward_pre_hook(too_much)
        with ScoringQueue(scorer) as queue:
            outcomes = list(queue.map(RECORDS, return_exceptions=True))
        for n_tokens, outcome in zip(lengths, outcomes, strict=True):
            assert isinstance(outcome, torch.OutOfMemoryError) == (n_tokens > most)

    def test_a_pass_that_fails_fails_all_that_is_pending(self, scorer):
        error = RuntimeError("an illegal memory access")
        gate = Gate(scorer, error)
        with ScoringQueue(scorer, max_pending=9, max_wait=0) as queue:
            futures = [queue.submit(record) for record in RECORDS[:9]]
            refused = []
            blocked = threading.Thread(target=lambda: refused.append(raised_by(queue.submit, RECORDS[9])), daemon=True)
            blocked.start()
            wait_until(lambda: queue._pipeline._wanted)
            gate.open.set()
            assert [future.exception(20) for future in futures] == [error] * 9
            blocked.join(20)
            for refusal in (*refused, raised_by(queue.submit, RECORDS[0])):
                assert type(refusal) is RuntimeError
                assert "illegal" in str(refusal)
                assert refusal.__cause__ is error
            assert queue.pending == 0
        assert scorer.student.model.config._attn_implementation == "eager"

    @pytest.mark.parametrize("broken", ["_next_waiting", "_take_due"])
    def test_a_thread_that_dies_leaves_nobody_waiting(self, scorer, broken):
        queue = ScoringQueue(scorer, max_wait=NEVER)
        error = MemoryError("no room")

        def die():
            raise error

        futures = [queue.submit(record) for record in RECORDS[:2]]
        wait_until(lambda: len(queue._pipeline._ready) == 2)
        setattr(queue._pipeline, broken, die)
        futures += [queue.submit(record) for record in RECORDS[2:20]]
        for future in futures:
            if future.exception(20) is not error:
                assert broken == "_next_waiting"
        assert futures[-1].exception() is error
        queue.close()
        assert queue.pending == 0


def raised_by(call, *arguments):
    try:
        call(*arguments)
    except Exception as error:
        return error


class TestCancelling:
    def test_before_its_pass_it_is_left_out(self, scorer):
        gate = Gate(scorer)
        with ScoringQueue(scorer, max_wait=0) as queue:
            first = queue.submit(RECORDS[0])
            gate.wait_for_a_pass()
            second, third = queue.submit(RECORDS[1]), queue.submit(RECORDS[2])
            wait_until(lambda: len(queue._pipeline._ready) == 2)
            assert not first.cancel()
            assert second.cancel()
            gate.open.set()
            assert [score.result().candidate_id for score in (first, third)] == [0, 2]
            assert next(as_completed([second])).cancelled()
            assert gate.passes == [first.result().n_input_tokens, third.result().n_input_tokens]
            wait_until(lambda: queue.pending == 0)

    def test_cancelled_ones_take_no_more_places_than_others(self, scorer):
        gate = Gate(scorer)
        with ScoringQueue(scorer, max_pending=4, max_wait=0) as queue:
            queue.submit(RECORDS[0])
            gate.wait_for_a_pass()
            futures = [queue.submit(RECORDS[1]) for _ in range(3)]
            wait_until(lambda: len(queue._pipeline._ready) == 3)
            assert all(future.cancel() for future in futures)
            assert queue.pending == 4, "their records are still held"
            gate.open.set()
            wait_until(lambda: queue.pending == 0)


class TestClosing:
    def test_draining(self, scorer):
        gate = Gate(scorer)
        gate.open.set()
        queue = ScoringQueue(scorer, max_wait=NEVER)
        futures = [queue.submit(record) for record in RECORDS]
        queue.close()
        assert all(future.done() for future in futures)
        assert [future.result().n_tokens > 0 for future in futures] == [True] * len(RECORDS)
        queue.close()
        with pytest.raises(RuntimeError, match="the queue is closed"):
            queue.submit(RECORDS[0])
        with pytest.raises(RuntimeError, match="the queue is closed"):
            next(queue.map(RECORDS))

    def test_without_draining(self, scorer):
        gate = Gate(scorer)
        scorer.student.model.train()
        queue = ScoringQueue(scorer, max_pending=6, max_wait=0)
        first = queue.submit(RECORDS[0])
        gate.wait_for_a_pass()
        others = [queue.submit(record) for record in RECORDS[1:6]]
        refused = []
        blocked = threading.Thread(target=lambda: refused.append(raised_by(queue.submit, RECORDS[9])), daemon=True)
        blocked.start()
        wait_until(lambda: queue._pipeline._wanted)
        closing = threading.Thread(target=queue.close, kwargs={"drain": False})
        closing.start()
        blocked.join(20)
        assert "closed" in str(refused[0])
        assert scorer.student.model.config._attn_implementation == NAME
        gate.open.set()
        closing.join(20)
        assert first.result().n_tokens > 0, "its pass was under way"
        for future in others:
            with pytest.raises(CancelledError):
                future.result(0)
        assert queue.pending == 0
        assert scorer.student.model.training
        assert scorer.student.model.config._attn_implementation == "eager"

    def test_without_draining_among_passes_that_were_planned_together(self):
        scorer = with_batches_of(30)
        gate = Gate(scorer)
        queue = ScoringQueue(scorer, max_pending=6, max_wait=NEVER)
        futures = [queue.submit(record) for record in RECORDS[:6]]
        gate.wait_for_a_pass()
        threading.Timer(0.05, gate.open.set).start()
        queue.close(drain=False)
        assert len(gate.passes) == 1
        assert sorted(future.cancelled() for future in futures) == [False] + [True] * 5

    def test_an_exception_in_the_sampling_loop(self, scorer):
        gate = Gate(scorer)
        futures = []

        class SamplingError(Exception):
            pass

        def sample():
            with ScoringQueue(scorer, max_wait=0) as queue:
                for record in RECORDS:
                    futures.append(queue.submit(record))
                    if len(futures) == 5:
                        gate.wait_for_a_pass()
                        threading.Timer(0.05, gate.open.set).start()
                        raise SamplingError

        with pytest.raises(SamplingError):
            sample()
        assert futures[0].result().n_tokens > 0
        assert all(future.done() for future in futures)
        assert scorer.score(RECORDS[:1])[0].nll == futures[0].result().nll

    def test_ctrl_c_while_it_drains(self, scorer):
        gate = Gate(scorer)
        queue = ScoringQueue(scorer, max_wait=0)
        futures = [queue.submit(RECORDS[0])]
        gate.wait_for_a_pass()
        futures += [queue.submit(record) for record in RECORDS[1:5]]
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            queue.close()
        gate.open.set()
        queue.close()
        assert [future.cancelled() for future in futures] == [False, True, True, True, True]

    def test_one_that_is_dropped(self, scorer):
        gate = Gate(scorer)
        queue = ScoringQueue(scorer, max_wait=0)
        futures = [queue.submit(RECORDS[0])]
        gate.wait_for_a_pass()
        futures += [queue.submit(record) for record in RECORDS[1:5]]
        threading.Timer(0.05, gate.open.set).start()
        del queue
        gc.collect()
        assert [future.cancelled() for future in futures] == [False, True, True, True, True]
        assert scorer.student.model.config._attn_implementation == "eager"

    def test_callbacks_run_in_the_queues_own_thread(self, scorer):
        gate, told = Gate(scorer), []
        with ScoringQueue(scorer, max_pending=2, max_wait=0) as queue:
            future = queue.submit(RECORDS[0])
            future.add_done_callback(lambda _: told.append(raised_by(queue.submit, RECORDS[2])))
            future.add_done_callback(lambda _: queue.close())
            gate.wait_for_a_pass()
            queue.submit(RECORDS[1])
            gate.open.set()
            wait_until(lambda: told)
        assert "cannot wait" in str(told[0])

    def test_one_queue_a_model_at_a_time(self, scorer):
        other = Scorer(scorer.student.model, TOKENIZER)
        with ScoringQueue(scorer), pytest.raises(ValueError, match="in use"):
            ScoringQueue(other)
        with ScoringQueue(scorer) as queue:
            assert queue.submit(RECORDS[0]).result()

    def test_bad_arguments(self, scorer):
        with pytest.raises(ValueError, match="no tokenizer"):
            ScoringQueue(Scorer(scorer.student.model))
        for wrong in ({"max_pending": 0}, {"max_wait": -1}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                ScoringQueue(scorer, **wrong)


class TestAsyncio:
    def test_many_at_once(self, scorer):
        expected = scorer.score(RECORDS)

        async def main():
            async with ScoringQueue(scorer, max_pending=5) as queue:
                tasks = [asyncio.create_task(queue.score(record)) for record in RECORDS]
                bad = asyncio.create_task(queue.score(BAD))
                most = 0
                while not all(task.done() for task in tasks):
                    most = max(most, queue.pending)
                    await asyncio.sleep(0.001)
                assert 1 < most <= 5
                assert isinstance((await asyncio.gather(bad, return_exceptions=True))[0], ValueError)
                return await asyncio.gather(*tasks)

        for score, other in zip(asyncio.run(main()), expected, strict=True):
            assert values(score) == pytest.approx(values(other), rel=1e-6)

    @pytest.mark.parametrize("asynchronous", [True, False])
    def test_in_order(self, scorer, asynchronous):
        async def stream():
            for record in (RECORDS[0], BAD, *RECORDS[2:]):
                await asyncio.sleep(0)
                yield record

        async def main():
            records = stream() if asynchronous else (RECORDS[0], BAD, *RECORDS[2:])
            async with ScoringQueue(scorer, max_pending=5) as queue:
                return [one async for one in queue.amap(records, return_exceptions=True)]

        scores = asyncio.run(main())
        assert isinstance(scores.pop(1), ValueError)
        assert [score.candidate_id for score in scores] == [0, *(record["candidate_id"] for record in RECORDS[2:])]

    def test_what_is_cancelled_frees_its_place(self, scorer):
        gate = Gate(scorer)

        async def main():
            async with ScoringQueue(scorer, max_pending=2, max_wait=0) as queue:
                tasks = [asyncio.create_task(queue.score(record)) for record in RECORDS[:1]]
                await asyncio.to_thread(gate.wait_for_a_pass)
                tasks += [asyncio.create_task(queue.score(record)) for record in RECORDS[1:6]]
                await asyncio.sleep(0.05)  # one has a place, four wait for one
                for task in tasks[1:5]:
                    task.cancel()
                await asyncio.sleep(0)
                gate.open.set()
                done = await asyncio.gather(*tasks, return_exceptions=True)
                assert [isinstance(one, asyncio.CancelledError) for one in done] == [False, *[True] * 4, False]
                assert (await queue.score(RECORDS[7])).candidate_id == RECORDS[7]["candidate_id"]

        asyncio.run(main())
        assert len(gate.passes) == 3

    def test_an_exception_in_the_block(self, scorer):
        async def main():
            async with ScoringQueue(scorer, max_wait=NEVER) as queue:
                task = asyncio.create_task(queue.score(RECORDS[0]))
                await asyncio.sleep(0.02)
                try:
                    raise KeyError("sampling")
                finally:
                    main.task = task

        with pytest.raises(KeyError):
            asyncio.run(main())
        assert main.task.cancelled()


AT_EXIT = """
import threading, time
from lark_fast import Scorer, ScoringQueue
from tests.templates import chatml
from tests.tiny import tiny_llama

tokenizer = chatml()
scorer = Scorer(tiny_llama(len(tokenizer)), tokenizer)
scorer.student.unpackable
begun = threading.Event()
scorer.student.model.get_input_embeddings().register_forward_pre_hook(lambda *_: begun.set() or time.sleep(0.3))
record = {"prompt": "What is two and two?", "completion": "Two and two is four."}
queue = ScoringQueue(scorer, max_wait=0)
futures = [queue.submit(record)]
begun.wait()
futures.append(queue.submit(record))
for future in futures:
    future.add_done_callback(lambda future: print(future.cancelled() or future.result().n_tokens))
"""


def test_python_ends_with_work_pending():
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "9\nTrue\n", "")
