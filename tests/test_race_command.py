"""``lark-fast score --race`` from the command line, beside the same pool scored in full."""

import json
import signal
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lark_fast.racing.outcome import read_race
from lark_fast.racing.rules import RaceRules
from lark_fast.report.sources import Scores
from lark_fast.scoring.parts import part_files
from lark_fast.scoring.store import read_manifest
from tests.command import NO_CEILING, write_jsonl, write_student
from tests.races import PROBLEMS, RACE_SHORT_ONES, RACED, make_records


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("race")
    write_student(place / "student")
    write_jsonl(place / "pool.jsonl", make_records())
    return place


@pytest.fixture(scope="module")
def forks(forks):
    return forks.preceded_by(NO_CEILING + RACE_SHORT_ONES)


def score(place, out, *more, pool="pool.jsonl"):
    where = ("--pool", place / pool, "--student", place / "student", "--out", out, "--device", "cpu", "--workers", 0)
    return ("score", *where, "--dtype", "float32", *more)


def rows(out):
    table = pa.concat_tables([pq.read_table(part) for part in part_files(out)])
    return {(row["problem_id"], row["candidate_id"]): row for row in table.to_pylist()}


@pytest.fixture(scope="module")
def full(place, forks):
    forks.run(*score(place, place / "full"))
    return rows(place / "full")


@pytest.fixture(scope="module")
def raced(place, forks):
    told = forks.run(*score(place, place / "raced", "--race", 2, "--json"))
    return rows(place / "raced"), json.loads(told.stdout)


def by_problem(scores):
    problems = {}
    for key, row in scores.items():
        problems.setdefault(key[0], []).append(row)
    return problems


def test_who_is_scored_in_full_has_the_scores_of_a_run_without_a_race(full, raced):
    stopped = 0
    for key, row in raced[0].items():
        if row["audited"] or row["n_raced"] == row["n_tokens"]:
            for name in ("nll", "brier", "entropy", "rank_mean", "rsr"):
                assert row[name] == pytest.approx(full[key][name], rel=1e-6)
        else:
            stopped += 1
            assert row["nll"] == pytest.approx(full[key]["nll"], rel=0.2)  # a forecast
        assert row["n_tokens"] == full[key]["n_tokens"]
    assert stopped > 20


def test_winners_are_the_best_and_known_to_their_ends(full, raced):
    missed = 0
    for problem, own in by_problem(raced[0]).items():
        if own[0]["winner"] is None:
            assert len(own) == 3  # too few to race
            continue
        winners = {row["candidate_id"] for row in own if row["winner"]}
        best = sorted(own, key=lambda row: -row["g_hat"])
        assert len(winners) == 2
        if not own[0]["audited"]:
            assert winners == {row["candidate_id"] for row in best[:2]}
            assert all(row["n_raced"] == row["n_tokens"] for row in best[:3])
        exact = sorted((key for key in full if key[0] == problem), key=lambda key: -full[key]["g_hat"])
        missed += {key[1] for key in exact[:2]} != winners
    assert missed <= 1


def test_what_it_says(place, raced):
    told = raced[1]
    out = read_race(place / "raced", RaceRules(budget=2))
    assert told["race_budget"] == 2
    assert told["race_problems"] == out.problems == RACED
    assert told["race_share"] == pytest.approx(out.share, rel=1e-5)
    assert out.share < 0.95
    assert out.share_of_races < out.share
    assert told["passed_tokens"] < told["input_tokens"]
    audited = {problem for problem, own in by_problem(raced[0]).items() if own[0]["audited"]}
    assert audited == {str(100 + p) for p in range(PROBLEMS) if p % 4 and RaceRules(budget=2).audits(str(100 + p))}
    assert told["race_audited"] == len(audited) > 0


