"""lark-fast in the place of other programs: their flags, their files, their numbers."""

import io
import json
import math
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import pandas as pd
import pytest

import lark_fast.flop
from lark_fast.__main__ import main
from lark_fast.dropins.rsr_files import Begun
from lark_fast.packing import WINDOW_TOKENS, windows
from lark_fast.student import load_student
from tests.command import make_records, write_jsonl, write_student
from tests.eager import eager_g_hat, eager_rsr, eager_scores

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def lark_fast_command(monkeypatch):
    """The program in this process, which has imported all it needs; exit code and the absence of tracebacks checked."""
    # The matrix product that is timed before every run takes longer than these runs.
    monkeypatch.setattr(lark_fast.flop, "matmul_ceiling", lambda *_: math.nan)

    def run(*words, code=0):
        monkeypatch.setattr(sys, "argv", ["lark-fast", *map(str, words)])
        stdout, stderr = io.StringIO(), io.StringIO()
        with redirect_stdout(stdout), redirect_stderr(stderr), pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code, f"{stdout.getvalue()}\n{stderr.getvalue()}"
        return SimpleNamespace(stdout=stdout.getvalue(), stderr=stderr.getvalue())

    return run


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return write_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def loaded(student):
    return load_student(str(student), dtype="float32")


def talk(*contents):
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def close(ours, theirs, rel, atol=0.0):
    """Two lines of a file: the same keys in the same order, the same names and counts, and numbers within ``rel``."""
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert type(ours[name]) is type(value)
        assert ours[name] == (pytest.approx(value, rel=rel, abs=atol) if isinstance(value, float) else value), name


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class TestScoreLark:
    def lark(self, command, pool, output, student, *more, code=0):
        flags = ("--input", pool, "--output", output, "--student_model", student, "--dtype", "float32", *more)
        return command("score-lark", *flags, code=code)

    def expected(self, loaded, records, name, top_k, max_length):
        """What the released scorer makes of them, by its own formulas."""
        problems, scored = {}, 0
        for record in records:
            ids, prompt = (
                loaded.tokenizer(loaded.tokenizer.apply_chat_template(turns, tokenize=False, **how)).input_ids
                for turns, how in (
                    (record["messages"], {}),
                    (record["messages"][:-1], {"add_generation_prompt": True}),
                )
            )
            ids = ids[:max_length]
            if len(prompt) >= len(ids) - 1:
                continue
            scored += 1
            nll, brier = eager_scores(loaded.model, ids, len(prompt), top_k)
            rows = problems.setdefault(record["problem_id"], [])
            row = {"candidate_id": record.get("candidate_id", len(rows)), "teacher": record.get("teacher", "")}
            rows.append(row | {"L": nll, "Brier": brier})
        for rows in problems.values():
            for row, value in zip(rows, eager_g_hat(*([r[n] for r in rows] for n in ("L", "Brier"))), strict=True):
                row |= {"rho": row["Brier"] / row["L"], "g_hat": value}
        head = {"method": "lark_ghat", "student_model": str(name), "top_k": top_k, "n_problems": len(problems)}
        scores = {str(problem): rows for problem, rows in sorted(problems.items())}
        return head | {"n_scored": scored, "n_skipped": len(records) - scored, "scores": scores}

    def agree(self, path, expected):
        made = json.loads(path.read_text())
        assert path.read_text() == json.dumps(made, ensure_ascii=False, indent=2)
        assert list(made) == list(expected)
        assert {n: v for n, v in made.items() if n != "scores"} == {n: v for n, v in expected.items() if n != "scores"}
        assert list(made["scores"]) == list(expected["scores"])
        for problem, rows in expected["scores"].items():
            for ours, theirs in zip(made["scores"][problem], rows, strict=True):
                close(ours, theirs, rel=2e-6, atol=2e-6)  # g_hat is a difference: of the size of its terms

    def test_writes_what_the_released_scorer_writes(self, lark_fast_command, student, loaded, tmp_path):
        records = list(make_records(12))
        records = records[20:] + records[:20]  # problems in no order, and one in two places
        long = {"role": "user", "content": "Let me check that the sum is right. " * 30}
        records[4]["messages"][0] = long  # nothing of the answer is left
        records[8]["messages"][1]["content"] = "Größe — 数" + "It is 4. " * 60  # cut
        for record in (records[3], records[4], records[5], records[7]):
            del record["candidate_id"]
        del records[6]["teacher"]
        records[9]["messages"][1] = records[10]["messages"][1]
        pool = write_jsonl(tmp_path / "pool.jsonl", records)
        output = tmp_path / "new" / "folder" / "lark.json"
        flags = ("--top_k", 7, "--max_length", 120, "--batch_size", 3, "--device", "cuda")
        done = self.lark(lark_fast_command, pool, output, student, *flags)
        expected = self.expected(loaded, records, student, 7, 120)
        assert (expected["n_scored"], expected["n_skipped"]) == (35, 1)
        self.agree(output, expected)
        assert f"{output}: written" in done.stdout
        # The pool has grown: only the new is scored. Dashes in flags are underscores.
        more = make_records(13)
        records += [record for record in more if record["problem_id"] == 12]
        write_jsonl(pool, records)
        again = self.lark(lark_fast_command, pool, output, student, *(str(flag).replace("_", "-") for flag in flags))
        assert "3 trajectories scored" in again.stdout
        self.agree(output, self.expected(loaded, records, student, 7, 120))
        other = self.lark(lark_fast_command, pool, output, student, code=2)
        assert f"--output {output}.scores: holds scores made otherwise (top_k was 7, is 50" in other.stderr

    def test_names_and_what_cannot_be_used(self, lark_fast_command, student, loaded, tmp_path):
        records = [record | {"problem_id": f"p{record['problem_id']}"} for record in make_records(11, 2)]
        twice = records[3] | {"messages": talk("What is two?", "It is 4.")}
        empty = records[3] | {"candidate_id": "empty", "messages": talk("What is two?", "")}
        lines = [json.dumps(record) for record in [*records, twice, empty]]
        pool = tmp_path / "pool.jsonl"
        pool.write_text("\n\n".join([*lines[:4], "{", '{"problem_id": 1}', *lines[4:]]))
        self.lark(lark_fast_command, pool, tmp_path / "lark.json", student)
        expected = self.expected(loaded, records, student, 50, 32768) | {"n_skipped": 4}
        self.agree(tmp_path / "lark.json", expected)
        assert list(expected["scores"])[:3] == ["p0", "p1", "p10"]
        assert len(read_lines(tmp_path / "lark.json.scores" / "rejected.jsonl")) == 4

    def test_bad_input_is_one_line(self, lark_fast_command, student, tmp_path):
        pool = write_jsonl(tmp_path / "pool.jsonl", make_records(2))
        output, nothing = tmp_path / "lark.json", tmp_path / "nothing.jsonl"
        nothing.write_text("\n")
        (tmp_path / "folder").mkdir()
        for arguments, said in (
            ((tmp_path / "no.jsonl", output, student), "no.jsonl"),
            ((nothing, output, student), f"--input {nothing}: holds no record"),
            ((pool, pool, student), f"--output {pool}: holds --input {pool}"),
            ((pool, tmp_path / "folder", student), "is a directory; name the file"),
            ((pool, nothing / "lark.json", student), f"--output {nothing / 'lark.json'}.scores: cannot be written to"),
            ((pool, output, tmp_path / "nobody"), f"{tmp_path / 'nobody'}: no such directory"),
            ((pool, output, student, "--dtype", "int8"), "int8"),
            ((pool, output, student, "--B", 3), "No such option: --B"),
        ):
            refused = self.lark(lark_fast_command, *arguments, code=2)
            assert said in " ".join(refused.stderr.split())
            assert not output.exists()
        bad = write_jsonl(tmp_path / "bad.jsonl", [{"problem_id": 1}])
        self.lark(lark_fast_command, bad, output, student, code=3)
        assert json.loads(output.read_text())["n_skipped"] == 1


