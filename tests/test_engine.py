"""What a scoring run computes, says and writes, whatever its workers, batches and students: the command line."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import GptOssConfig, MambaConfig

from lark_fast.racing.outcome import RACE
from lark_fast.scoring.delta import DELTA
from lark_fast.scoring.engine import _Writer
from lark_fast.scoring.head_summary import HEAD_SUMMARY
from lark_fast.scoring.learnability import g_hat
from lark_fast.scoring.metrics import Account
from lark_fast.scoring.parts import part_files, schema
from lark_fast.scoring.precision import FP8
from lark_fast.scoring.store import read_manifest
from tests.command import STOP, make_records, run, write_jsonl, write_student
from tests.score_rows import table
from tests.templates import CHATML
from tests.tiny import byte_level_tokenizer

STATISTICS = ("nll", "brier", "entropy", "rank_mean", "rsr", "rho", "g_hat")
# The matrix product that is timed before every run, for a figure of its summary, takes longer than these runs.
QUICK = "import math, os, lark_fast.flop as f, lark_fast.packing as p; f.matmul_ceiling = lambda *_: math.nan\n"
SMALL_WINDOWS = QUICK + "p.CPU_WINDOW_FLOP = 0\n"  # of four packs


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return write_student(tmp_path_factory.mktemp("student"))


@pytest.fixture
def pool(tmp_path):
    return write_jsonl(tmp_path / "pool.jsonl", make_records(24, 4))


def words(pool, student, out, *more, dtype="float32"):
    """The words of the command; float32, so that what differs differs for a reason."""
    return ("score", "--pool", pool, "--student", student, "--out", out, "--dtype", dtype, *more)


def by_key(out):
    rows = table(out).to_pylist()
    return {(row["problem_id"], row["candidate_id"]): row for row in rows}


def close_to(out, expected, columns=STATISTICS, rel=1e-6):
    """The same rows, whatever their order, and numbers within ``rel``."""
    made, expected = by_key(out), by_key(expected)
    assert made.keys() == expected.keys()
    for column in columns:
        ours, theirs = ([np.asarray(rows[key][column]) for key in expected] for rows in (made, expected))
        # Of g_hat, which is a difference: of the size of its terms.
        np.testing.assert_allclose(np.hstack(ours), np.hstack(theirs), rtol=rel, atol=rel)


def test_workers_and_batches_change_no_score(tmp_path, forks, pool, student):
    base, quick = tmp_path / "base", {"before": SMALL_WINDOWS}
    forks.run(*words(pool, student, base, "--per-token", "--workers", 0), **quick)
    tokens = ("token_nll", "token_brier", "token_entropy", "token_rank")
    # One trajectory a pass, packs of a few, and everything in one.
    for workers, size in ((1, 2048), (3, 256), (0, 1), (0, 10**6)):
        out = tmp_path / f"{workers}-{size}"
        forks.run(*words(pool, student, out, "--per-token", "--workers", workers, "--tokens-per-batch", size), **quick)
        close_to(out, base, (*STATISTICS, *tokens))
        if size == 2048:
            assert table(out).equals(table(base)), "the same packs: bit for bit"
    # A run goes on with other packs, in the middle of a window.
    out = tmp_path / "cut"
    arguments = words(pool, student, out, "--per-token", "--tokens-per-batch", 256)
    forks.run(*arguments, code=130, before=SMALL_WINDOWS + STOP)
    assert part_files(out)
    assert list(out.glob("journal-*"))
    forks.run(*arguments[:-1], 300, code=130, before=SMALL_WINDOWS + STOP)
    forks.run(*arguments[:-1], 64, before=SMALL_WINDOWS)
    close_to(out, base, (*STATISTICS, *tokens))
    assert not list(out.glob("journal-*"))


class TestAPoolThatChanges:
    @pytest.fixture
    def begun(self, tmp_path, forks, pool, student):
        """The words of a run that was stopped, and its records."""
        arguments = words(pool, student, tmp_path / "s", "--tokens-per-batch", 256)
        forks.run(*arguments, "--limit", 40, before=SMALL_WINDOWS)
        return arguments, list(make_records(24, 4))

    def test_a_text(self, tmp_path, forks, pool, begun):
        arguments, records = begun
        before = {p.name: p.read_bytes() for p in part_files(tmp_path / "s")}
        records[21]["messages"][1]["content"] = "Something else."
        write_jsonl(pool, records)
        refused = forks.run(*arguments, code=2, before=SMALL_WINDOWS)
        assert f"lark-fast: {pool}:22: this record's text is not the one that was scored; " in refused.stderr
        assert {p.name: p.read_bytes() for p in part_files(tmp_path / "s")} == before
        forks.run(*arguments, "--overwrite", before=SMALL_WINDOWS)
        assert len(table(tmp_path / "s")) == 96

    def test_a_text_of_a_window_that_was_not_closed(self, tmp_path, forks, pool, student):
        records = list(make_records(24, 4))
        stop = (
            "from lark_fast.scoring.store import ScoreStore\n"
            "def stopped(*_): raise KeyboardInterrupt\n"
            "ScoreStore.close_window = stopped\n"
        )
        arguments = words(pool, student, tmp_path / "s", "--tokens-per-batch", 256)
        forks.run(*arguments, code=130, before=SMALL_WINDOWS + stop)
        assert not part_files(tmp_path / "s")
        records[3]["messages"][1]["content"] = "Something else."
        write_jsonl(pool, records)
        refused = forks.run(*arguments, code=2, before=SMALL_WINDOWS)
        assert f"lark-fast: {pool}:4: this record's text is not the one that was scored; " in refused.stderr

    def test_a_record_removed(self, tmp_path, forks, pool, begun):
        arguments, records = begun
        write_jsonl(pool, records[:21] + records[22:])
        done = forks.run(*arguments, before=SMALL_WINDOWS)
        assert "56 trajectories scored" in done.stdout
        assert "39 trajectories had been scored before" in done.stdout
        assert len(by_key(tmp_path / "s")) == 96

    def test_records_in_front(self, tmp_path, forks, pool, student, begun):
        arguments, records = begun
        more = [{**record, "problem_id": 100 + record["problem_id"]} for record in records[:9]]
        write_jsonl(pool, more + records)
        done = forks.run(*arguments, before=SMALL_WINDOWS)
        assert "65 trajectories scored" in done.stdout
        assert "40 trajectories had been scored before" in done.stdout
        forks.run(*words(pool, student, tmp_path / "once"), before=QUICK)
        close_to(tmp_path / "s", tmp_path / "once")

    def test_a_new_teacher(self, tmp_path, forks, student):
        """In a file behind: only its records are scored, and g_hat is renewed where they are."""
        inputs, out = tmp_path / "pool", tmp_path / "s"
        inputs.mkdir()
        records = list(make_records(40, 4))
        write_jsonl(inputs / "a.jsonl", [r for r in records if r["candidate_id"] < 3])
        arguments = words(inputs, student, out, "--tokens-per-batch", 256)
        forks.run(*arguments, before=SMALL_WINDOWS)
        before = {p.name: p.read_bytes() for p in part_files(out)}
        assert len(before) > 4
        write_jsonl(inputs / "b.jsonl", [r for r in records if r["candidate_id"] == 3 and r["problem_id"] < 5])
        done = forks.run(*arguments, before=SMALL_WINDOWS)
        assert "5 trajectories scored" in done.stdout
        after = {p.name: p.read_bytes() for p in part_files(out)}
        problems = {p.name: set(pq.read_table(p)["problem_id"].to_pylist()) for p in part_files(out)}
        touched = {name for name, own in problems.items() if own & set("01234")}
        assert {name for name in after if after[name] != before.get(name)} == touched
        assert 1 < len(touched) < len(after) - 2
        rows = by_key(out).values()
        expected = g_hat([r["nll"] for r in rows], [r["brier"] for r in rows], [r["problem_id"] for r in rows])
        np.testing.assert_allclose([r["g_hat"] for r in rows], expected, rtol=1e-12)
        forks.run(*words(inputs, student, tmp_path / "once"), before=QUICK)
        close_to(out, tmp_path / "once")


class TestAStoreThatWasBegun:
    def test_by_the_previous_release(self, tmp_path, forks, pool, student):
        """Format 1 as 0.0 left it: raw parts and a manifest; no journal, no lock, no metrics."""
        once, out = tmp_path / "once", tmp_path / "s"
        forks.run(*words(pool, student, once, "--tokens-per-batch", 256), before=SMALL_WINDOWS)
        out.mkdir()
        raw = schema(top_k=None)
        for part in part_files(once)[:2]:
            pq.write_table(pq.read_table(part).select(raw.names).cast(raw), out / part.name, compression="zstd")
        identity = {
            "student": read_manifest(once)["identity"]["student"],
            "tokenizer": read_manifest(once)["identity"]["tokenizer"],
            "template": read_manifest(once)["identity"]["template"],
            "dtype": "float32",
            "top_k": None,
            "per_token": False,
            "span": "turn",
            "render": "template",
            "system": "keep",
            "last_turn_only": False,
            "long": "truncate",
            "max_length": 512,
        }
        manifest = {"format": 1, "complete": False, "brier": "brier", "identity": identity}
        (out / "manifest.json").write_text(json.dumps(manifest))
        (out / "rejected.jsonl").write_text("")
        done = forks.run(*words(pool, student, out, "--tokens-per-batch", 256, dtype="auto"), before=SMALL_WINDOWS)
        assert "trajectories had been scored before" in done.stdout
        assert table(out).equals(table(once))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_goes_on_in_its_own_dtype(self, tmp_path, forks, pool, student, dtype):
        out = tmp_path / "s"
        forks.run(*words(pool, student, out, "--limit", 5, dtype=dtype), before=QUICK)
        done = forks.run(*words(pool, student, out, dtype="auto"), before=QUICK)
        assert read_manifest(out)["identity"]["dtype"] == dtype
        assert "91 trajectories scored" in done.stdout
        assert "bfloat16" not in done.stderr
        other = "bfloat16" if dtype == "float32" else "float32"
        refused = forks.run(*words(pool, student, out, dtype=other), before=QUICK, code=2)
        assert f"dtype was '{dtype}', is '{other}'" in refused.stderr


COUNTS = {"records": 98, "scored": 96, "kept": 0, "rejected": 2, "truncated": 0}
# As README and ``ScoreSummary.as_json`` have them.
RUN = {"out", "complete", "dry_run", "first_rejects", "rows", "problems", "not_finite", *COUNTS}
RUN |= {f"paired_{name}" for name in DELTA}  # None: this is one student
RUN |= {f"race_{name}" for name in RACE}  # None: nobody races
RUN |= {f"sample_{name}" for name in HEAD_SUMMARY}  # None: all positions are read
RUN |= {f"fp8_{name}" for name in FP8}  # None: it is not in FP8
ACCOUNT = {
    *("seconds", "device_seconds", "waiting_seconds", "render_seconds", "write_seconds", "finish_seconds"),
    *("rendered_tokens", "local_tokens", "passed_tokens", "head_tokens", "devices"),
    *("input_tokens", "scored_tokens", "padded_tokens", "packs", "out_of_memory", "lost_processes", "forward_flop"),
    *("tokens_per_second", "matmul_flop_per_second", "ceiling_share", "device_busy_share"),
    *("rendered_tokens_per_second", "writing_share", "padding_share"),
}


@pytest.fixture
def pool_with_rejects(tmp_path):
    records = [*make_records(24, 4), {"messages": "broken"}, {"messages": [{"role": "\x1b[31m", "content": "x"}]}]
    return write_jsonl(tmp_path / "pool.jsonl", records)


def test_json_is_all_there_is_on_stdout(tmp_path, forks, pool_with_rejects, student):
    out = tmp_path / "s"
    arguments = words(pool_with_rejects, student, out, "--json")
    done = run(*arguments, "--workers", 1)  # no fork: what Transformers or a worker may print at its start counts too
    first = json.loads(done.stdout)
    estimated = {name for name in first if name.startswith("estimated_")}
    assert first.keys() == RUN | ACCOUNT | estimated
    assert {name: first[name] for name in COUNTS} == COUNTS
    assert [first[name] for name in ("out", "complete", "dry_run", "rows", "problems")] == [
        str(out),
        True,
        False,
        96,
        24,
    ]
    assert [line.split(": ")[0] for line in first["first_rejects"]] == [f"{pool_with_rejects}:{n}" for n in (97, 98)]
    assert all(first[name] is None for name in estimated)
    assert first["matmul_flop_per_second"] > 1e6
    assert 0 < first["ceiling_share"] < 1
    assert "scoring: 100%" in done.stderr
    assert "2 rejected" in done.stderr
    again = json.loads(forks.run(*arguments, before=QUICK).stdout)
    assert again.keys() == first.keys()
    assert (again["scored"], again["kept"], again["rows"]) == (0, 96, 96)
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(line["run"], line["end"], line["scored"], line["kept"]) for line in metrics if line["end"]] == [
        (1, True, 96, 0),
        (2, True, 0, 96),
    ]
    assert all(line.keys() > ACCOUNT for line in metrics)
    # What a dry run says beside them, and that it leaves no trace: of a new directory, and of one that has everything.
    for where, left in ((tmp_path / "none", 96), (out, 0)):
        before = sorted((p, p.stat().st_mtime_ns, p.read_bytes()) for p in where.glob("*"))
        done = forks.run(*words(pool_with_rejects, student, where, "--json", "--dry-run"))
        dry = json.loads(done.stdout)
        assert dry.keys() == first.keys()
        assert (dry["dry_run"], dry["complete"], dry["rejected"], dry["rows"]) == (True, False, 2, 0)
        assert (dry["scored"], dry["kept"]) == (left, 96 - left)
        assert dry["tokens_per_second"] is None  # nothing has been scored
        if left:
            assert dry["input_tokens"] == first["input_tokens"]
            assert dry["scored_tokens"] == first["scored_tokens"]
            assert all(dry[name] is not None for name in estimated), dry
        assert sorted((p, p.stat().st_mtime_ns, p.read_bytes()) for p in where.glob("*")) == before
    assert not (tmp_path / "none").exists()
    done = forks.run(*words(pool_with_rejects, student, tmp_path / "none", "--dry-run", "--engine", "ray"))
    assert "the estimate is of one device of this machine; a dry run asks no cluster" in done.stderr
    told = done.stdout
    assert f"96 of 98 records can be scored: {first['input_tokens']:,} tokens" in told
    for what in ("time: about ", "memory: about ", "disk: about "):
        assert what in told
    assert "\x1b" not in told


def write_model(directory, config):
    """A checkpoint of a model that ``tests.tiny`` does not have."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer(CHATML)
    config.vocab_size = len(tokenizer)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", ["mamba", "gpt_oss"])
