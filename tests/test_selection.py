"""Selections made through ``select``: what is written, what is refused, and what a policy may depend on."""

import hashlib
import json
import math
import tracemalloc
from collections import Counter, defaultdict
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lark_fast.errors import UserError
from lark_fast.kernels.chi2 import chi2_weights
from lark_fast.scoring.store import ScoreStore
from lark_fast.selection import scored_rows
from lark_fast.selection.matching import RowIndex
from lark_fast.selection.run import SelectConfig, select
from lark_fast.selection.scored_rows import ScoredRows
from tests.selections import COLUMNS, NUMBERS, RAGGED, Setup, raw, read_lines, score_row, write_pool, write_scores

NAN, INF = math.nan, math.inf
POLICIES = ("chi2", "topb", "random", "nll", "rsr")


def test_rows_are_the_pool_in_its_order_with_chi2_weights(tmp_path):
    setup = Setup(tmp_path, RAGGED, parts=3)  # problems then span parts
    summary, lines = setup.select(budget=3)
    expected = {(problem, k): q for problem, e in RAGGED.items() for k, q in enumerate(chi2_weights(e, 3)) if q > 0}
    keys = [(line["meta"]["problem_id"], line["meta"]["candidate_id"]) for line in lines]
    assert keys == [key for key in ((r["problem_id"], r["candidate_id"]) for r in setup.raws) if key in expected]
    for key, line in zip(keys, lines, strict=True):
        assert line["weight"] == line["meta"]["train_weight"] == pytest.approx(expected[key], rel=1e-13)
        assert line["meta"]["g_hat"] == RAGGED[key[0]][key[1]]
        source = next(r for r in setup.raws if (r["problem_id"], r["candidate_id"]) == key)
        assert line["messages"] == source["messages"]
        assert line["meta"]["teacher"] == source["teacher"]
        assert set(line) == {"messages", "weight", "meta", "level"}
        assert line["level"] == source["level"]
    assert summary.rows == len(lines) == 3 + 3 + 2 + 1 + 3
    sums = defaultdict(float)
    for line in lines:
        sums[line["meta"]["problem_id"]] += line["weight"]
    np.testing.assert_allclose([sums[problem] for problem in RAGGED], 1, rtol=1e-13)


