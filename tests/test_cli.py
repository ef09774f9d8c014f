"""The command line as a user meets it: exit codes, one clear line, what is written."""

import json
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lark_fast.scoring.store import part_files, read_manifest
from tests.command import ENVIRONMENT, make_records, run, write_jsonl, write_student
from tests.templates import GEMMA2
from tests.tiny import byte_level_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return write_student(tmp_path_factory.mktemp("student"))


@pytest.fixture
def pool(tmp_path):
    return write_jsonl(tmp_path / "pool.jsonl", make_records(6))


def test_score_select_train(tmp_path, pool, student, forks):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", list(make_records(9))[18:])
    scored = run("score", "--pool", pool, "--student", student, "--out", tmp_path / "s", "--top-k", 50)
    assert "18 trajectories of 6 problems" in scored.stdout
    forks.run("select", "--scores", tmp_path / "s", "--pool", pool, "--out", tmp_path / "c", "--budget", 2)
    rows = [json.loads(line) for line in (tmp_path / "c" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    for problem in range(6):
        assert sum(r["weight"] for r in rows if r["meta"]["problem_id"] == problem) == pytest.approx(1)
    trained = forks.run(
        *("train", "--data", tmp_path / "c" / "train.jsonl", "--student", student, "--out", tmp_path / "k"),
        *("--eval-data", held_out, "--epochs", 4, "--lr", 3e-3, "--global-batch", 4),
    )
    metrics = [json.loads(line) for line in (tmp_path / "k" / "metrics.jsonl").read_text().splitlines()]
    steps = [m for m in metrics if "loss" in m]
    assert len(steps) == 12
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert "held-out" in trained.stdout
    assert (tmp_path / "k" / "loss.png").stat().st_size > 1000
    # A checkpoint is a student.
    forks.run("score", "--pool", pool, "--student", tmp_path / "k", "--out", tmp_path / "s2")
    assert read_manifest(tmp_path / "s2")["identity"]["student"] != read_manifest(tmp_path / "s")["identity"]["student"]


def test_again_is_at_once_and_changes_nothing(tmp_path, pool, student, forks):
    arguments = ("score", "--pool", pool, "--student", student, "--out", tmp_path / "s")
    forks.run(*arguments)
    before = [part.read_bytes() for part in part_files(tmp_path / "s")]
    again = forks.run(*arguments)
    assert "18 trajectories had been scored before and were kept" in again.stdout
    assert [part.read_bytes() for part in part_files(tmp_path / "s")] == before
    other = forks.run(
        "score", "--pool", pool, "--student", student, "--out", tmp_path / "s", "--span", "content", code=2
    )
    assert "span was 'turn', is 'content'" in other.stderr
    write_student(tmp_path / "other", seed=1)
    other = forks.run("score", "--pool", pool, "--student", tmp_path / "other", "--out", tmp_path / "s", code=2)
    assert "student was" in other.stderr


def test_what_the_student_cannot_read_is_cut_and_said(tmp_path, pool, forks):
    student = write_student(tmp_path / "student", max_position_embeddings=60)
    arguments = ("score", "--pool", pool, "--student", student)
    cut = forks.run(*arguments, "--out", tmp_path / "cut")
    assert cut.stderr.count("cut at the student's 60 positions") == 1
    rows = pq.read_table(part_files(tmp_path / "cut")).to_pydict()
    assert max(rows["n_input_tokens"]) == 60
    assert f"{sum(rows['truncated'])} trajectories were longer" in cut.stdout
    asked = forks.run(*arguments, "--out", tmp_path / "asked", "--max-length", 50)
    assert "positions" not in asked.stderr
    left = forks.run(*arguments, "--out", tmp_path / "left", "--long", "reject")
    assert f"{sum(rows['truncated'])} of 18 records rejected" in left.stdout


def test_rejects_are_counted_named_and_listed(tmp_path, student, forks):
    records = list(make_records(2))
    lines = [json.dumps(r) for r in records]
    lines.insert(2, '{"messages": [')
    lines.append(json.dumps(records[0]))
    pool = tmp_path / "pool.jsonl"
    pool.write_text("\n".join(lines))
    arguments = ("score", "--pool", pool, "--student", student, "--out", tmp_path / "s")
    done = forks.run(*arguments)
    assert "2 of 8 records rejected" in done.stdout
    rejects = [json.loads(line) for line in (tmp_path / "s" / "rejected.jsonl").read_text().splitlines()]
    assert [(r["source"], r["line"]) for r in rejects] == [(str(pool), 3), (str(pool), 8)]
    assert "duplicate" in rejects[1]["reason"]
    strict = forks.run(*arguments, "--overwrite", "--strict", code=2)
    assert f"{pool}:3: " in strict.stderr
    assert len(strict.stderr.strip().splitlines()[-1]) < 500


def test_nothing_to_score_is_3(tmp_path, student, forks):
    pool = tmp_path / "pool.jsonl"
    pool.write_text("not json\n")
    forks.run("score", "--pool", pool, "--student", student, "--out", tmp_path / "s", code=3)


def test_limit_then_the_rest(tmp_path, pool, student, forks):
    arguments = ("score", "--pool", pool, "--student", student, "--out", tmp_path / "s")
    assert "5 trajectories" in forks.run(*arguments, "--limit", 5).stdout
    assert "13 trajectories scored" in forks.run(*arguments).stdout


def test_per_token_and_export(tmp_path, pool, student, forks):
    forks.run(
        *("score", "--pool", pool, "--student", student, "--out", tmp_path / "s"),
        *("--per-token", "--export", "lark-json", "--top-k", 50),
    )
    row = pq.read_table(part_files(tmp_path / "s")[0]).to_pylist()[0]
    assert len(row["token_nll"]) == len(row["token_rank"]) == row["n_tokens"]
    assert sum(row["token_nll"]) / row["n_tokens"] == pytest.approx(row["nll"], rel=1e-5)
    made = json.loads((tmp_path / "s" / "lark_ghat.json").read_text())
    assert (made["method"], made["top_k"], made["n_problems"], made["n_scored"]) == ("lark_ghat", 50, 6, 18)
    first = made["scores"]["0"][0]
    assert first == {
        "candidate_id": 0,
        "teacher": "teacher-0",
        "L": row["nll"],
        "Brier": row["brier_topk"],
        "rho": row["rho"],
        "g_hat": row["g_hat"],
    }


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--pool": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"--student": "nowhere"}, "nowhere"),
        ({"--student": "/"}, "config.json"),
        ({"--device": "cuda:77"}, "cuda:77"),
        ({"--dtype": "int3"}, "int3"),
        ({"--chat-template": "/no/file"}, "/no/file"),
        ({"--tokens-per-batch": "many"}, "tokens-per-batch"),
        ({"--top-k": "0"}, "top-k"),
        ({"--out": "/proc/scores"}, "/proc/scores"),
    ],
)
def test_bad_usage_is_one_line_and_2(tmp_path, pool, student, change, says, forks):
    options = {"--pool": pool, "--student": student, "--out": tmp_path / "s"} | change
    assert says in forks.run("score", *(word for pair in options.items() for word in pair), code=2).stderr