def test_a_model_that_cannot_be_packed_says_so_once(tmp_path, forks, pool, kind):
    if kind == "mamba":
        config = MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=400)
    else:
        config = GptOssConfig(
            **dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8),
            **dict(num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, vocab_size=400),
            **dict(pad_token_id=None, eos_token_id=None, sliding_window=16),
        )
    student = write_model(tmp_path / kind, config)
    done = forks.run(*words(pool, student, tmp_path / "s", "--tokens-per-batch", 256, "--json"), before=SMALL_WINDOWS)
    assert done.stderr.count("trajectories are scored in padded batches") == 1
    summary = json.loads(done.stdout)
    assert summary["scored"] == 96
    assert summary["padded_tokens"] > 0
    forks.run(*words(pool, student, tmp_path / "alone", "--tokens-per-batch", 1), before=QUICK)
    close_to(tmp_path / "s", tmp_path / "alone", rel=1e-5)


def test_what_the_memory_cannot_hold_is_a_reject(tmp_path, forks, pool, student):
    """Passes of more than 150 tokens find no room: packs are halved, and what is longer by itself is left out."""
    short = """
from lark_fast.scoring.forward import Passes
launch = Passes._launch
def _launch(self, batch):
    if batch.n_tokens > 150:
        raise MemoryError
    return launch(self, batch)
Passes._launch = _launch
"""
    long = {"role": "assistant", "content": "It is a long answer. " * 20}
    records = list(make_records(24, 4))
    for at in (5, 50):
        records[at]["messages"][1] = long
    write_jsonl(pool, records)
    out, arguments = tmp_path / "s", ("--tokens-per-batch", 256, "--json")
    for scored in (94, 0):  # it is tried again: the next machine may be a larger one
        done = json.loads(forks.run(*words(pool, student, out, *arguments), before=SMALL_WINDOWS + short).stdout)
        assert (done["scored"], done["rejected"], done["complete"], done["rows"]) == (scored, 2, True, 94)
        rejects = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
        assert [(r["source"], r["line"]) for r in rejects] == [(str(pool), 6), (str(pool), 51)]
        assert all("tokens do not fit into the device's memory" in r["reason"] for r in rejects)
        assert done["out_of_memory"] > 0 or not scored
    assert (
        "(--strict)"
        in forks.run(
            *words(pool, student, tmp_path / "strict", *arguments, "--strict"), before=SMALL_WINDOWS + short, code=2
        ).stderr
    )
    done = json.loads(forks.run(*words(pool, student, out, *arguments), before=SMALL_WINDOWS).stdout)
    assert (done["scored"], done["rejected"], done["rows"]) == (2, 0, 96)
    forks.run(*words(pool, student, tmp_path / "once"), before=QUICK)
    close_to(out, tmp_path / "once")