def test_order_of_the_pool_does_not_change_the_weights(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    straight, shuffled = Setup(tmp_path / "a", RAGGED), Setup(tmp_path / "b", RAGGED, shuffle=5)
    for policy in POLICIES:
        assert straight.weights(policy=policy) == shuffled.weights(policy=policy)
    keys = [(r["problem_id"], r["candidate_id"]) for r in read_lines(shuffled.pool)]
    chosen = shuffled.weights()
    assert list(chosen) == [key for key in keys if key in chosen]


def test_blocks_of_any_size_give_the_same_weights(tmp_path, monkeypatch):
    setup = Setup(tmp_path, RAGGED)
    whole = {policy: setup.weights(policy=policy) for policy in POLICIES}
    for cells in (1, 40, 100):
        monkeypatch.setattr(scored_rows, "_BLOCK_CELLS", cells)
        widths = [block.shape for block in ScoredRows(setup.scores, ("g_hat",)).padded_blocks()]
        assert max(n * k for n, k in widths) <= max(cells, 37)
        for policy in POLICIES:
            assert setup.weights(policy=policy) == whole[policy]


@pytest.mark.parametrize(("policy", "column", "sign"), [("topb", "g_hat", -1), ("nll", "nll", 1), ("rsr", "rsr", 1)])
def test_baselines_take_the_best_by_their_column_alike(tmp_path, policy, column, sign):
    setup = Setup(tmp_path, RAGGED)
    weights = setup.weights(policy=policy, budget=4)
    for problem, energies in RAGGED.items():
        own = [row for row in setup.rows if row["problem_id"] == str(problem)]
        best = sorted(range(len(own)), key=lambda k: sign * own[k][column])[:4]
        expected = {(problem, k): 1 / min(4, len(energies)) for k in best}
        assert {key: q for key, q in weights.items() if key[0] == problem} == expected


def test_topb_takes_the_first_among_ties(tmp_path):
    # Sorting that is not stable only shows on more than a few equal numbers.
    setup = Setup(tmp_path, {n: [0.0] + [1.0] * 40 for n in range(20)})
    weights = setup.weights(policy="topb", budget=2)
    assert weights == {(n, k): 0.5 for n in range(20) for k in (1, 2)}
    assert setup.weights(ties="reference", budget=2) == weights


def test_random_depends_on_seed_and_problem_only(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    setup = Setup(tmp_path / "a", {n: [0.1 * k for k in range(6)] for n in range(400)})
    first = setup.weights(policy="random", budget=2)
    assert first == setup.weights(policy="random", budget=2)
    assert first != setup.weights(policy="random", budget=2, seed=1)
    assert set(first.values()) == {0.5}
    # Each of 6 candidates is expected in 400 / 3 = 133 problems, with a standard deviation of 9.4.
    counts = Counter(candidate for _, candidate in first)
    assert len(first) == 800
    assert all(90 < counts[k] < 180 for k in range(6))
    other = Setup(tmp_path / "b", {n: [0.3 * k for k in range(6)] for n in (17, 3)})
    assert other.weights(policy="random", budget=2) == {key: q for key, q in first.items() if key[0] in (3, 17)}


def test_tau_form(tmp_path):
    weights = Setup(tmp_path, RAGGED).weights(tau=0.05)
    for problem, energies in RAGGED.items():
        expected = chi2_weights(energies, tau=0.05)
        got = [weights.get((problem, k), 0.0) for k in range(len(energies))]
        np.testing.assert_allclose(got, expected, rtol=1e-12)
    manifest = json.loads((tmp_path / "selection" / "manifest.json").read_text())
    assert manifest["config"]["tau"] == 0.05
    assert manifest["config"]["budget"] is None


def test_boundary_ties_are_rows_in_reference_mode_only(tmp_path):
    setup = Setup(tmp_path, {1: [3.0, 1.0, 2.0, 1.0], 2: [1.0, 1.0, 1.0, 1.0], 3: [2.0, 1.0]})
    assert setup.weights() == {
        (1, 0): pytest.approx(2 / 3),
        (1, 2): pytest.approx(1 / 3),
        **{(2, k): 0.25 for k in range(4)},
        (3, 0): 0.5,
        (3, 1): 0.5,
    }
    reference = setup.weights(ties="reference")
    assert {key: q for key, q in reference.items() if key[0] < 3} == {
        (1, 0): pytest.approx(2 / 3),
        (1, 1): 0.0,
        (1, 2): pytest.approx(1 / 3),
        **{(2, k): pytest.approx(1 / 3) for k in range(3)},
    }
    assert reference[3, 0] == pytest.approx(1 - 1e-8, abs=1e-12)
    assert reference[3, 1] == pytest.approx(1e-8, abs=1e-12)


def test_candidates_without_g_hat_are_dropped_and_reported(tmp_path):
    setup = Setup(tmp_path, {1: [3.0, NAN, 2.0, 1.0], "lost": [NAN, NAN], 3: [NAN, 0.5]})
    for policy in POLICIES:
        summary, lines = setup.select(policy=policy, budget=2)
        keys = [(line["meta"]["problem_id"], line["meta"]["candidate_id"]) for line in lines]
        assert len(keys) == 3
        assert (3, 1) in keys
        assert not {(1, 1), (3, 0), ("lost", 0), ("lost", 1)} & set(keys)
        assert (summary.without_g_hat, summary.problems_without_row, summary.problems) == (4, 1, 3)
        said = "\n".join(summary.lines())
        assert "4 scored trajectories have no g_hat" in said
        assert "1 problems have no row: 'lost'" in said
    with pytest.raises(UserError, match=r"no candidate of problem 'lost' has a g_hat \(1 such"):
        setup.select(ties="reference")


def test_nothing_but_nan_cannot_be_selected_from(tmp_path):
    with pytest.raises(UserError, match="no trajectory has a g_hat"):
        Setup(tmp_path, {1: [NAN], 2: [NAN, NAN]}).select()


@pytest.mark.parametrize("value", [INF, -INF])
def test_infinite_scores_name_the_problem(tmp_path, value):
    setup = Setup(tmp_path, {1: [3.0, 1.0], "bad one": [2.0, value, 0.0]})
    for settings in ({}, {"policy": "random"}, {"tau": 1.0}):
        with pytest.raises(UserError, match=r"problem 'bad one', candidate '1': g_hat is -?inf \(1 such"):
            setup.select(**settings)
    if value > 0:
        with pytest.raises(UserError, match="problem 'bad one'"):
            setup.select(ties="reference")
    else:
        assert ("bad one", 1) not in setup.weights(ties="reference")
        assert setup.select(ties="reference")[0].without_g_hat == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "best"}, "--policy best: unknown; known are chi2, topb, kl, random, nll, "),
        ({"ties": "fair"}, "--ties fair: unknown; known are exact, reference"),
        ({"budget": 2, "tau": 1.0}, "--budget and --tau: give one of them"),
        ({"budget": 0}, "--budget 0: must be at least 1"),
        ({"tau": 0.0}, "--tau 0.0: must be a finite number above 0"),
        ({"tau": NAN}, "--tau nan: must be"),
        ({"tau": 1.0, "policy": "topb"}, "--tau: only the policies chi2 and kl have one"),
        ({"tau": 1.0, "ties": "reference"}, "--ties reference: is for"),
        ({"policy": "nll", "ties": "reference"}, "--ties reference: is for"),
        ({"pool": ("nowhere.jsonl",)}, "nowhere.jsonl"),
        ({"scores": "nowhere"}, "nowhere: no manifest.json there"),
        ({"policy": "teacher"}, "--policy teacher: needs --teacher-order"),
        ({"teacher_order": ("alpha",)}, "--teacher-order: is for the policy teacher only"),
        ({"band": (1.0, 2.0)}, "--band: is for the policy perplexity only"),
        ({"policy": "perplexity", "band": (3.0, 2.0)}, "--band 3:2: LOW:HIGH are finite"),
        ({"policy": "perplexity", "band": (NAN, 2.0)}, "--band nan:2"),
        ({"policy": "entropy", "tau": 1.0}, "--tau: only the policies chi2 and kl"),
        ({"policy": "kl", "tau": -1.0}, "--tau -1.0: must be"),
        ({"near_duplicate_threshold": 0.0}, "--near-duplicate-threshold 0.0"),
        ({"near_duplicate_threshold": 0.9, "near_duplicates": "exact"}, "is for --near-duplicates minhash only"),
        ({"ngram": 0}, "--ngram 0"),
        ({"ngram": 8}, "--ngram: is for --decontaminate only"),
        ({"pool": (), "where": ("correct",)}, "give --pool too"),
        ({"constraints": "c.yaml", "policy": "topb"}, "--constraints: are for the policy chi2"),
    ],
)
def test_bad_settings_are_one_clear_line(tmp_path, settings, message):
    setup = Setup(tmp_path, {1: [1.0, 2.0]})
    with pytest.raises(UserError) as caught:
        setup.select(**settings)
    assert message in str(caught.value)
    assert not setup.out.exists()