def test_the_same_bytes_again_and_after_kill_9(place, forks, raced):
    def parts(out):
        return [part.read_bytes() for part in part_files(place / out)]

    run = forks.start(*score(place, place / "killed", "--race", 2))
    while not any(journal.stat().st_size for journal in (place / "killed").glob("journal-*")):
        assert run.poll() is None
        time.sleep(0.002)
    run.kill(signal.SIGKILL)
    run.wait()
    assert not parts("killed")  # the race of one problem at least was still to come
    told = [
        json.loads(forks.run(*score(place, place / out, "--race", 2, "--json")).stdout) for out in ("killed", "again")
    ]
    assert told[0]["scored"] < told[1]["scored"]
    assert parts("again") == parts("killed") == parts("raced")


def test_the_order_of_problems_is_nothing_to_it(place, forks, raced):
    problems = {}
    for record in make_records():
        problems.setdefault(record["problem_id"], []).append(record)
    write_jsonl(place / "turned.jsonl", [one for own in reversed(list(problems.values())) for one in own])
    forks.run(*score(place, place / "turned", "--race", 2, pool="turned.jsonl"))
    turned = rows(place / "turned")
    for key, row in raced[0].items():
        assert {name: turned[key][name] for name in ("n_raced", "winner", "audited")} == {
            name: row[name] for name in ("n_raced", "winner", "audited")
        }
        assert turned[key]["nll"] == pytest.approx(row["nll"], rel=1e-6)


def test_without_keys_and_values_the_same_comes_out(place, forks, raced):
    # Of a student that cannot go on, pieces pass again from their first token.
    before = "\nimport lark_fast.racing.passes\nlark_fast.racing.passes.PAST_MEMORY_SHARE = 0.0\n"
    told = json.loads(forks.run(*score(place, place / "anew", "--race", 2, "--json"), before=before).stdout)
    assert told["passed_tokens"] > raced[1]["passed_tokens"]
    for key, row in rows(place / "anew").items():
        assert row["n_raced"] == raced[0][key]["n_raced"]
        assert row["nll"] == pytest.approx(raced[0][key]["nll"], rel=1e-6)


def test_a_pool_of_which_every_race_is_audited(place, forks, raced):
    audited = {problem for problem, own in by_problem(raced[0]).items() if own[0]["audited"]}
    write_jsonl(place / "audited.jsonl", [one for one in make_records() if str(one["problem_id"]) in audited])
    told = forks.run(*score(place, place / "audited", "--race", 2, pool="audited.jsonl")).stdout
    assert f"race for 2: {len(audited)} problems, 100.0% of the scored tokens were scored, 0 candidates stopped" in told


def test_short_answers_do_not_race(place, forks):
    shortest = "lark_fast.racing.rules.SHORTEST = 320\n"
    told = forks.run(*score(place, place / "short", "--race", 2), before=shortest).stdout
    assert "of 320 scored tokens or more in the mean" in told
    assert all(row["winner"] is None and row["n_raced"] == row["n_tokens"] for row in rows(place / "short").values())


def test_a_pool_without_a_race(place, forks):
    write_jsonl(place / "few.jsonl", [one for one in make_records() if one["candidate_id"] < 3])
    told = forks.run(*score(place, place / "few", "--race", 2, pool="few.jsonl")).stdout
    assert "race: none was run; it takes more than 3 candidates a problem" in told


def test_bernsteins_bounds_stop_fewer(place, forks, full, raced):
    told = forks.run(*score(place, place / "bernstein", "--race", 2, "--race-bounds", "bernstein", "--json"))
    assert json.loads(told.stdout)["race_share"] > raced[1]["race_share"]
    assert read_manifest(place / "bernstein")["identity"]["race"]["bounds"] == "bernstein"
    for key, row in rows(place / "bernstein").items():
        if row["n_raced"] == row["n_tokens"]:
            assert row["nll"] == pytest.approx(full[key]["nll"], rel=1e-6)


