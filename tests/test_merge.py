"""A pool scored in shares, and the stores of the shares made one: against one run over the whole pool."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lark_fast.errors import UserError
from lark_fast.pool.reading import Pool
from lark_fast.pool.shares import Share
from lark_fast.scoring import merging
from lark_fast.scoring.merging import MergeConfig, merge
from lark_fast.scoring.parts import part_files
from lark_fast.scoring.store import ScoreStore, read_finished, read_manifest
from tests.command import make_records, write_jsonl, write_student
from tests.score_rows import IDENTITY, call_around, go_on, key, row, table, write_window

# Shares


@pytest.mark.parametrize("of", [1, 2, 3, 7, 8, 64])
def test_every_record_is_of_one_share(of):
    shares = [Share(part, of) for part in range(of)]
    owners = [[share.part for share in shares if share.has(ordinal)] for ordinal in range(40 * of)]
    assert all(len(found) == 1 for found in owners)
    for turn in range(40):
        assert sorted(owners[turn * of : (turn + 1) * of]) == [[part] for part in range(of)]


@pytest.mark.parametrize("of", [2, 5, 8])
@pytest.mark.parametrize("period", [2, 3, 8, 33])
def test_no_share_has_a_teacher_of_its_own(of, period):
    """Teachers take turns, and one writes a hundred times as much as the others."""
    tokens = []
    for share in (Share(part, of) for part in range(of)):
        own = [ordinal for ordinal in range(20_000) if share.has(ordinal)]
        tokens.append(sum(1 if ordinal % period else 100 for ordinal in own))
    assert max(tokens) < 1.1 * min(tokens)


@pytest.mark.parametrize("text", ["8/8", "-1/8", "a/b", "1", "3/0", "1/2/3", "٣/8", "", "1 / 8", "0/", "/8"])
def test_malformed_shards(text):
    with pytest.raises(UserError, match=r"--shard .*: give i/n, i from 0 to .*array"):
        Share.parse(text)


@pytest.fixture
def mixed_pool(tmp_path):
    """Files of every kind, with rejects, default ids, and keys that come again with another text."""
    records = list(make_records(12))
    for record in records[3::5]:
        del record["candidate_id"]  # its place in the whole pool then
    again = [record | {"candidate_id": 0, "problem_id": p} for p, record in enumerate(make_records(8, 1, words=9))]
    directory = tmp_path / "pool"
    directory.mkdir()
    write_jsonl(directory / "a.jsonl", records[:20])
    with open(directory / "a.jsonl", "a") as file:
        file.write('{"problem_id": 1, "messages": [\n' + json.dumps({"problem_id": 1, "messages": []}) + "\n")
    (directory / "b.json").write_text(json.dumps([*records[20:30], *again[:5], 7]))
    with_ids = [record for record in records[30:] if "candidate_id" in record]
    pq.write_table(pa.Table.from_pylist([*with_ids, *again[4:]]), directory / "c.parquet")
    return directory


@pytest.mark.parametrize("limit", [None, 31])
def test_shares_of_a_pool_are_the_pool(mixed_pool, limit):
    whole = {raw.ordinal: raw for raw in Pool([str(mixed_pool)]).read_raw(limit)}
    shares = {}
    for part in range(3):
        pool = Pool([str(mixed_pool)], share=Share(part, 3))
        own = list(pool.read_raw(limit))
        assert [raw.ordinal for raw in own] == sorted(raw.ordinal for raw in own)
        assert pool.ordinals == len(whole)
        shares |= {raw.ordinal: raw for raw in own}
        assert abs(len(own) - len(whole) / 3) <= 1
    assert len(whole) == limit or limit is None
    assert {n: (raw.source, raw.line, str(raw.content)) for n, raw in whole.items()} == {
        n: (raw.source, raw.line, str(raw.content)) for n, raw in shares.items()
    }


# Commands


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return write_student(tmp_path_factory.mktemp("student"))


def rejects(directory):
    lines = [json.loads(line) for line in (directory / "rejected.jsonl").read_text().splitlines()]
    return [(Path(line["source"]).name, line["line"], line["reason"]) for line in lines]


def assert_equal_stores(made, expected):
    got, whole = table(made), table(expected)
    assert got.schema.equals(whole.schema)
    for name in whole.column_names:
        if pa.types.is_floating(whole.schema.field(name).type):
            np.testing.assert_allclose(got[name].to_numpy(), whole[name].to_numpy(), rtol=1e-6, err_msg=name)
        elif not pa.types.is_list(whole.schema.field(name).type):
            assert got[name].to_pylist() == whole[name].to_pylist(), name
    assert rejects(made) == sorted(rejects(made), key=lambda line: line[:2])
    assert sorted(rejects(made)) == sorted(rejects(expected))
    ours, theirs = read_manifest(made), read_manifest(expected)
    assert ours["complete"]
    assert {name: ours[name] for name in ("counts", "identity", "brier", "format", "config", "versions")} == {
        name: theirs[name] for name in ("counts", "identity", "brier", "format", "config", "versions")
    }


@pytest.fixture
def command(capsys, monkeypatch):
    """The real command line, in this process: returns what it prints, or the error that it ends with."""
    from lark_fast.cli.app import app
    from lark_fast.scoring import facts

    monkeypatch.setattr(facts, "matmul_ceiling", lambda *_: 1e12)  # takes longer than the runs

    def run(*words):
        try:
            app(list(map(str, words)), standalone_mode=False)
        except UserError as error:
            return str(error)
        return capsys.readouterr().out

    return run


def test_merged_shards_are_one_run(tmp_path, student, mixed_pool, command, one_thread):
    how = ("--pool", mixed_pool, "--student", student, "--dtype", "float32", "--device", "cpu", "--per-token")
    out, whole = tmp_path / "s", tmp_path / "whole"
    shards = [out / f"shard-{part}" for part in range(3)]
    command("score", *how, "--out", whole)
    for part, shard in enumerate(shards):
        said = command("score", *how, "--out", shard, "--shard", f"{part}/3")
        assert f"share {part}/3; `lark-fast merge` makes one store of all 3" in said
    told = "shard-2: is shard 2/3 of a pool; `lark-fast merge` makes one store"
    assert told in command("select", "--scores", shards[2], "--out", tmp_path / "no")
    assert told in command("report", "--scores", shards[2], "--out", tmp_path / "no.html")
    for another in ((), ("--shard", "1/3")):
        assert "shard was '2/3', is " in command("score", *how, "--out", shards[2], *another)
    for bad, why in (("3/3", "give i/n, i from 0 to 2"), ("1/3 --export lark-json", "takes all candidates")):
        assert why in command("score", *how, "--out", tmp_path / "no", "--shard", *bad.split())

    before = content(*shards)
    rows = len(table(whole))
    said = command("merge", *shards, "--out", out, "--export", "lark-json")
    assert f"{rows} trajectories of 12 problems, merged from 3 shards" in said
    assert content(*shards) == before
    assert_equal_stores(out, whole)
    assert "duplicate" in str(rejects(out))
    assert json.loads((out / "lark_ghat.json").read_text())["n_scored"] == rows
    assert "merged before" in command("merge", *shards[::-1], "--out", out)
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sorted({line["run"] for line in logged}) == [1, 2, 3]

    # It goes on as any store does: all is known but what has come to the pool.
    write_jsonl(mixed_pool / "d.jsonl", list(make_records(14))[36:])
    grown = command("score", *how, "--out", out)
    assert "6 trajectories scored" in grown
    assert f"{rows} trajectories had been scored before" in grown
    command("score", *how, "--out", whole)
    assert_equal_stores(out, whole)
    chosen = command("select", "--scores", out, "--pool", mixed_pool, "--out", tmp_path / "c", "--budget", 2)
    assert "14 problems" in chosen
    assert "holds other scores" in command("merge", *shards, "--out", out)


def test_a_pool_in_shares_grows_at_its_end_alone(tmp_path, student, command, one_thread):
    records = list(make_records(8))
    pool = write_jsonl(tmp_path / "pool.jsonl", records[:12])
    shards = [tmp_path / f"shard-{part}" for part in range(2)]
    how = ("score", "--pool", pool, "--student", student, "--dtype", "float32", "--device", "cpu")

    def score(part):
        return command(*how, "--out", shards[part], "--shard", f"{part}/2")

    for part in range(2):
        score(part)
    write_jsonl(pool, records)
    score(0)
    refused = command("merge", *shards, "--out", tmp_path / "s")
    assert "was scored on another pool" in refused
    assert "12 records in 1 file(s)" in refused
    assert "6 trajectories scored" in score(1)
    assert "24 trajectories of 8 problems" in command("merge", *shards, "--out", tmp_path / "s")
    write_jsonl(pool, records[1:])
    assert "of its trajectories are not of share 0/2 of this pool" in score(0)
    refused = command("merge", *shards, "--out", tmp_path / "t")
    assert "shard-0: is not finished; run its `lark-fast score --shard 0/2 --out" in refused
    assert not (tmp_path / "t").exists()


# Stores


def made_rows(n):
    """In the order of a pool; every fifth has the key of the one before it, and some have the same tokens."""
    rng = np.random.default_rng(0)
    for ordinal in range(n):
        named = ordinal - (ordinal % 5 == 4)
        made = row(named // 4, named % 4, *rng.uniform(0.1, 1, 2), b"same" if ordinal % 6 == 0 else None)
        made["token_nll"] = made["token_brier"] = made["token_entropy"] = rng.random(ordinal % 7)
        made["token_rank"] = np.arange(ordinal % 7)
        yield made | {"ordinal": ordinal, "line": ordinal + 1, "n_tokens": ordinal % 7}


def write_shards(directory, rows, of=3, identity=IDENTITY, window=4, **share):
    """Stores as ``score --shard`` leaves them."""
    for part in range(of):
        own = [made for made in rows if Share(part, of).has(made["ordinal"])]
        seen = set()
        first = [made for made in own if not (key(made) in seen or seen.add(key(made)))]
        again = [made for made in own if made not in first]
        with ScoreStore(directory / f"shard-{part}", identity | {"shard": f"{part}/{of}"}) as store:
            for start in range(0, len(first), window):
                write_window(store, first[start : start + window])
            log = [{"source": "pool.jsonl", "line": made["line"], "reason": "duplicate"} for made in again]
            write_jsonl(store.directory / "rejected.jsonl", log)
            write_jsonl(store.directory / "metrics.jsonl", [{"run": 1}, {"run": 2}])
            timing = {"seconds": 2.0, "input_tokens": 50, "scored_tokens": 40}
            facts = {"pool": {"pool.jsonl": 999}, "records": len(rows)} | share
            store.finish(share=facts, config={}, timing=timing, versions={}, counts={"records": len(own)})
    return tuple(str(directory / f"shard-{part}") for part in range(of))


def content(*directories):
    """Every file's bytes and time."""
    files = [path for directory in map(Path, directories) for path in directory.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(files)}


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("of", [1, 3, 23])
def test_rows_come_in_the_order_of_the_pool(tmp_path, monkeypatch, per_token, of):
    """Also where a share has no row at all, and parts are cut anywhere."""
    monkeypatch.setattr(merging, "PART_ROWS", 7)
    monkeypatch.setattr(merging, "PART_TOKENS", 13)
    rows, identity = list(made_rows(40)), IDENTITY | {"per_token": per_token}
    shards = write_shards(tmp_path, rows, of, identity)
    seen = set()
    first = [made for made in rows if not (key(made) in seen or seen.add(key(made)))]
    go_on(tmp_path / "whole", [first[:11], first[11:]], identity)
    summary = merge(MergeConfig(shards=shards, out=str(tmp_path)))
    made = table(tmp_path)
    assert made.equals(table(tmp_path / "whole"))
    assert not made.column_names.count("ordinal")
    assert len(rejects(tmp_path)) == 8 == summary.rejected
    assert {line for _, line, _ in rejects(tmp_path)} == {5, 10, 15, 20, 25, 30, 35, 40}
    sizes = [pq.read_metadata(part).num_rows for part in part_files(tmp_path)]
    assert max(sizes) <= 7
    assert (sizes[0] < 7) == per_token
    assert read_finished(tmp_path)["timing"]["tokens_per_second"] == 25
    assert (summary.rows, summary.records) == (32, 40)


