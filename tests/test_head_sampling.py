"""Estimates from a random part of the scored positions: their design, their errors, and runs that make them."""

import json
import math

import numpy as np
import pytest

from lark_fast import Scorer, ScoringQueue
from lark_fast.rendering.renderer import Rendered
from lark_fast.scoring.feed import token_hash
from lark_fast.scoring.head_sampling import LEAST, draw, estimate, n_drawn, sample_rows, strata
from lark_fast.scoring.learnability import g_hat, g_hat_se
from lark_fast.scoring.paired import PairedScorer
from lark_fast.scoring.parts import SAMPLED, part_files, schema_of
from lark_fast.scoring.store import read_manifest
from tests.command import STOP, make_records, write_jsonl, write_student
from tests.score_rows import IDENTITY, go_on, row, table
from tests.templates import CHATML
from tests.tiny import byte_level_tokenizer, tiny_llama

# One below, at and above what is always read; odd lengths and shares; more than half of them; long ones.
CASES = [(0, 0.5), (1, 0.5), (31, 0.9), (32, 0.1), (33, 0.1), (65, 0.5), (97, 0.51), (333, 1 / 3), (2001, 1 / 16)]

FIRST = [0, 4, 7, 10, 15, 16, 18, 19]  # of 100 positions


def digest(number):
    return number.to_bytes(16, "big")


def statistics(n, seed=0):
    """Two that depend on each other and drift along the trajectory, as nll and Brier scores do. [2, n]"""
    rng = np.random.default_rng(seed)
    nll = rng.exponential(1.0 + 2.0 * np.arange(n) / max(n, 1))
    return np.stack([nll, 1.0 - np.exp(-nll)])