@pytest.mark.parametrize("inside", ["", "deeper/still"])
def test_a_selection_is_never_written_among_the_scores(tmp_path, inside):
    setup = Setup(tmp_path, RAGGED)
    before = sorted(setup.scores.iterdir())
    for pool in ({}, {"pool": ()}):
        with pytest.raises(UserError, match="lies in --scores"):
            setup.select(out=str(setup.scores / inside), **pool)
    assert sorted(setup.scores.iterdir()) == before


@pytest.mark.parametrize("name", ["manifest.json", "removed.jsonl", "comparison.md", "trl/train.jsonl"])
def test_files_of_others_stay(tmp_path, name):
    setup = Setup(tmp_path, RAGGED)
    theirs = setup.out / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    with pytest.raises(UserError, match=rf"holds .*{name} already; give another directory or --overwrite"):
        setup.select(overwrite=False)
    assert theirs.read_text() == "mine"


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("teacher", None, "has no column teacher"),
        ("teacher", pa.nulls(50, pa.string()), "column teacher has empty values"),
        ("problem_id", pa.array(range(50)), "column problem_id is int64"),
        ("candidate_id", pa.array(range(50)), "column candidate_id is int64"),
        ("n_tokens", pa.nulls(50, pa.int32()), "column n_tokens has empty values"),
        ("n_tokens", pa.array([-1] * 50, pa.int32()), "n_tokens is below 0 in 50 rows"),
        ("g_hat", pa.array(["0.5"] * 50), "column g_hat is string"),
    ],
)
def test_columns_of_another_kind_are_named(tmp_path, column, values, message):
    setup = Setup(tmp_path, RAGGED)
    part = setup.scores / "part-000000.parquet"
    table = pq.read_table(part).drop_columns([column])
    pq.write_table(table if values is None else table.append_column(column, values), part)
    with pytest.raises(UserError, match=message):
        setup.select(policy="chi2")