def test_shards_that_are_not_one_pool(tmp_path):
    rows = list(made_rows(12))
    a = write_shards(tmp_path / "a", rows)
    b = write_shards(tmp_path / "b", rows, identity=IDENTITY | {"top_k": None, "dtype": "float16"})
    c = write_shards(tmp_path / "c", rows, of=4)
    d = write_shards(tmp_path / "d", rows, pool={"another.jsonl": 10})
    go_on(tmp_path / "whole", [rows[:3]])
    with ScoreStore(tmp_path / "begun", IDENTITY | {"shard": "2/3"}) as store:
        store.append([rows[0]])

    def refused(*shards, out=tmp_path / "out", **how):
        with pytest.raises(UserError) as told:
            merge(MergeConfig(shards=tuple(map(str, shards)), out=str(out), **how))
        return str(told.value)

    assert "whole: is no shard" in refused(*a, tmp_path / "whole")
    assert "nothing: no manifest.json there" in refused(*a, tmp_path / "nothing")
    assert "of 3 shards, 1 are missing (1)" in refused(a[0], a[2])
    assert "shard 0/3 is there twice" in refused(*a, a[0])
    assert "c/shard-2: is shard 2/4, but" in refused(*a[:2], c[2])
    assert "b/shard-1: was scored otherwise than" in (told := refused(a[0], b[1], a[2]))
    assert "(dtype is 'float16', there None)" in told
    assert "d/shard-2: was scored on another pool" in refused(*a[:2], d[2])
    assert "begun: is not finished; run its `lark-fast score --shard 2/3 --out" in refused(*a[:2], tmp_path / "begun")
    assert "lies in the shard" in refused(*a, out=a[1])
    assert not (tmp_path / "out").exists()

    # What another run has left is kept, what is somebody else's even under --overwrite.
    assert "holds other scores" in refused(*a, out=tmp_path / "whole")
    merge(MergeConfig(shards=a, out=str(tmp_path / "whole"), overwrite=True))
    assert len(table(tmp_path / "whole")) == 10
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("{}")
    for overwrite in (False, True):
        assert "not a manifest of this version" in refused(*a, overwrite=overwrite)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]
    with ScoreStore(tmp_path / "taken", IDENTITY):
        assert "another run" in refused(*a, out=tmp_path / "taken", overwrite=True)