def test_a_template_at_fault_stops_before_anything_is_spent(tmp_path, pool, forks):
    tokenizer = byte_level_tokenizer(GEMMA2, special=("<start_of_turn>", "<end_of_turn>"), bos="<bos>", eos="<eos>")
    student = write_student(tmp_path / "gemma", tokenizer=tokenizer)
    told = [{"role": "system", "content": "Be brief."}, *next(make_records(1))["messages"]]
    pool = write_jsonl(tmp_path / "pool.jsonl", [{"messages": told}])
    arguments = ("score", "--pool", pool, "--student", student, "--out", tmp_path / "s")
    refused = forks.run(*arguments, code=2)
    assert f"{pool}:1: " in refused.stderr
    assert "--system" in refused.stderr
    forks.run(*arguments, "--system", "merge")


def test_a_broken_checkpoint_is_one_line(tmp_path, pool, student, forks):
    broken = tmp_path / "broken"
    tiny_llama().save_pretrained(broken)
    (broken / "model.safetensors").write_bytes(b"torn")
    assert (
        "cannot be loaded"
        in forks.run(*("score", "--pool", pool, "--student", broken, "--out", tmp_path / "s"), code=2).stderr
    )


def test_a_thousand_mutated_lines_are_rows_or_rejects(tmp_path, student, forks):
    rng = random.Random(5)
    lines = [json.dumps(r).encode() for r in make_records(400, 3)][:1000]

    def mutate(line):
        line = bytearray(line)
        kind = rng.randrange(7)
        if kind == 0:
            for _ in range(rng.randint(1, 6)):
                line[rng.randrange(len(line))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del line[rng.randrange(len(line)) :]
        elif kind == 2:
            line = line.replace(b'"content": "', b'"content": [' + b"[" * rng.randint(1, 3000), 1)
        elif kind == 3:
            line = line.replace(b'"problem_id": ', b'"problem_id": ' + b"9" * rng.randint(1, 6000), 1)
        elif kind == 4:
            line = line.replace(b"answer", rng.choice([b"\\ud800", b"\\u0000", b"\xff\xfe", b"\x1b[31m"]), 1)
        elif kind == 5:
            line = rng.choice([b"null", b"[]", b"3", b'"x"', b'{"messages": {}}', b"{" * 5000, b"[" * 100_000])
        return bytes(line).replace(b"\n", b" ") or b"x"

    mutated = [mutate(line) for line in lines]
    pool = tmp_path / "pool.jsonl"
    pool.write_bytes(b"\n".join(mutated) + b"\n")
    forks.run("score", "--pool", pool, "--student", student, "--out", tmp_path / "s")
    physical = sum(1 for line in mutated if line.strip())
    counts = read_manifest(tmp_path / "s")["counts"]
    assert counts["rows"] + counts["rejected"] == counts["records"] == physical
    assert counts["rejected"] > 300
    assert len((tmp_path / "s" / "rejected.jsonl").read_text().splitlines()) == counts["rejected"]


def test_pool_text_never_acts_on_the_terminal(tmp_path, student, forks):
    pool = tmp_path / "pool.jsonl"
    pool.write_text(json.dumps({"messages": [{"role": "\x1b]0;owned\x07", "content": "[red]x[/red]"}]}) + "\n")
    done = forks.run("score", "--pool", pool, "--student", student, "--out", tmp_path / "s", code=3)
    assert "\x1b" not in done.stdout + done.stderr


def test_inspect(pool, student, forks):
    done = forks.run("inspect", "--pool", pool, "--student", student, "--record", 2)
    assert "scored" in done.stdout
    assert "<|im_end|>" in done.stdout


def test_help_is_instant():
    # What makes a command slow to start is importing torch and transformers: --help must not.
    program = (
        "import sys; sys.argv = ['lark-fast', 'score', '--help']\n"
        "from lark_fast.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'pyarrow', 'numpy', 'matplotlib', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    assert "--max-length" in done.stdout


def test_nothing_of_somebody_elses_is_thrown_away(tmp_path, student, forks):
    records = write_jsonl(tmp_path / "pool.jsonl", make_records(2))
    pool = tmp_path / "pd"
    pool.mkdir()
    table = pa.Table.from_pylist([json.loads(line) for line in records.read_text().splitlines()])
    pq.write_table(table, pool / "part-00000.parquet")
    for out in (pool, pool / "scores"):
        done = forks.run("score", "--pool", pool, "--student", student, "--out", out, "--overwrite", code=2)
        assert "give another directory" in done.stderr
    other = tmp_path / "other"
    other.mkdir()
    (other / "part-00000.parquet").write_bytes(b"theirs")
    (other / "notes.tmp").write_bytes(b"theirs too")
    done = forks.run("score", "--pool", pool, "--student", student, "--out", other, "--overwrite", code=2)
    assert "no manifest.json" in done.stderr
    assert sorted(path.name for path in other.iterdir()) == ["notes.tmp", "part-00000.parquet"]
    done = forks.run("select", "--scores", other, "--pool", pool, "--out", pool / "selection", code=2)
    assert "give another directory" in done.stderr


def test_a_damaged_store_is_one_line(tmp_path, pool, student, forks):
    arguments = ("score", "--pool", pool, "--student", student, "--out", tmp_path / "s")
    forks.run(*arguments, "--export", "lark-json")
    (part,) = part_files(tmp_path / "s")
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in forks.run(*arguments, code=2).stderr
    part.write_bytes(whole)
    (tmp_path / "s" / "manifest.json").write_text('{"format": 1}')
    assert "not a manifest" in forks.run(*arguments, code=2).stderr


def test_an_export_does_not_outlive_its_scores(tmp_path, pool, student, forks):
    arguments = ("score", "--pool", pool, "--student", student, "--out", tmp_path / "s")
    forks.run(*arguments, "--limit", 4, "--export", "lark-json")
    assert (tmp_path / "s" / "lark_ghat.json").exists()
    forks.run(*arguments)
    assert not (tmp_path / "s" / "lark_ghat.json").exists()


def test_errors_cannot_act_on_the_terminal(tmp_path, student, forks):
    pool = tmp_path / "a\x1b[31mred.jsonl"
    pool.write_text("{\n")
    done = forks.run("score", "--pool", pool, "--student", student, "--out", tmp_path / "s", "--strict", code=2)
    assert "\x1b" not in done.stderr
    assert "\\x1b[31mred.jsonl:1" in done.stderr


def test_inspect_cuts_where_score_does(tmp_path, pool, forks):
    student = write_student(tmp_path / "student", max_position_embeddings=30)
    assert "30 tokens" in forks.run("inspect", "--pool", pool, "--student", student, "--record", 17).stdout