def test_unfinished_scores_are_refused(tmp_path):
    setup = Setup(tmp_path, {1: [1.0, 2.0]})
    write_scores(setup.scores, setup.rows, complete=False)
    with pytest.raises(UserError, match="run the same `lark-fast score` command again"):
        setup.select()


def test_broken_scores_are_refused(tmp_path):
    setup = Setup(tmp_path, {1: [1.0, 2.0]})
    part = setup.scores / "part-000000.parquet"
    pq.write_table(pq.read_table(part).drop_columns(["g_hat"]), part)
    with pytest.raises(UserError, match=r"part-000000\.parquet: has no column g_hat"):
        setup.select()
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(UserError, match=r"part-000000\.parquet: cannot be read"):
        setup.select()
    part.unlink()
    with pytest.raises(UserError, match="holds no scored trajectories"):
        setup.select()
    write_scores(setup.scores, [*setup.rows, setup.rows[0]])
    with pytest.raises(UserError, match="problem '1', candidate '0' is there twice"):
        setup.select()
    write_scores(setup.scores, setup.rows)
    (setup.scores / "rejected.jsonl").write_text("{\n")
    with pytest.raises(UserError, match=r"rejected\.jsonl: cannot be read"):
        setup.select()


def test_a_pool_that_lacks_scored_rows_is_refused(tmp_path):
    setup = Setup(tmp_path, RAGGED)
    write_pool(setup.pool, [row for row in setup.raws if row["problem_id"] not in (7, "one")])
    with pytest.raises(UserError, match=r"lacks 6 of the 50 .* problem '7', candidate '0' of pool\.jsonl"):
        setup.select()
    assert list(setup.out.iterdir()) == []


def test_a_pool_with_other_texts_is_refused(tmp_path):
    setup = Setup(tmp_path, RAGGED)
    raws = [dict(row) for row in setup.raws]
    for index in (40, 44):
        raws[index]["messages"] = [*raws[index]["messages"][:-1], {"role": "assistant", "content": "Another answer."}]
    write_pool(setup.pool, raws)
    with pytest.raises(UserError) as caught:
        setup.select()
    key = raws[40]["problem_id"], raws[40]["candidate_id"]
    assert f"{setup.pool}:41: problem '{key[0]}', candidate '{key[1]}': not the text" in str(caught.value)
    assert "2 of 50" in str(caught.value)


def test_ids_of_either_type_are_one_key_but_stay_as_they_are(tmp_path):
    setup = Setup(tmp_path, {5: [1.0]})
    row = setup.raws[0]
    write_pool(setup.pool, [row | {"problem_id": "5", "candidate_id": "0"}])
    assert setup.weights() == {("5", "0"): 1.0}


