"""The account of a run, its log, the live line and the summary: what they say, and that nothing can make them fail."""

import json
import math

import numpy as np
import pytest

from lark_fast import progress as progress_module
from lark_fast.progress import Progress, Throughput, duration
from lark_fast.scoring.estimate import ESTIMATED, Estimate
from lark_fast.scoring.metrics import TAIL_BYTES, Account, MetricsLog
from lark_fast.scoring.summary import ScoreSummary

CEILING = 1e12
ACCOUNT = {
    "records": 25,
    "scored": 20,
    "kept": 2,
    "rejected": 3,
    "input_tokens": 9000,
    "scored_tokens": 5000,
    "padded_tokens": 1000,
    "forward_flop": 7.1e12,
    "packs": 4,
    "seconds": 10.0,
    "device_seconds": 9.0,
    "waiting_seconds": 0.5,
    "rendered_tokens": 9000,
    "render_seconds": 3.0,
    "write_seconds": 0.2,
    "finish_seconds": 1.0,
}


@pytest.fixture
def clock(monkeypatch):
    """Time as the test sets it: ``clock.now``."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    fake = Clock()
    monkeypatch.setattr("lark_fast.progress.time", fake)
    monkeypatch.setattr("lark_fast.scoring.metrics.time", fake)
    return fake


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class TestAccount:
    def test_rates_and_shares(self):
        account = Account(**ACCOUNT)
        assert account.tokens_per_second == 900
        assert account.ceiling_share(CEILING) == pytest.approx(0.71)
        assert account.device_busy_share == 0.9
        assert account.rendered_tokens_per_second == 3000
        assert account.writing_share == pytest.approx(0.02)
        assert account.padding_share == 0.1

    def test_unknown_is_none_in_json(self):
        for ceiling in (math.nan, 0.0, math.inf):
            values = json.loads(json.dumps(Account().as_json(ceiling), allow_nan=False))
            assert values["tokens_per_second"] is values["ceiling_share"] is values["padding_share"] is None
            assert values["scored"] == 0
        assert Account(forward_flop=math.nan, seconds=1).as_json(CEILING)["forward_flop"] is None

    def test_counts_keep_their_digits_whoever_counted(self):
        assert Account(input_tokens=np.int64(12_345_678_901)).as_json()["input_tokens"] == 12_345_678_901


class TestMetricsLog:
    def test_a_line_now_and_then_and_one_at_the_end(self, tmp_path, clock):
        log, account = MetricsLog(tmp_path / "metrics.jsonl", every_seconds=10), Account(**ACCOUNT)
        for second in range(25):
            clock.now = 1000.0 + second
            log.update(account, CEILING)
        log.finish(account, CEILING)
        lines = read(log.path)
        assert [line["end"] for line in lines] == [False, False, True]
        assert lines[0]["run"] == 1
        assert lines[0]["time"].endswith("+00:00")
        assert lines[0]["ceiling_share"] == 0.71
        assert {name: lines[0][name] for name in ACCOUNT} == ACCOUNT

    def test_runs_follow_one_another(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        for _ in range(3):
            MetricsLog(path).finish(Account(), math.nan)
        assert [line["run"] for line in read(path)] == [1, 2, 3]

    @pytest.mark.parametrize("torn", ['{"run": 1, "ti', "{", "\0\0\0", '"run"', "[1]", '{"run": "x"}'])
    def test_a_torn_line_is_cut_off(self, tmp_path, torn):
        path = tmp_path / "metrics.jsonl"
        MetricsLog(path).finish(Account())
        whole = path.read_text()
        path.write_text(whole + torn)
        MetricsLog(path).finish(Account())
        assert path.read_text().startswith(whole)
        assert [line["run"] for line in read(path)] == [1, 2]

    def test_a_line_that_lacks_only_its_end_is_kept(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        MetricsLog(path).finish(Account())
        path.write_text(path.read_text().rstrip("\n"))
        MetricsLog(path).finish(Account())
        assert [line["run"] for line in read(path)] == [1, 2]

    def test_somebody_elses_file_is_added_to(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        path.write_text("x" * 2 * TAIL_BYTES)
        MetricsLog(path).finish(Account())
        first, second = path.read_text().splitlines()
        assert first == "x" * 2 * TAIL_BYTES
        assert json.loads(second)["run"] == 1

    def test_a_long_log_is_not_read_through(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(json.dumps({"run": run, "pad": "x" * 100}) + "\n" for run in range(1, 3001)))
        assert MetricsLog(path).run == 3001


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.4, "0 s"), (165, "165 s"), (179.6, "3 min 00 s"), (725, "12 min 05 s"), (3599.7, "1 h 00 min")),
        *((7500, "2 h 05 min"), (273600, "3 d 04 h"), (math.nan, "?"), (math.inf, "?")),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


class TestLiveLine:
    def test_as_a_log_shows_it(self, clock, capsys):
        progress, throughput = Progress("scoring", 100), Throughput(CEILING)
        for second in range(121):
            clock.now = 1000.0 + second
            progress.last_line = clock.now
            detail = throughput.detail(7312 * second, 0.71 * CEILING * second, 3)
        progress.last_line = 0.0
        progress.update(42, detail)
        (line,) = capsys.readouterr().err.splitlines()
        assert line == (
            "scoring: 42%, 7,312 tokens/s, 71% of the matmul ceiling, 3 rejected, 120 s, 166 s left"  # 120 x 58 / 42
        )

    def test_what_is_not_known_is_left_out(self, clock):
        clock.now += 1
        for ceiling in (math.nan, 0.0):
            assert Throughput(ceiling).detail(0, math.nan) == "0 tokens/s"

    def test_the_rate_is_of_the_last_half_minute(self, clock):
        throughput = Throughput(window_seconds=30)
        tokens = 0
        for second in range(1, 200):
            clock.now = 1000.0 + second
            tokens += 1000 if second <= 100 else 10
            detail = throughput.detail(tokens, 0.0)
            if second == 100:
                assert detail == "1,000 tokens/s"
        assert detail == "10 tokens/s"
        assert len(throughput._seen) < 40

    def test_many_updates_keep_few_points(self, clock):
        throughput = Throughput(window_seconds=30)
        for step in range(100_000):
            clock.now += 0.001
            throughput.detail(step, 0.0)
        assert len(throughput._seen) < 40

    def test_what_an_earlier_run_did_foretells_nothing(self, clock, capsys):
        progress = Progress("scoring", 100)
        clock.now += 5
        progress.pace_from(50)
        assert math.isnan(progress.seconds_left)
        clock.now += 100
        progress.update(60)
        assert progress.seconds_left == 400
        assert capsys.readouterr().err.splitlines()[-1] == "scoring: 60%, 105 s, 6 min 40 s left"

    def test_no_total_no_time_left(self, clock, capsys):
        progress = Progress("reading", 0)
        clock.now += 20
        progress.update(5, "x")
        assert capsys.readouterr().err == "reading: 0%, x, 20 s\n"

    def test_the_end_has_nothing_left(self, clock, capsys):
        with progress_module.track("reading", 10) as progress:
            clock.now += 2
            progress.update(10)
        assert capsys.readouterr().err == "reading: 100%, 2 s\n"


class TestSummary:
    def test_for_people(self):
        summary = ScoreSummary(
            out="s", account=Account(**ACCOUNT, out_of_memory=1), ceiling=CEILING, rows=22, problems=6
        )
        for where in ("p:1: bad", "p:2: \x1b[31mred", "p:3: bad", "p:4: bad"):
            summary.note_reject(where)
        summary.truncated, summary.not_finite = 4, 1
        text = "\n".join(summary.lines())
        assert text == (
            "20 trajectories scored (9,000 tokens, 5,000 scored) in 10.0 s: 900 tokens/s\n"
            "  forward passes  71% of the matmul ceiling, 1 TFLOP/s\n"
            "  device          90% busy, waited 0.5 s for input\n"
            "  rendering       3,000 tokens/s a worker\n"
            "  writing         2.0% of the time\n"
            "  padding         10.0% of what went through the student\n"
            "  memory          ran short once, and packs were made smaller\n"
            "2 trajectories had been scored before and were kept\n"
            "s: 22 trajectories of 6 problems\n"
            "1 trajectories have no g_hat (statistics that are not finite, or nll 0)\n"
            "4 trajectories were longer than the maximum length and were cut\n"
            "7 of 25 records rejected, listed in s/rejected.jsonl\n"
            "  p:1: bad\n"
            "  p:2: \\x1b[31mred\n"
            "  p:3: bad"
        )

    def test_nothing_known(self):
        summary = ScoreSummary(out="s")
        assert summary.lines() == [
            "0 trajectories scored (0 tokens, 0 scored) in 0.0 s: 0 tokens/s",
            "s: 0 trajectories of 0 problems",
        ]
        summary.scored = 1
        assert summary.account.scored == 1
        assert len(summary.lines()) == 2

    def test_dry_run(self):
        said = Estimate(
            records=20,
            input_tokens=9000,
            scored_tokens=5000,
            flop=1e13,
            flop_per_second=1e9,
            pack_tokens=2048,
            weights_bytes=2**30,
            pack_bytes=2**29,
            disk_bytes=4000,
        )
        account = Account(records=21, scored=20, rejected=1, input_tokens=9000, scored_tokens=5000)
        summary = ScoreSummary(out="s", account=account, dry_run=True, estimate=said)
        assert summary.lines() == [
            "20 of 21 records can be scored: 9,000 tokens, 5,000 of them scored; nothing was written",
            "time: about 2 h 46 min (10 TFLOP at 1 GFLOP/s, as measured here)",
            "memory: about 1.5 GiB (weights 1 GiB, a pack of 2,048 tokens 512 MiB)",
            "disk: about 3.91 KiB",
            "1 of 21 records rejected",
        ]
        values = summary.as_json()
        assert values["estimated_seconds"] == 10_000
        assert values["estimated_memory_bytes"] == 3 * 2**29

    def test_for_machines(self):
        filled = ScoreSummary(out="s", account=Account(**ACCOUNT), ceiling=CEILING, complete=True)
        filled.note_reject("p:1: \x1b[31m\ud800")
        values = json.loads(json.dumps(filled.as_json(), allow_nan=False))
        assert values["ceiling_share"] == 0.71
        assert values["first_rejects"] == ["p:1: \x1b[31m\ud800"]
        assert values["complete"] is True
        empty = ScoreSummary(out="s").as_json()
        assert list(empty) == list(values)
        assert all(empty[f"estimated_{name}"] is None for name in ESTIMATED)
        assert not any(isinstance(value, dict) for value in values.values())