class TestDesign:
    @pytest.mark.parametrize(("n", "share"), CASES)
    def test_two_of_each_stratum_or_all(self, n, share):
        rows = sample_rows(n, share, digest(7))
        m = len(rows)
        assert m == n_drawn(n, share) == min(n, max(LEAST, math.ceil(share * n)))
        assert (np.diff(rows) > 0).all()
        if m == n:
            assert rows.tolist() == list(range(n))
            return
        sizes, draws = strata(n, m)
        assert (sizes.sum(), draws.sum()) == (n, m)
        ends = np.concatenate([[0], np.cumsum(sizes)]) - 0.5
        assert np.histogram(rows, ends)[0].tolist() == draws.tolist()
        assert min(np.ptp(draws), np.ptp(sizes - draws)) == 0 or np.ptp(draws) == np.ptp(sizes - draws) == 1
        assert draws.min() >= 2
        assert (sizes - draws).min() >= min(2, n - m)
        assert len(sizes) == max(1, min(m, n - m) // 2)

    def test_positions_are_those_of_every_version(self):
        """Stores that were begun go on: these must never change."""
        assert sample_rows(100, 0.1, digest(1))[:8].tolist() == FIRST
        assert sample_rows(100, 0.1, digest(2))[:8].tolist() != FIRST

    def test_every_pair_of_a_stratum_has_the_same_chance(self):
        draws = 6000
        assert [part[0] for part in strata(80, 32)] == [5, 2]
        pairs = [tuple(sample_rows(80, 0.1, digest(number))[:2].tolist()) for number in range(draws)]
        found, counts = np.unique(pairs, axis=0, return_counts=True)
        assert len(found) == 10  # of five positions
        expected = draws / 10
        assert ((counts - expected) ** 2 / expected).sum() < 33.7  # chi2 with 9 degrees: one in 10,000

    def test_asks_for_the_words_behind_the_positions(self):
        ids = list(range(200))
        labels = [-100] * 50 + ids[50:120] + [-100] * 10 + ids[130:]
        asked = draw(labels, digest(3), 0.3)
        assert asked.drawn_from == 140
        assert len(asked.rows) == 42
        assert (asked.words == asked.rows + 1).all()
        assert all(labels[word] == word for word in asked.words)


class TestEstimate:
    @pytest.mark.parametrize(("n", "share"), CASES[2:])
    def test_is_its_definition(self, n, share):
        values = statistics(n)
        rows = sample_rows(n, share, digest(5))
        means, covariance = estimate(values[:, rows], n)
        if len(rows) == n:
            np.testing.assert_allclose(means, values.mean(axis=1), rtol=1e-14)
            assert not covariance.any()
            return
        expected, variance, start, first = np.zeros(2), np.zeros((2, 2)), 0, 0
        for size, draws in zip(*strata(n, len(rows)), strict=True):
            own = values[:, rows[(rows >= start) & (rows < start + size)]]
            assert own.shape == (2, draws)
            assert (own == values[:, rows[first : first + draws]]).all()
            expected += size / n * own.mean(axis=1)
            variance += (size / n) ** 2 * (1 - draws / size) * np.cov(own) / draws
            start, first = start + size, first + draws
        np.testing.assert_allclose(means, expected, rtol=1e-13)
        np.testing.assert_allclose(covariance, variance, rtol=1e-11, atol=1e-18)

    def test_of_nothing_and_of_what_is_not_finite(self):
        means, covariance = estimate(np.empty((2, 0)), 0)
        assert np.isnan(means).all()
        assert covariance.tolist() == [[0, 0], [0, 0]]
        values = statistics(100)[:, sample_rows(100, 0.1, digest(0))]
        values[0, 3] = np.nan
        means, covariance = estimate(values, 100)
        assert np.isnan([means[0], *covariance[0]]).all()
        assert np.isfinite([means[1], covariance[1, 1]]).all()

    @pytest.mark.parametrize(("n", "share"), [(35, 0.25), (83, 0.25), (83, 0.7), (500, 0.125)])
    def test_is_unbiased_and_knows_its_error(self, n, share):
        values, draws = statistics(n), 4000
        made = [estimate(values[:, sample_rows(n, share, digest(number))], n) for number in range(draws)]
        means, covariances = (np.array(column) for column in zip(*made, strict=True))
        apart, errors = means - values.mean(axis=1), np.sqrt(covariances[:, [0, 1], [0, 1]])
        assert (np.abs(apart.mean(axis=0)) < 4 * apart.std(axis=0) / draws**0.5).all()
        np.testing.assert_allclose(covariances.mean(axis=0), np.cov(means.T), rtol=0.12)
        covered = (np.abs(apart) < 2 * errors).mean(axis=0)
        # 0.954 of a normal one; 16 strata of skewed values have a few more far off.
        assert ((covered > 0.88) & (covered < 0.97)).all(), covered

    def test_a_drift_lies_between_the_strata(self):
        """Against the variance of a simple random sample of as many, of values that are half drift, half noise."""
        n, m = 400, n_drawn(400, 0.125)
        values = np.linspace(0, 12**0.5, n) + np.random.default_rng(0).standard_normal(n)
        seen = [estimate(values[None, sample_rows(n, 0.125, digest(number))], n)[0][0] for number in range(3000)]
        assert 0.4 < np.var(seen) / (values.var(ddof=1) / m * (1 - m / n)) < 0.6


class TestErrorOfGHat:
    def test_is_that_of_repeated_draws(self):
        """Against g_hat of perturbed scores; two candidates have the same tokens, and so the same error."""
        rng, repeats = np.random.default_rng(0), 20_000
        problem, origin = np.repeat(["a", "b", "c"], [4, 5, 1]), np.arange(10)
        nll, brier = rng.uniform(0.3, 1.0, 10), rng.uniform(0.2, 0.6, 10)
        errors = rng.uniform(0.004, 0.01, (2, 10))
        correlation = rng.uniform(-0.2, 0.9, 10)
        origin[2] = 1
        for column in (nll, brier, *errors, correlation):
            column[2] = column[1]
        drawn = rng.standard_normal((repeats, 2, 10))
        drawn[:, :, 2] = drawn[:, :, 1]
        off_nll = errors[0] * drawn[:, 0]
        off_brier = errors[1] * (correlation * drawn[:, 0] + np.sqrt(1 - correlation**2) * drawn[:, 1])
        seen = np.std([g_hat(nll + x, brier + y, problem) for x, y in zip(off_nll, off_brier, strict=True)], axis=0)
        args = (nll, brier, problem, *errors, correlation * errors[0] * errors[1])
        told = g_hat_se(*args, origin=origin)
        np.testing.assert_allclose(told, seen, rtol=0.03)
        assert not np.allclose(g_hat_se(*args), seen, rtol=0.03), "twins' errors are not independent"

    def test_is_not_there_where_g_hat_is_not(self):
        error = np.full(3, 0.1)
        told = g_hat_se([1.0, np.nan, 2.0], [0.5, 0.1, 0.8], [0, 0, 0], error, error, 0 * error)
        assert np.isnan(told).tolist() == [False, True, False]
        left = g_hat_se([1.0, 2.0], [0.5, 0.8], [0, 0], error[:2], error[:2], 0 * error[:2])
        np.testing.assert_allclose(told[[0, 2]], left)
        assert np.isnan(g_hat_se([0.0], [0.0], [0], [0.1], [0.1], [0.0])).all()
        assert g_hat_se([1.0, 2.0], [0.5, 0.8], [0, 0], *[[0.0, 0.0]] * 3).tolist() == [0.0, 0.0]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer(CHATML)


def trajectories(tokenizer):
    """Of 1 to 300 scored tokens; the third and the last are the same."""
    rng = np.random.default_rng(0)
    rendered = []
    for n_scored in (1, 40, 90, 33, 300, 150):
        ids = rng.integers(0, len(tokenizer), 9 + n_scored).tolist()
        rendered.append(Rendered(input_ids=ids, labels=[-100] * 9 + ids[9:], truncated=False))
    return [*rendered, rendered[2]]


class TestScorer:
    @pytest.mark.parametrize("top_k", [None, 20])
    def test_estimates_are_of_the_full_statistics_there(self, tokenizer, top_k):
        model, rendered = tiny_llama(len(tokenizer)), trajectories(tokenizer)
        every = Scorer(model, tokenizer, top_k=top_k).score_rendered(rendered)
        made = Scorer(model, tokenizer, top_k=top_k, head_share=0.25).score_rendered(rendered)
        for item, full, one in zip(rendered, every, made, strict=True):
            n = item.n_scored
            rows = sample_rows(n, 0.25, token_hash(item.input_ids, item.labels))
            assert (one.n_tokens, one.n_head, full.n_head) == (n, len(rows), n)
            names = ["nll", "brier", "entropy", *(["brier_topk"] if top_k else [])]
            values = np.stack([getattr(full.tokens, name).double().numpy()[rows] for name in names])
            means, covariance = estimate(values, n)
            for place, name in enumerate(names):
                assert getattr(one, name) == pytest.approx(means[place], rel=1e-5)
                if name != "entropy":
                    error = covariance[place, place] ** 0.5
                    assert getattr(one, f"{name}_se") == pytest.approx(error, rel=1e-4, abs=1e-7)
            used = names.index("brier_topk" if top_k else "brier")
            assert one.nll_brier_cov == pytest.approx(covariance[0, used], rel=1e-3, abs=1e-9)
            assert one.rho == pytest.approx(means[used] / means[0], rel=1e-5)
            ranks = full.tokens.rank.clamp(max=100).double().numpy()[rows]
            assert one.rank_mean == pytest.approx(estimate(ranks[None], n)[0][0])
            assert one.rsr == pytest.approx(one.rank_mean / one.nll)
            assert full.nll_se is full.brier_se is full.brier_topk_se is full.nll_brier_cov is None
            assert (one.brier_topk_se is None) == (top_k is None)
        assert made[2].nll == made[-1].nll
        assert made[0].nll == pytest.approx(every[0].nll, rel=1e-6)
        assert made[0].nll_se == 0

    def test_batches_draw_the_same(self, tokenizer):
        model, rendered = tiny_llama(len(tokenizer)), trajectories(tokenizer)
        made = [
            Scorer(model, tokenizer, head_share=0.1, tokens_per_batch=size).score_rendered(order)
            for size, order in ((1, rendered), (2048, rendered[::-1]))
        ]
        for one, other in zip(made[0], made[1][::-1], strict=True):
            assert one.n_head == other.n_head
            for name in ("nll", "brier", "nll_se", "brier_se", "nll_brier_cov"):
                assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-5, abs=1e-9)

    def test_records_a_queue_and_single_tokens(self, tokenizer):
        model, records = tiny_llama(len(tokenizer)), list(make_records(6, words=9))
        scorer = Scorer(model, tokenizer, head_share=0.2)
        scores = scorer.score(records)
        assert any(score.n_head < score.n_tokens and score.nll_se > 0 for score in scores)
        with ScoringQueue(scorer) as queue:
            queued = list(queue.map(records))
        for one, other in zip(scores, queued, strict=True):
            assert (one.n_head, one.n_tokens) == (other.n_head, other.n_tokens)
            assert [one.nll, one.nll_se] == pytest.approx([other.nll, other.nll_se], rel=1e-5, abs=1e-8)
        ids = list(range(60, 120))
        assert len(scorer.score_tokens(ids, ids).nll) == 59
        (plain,) = Scorer(model, tokenizer).score(records[:1])
        assert plain.nll_se is plain.nll_brier_cov is None

    def test_bad_shares(self, tokenizer):
        model = tiny_llama(len(tokenizer))
        for share in (0.0, 1.0, -1, math.nan):
            with pytest.raises(ValueError, match="head_share is above 0 and below 1"):
                Scorer(model, tokenizer, head_share=share)
        with pytest.raises(ValueError, match="local_steps does not go with head_share"):
            Scorer(model, tokenizer, head_share=0.5).score([], local_steps=1)
        with pytest.raises(ValueError, match="token by token, on all of them"):
            PairedScorer(model, model, head_share=0.5)