def peak_bytes(forks, student, directory, records):
    """The most memory that a run over so many records has held."""
    answers = ("Yes.", "No.", "It is 4.")
    made = (
        {
            "problem_id": i // 3,
            "candidate_id": i,
            "messages": [{"role": "user", "content": f"{i // 3}?"}, {"role": "assistant", "content": answers[i % 3]}],
        }
        for i in range(records)
    )
    pool = write_jsonl(directory / f"{records}.jsonl", made)
    peak = directory / f"{records}.peak"
    # One arena and no pool of Arrow's own: what allocators keep back is 10 MB, more or less, from run to run.
    before = f"""
import atexit, ctypes, pathlib, pyarrow, lark_fast.scoring.finishing as finishing
pyarrow.set_memory_pool(pyarrow.system_memory_pool())
M_ARENA_MAX, M_MMAP_THRESHOLD = -8, -3
[ctypes.CDLL(None).mallopt(*setting) for setting in ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, 1 << 16))]
def peak():
    line = next(l for l in open("/proc/self/status") if l.startswith("VmHWM"))
    pathlib.Path({str(peak)!r}).write_text(line.split()[1])
atexit.register(peak)
finishing.GROUP_ROWS = 2000  # not a million: below it the last step holds all rows, by design
"""
    arguments = words(pool, student, directory / f"{records}", "--tokens-per-batch", 2048, "--workers", 0)
    forks.run(*arguments, before=SMALL_WINDOWS + before)
    assert len(part_files(directory / f"{records}")) > records // 1000
    return 1024 * int(peak.read_text())


def test_memory_does_not_grow_with_the_pool(tmp_path, forks):
    smallest = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    student = write_student(tmp_path / "student", **smallest)
    few, many = 2000, 20_000
    peaks = [peak_bytes(forks, student, tmp_path, n) for n in (few, many)]
    # The first windows leave some 3 MB with the allocator, once: from 20,000 records to 60,000 it is 41 bytes a record.
    # Rows or trajectories that were kept would be 10 MB and more.
    assert peaks[1] - peaks[0] < 64 * (many - few) + (4 << 20), peaks


def test_nothing_is_written_behind_a_write_that_failed():
    # The disk may have room again for what is smaller, and then rows of the next window would be in this one.
    written = []

    def write(name):
        if name == "fails":
            raise OSError(28, "No space left on device")
        written.append(name)

    with ThreadPoolExecutor(1) as thread:
        started = threading.Event()
        thread.submit(started.wait)  # so that all calls are queued before the first is made
        writer = _Writer(thread, Account())
        for name in ("first", "fails", "behind"):
            writer.submit(write, name)
        started.set()
        with pytest.raises(OSError, match="No space"):
            writer.wait()
    assert written == ["first"]