def test_a_damaged_shard_is_named_and_nothing_stays(tmp_path):
    shards = write_shards(tmp_path, list(made_rows(12)))
    part = part_files(shards[1])[0]
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"shard-1/part-000000.parquet: cannot be read"):
        merge(MergeConfig(shards=shards, out=str(tmp_path / "s")))
    assert [path.name for path in (tmp_path / "s").iterdir()] == [".lock"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_between_any_two_steps(tmp_path, monkeypatch, overwrite):
    """The directory is copied before and after everything that changes it; each copy is what a kill would leave."""
    monkeypatch.setattr(merging, "PART_ROWS", 7)
    rows, out, states = list(made_rows(20)), tmp_path / "out", []
    shards = write_shards(tmp_path, rows)
    before = content(*shards)
    if overwrite:
        go_on(out, [[made] for made in rows[:4] + rows[5:8]])  # of more parts than the new one

    def keep():
        files = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        if files not in states:
            states.append(files)

    with monkeypatch.context() as patched:
        call_around(patched, ("replace", "unlink"), keep)
        merge(MergeConfig(shards=shards, out=str(out), overwrite=overwrite))
    assert len(states) > 12
    expected, moving = table(out), 0
    for number, files in enumerate(states):
        copy = tmp_path / f"copy-{number}"
        for name, data in files.items():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(data)
        whole = (copy / "manifest.json").exists()
        if whole:  # the old store, or the new one: never something between
            assert len(table(copy)) == len(expected) if "merged" in read_finished(copy) else 7
        moving += not whole and any(copy.glob("part-*"))
        merge(MergeConfig(shards=shards, out=str(copy), overwrite=overwrite and whole))
        assert table(copy).equals(expected)
        assert len(rejects(copy)) == 4
        assert read_finished(copy)["counts"]["rows"] == 16
        assert not (copy / merging.BUILDING).exists()
        shutil.rmtree(copy)
    assert moving >= 3
    assert content(*shards) == before


def test_a_ready_merge_does_not_replace_what_has_come_since(tmp_path, monkeypatch):
    shards, out = write_shards(tmp_path, list(made_rows(12))), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(merging, "_move", lambda *_: None)  # killed before it
        with pytest.raises(UserError):
            merge(MergeConfig(shards=shards, out=str(out)))
    assert (out / merging.BUILDING / "manifest.json").exists()
    go_on(out, [[row(9, 9)]])
    with pytest.raises(UserError, match="holds other scores"):
        merge(MergeConfig(shards=shards, out=str(out)))
    assert len(table(out)) == 1