def test_records_without_ids_are_known_by_prompt_and_place(tmp_path):
    raws = [{"messages": raw(1, k)["messages"]} for k in range(3)]
    rows = [score_row(row, float(k), ordinal=k) for k, row in enumerate(raws)]
    pool, scores = write_pool(tmp_path / "pool.jsonl", raws), write_scores(tmp_path / "scores", rows)
    select(SelectConfig(scores=str(scores), pool=(str(pool),), out=str(tmp_path / "out"), budget=1))
    (line,) = read_lines(tmp_path / "out" / "train.jsonl")
    assert line["meta"]["candidate_id"] == 2
    assert line["meta"]["teacher"] == ""
    assert len(line["meta"]["problem_id"]) == 32


def test_never_scored_records_are_counted_unless_scoring_rejected_them(tmp_path):
    broken = {"problem_id": 9, "messages": []}
    extra = [raw("new", 0), broken, raw("rejected", 0), raw("new", 1)]
    setup = Setup(tmp_path, {1: [1.0, 2.0]}, extra_pool=extra)
    write_scores(setup.scores, setup.rows, rejected=[(setup.pool, 4), (setup.pool, 5)])
    summary, lines = setup.select()
    assert len(lines) == 2
    assert (summary.pool_records, summary.never_scored) == (6, 2)
    assert any(line.startswith("2 of 6 pool records were never scored") for line in summary.lines())


def test_a_small_part_of_a_pool_may_be_scored(tmp_path):
    setup = Setup(tmp_path, {1: [1.0, 2.0]}, extra_pool=[raw(n, 0) for n in range(2, 60)], shuffle=1)
    summary, lines = setup.select()
    assert (len(lines), summary.never_scored) == (2, 58)