SAMPLES = [
    {"id": 5, "messages": talk("How many apples?", "She has 9 apples, so the answer is 9.")},
    {"_id": 7, "messages": talk("How many apples?", "9", "Are you sure?", "Two and two is four.")},
    {"text": "not a conversation"},
    {"messages": talk("How many apples?")},
    {"messages": talk("Größe?", "数 the answer is 42. " * 12)},
    {"messages": talk("How many apples?", "")},
]


class TestRsrMetrics:
    def rsr(self, command, data, out, student, *more, code=0, root=None):
        flags = {"model_path": student, "model_name": "tiny", "data_root": root or data, "data_path": data}
        words = [f"--{name}={value}" for name, value in (flags | {"output_root": out, "dtype": "float32"}).items()]
        return command("rsr-metrics", *words, *more, code=code)

    def expected(self, loaded, samples, clip, limit):
        """Inference results and metrics as the released program has them, by its own formulas."""
        ours, end = [loaded.tokenizer(text)["input_ids"] for text in ("<|im_start|>assistant\n", "<|im_end|>")]
        results, metrics = [], []
        for index, sample in enumerate(samples):
            if "messages" not in sample:
                continue
            ids = loaded.tokenizer.apply_chat_template(sample["messages"], return_dict=False)[:limit]
            places, inside = [], False
            for place in range(len(ids)):
                if ids[place - len(ours) : place] == ours:
                    inside = True
                inside = inside and ids[place : place + 1] != end
                places += [place] * inside
            if not places:
                continue
            nlls, probabilities, ranks = eager_rsr(loaded.model, ids, places, clip)
            name = sample.get("id", sample.get("_id", index))
            results.append((name, places, probabilities, nlls, ranks))
            metrics.append(
                {
                    "sample_id": name,
                    "resp_token_length": len(places),
                    "avg_rank_clip": sum(ranks) / len(ranks),
                    "avg_surprisal": sum(nlls) / len(nlls),
                    "rank_surprisal_ratio": sum(ranks) / sum(nlls),
                }
            )
        return results, metrics

    def agree(self, made, expected):
        for ours, theirs in zip(made, expected, strict=True):
            close(ours, theirs, rel=1e-6)

    def test_writes_what_the_released_program_writes(self, lark_fast_command, student, loaded, tmp_path):
        data, out = tmp_path / "data", tmp_path / "out"
        (data / "deep").mkdir(parents=True)
        (data / "a.json").write_text(json.dumps(SAMPLES))
        (data / "deep" / "b.x.jsonl").write_text("".join(json.dumps(sample) + "\n\n" for sample in SAMPLES[3::-1]))
        (data / "not.txt").write_text("{")
        limits = ("--rank_clip_r=50", "--max_model_len=60")
        unused = ("--batch_size=3", "--tag=", "--filter_file_suffix=", "--use_flash_attn", "--media_root=x")
        done = self.rsr(lark_fast_command, data, out, student, *limits, *unused)
        files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
        folders = ("_inferred_data/tiny", "_sample_metrics/tiny")
        expected_files = {f"{folders[0]}/{name}.parquet" for name in ("a", "deep/b.x")}
        expected_files |= {f"{folders[1]}/{name}.jsonl" for name in ("a", "deep/b.x")}
        assert files == expected_files | {"rsr_tiny.tsv"}
        lines = {}
        for name, samples in (("a", SAMPLES), ("deep/b.x", SAMPLES[3::-1])):
            results, lines[name] = self.expected(loaded, samples, 50, 60)
            self.agree(read_lines(out / folders[1] / f"{name}.jsonl"), lines[name])
            table = pd.read_parquet(out / folders[0] / f"{name}.parquet")
            assert list(table) == ["sample_id", "resp_token_positions", "probs", "nlls", "ranks"]
            for row, (sample_id, places, probabilities, nlls, ranks) in zip(table.values, results, strict=True):
                assert (row[0], list(row[1]), list(row[4])) == (sample_id, places, ranks)
                assert list(row[2]) == pytest.approx(probabilities, rel=1e-4)
                assert list(row[3]) == pytest.approx(nlls, rel=1e-5, abs=1e-6)
        assert [line["sample_id"] for line in lines["a"]] == [5, 7, 4]
        table = pd.read_csv(out / "rsr_tiny.tsv", sep="\t")
        assert list(table["data_name"]) == ["a", "deep__b.x"]
        length, rank, nll = (sum(line[name] for line in lines["a"]) / 3 for name in list(lines["a"][0])[1:4])
        numbers = [length, rank, nll, rank / nll]
        assert list(table.iloc[0, 1:5]) == pytest.approx(numbers, abs=1e-5)
        assert table["infer_seconds"].notna().all()
        assert "a: 3 samples, ratio" in done.stdout

    def test_takes_inference_results_that_are_there(self, lark_fast_command, student, tmp_path):
        """Made by pandas, as the original does; without a student."""
        data, out = tmp_path / "b.jsonl", tmp_path / "out"
        write_jsonl(data, SAMPLES)
        kept = out / "_inferred_data" / "tiny_x" / "b.parquet"
        kept.parent.mkdir(parents=True)
        row = {"sample_id": "q", "resp_token_positions": [3, 4], "probs": [0.5, 0.1], "nlls": [0.7, 2.3]}
        pd.DataFrame([row | {"ranks": [1, 80], "origin": "me"}]).to_parquet(kept, index=False)
        (out / "rsr_tiny_x.tsv").write_text("data_name\tavg_surprisal\tnote\nz\t2.00000\tkept\nb\t9.0\told\n")
        flags = ("--run_mode=metrics_only", "--tag=x", "--rank-clip-r=50")
        self.rsr(lark_fast_command, data, out, tmp_path / "nobody", *flags, root=tmp_path)
        lines = read_lines(out / "_sample_metrics" / "tiny_x" / "b.jsonl")
        numbers = {"resp_token_length": 2, "avg_rank_clip": 25.5, "avg_surprisal": 1.5, "rank_surprisal_ratio": 17.0}
        self.agree(lines, [{"sample_id": "q", **numbers, "origin": "me"}])
        table = pd.read_csv(out / "rsr_tiny_x.tsv", sep="\t")
        assert list(table["data_name"]) == ["b", "z"]
        assert list(table["avg_surprisal"]) == [1.5, 2.0]
        assert list(table["note"].fillna("")) == ["", "kept"]
        assert table["infer_seconds"].isna().all()
        missing = self.rsr(lark_fast_command, data, out, student, "--run_mode=metrics_only", root=tmp_path, code=3)
        assert "--run_mode together makes it" in missing.stdout

    def test_a_stopped_run_goes_on(self, lark_fast_command, student, tmp_path, monkeypatch):
        data = write_jsonl(tmp_path / "b.jsonl", [{"messages": record["messages"]} for record in make_records(4)])
        monkeypatch.setattr(windows, "__defaults__", (5, WINDOW_TOKENS))
        add, added = Begun.add, []

        def watched(begun, window):
            if len(added) == 1:
                raise KeyboardInterrupt
            added.append(len(window))
            add(begun, window)

        monkeypatch.setattr(Begun, "add", watched)
        stopped, whole, bare = (tmp_path / name for name in ("stopped", "whole", "bare"))
        jsonl = "--infer_save_format=jsonl"
        self.rsr(lark_fast_command, data, stopped, student, jsonl, root=tmp_path, code=130)
        begun = stopped / "_inferred_data" / "tiny" / "b.partial"
        assert len(read_lines(begun / "windows.jsonl")) == 1
        other = self.rsr(lark_fast_command, data, stopped, student, jsonl, "--rank_clip_r=7", root=tmp_path, code=2)
        assert f"--output_root {begun}: was begun otherwise (rank_clip_r 100 there, 7 now)" in other.stderr
        added += [0]
        self.rsr(lark_fast_command, data, stopped, student, jsonl, root=tmp_path)
        assert added == [5, 0, 5, 2]
        self.rsr(lark_fast_command, data, whole, student, jsonl, root=tmp_path)
        names = ["_inferred_data/tiny/b.jsonl", "_sample_metrics/tiny/b.jsonl"]
        for name in names:
            assert (stopped / name).read_bytes() == (whole / name).read_bytes()
        assert not begun.exists()
        # Nothing is kept but the metrics.
        self.rsr(lark_fast_command, data, bare, student, "--infer_save_format=", root=tmp_path)
        assert (bare / names[1]).read_bytes() == (whole / names[1]).read_bytes()
        assert not list((bare / "_inferred_data" / "tiny").iterdir())
        # What is there is taken, unless it is to be made anew.
        before = len(added)
        assert "is taken" in self.rsr(lark_fast_command, data, whole, student, jsonl, root=tmp_path).stdout
        assert len(added) == before
        self.rsr(lark_fast_command, data, whole, student, jsonl, "--overwrite", root=tmp_path)
        assert len(added) == before + 3

    def test_bad_input_is_one_line(self, lark_fast_command, student, tmp_path):
        good, out = write_jsonl(tmp_path / "good.jsonl", SAMPLES), tmp_path / "out"
        broken, words, named, mixed = (tmp_path / f"{name}.json" for name in ("broken", "words", "named", "mixed"))
        broken.write_text('[{"messages": [}]')
        words.write_text('["messages"]')
        named.write_text(json.dumps([SAMPLES[0] | {"id": [1]}]))
        mixed.write_text(json.dumps([SAMPLES[0], SAMPLES[1] | {"_id": "seven"}]))
        odd = write_jsonl(tmp_path / "odd.jsonl", [{"messages": 5}])
        none = write_student(tmp_path / "none", template=None)
        twice = tmp_path / "twice"
        twice.mkdir()
        for suffix in ("json", "jsonl"):
            (twice / f"a.{suffix}").write_text("[]")
        for data, model, more, said in (
            (tmp_path / "no.json", student, (), f"--data_path {tmp_path / 'no.json'}: no such file"),
            (broken, student, (), f"{broken}:1: invalid JSON"),
            (words, student, (), "an item must be a JSON object"),
            (named, student, (), "its id is neither an integer nor a string: [1]"),
            (mixed, student, (), "--infer_save_format jsonl can"),
            (odd, student, (), f"{odd}:1: the chat template cannot render it"),
            (twice, student, (), "have one name"),
            (good, tmp_path / "nobody", (), "nobody: no such directory"),
            (good, none, (), "no chat template there"),
            (good, student, ("--filter_file_suffix=_gen3",), "--filter_file_suffix _gen3: no name"),
            (good, student, ("--input_format=multimodal_messages",), "multimodal_messages"),
            (good, student, ("--run_mode=infer_only", "--infer_save_format="), "cannot be empty with --run_mode"),
            (good, student, ("--unknown=1",), "No such option: --unknown"),
        ):
            refused = self.rsr(lark_fast_command, data, out, model, *more, root=tmp_path, code=2)
            assert said in " ".join(refused.stderr.split()), refused.stderr
        (tmp_path / "file").write_text("")
        refused = self.rsr(lark_fast_command, good, tmp_path / "file", student, root=tmp_path, code=2)
        assert f"--output_root {tmp_path / 'file'}" in refused.stderr
        empty = tmp_path / "empty.jsonl"
        empty.write_text("")
        nothing = self.rsr(lark_fast_command, empty, out, student, root=tmp_path, code=2)
        assert f"--data_path {empty}: holds no sample" in nothing.stderr
        self.rsr(lark_fast_command, write_jsonl(empty, SAMPLES[2:4]), out, student, root=tmp_path, code=3)