@pytest.fixture(scope="module")
def sampled(place, forks):
    told = forks.run(*score(place, place / "sampled", "--race", 2, "--race-risk", 0.2, "--head-share", 0.5, "--json"))
    return rows(place / "sampled"), json.loads(told.stdout)


def test_a_race_with_a_sample_reads_winners_in_full(place, forks, full, sampled):
    found, told = sampled
    for key, row in found.items():
        assert row["n_head"] <= (row["n_tokens"] if row["audited"] else row["n_raced"])
        if row["audited"] or row["winner"] is None or row["n_head"] == row["n_tokens"]:
            assert row["n_head"] == row["n_tokens"]
            for name in ("nll", "brier", "entropy", "rank_mean", "rsr"):
                assert row[name] == pytest.approx(full[key][name], rel=1e-6)
        else:
            assert not row["winner"]
            assert row["nll"] == pytest.approx(full[key]["nll"], rel=0.2)  # a forecast
    read = sum(row["n_head"] for row in found.values())
    assert told["head_tokens"] == read < told["race_share"] * told["scored_tokens"]
    forecast = sum(row["n_head"] < row["n_tokens"] for row in found.values())
    assert told["race_stopped"] == forecast
    assert told["race_head_share"] == pytest.approx(read / told["scored_tokens"])
    assert "nll_se" not in next(iter(found.values()))  # forecasts have no standard error of a sample


def test_a_race_with_a_sample_comes_to_the_same_bytes_after_kill_9(place, forks, sampled):
    asked = score(place, place / "sampled-killed", "--race", 2, "--race-risk", 0.2, "--head-share", 0.5)
    run = forks.start(*asked)
    while not any(journal.stat().st_size for journal in (place / "sampled-killed").glob("journal-*")):
        assert run.poll() is None
        time.sleep(0.002)
    run.kill(signal.SIGKILL)
    run.wait()
    told = forks.run(*asked).stdout
    assert "met the head" in told
    bytes_of = [[part.read_bytes() for part in part_files(place / out)] for out in ("sampled", "sampled-killed")]
    assert bytes_of[0] == bytes_of[1]


def test_risk_0_is_never_wrong(place, forks, full):
    forks.run(*score(place, place / "sure", "--race", 2, "--race-risk", 0))
    for problem, own in by_problem(rows(place / "sure")).items():
        if own[0]["winner"] is not None:
            exact = sorted((key for key in full if key[0] == problem), key=lambda key: -full[key]["g_hat"])[:2]
            assert {row["candidate_id"] for row in own if row["winner"]} == {key[1] for key in exact}


def test_candidates_that_come_later_are_scored_in_full(place, forks):
    records = list(make_records())
    late = [record for record in records if record["candidate_id"] in (7, 8)]
    write_jsonl(place / "growing.jsonl", [record for record in records if record not in late])
    forks.run(*score(place, place / "grown", "--race", 2, pool="growing.jsonl"))
    before = rows(place / "grown")
    # One has the tokens of a candidate that was stopped: they have one number, and are told to have the same.
    stopped = next(key for key, row in before.items() if row["n_raced"] < row["n_tokens"] and not row["audited"])
    twin = next(record for record in records if (str(record["problem_id"]), str(record["candidate_id"])) == stopped)
    place_of_twin = 1 + max(n for n, record in enumerate(records) if record["problem_id"] == twin["problem_id"])
    records.insert(place_of_twin, twin | {"candidate_id": "twin"})
    write_jsonl(place / "growing.jsonl", records)
    forks.run(*score(place, place / "grown", "--race", 2, pool="growing.jsonl"))
    after = rows(place / "grown")
    assert len(after) == len(records)
    late_twin = (stopped[0], "twin")
    assert [after[late_twin][name] for name in ("nll", "g_hat", "n_raced")] == [
        after[stopped][name] for name in ("nll", "g_hat", "n_raced")
    ]
    for key in after.keys() - before.keys() - {late_twin}:
        assert after[key]["n_raced"] == after[key]["n_tokens"]
        assert after[key]["winner"] is None
    assert all(after[key]["n_raced"] == row["n_raced"] for key, row in before.items())


