"""``python -m benchmarks.policies`` on a tiny student: equal tokens, problems kept apart, and nothing done twice."""

import json
import sys

import pytest

from benchmarks import policies, policies_report
from tests.command import make_records, write_jsonl, write_student

ARGUMENTS = ("--seeds", "2", "--budget", "2", "--tokens", "1500", "--global-batch", "4", "--evaluations", "2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")
    rows = [{**row, "correct": row["candidate_id"] != 1} for row in make_records(16, candidates=4)]
    pool = write_jsonl(folder / "rows.jsonl", rows)
    student = write_student(folder / "student")
    arguments = ["--student", str(student), "--pool", str(pool), "--out", str(folder / "out"), "--held-out-from", "12"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["policies", *arguments, *ARGUMENTS])
        policies.main()
        first = (folder / "out" / "policies.json").read_bytes()
        written = {path: path.stat().st_mtime_ns for path in (folder / "out").glob("run-*/[!.]*")}
        policies.main()
    return folder / "out", first, written


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_runs_see_the_same_number_of_tokens(finished):
    out, _, _ = finished
    result = json.loads((out / "policies.json").read_text())
    assert len(result["runs"]) == 8
    longest = max(row["tokens"] for path in out.glob("run-*/metrics.jsonl") for row in rows_of(path) if "tokens" in row)
    for run in result["runs"]:
        assert abs(run["tokens"] - 1500) <= longest / 2
        assert run["held_out_loss"][-1][0] == run["tokens"]
    starts = {run["held_out_loss"][0][1] for run in result["runs"]}
    assert len(starts) == 1


def test_held_out_problems_are_in_no_selection(finished):
    out, _, _ = finished
    held_out = rows_of(out / "held-out.jsonl")
    assert {row["problem_id"] for row in held_out} == {12, 13, 14, 15}
    assert all(row["correct"] for row in held_out)
    for path in [out / "pool.jsonl", *out.glob("selection-*/train.jsonl")]:
        assert {row.get("meta", row)["problem_id"] for row in rows_of(path)} == set(range(12))


def test_a_finished_run_is_not_run_again(finished):
    out, first, written = finished
    assert {path: path.stat().st_mtime_ns for path in out.glob("run-*/[!.]*")} == written
    assert (out / "policies.json").read_bytes() == first


def test_what_is_left_for_readers(finished):
    out, _, _ = finished
    assert (out / "policies.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "policies.md").read_text()
    for policy in policies_report.COLOURS:
        assert f"\n| {policy} | " in text


def test_a_policy_differs_only_where_seeds_and_problems_agree():
    def gap(over_seeds, over_problems):
        return {
            "minus_random": {"mean": -0.2, "interval_over_seeds": over_seeds, "interval_over_problems": over_problems}
        }

    clear, unclear = [-0.3, -0.1], [-0.3, 0.1]
    assert "chi2 ends below random by 0.2000" in policies_report.verdict({"chi2": gap(clear, clear), "random": {}})
    for ends in ((clear, unclear), (unclear, clear)):
        assert "Nothing separates" in policies_report.verdict({"chi2": gap(*ends), "random": {}})
    assert "One seed" in policies_report.verdict({"chi2": gap(None, clear)})
