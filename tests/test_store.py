"""The scores directory: finishing, resuming after kill -9, refusing, and growing."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lark_fast import packing
from lark_fast.errors import UserError
from lark_fast.scoring import finishing
from lark_fast.scoring.learnability import g_hat
from lark_fast.scoring.store import ScoreStore, part_files, read_manifest
from tests.command import make_records, run, write_jsonl, write_student
from tests.score_rows import IDENTITY, row, table, write_window


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return write_student(tmp_path_factory.mktemp("student"))


def test_g_hat_across_parts_and_groups(tmp_path, monkeypatch):
    # Three rows a group, so that the group-by takes several passes; problems are spread over all parts.
    monkeypatch.setattr(finishing, "GROUP_ROWS", 3)
    rng = np.random.default_rng(0)
    rows = [row(i % 7, i, *rng.uniform(0.1, 1, 2)) for i in range(40)]
    with ScoreStore(tmp_path, IDENTITY) as scores:
        for start in range(0, 40, 9):
            write_window(scores, rows[start : start + 9])
        assert len(scores.parts()) == 5
        manifest = scores.finish()
    assert manifest["counts"] == {"rows": 40, "problems": 7, "not_finite": 0}
    made = table(tmp_path).to_pydict()
    expected = g_hat([r["nll"] for r in rows], [r["brier"] for r in rows], [r["problem_id"] for r in rows])
    np.testing.assert_allclose(made["g_hat"], expected, rtol=1e-13)
    np.testing.assert_allclose(made["rho"], np.array(made["brier"]) / np.array(made["nll"]), rtol=1e-15)
    assert made["candidate_id"] == [str(i) for i in range(40)]


def test_equal_tokens_in_different_parts_share_the_numbers(tmp_path):
    # Scored in different batches they differ in the last digits; the first one's numbers hold for both.
    with ScoreStore(tmp_path, IDENTITY) as scores:
        write_window(scores, [row(1, 0, 0.5, 0.2, b"same"), row(2, 0, 0.7, 0.2, b"same"), row(1, 1, 0.9, 0.3)])
        write_window(scores, [row(1, 2, 0.5000001, 0.2000001, b"same")])
        scores.finish()
    made = table(tmp_path).to_pydict()
    assert made["nll"] == [0.5, 0.7, 0.9, 0.5]
    assert made["g_hat"][0] == made["g_hat"][3]


def snapshot(directory):
    return [(p.name, p.read_bytes(), p.stat().st_mtime_ns) for p in part_files(directory)]


def test_finishing_twice_changes_no_byte(tmp_path):
    with ScoreStore(tmp_path, IDENTITY) as scores:
        write_window(scores, [row(1, 0), row(1, 1, 2.0), row(2, 0, math.nan)])
        assert scores.finish()["counts"]["not_finite"] == 1
    before = snapshot(tmp_path)
    with ScoreStore(tmp_path, IDENTITY) as scores:
        scores.finish()
    assert snapshot(tmp_path) == before


def test_new_candidates_rewrite_only_the_parts_of_their_problems(tmp_path):
    with ScoreStore(tmp_path, IDENTITY) as scores:
        # A row without a g_hat is no change either, though NaN is not equal to itself.
        for problem, nll in ((1, 0.5), (2, 0.7), (3, math.nan)):
            write_window(scores, [row(problem, 0, nll), row(problem, 1, 0.9)])
        scores.finish()
    before = snapshot(tmp_path)
    with ScoreStore(tmp_path, IDENTITY) as scores:
        (tmp_path / "lark_ghat.json").write_text("of the rows so far")
        scores.append([row(2, 2, 0.8)])
        assert not read_manifest(tmp_path)["complete"]
        assert not (tmp_path / "lark_ghat.json").exists()
        scores.close_window([("2", "2")])
        scores.finish()
    after = snapshot(tmp_path)
    assert [b == a for b, a in zip(before, after[:3], strict=True)] == [True, False, True]
    rows = [row(2, k, nll) for k, nll in enumerate((0.7, 0.9, 0.8))]
    expected = g_hat([r["nll"] for r in rows], [0.5] * 3, [2] * 3)
    made = table(tmp_path).to_pydict()
    of_two = [g for g, problem in zip(made["g_hat"], made["problem_id"], strict=True) if problem == "2"]
    np.testing.assert_allclose(of_two, expected, rtol=1e-13)


def test_refuses_another_identity_and_names_it(tmp_path):
    def begin(identity, **how):
        with ScoreStore(tmp_path, identity, **how):
            pass

    another = IDENTITY | {"top_k": 50}
    with ScoreStore(tmp_path, IDENTITY) as scores:
        scores.append([row(1, 0)])
    for close in (False, True):  # rows in the journal are scores as much as rows in a part
        with ScoreStore(tmp_path, IDENTITY) as scores:
            if close:
                scores.close_window([("1", "0")])
        with pytest.raises(UserError, match=r"top_k was None, is 50.*--overwrite"):
            begin(another)
    with ScoreStore(tmp_path, IDENTITY) as scores:
        scores.append([row(1, 1)])
    begin(another, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "manifest.json"]
    begin(IDENTITY)  # nothing had been scored


def test_leftovers_of_a_killed_run_are_swept(tmp_path):
    (tmp_path / "part-000000.parquet.tmp").write_bytes(b"torn")
    with ScoreStore(tmp_path, IDENTITY) as scores:
        write_window(scores, [row(1, 0)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "manifest.json", "part-000000.parquet"]


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_a_directory_of_version_0_0_goes_on(tmp_path, complete, per_token):
    """Format 1 as it was written before there was a journal or a lock, by hand."""
    numbers = [(name, pa.float64()) for name in ("nll", "brier", "entropy", "rank_mean", "rsr")]
    derived = [(name, pa.float64()) for name in ("rho", "g_hat")] if complete else []
    floats, ranks = pa.list_(pa.float32()), pa.list_(pa.int32())
    tokens = [("token_nll", floats), ("token_brier", floats), ("token_entropy", floats), ("token_rank", ranks)]
    columns = [
        *[(name, pa.string()) for name in ("problem_id", "candidate_id", "teacher", "source")],
        *[("n_tokens", pa.int32()), ("n_input_tokens", pa.int32()), ("truncated", pa.bool_())],
        *[*numbers, *derived, ("content_hash", pa.binary(16)), ("token_hash", pa.binary(16))],
        *(tokens if per_token else ()),
    ]
    rows = [row(1, 0, 0.5), row(1, 1, 0.7), row(2, 0, 0.9)]
    scores = np.array([0.5 / 1.2 * (2 * 1 - 1 / 1.2), 0.7 / 1.2 * (2 * 0.5 / 0.7 - 1 / 1.2), 0.5 / 0.9])
    for made, score in zip(rows, scores, strict=True):
        made |= {"rho": 0.5 / made["nll"], "g_hat": score} if complete else {}
        made |= {name: [1, 2, 3] for name, _ in tokens} if per_token else {}
    for number, part in enumerate((rows[:2], rows[2:])):
        written = pa.Table.from_pylist(part, pa.schema(columns))
        pq.write_table(written, tmp_path / f"part-{number:06d}.parquet", compression="zstd")
    identity = IDENTITY | {"per_token": per_token}
    manifest = {"format": 1, "complete": complete, "brier": "brier", "identity": identity}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "rejected.jsonl").write_text("")

    new = row(2, 1, 0.4) | ({name: np.arange(3) for name, _ in tokens} if per_token else {})
    with ScoreStore(tmp_path, identity) as store:
        assert store.unfinished == {}
        assert dict(store.scored_keys()) == {(r["problem_id"], r["candidate_id"]): r["content_hash"] for r in rows}
        write_window(store, [new])
        assert store.finish()["counts"] == {"rows": 4, "problems": 2, "not_finite": 0}
    made = table(tmp_path)
    assert made["candidate_id"].to_pylist() == ["0", "1", "0", "1"]
    np.testing.assert_allclose(made["g_hat"][:2].to_numpy(), scores[:2], rtol=1e-12)
    assert set(made.column_names) == {name for name, _ in columns} | {"rho", "g_hat"}


def test_a_manifest_of_another_format_is_refused_in_a_line(tmp_path):
    future = {"format": 2, "complete": True, "brier": "brier", "identity": IDENTITY}
    (tmp_path / "manifest.json").write_text(json.dumps(future))
    before = sorted(tmp_path.iterdir())
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"manifest\.json: not .*format 1.* format 2: use the version") as refused:
            ScoreStore(tmp_path, IDENTITY, overwrite=overwrite)
        assert "\n" not in str(refused.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("damage", ["torn", "empty", "zeros", "numbers"])
def test_a_part_that_a_disk_has_damaged(tmp_path, damage):
    rng = np.random.default_rng(0)
    windows = [[row(p, k, *rng.uniform(0.1, 1, 2)) for k in range(400)] for p in range(2)]
    with ScoreStore(tmp_path, IDENTITY) as scores:
        for window in windows:
            write_window(scores, window)
    last = part_files(tmp_path)[-1]
    whole = last.read_bytes()
    # The footer stays whole: what lies before it, names or numbers, is only missed when it is read.
    footer = 8 + int.from_bytes(whole[-8:-4], "little")
    middle = slice(4, len(whole) - footer)
    zeros = whole[: middle.start] + bytes(len(whole[middle])) + whole[middle.stop :]
    numbers = whole[: middle.stop // 2] + bytes(middle.stop // 2) + whole[2 * (middle.stop // 2) :]
    last.write_bytes({"torn": whole[: len(whole) // 2], "empty": b"", "zeros": zeros, "numbers": numbers}[damage])

    def read_all():
        with ScoreStore(tmp_path, IDENTITY) as scores:
            return dict(scores.scored_keys()), scores.finish()

    with pytest.raises(UserError, match=r"part-000001\.parquet: cannot be read .*; remove it") as refused:
        read_all()
    assert "\n" not in str(refused.value)
    last.unlink()
    with ScoreStore(tmp_path, IDENTITY) as scores:
        assert len(list(scores.scored_keys())) == 400
        write_window(scores, windows[1])
        assert scores.finish()["counts"]["rows"] == 800


def test_not_a_store(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_manifest(tmp_path)


def test_batches_never_depend_on_where_a_run_stopped():
    items = [(i, 1 + i * 7 % 13) for i in range(100)]
    whole = list(packing.windows(items, 8, 40))
    done = sum(len(window) for window in whole[:5])
    assert list(packing.windows(items[done:], 8, 40)) == whole[5:]
    lengths = [5, 5, 9, 1, 100, 3]
    batches = list(packing.length_batches(lengths, 20))
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 20 for b in batches)


def test_a_window_is_half_a_minute_of_work_on_any_student():
    assert packing.window_tokens(1_000_000, 2048, "cpu") == packing.WINDOW_TOKENS
    assert packing.window_tokens(500_000_000, 2048, "cpu") == 4 * 2048
    assert packing.window_tokens(7_000_000_000, 32768, "cuda") == int(4e15 / 14e9)


def test_manifest_says_what_made_the_numbers(tmp_path, student):
    pool = write_jsonl(tmp_path / "pool.jsonl", make_records(2))
    run("score", "--pool", pool, "--student", student, "--out", tmp_path / "s", "--top-k", 5)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["brier"] == "brier_topk"
    assert manifest["counts"] == {"records": 6, "rejected": 0, "rows": 6, "problems": 2, "not_finite": 0}
    assert len(manifest["identity"]["student"]) == len(manifest["identity"]["template"]) == 64
    assert set(manifest["versions"]) == {"lark_fast", "torch", "transformers", "numpy", "pyarrow", "python"}