def test_of_records_with_one_key_the_first_counts(tmp_path):
    other = raw(1, 0) | {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    setup = Setup(tmp_path, {1: [1.0]}, extra_pool=[raw(1, 0, note="again"), other])
    summary, lines = setup.select()
    assert [line["messages"] for line in lines] == [setup.raws[0]["messages"]]
    assert "note" not in lines[0]
    assert summary.duplicates == 2
    assert any("2 pool records repeat the key" in line for line in summary.lines())


def test_a_rejected_record_does_not_hide_the_scored_one_of_its_key(tmp_path):
    setup = Setup(tmp_path, {1: [1.0]})
    too_long = raw(1, 0) | {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    write_pool(setup.pool, [too_long, setup.raws[0]])
    write_scores(setup.scores, setup.rows, rejected=[(setup.pool, 1)])
    summary, lines = setup.select()
    assert [line["messages"] for line in lines] == [setup.raws[0]["messages"]]
    assert (summary.never_scored, summary.duplicates) == (0, 0)


def test_unknown_columns_travel_but_never_overwrite(tmp_path):
    row = raw(1, 0, weight=99, meta={"g_hat": 5}, correct=True, tags=["a", None], score=NAN, labels=[1])
    pool = write_pool(tmp_path / "pool.jsonl", [row])
    scores = write_scores(tmp_path / "scores", [score_row(row, 0.5)])
    summary = select(SelectConfig(scores=str(scores), pool=(str(pool),), out=str(tmp_path / "out")))
    (line,) = read_lines(tmp_path / "out" / "train.jsonl")
    assert line == {
        "messages": row["messages"],
        "weight": 1.0,
        "meta": {"problem_id": 1, "candidate_id": 0, "teacher": "alpha", "g_hat": 0.5, "train_weight": 1.0},
        "correct": True,
        "tags": ["a", None],
        "score": None,
    }
    assert summary.columns_left_out == ("labels", "meta", "weight")
    assert any("labels, meta, weight" in line for line in summary.lines())


def test_pre_tokenised_records(tmp_path):
    row = {"problem_id": "p", "candidate_id": 3, "input_ids": [5, 6, 7], "labels": [-100, 6, 7], "x": 1}
    pool = write_pool(tmp_path / "pool.jsonl", [row])
    scores = write_scores(tmp_path / "scores", [score_row(row, 0.5)])
    select(SelectConfig(scores=str(scores), pool=(str(pool),), out=str(tmp_path / "out")))
    (line,) = read_lines(tmp_path / "out" / "train.jsonl")
    assert line["input_ids"] == row["input_ids"]
    assert line["labels"] == row["labels"]
    assert line["x"] == 1
    assert "messages" not in line


def test_pool_of_several_files_and_forms(tmp_path):
    setup = Setup(tmp_path, RAGGED)
    whole = setup.weights()
    write_pool(tmp_path / "a.jsonl", setup.raws[:20])
    strings = [row | {"problem_id": str(row["problem_id"])} for row in setup.raws[20:39]]
    pq.write_table(pa.Table.from_pylist(strings), tmp_path / "b.parquet")
    write_pool(tmp_path / "c.jsonl", setup.raws[39:])
    files = tuple(str(tmp_path / name) for name in ("a.jsonl", "b.parquet", "c.jsonl"))
    with_files = setup.weights(pool=files)
    assert {(str(p), k): q for (p, k), q in with_files.items()} == {(str(p), k): q for (p, k), q in whole.items()}


def test_an_existing_selection_is_kept_unless_overwritten(tmp_path):
    setup = Setup(tmp_path, RAGGED)
    setup.select(overwrite=False)
    before = {file.name: file.read_bytes() for file in setup.out.iterdir()}
    assert set(before) == {"train.jsonl", "weights.parquet", "manifest.json"}
    with pytest.raises(UserError, match="holds a selection already; give another directory or --overwrite"):
        setup.select(overwrite=False, budget=1)
    write_pool(setup.pool, setup.raws[:-1])
    with pytest.raises(UserError, match="lacks 1 of the 50"):
        setup.select(overwrite=True, budget=1)
    assert {file.name: file.read_bytes() for file in setup.out.iterdir()} == before
    write_pool(setup.pool, setup.raws)
    assert len(setup.select(overwrite=True, budget=1)[1]) == 5
    assert json.loads((setup.out / "manifest.json").read_text())["config"]["budget"] == 1


def test_no_manifest_speaks_of_another_selection(tmp_path):
    setup = Setup(tmp_path, RAGGED)
    setup.select()
    (setup.out / "manifest.json.tmp").mkdir()  # the rows can be written, the manifest cannot
    with pytest.raises(UserError, match="cannot be written to"):
        setup.select(budget=1)
    assert len(read_lines(setup.out / "train.jsonl")) == 5
    assert not (setup.out / "manifest.json").exists()


def test_an_out_path_that_is_a_file(tmp_path):
    setup = Setup(tmp_path, {1: [1.0]})
    setup.out.write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        setup.select()


def test_manifest_says_what_was_done(tmp_path):
    setup = Setup(tmp_path, {1: [4.0, 2.0, 1.0], 2: [0.5, NAN], 3: [NAN]})
    summary, lines = setup.select(budget=2)
    manifest = json.loads((setup.out / "manifest.json").read_text())
    q = [3 / 4, 1 / 4]
    chosen = {(line["meta"]["problem_id"], line["meta"]["candidate_id"]) for line in lines}
    tokens = sum(row["n_tokens"] for row in setup.rows if (int(row["problem_id"]), int(row["candidate_id"])) in chosen)
    sample_size = (1 / (q[0] ** 2 + q[1] ** 2) + 1) / 2  # problem 2 has one candidate, problem 3 none
    divergence = 3 * ((q[0] - 1 / 3) ** 2 + (q[1] - 1 / 3) ** 2 + 1 / 9) / 2
    assert manifest["mean_effective_sample_size"] == summary.mean_effective_sample_size == pytest.approx(sample_size)
    assert manifest["mean_chi2_divergence"] == summary.mean_chi2_divergence == pytest.approx(divergence)
    assert manifest["selected_tokens"] == summary.selected_tokens == tokens
    assert manifest["config"] == json.loads(json.dumps(asdict(setup.config(budget=2, overwrite=True))))
    counts = manifest["counts"]
    assert (counts["problems"], counts["candidates"], counts["rows"]) == (3, 6, 3)
    assert (counts["without_g_hat"], counts["problems_without_row"]) == (2, 1)
    assert counts["first_problems_without_row"] == ["3"]
    digest = hashlib.sha256((setup.scores / "manifest.json").read_bytes()).hexdigest()
    assert manifest["scores"]["manifest_sha256"] == digest
    assert manifest["teachers"] == {
        "alpha": {"candidates": pytest.approx(4 / 6), "rows": pytest.approx(2 / 3), "weight": pytest.approx(7 / 8)},
        "beta": {"candidates": pytest.approx(2 / 6), "rows": pytest.approx(1 / 3), "weight": pytest.approx(1 / 8)},
    }
    assert set(manifest["versions"]) == {"lark_fast", "numpy", "pyarrow", "python"}


def test_budget_defaults_to_three(tmp_path):
    setup = Setup(tmp_path, RAGGED)
    assert setup.weights() == setup.weights(budget=3)
    assert setup.select()[0].lines()[0].startswith(f"{setup.out}: 12 of 50 trajectories for 5 problems")
    setup.select(policy="random")
    assert json.loads((setup.out / "manifest.json").read_text())["config"]["budget"] == 3


def test_scores_that_the_store_itself_wrote(tmp_path):
    """The hand-made parts above must not drift from what scoring writes."""
    setup = Setup(tmp_path, {1: [0.0] * 4, 2: [0.0] * 3})
    store = ScoreStore(tmp_path / "real", {"top_k": None, "per_token": False})
    rng = np.random.default_rng(4)
    for half in (setup.rows[:3], setup.rows[3:]):
        extra = {"n_input_tokens": 20, "truncated": False, "entropy": 1.0, "rank_mean": 2.0}
        made = [row | extra | {"brier": rng.uniform(0.1, 1), "token_hash": rng.bytes(16)} for row in half]
        store.append([{name: value for name, value in row.items() if name != "g_hat"} for row in made])
    with pytest.raises(UserError, match="run the same"):
        setup.select(scores=str(store.directory))
    store.finish()
    g_hat = pa.concat_tables([pq.read_table(part) for part in store.parts()])["g_hat"].to_numpy()
    weights = setup.weights(scores=str(store.directory), budget=2)
    expected = np.concatenate([chi2_weights(g_hat[:4], 2), chi2_weights(g_hat[4:], 2)])
    got = [weights.get((row["problem_id"], row["candidate_id"]), 0.0) for row in setup.raws]
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_memory_of_the_scores_is_a_few_words_a_row(tmp_path):
    n = 200_000
    rng = np.random.default_rng(0)
    content = np.frombuffer(rng.bytes(16 * n), dtype="V16").tolist()
    columns = {
        "problem_id": [f"a problem with a rather long name {i // 10}" for i in range(n)],
        "candidate_id": [f"a candidate with a long name {i % 10}" for i in range(n)],
        "teacher": ["alpha"] * n,
        "source": ["pool.jsonl"] * n,
        "n_tokens": np.ones(n, dtype=np.int32),
        **{name: np.ones(n) for name in NUMBERS},
        "content_hash": content,
    }
    scores = tmp_path / "scores"
    scores.mkdir()
    pq.write_table(pa.table(columns, schema=COLUMNS), scores / "part-000000.parquet")
    del columns, content
    arrow_before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        rows = ScoredRows(scores, ("g_hat",))
        index = RowIndex(rows)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert index.find(("a problem with a rather long name 7", "a candidate with a long name 3")) == 73
    assert held < 65 * n
    # The strings of one batch of 32,768 rows, as Python objects, come and go on top.
    assert peak < 85 * n + 32768 * 300
    assert pa.total_allocated_bytes() - arrow_before < 10 * n