def test_selection(place, forks, raced, full):
    pool = ("--pool", place / "pool.jsonl")
    forks.run("select", "--scores", place / "raced", *pool, "--out", place / "chosen", "--budget", 2)
    chosen = [json.loads(line)["meta"] for line in (place / "chosen" / "train.jsonl").open()]
    for one in chosen:
        row = raced[0][(str(one["problem_id"]), str(one["candidate_id"]))]
        assert row["winner"] in (True, None) or row["audited"]
    for wrong in (("--budget", 3), ("--policy", "nll"), ("--tau", 0.1), ("--policy", "random", "--budget", 2)):
        told = forks.run("select", "--scores", place / "raced", *pool, "--out", place / "x", *wrong, code=2)
        assert "raced for the 2 best" in told.stderr
        assert told.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--race-risk", 0.1), "--race-risk goes with --race"),
        (("--race-bounds", "bernstein"), "--race-bounds goes with --race"),
        (("--race", 2, "--race-risk", 0, "--race-bounds", "normal"), "--race-risk 0 has bounds of its own"),
        (("--race", 2, "--race-risk", 0.7), "--race-risk 0.7: lies between 0 and 0.5"),
        (("--race", 2, "--race-risk", "nan"), "lies between"),
        (("--race", 2, "--shard", "0/2"), "--race does not go with --shard"),
        (("--race", 2, "--local-steps", 1), "--race does not go with --local-steps"),
        (("--race", 2, "--export", "lark-json"), "--race does not go with --export"),
        (("--race", 2, "--compile"), "--race does not go with --compile"),
        (("--race", 2, "--head-share", 1.5), "--head-share 1.5: a share of the scored positions"),
        (("--race", 2, "--head-share", 0.5, "--race-risk", 0), "--head-share 0.5: does not go with --race-risk 0"),
        (("--race", 2, "--head-share", 0.5, "--per-token"), "--head-share 0.5: --per-token stores every token's"),
    ],
)
def test_what_does_not_go_with_it(place, forks, more, said):
    told = forks.run(*score(place, place / "x", *more), code=2)
    assert said in told.stderr
    assert told.stderr.count("\n") == 1
    assert not (place / "x").exists()


def test_a_store_of_another_race_or_of_none(place, forks, raced, full):
    for out, more in (
        ("raced", ("--race", 3)),
        ("raced", ("--race", 2, "--race-risk", 0.1)),
        ("raced", ("--race", 2, "--head-share", 0.5)),
        ("raced", ()),
        ("full", ("--race", 2)),
    ):
        told = forks.run(*score(place, place / out, *more), code=2)
        assert "race" in told.stderr


def test_a_dry_run(place, forks):
    told = forks.run(*score(place, place / "dry", "--race", 2, "--dry-run"))
    assert "the estimate is of a run without --race" in told.stderr
    assert not (place / "dry").exists()


def test_candidates_that_do_not_lie_together(place, forks):
    records = list(make_records())
    write_jsonl(place / "scattered.jsonl", records[1:] + records[:1])
    told = forks.run(*score(place, place / "scattered", "--race", 2, pool="scattered.jsonl"), code=2)
    assert "--race needs a problem's candidates together: sort the pool by problem_id" in told.stderr


def test_a_report_says_what_is_forecast(place, raced, sampled, full):
    for name, scores, read in (("raced", raced[0], "n_raced"), ("sampled", sampled[0], "n_head")):
        stopped = sum(row[read] < row["n_tokens"] and not row["audited"] for row in scores.values())
        (said,) = Scores(str(place / name)).caveats
        assert f"{stopped} of {len(scores)} trajectories were stopped early" in said
    assert Scores(str(place / "full")).caveats == []