QUICK = "import math, os, lark_fast.flop as f, lark_fast.packing as p; f.matmul_ceiling = lambda *_: math.nan\n"
SMALL_WINDOWS = QUICK + "p.CPU_WINDOW_FLOP = 0\n"  # of four packs


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return write_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Answers of 10 to 100 tokens; the first problem has two that are the same."""
    records = list(make_records(24, 4, words=9))
    records.append({**records[2], "candidate_id": 9})
    return write_jsonl(tmp_path_factory.mktemp("pool") / "pool.jsonl", records)


def words(pool, student, out, *more, share=0.25):
    """The words of the command; float32, so that what differs differs for a reason."""
    asked = () if share is None else ("--head-share", share)
    own = ("--dtype", "float32", "--device", "cpu", "--tokens-per-batch", 256)
    return ("score", "--pool", pool, "--student", student, "--out", out, *own, *asked, *more)


@pytest.fixture(scope="module")
def whole(forks, pool, student, tmp_path_factory):
    """The directory of a run that nothing happened to, and what it said."""
    out = tmp_path_factory.mktemp("whole") / "s"
    return out, forks.run(*words(pool, student, out), before=SMALL_WINDOWS)


def bytes_of(out):
    return [part.read_bytes() for part in part_files(out)]


class TestRuns:
    def test_columns_and_what_it_says(self, tmp_path, forks, pool, student, whole):
        out, said = whole
        plain = tmp_path / "plain"
        forks.run(*words(pool, student, plain, share=None), before=SMALL_WINDOWS)
        made, full = table(out), table(plain)
        added = ["n_head", "nll_se", "brier_se", "nll_brier_cov", "g_hat_se"]
        assert [name for name in made.schema.names if name not in full.schema.names] == added
        assert "head_share" not in read_manifest(plain)["identity"]
        assert read_manifest(out)["identity"]["head_share"] == 0.25
        for name in ("problem_id", "candidate_id", "n_tokens", "n_input_tokens", "token_hash"):
            assert made[name].equals(full[name])
        n, m, apart, error = (np.asarray(made[name]) for name in ("n_tokens", "n_head", "nll", "nll_se"))
        apart = apart - np.asarray(full["nll"])
        assert m.tolist() == [n_drawn(each, 0.25) for each in n.tolist()]
        some = m < n
        assert 20 < some.sum() < len(some) - 20
        assert not error[~some].any()
        assert (np.abs(apart[some]) < 4.5 * error[some]).all()
        assert (np.abs(apart[some]) < 2 * error[some]).mean() > 0.8
        assert np.abs(apart[~some]).max() < 1e-6
        columns = [made[name].to_numpy() for name in ("nll", "brier", "nll_se", "brier_se", "nll_brier_cov")]
        problem = np.asarray(made["problem_id"])
        _, origin = np.unique(np.asarray(made["token_hash"]), return_inverse=True)
        expected = g_hat_se(*columns[:2], problem, *columns[2:], origin=origin)
        np.testing.assert_allclose(made["g_hat_se"], expected, rtol=1e-12)
        twins = [row for row in made.to_pylist() if row["problem_id"] == "0" and row["candidate_id"] in ("2", "9")]
        assert len({(row["nll"], row["nll_se"], row["g_hat"], row["g_hat_se"]) for row in twins}) == 1
        assert f"{m.sum() / n.sum():.1%} of the scored positions met the head, " in said.stdout
        assert "of the FLOP saved; standard error, median: " in said.stdout

    def test_machines_are_told(self, tmp_path, forks, pool, student, whole):
        out, _ = whole
        told = json.loads(forks.run(*words(pool, student, out, "--json"), before=SMALL_WINDOWS).stdout)
        made = table(out)
        n, m = (np.asarray(made[name]).sum() for name in ("n_tokens", "n_head"))
        assert told["sample_head_share"] == pytest.approx(m / n, rel=1e-5)
        error = np.median(np.asarray(made["nll_se"]) / np.asarray(made["nll"]))
        assert told["sample_nll_error"] == pytest.approx(error, rel=1e-5)
        assert 0 < told["sample_flop_saved"] < 1 - m / n
        dry = forks.run(*words(pool, student, tmp_path / "none", "--dry-run", "--json"), before=QUICK).stdout
        assert (json.loads(dry)["scored_tokens"], json.loads(dry)["head_tokens"]) == (n, m)
        shown = forks.run(*words(pool, student, tmp_path / "none", "--dry-run"), before=QUICK).stdout
        assert f"{m:,} of the scored tokens meet the head" in shown

    def test_stopped_and_gone_on_with_bit_for_bit(self, tmp_path, forks, pool, student, whole):
        out = tmp_path / "s"
        forks.run(*words(pool, student, out), code=130, before=SMALL_WINDOWS + STOP)
        assert list(out.glob("journal-*"))
        forks.run(*words(pool, student, out), before=SMALL_WINDOWS)
        assert bytes_of(out) == bytes_of(whole[0])

    def test_other_processes_and_other_batches(self, tmp_path, forks, pool, student, whole):
        forks.run(*words(pool, student, tmp_path / "one", "--devices", 1), before=SMALL_WINDOWS)
        assert bytes_of(tmp_path / "one") == bytes_of(whole[0])
        forks.run(*words(pool, student, tmp_path / "large", "--tokens-per-batch", 4096), before=SMALL_WINDOWS)
        for rank in forks.start_ranks([QUICK] * 2, *words(pool, student, tmp_path / "ranks")):
            rank.ended()
        made = table(whole[0])
        for name in ("large", "ranks"):
            other = table(tmp_path / name)
            assert other.select(["problem_id", "candidate_id", "n_head"]).equals(
                made.select(["problem_id", "candidate_id", "n_head"])
            )
            for column in ("nll", "brier", "nll_se", "brier_se", "nll_brier_cov", "g_hat", "g_hat_se"):
                np.testing.assert_allclose(other[column], made[column], rtol=1e-5, atol=1e-6)

    def test_shares_are_merged(self, tmp_path, forks, pool, student, whole):
        shards = [tmp_path / str(part) for part in range(2)]
        for part, shard in enumerate(shards):
            said = forks.run(*words(pool, student, shard, "--shard", f"{part}/2"), before=QUICK).stdout
            assert "of the scored positions met the head" in said
        refused = forks.run("merge", *shards, "--out", tmp_path / "s", "--export", "lark-json", code=2)
        assert "--export lark-json: has no place for standard errors" in refused.stderr
        forks.run("merge", *shards, "--out", tmp_path / "s")
        made, expected = (table(out).drop_columns("source") for out in (tmp_path / "s", whole[0]))
        assert made.schema.equals(expected.schema)
        for column in ("nll", "nll_se", "g_hat_se"):
            np.testing.assert_allclose(made[column], expected[column], rtol=1e-5, atol=1e-7)

    def test_top_k_selection_and_report(self, tmp_path, forks, pool, student):
        out = tmp_path / "s"
        forks.run(*words(pool, student, out, "--top-k", 20), before=QUICK)
        made = table(out)
        assert set(SAMPLED) < set(made.schema.names)
        forks.run("select", "--scores", out, "--pool", pool, "--out", tmp_path / "selection", "--budget", 2)
        rows = [json.loads(line) for line in (tmp_path / "selection" / "train.jsonl").read_text().splitlines()]
        assert 24 <= len({row["meta"]["problem_id"] for row in rows}) <= len(rows)
        forks.run("report", "--scores", out, "--out", tmp_path / "report.html")
        assert (tmp_path / "report.html").stat().st_size > 10_000

    @pytest.mark.parametrize("share", [None, 0.5])
    def test_another_share_is_refused(self, forks, pool, student, whole, share):
        refused = forks.run(*words(pool, student, whole[0], share=share), code=2, before=QUICK)
        assert f"holds scores made otherwise (head_share was 0.25, is {share})" in refused.stderr

    def test_what_it_does_not_go_with(self, tmp_path, command, pool, student):
        for more, share, message in (
            (("--per-token",), 0.5, "--head-share 0.5: --per-token stores every token's statistics"),
            (("--local-steps", 1), 0.5, "--head-share 0.5: --local-steps takes means over all tokens"),
            (("--export", "lark-json"), 0.5, "--head-share 0.5: --export lark-json has no place for standard errors"),
            ((), 1, "--head-share 1: a share of the scored positions, above 0 and below 1"),
            ((), 0, "--head-share 0: a share of the scored positions, above 0 and below 1"),
        ):
            command.refused(words(pool, student, tmp_path / "s", *more, share=share), message)
        pair = ["--before", student, "--after", student, "--head-share", 0.5]
        command.refused(("score", "--pool", pool, *pair, "--out", tmp_path / "s"), "--before and --after are compared")
        assert not (tmp_path / "s").exists()


class TestStore:
    def test_twins_of_other_windows_share_the_numbers(self, tmp_path):
        identity = IDENTITY | {"head_share": 0.5}
        errors = {"brier_se": 0.01, "nll_brier_cov": 1e-4, "n_head": 3}
        rows = [row("p", c, tokens=b"same") | errors | {"nll_se": c / 100} for c in (1.0, 2.0)]
        go_on(tmp_path / "s", [rows[:1], rows[1:]], identity)
        made = table(tmp_path / "s")
        assert made.schema.equals(schema_of(identity, final=True))
        assert made["nll_se"].to_pylist() == [0.01, 0.01]
        assert made["n_head"].to_pylist() == [3, 3]
