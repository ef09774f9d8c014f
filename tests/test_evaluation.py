"""``lark-fast eval`` and ``compare`` as people use them, on a student that has learnt a few answers by heart."""

import json
import re
import signal
import time

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from tests.command import write_jsonl, write_student
from tests.templates import CHATML
from tests.tiny import byte_level_tokenizer, tiny_llama

PROBLEMS = [(a, b) for a in (2, 3, 5, 8) for b in (4, 7)]
KNOWN = 6  # of them, the student gets the rest wrong
TOKENIZER = byte_level_tokenizer(CHATML)


def question(a, b):
    return f"What is {a} + {b}?"


def lesson(place):
    a, b = PROBLEMS[place]
    said = a + b if place < KNOWN else a + b + 1
    user = {"role": "user", "content": question(a, b)}
    return [user, {"role": "assistant", "content": f"{a} and {b} is \\boxed{{{said}}}. Done."}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A student before and after it has learnt, and a benchmark."""
    made = tmp_path_factory.mktemp("evaluation")
    write_jsonl(
        made / "sums.jsonl",
        [
            {"problem": question(a, b), "answer": str(a + b), "level": 1 + place % 2}
            for place, (a, b) in enumerate(PROBLEMS)
        ],
    )
    write_student(made / "untaught", tokenizer=TOKENIZER)
    model = tiny_llama(len(TOKENIZER), hidden_size=64, intermediate_size=96)
    texts = [TOKENIZER.apply_chat_template(lesson(place), tokenize=False) for place in range(len(PROBLEMS))]
    batch = TOKENIZER(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.4, loss
    model.save_pretrained(made / "taught")
    TOKENIZER.save_pretrained(made / "taught")
    return made


def evaluate(directory, out, *more, model="taught", benchmark="sums.jsonl"):
    named = ("--model", directory / model, "--benchmark", directory / benchmark, "--out", out)
    return ("eval", *named, "--instruction", "", "--max-new-tokens", 40, "--dtype", "float32", *more)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary(out):
    return json.loads((out / "summary.json").read_text())["benchmarks"]["sums"]


@pytest.fixture(scope="module")
def done(directory, forks):
    """The evaluation of the student that has learnt, greedy."""
    out = directory / "eval"
    return out, forks.run(*evaluate(directory, out))


def test_what_is_measured_and_written(directory, done):
    out, run = done
    assert "ACC@1 75.0 %" in run.stdout
    assert summary(out)["acc_1"]["mean"] == KNOWN / len(PROBLEMS)
    assert [line["correct"] for line in lines(out / "problems.jsonl")] == [[place < KNOWN] for place in range(8)]
    first = lines(out / "problems.jsonl")[0]
    assert (first["problem_id"], first["gold"], first["answers"][0]["answer"]) == ("0", "6", "6")
    written = {line["problem_id"]: line["answers"][0] for line in lines(out / "generations.jsonl")}
    assert written["0"]["text"] == "2 and 4 is \\boxed{6}", "it ends behind its box"
    assert written["0"]["finish"] == "answer"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["identity"]["n"] == 1
    assert set(manifest["versions"]) >= {"torch", "transformers", "math-verify"}
    assert not list(out.glob("*.tmp"))


def test_the_same_command_asks_nothing_again(directory, done, forks):
    out, _ = done
    before = (out / "generations.jsonl").read_bytes()
    again = forks.run(*evaluate(directory, out))
    assert "no new answers" in again.stdout
    assert (out / "generations.jsonl").read_bytes() == before


def test_json_is_all_there_is_on_stdout(directory, done, forks):
    out, _ = done
    told = json.loads(forks.run(*evaluate(directory, out, "--json")).stdout)
    assert told["benchmarks"]["sums"]["acc_1"]["mean"] == 0.75


def test_before_and_after(directory, done, forks, tmp_path):
    out, _ = done
    forks.run(*evaluate(directory, tmp_path / "before", model="untaught"))
    assert summary(tmp_path / "before")["acc_1"]["mean"] == 0
    assert summary(tmp_path / "before")["acc_1"]["high"] > 0.3, "none of eight is not none for sure"
    run = forks.run("compare", tmp_path / "before", out, "--out", tmp_path / "compared")
    assert "+75.0" in run.stdout
    assert "+75.0" in (tmp_path / "compared/comparison.md").read_text()
    assert "was not made as" not in run.stdout
    assert json.loads((tmp_path / "compared/comparison.json").read_text())


def test_text_behind_the_answer_where_it_is_wanted(directory, done, forks, tmp_path):
    forks.run(*evaluate(directory, tmp_path / "e", "--no-stop-at-answer", "--limit", 2))
    texts = [line["answers"][0]["text"] for line in lines(tmp_path / "e/generations.jsonl")]
    assert texts[0] == "2 and 4 is \\boxed{6}. Done."
    assert len(texts) == 2
    compared = forks.run("compare", directory / "eval", tmp_path / "e", "--out", tmp_path / "compared")
    assert "stop_at_answer False instead of True" in compared.stdout


def test_killed_and_gone_on_with(directory, forks, tmp_path):
    sampled = ("--n", 3, "--temperature", 0.8, "--top-p", 0.95, "--batch-size", 2)
    forks.run(*evaluate(directory, tmp_path / "whole", *sampled))
    out = tmp_path / "killed"
    written = out / "generations.jsonl"
    run = forks.start(*evaluate(directory, out, *sampled))
    until = time.monotonic() + 60
    while not (written.exists() and written.read_bytes().count(b"\n")):
        assert time.monotonic() < until
        assert run.poll() is None, "it has ended before it was killed"
        time.sleep(0.002)
    run.kill(signal.SIGKILL)
    run.wait()
    there = written.read_bytes()
    kept = there[: there.rfind(b"\n") + 1]
    with open(written, "ab") as file:
        file.write(b'{"benchmark": "sums", "prob')  # what a power cut may leave
    again = forks.run(*evaluate(directory, out, *sampled))
    assert re.search(r"answers to \d problems kept", again.stdout)
    assert written.read_bytes().startswith(kept), "what was there is not written again"
    by_problem = [
        sorted(lines(d / "generations.jsonl"), key=lambda line: line["problem_id"]) for d in (out, tmp_path / "whole")
    ]
    assert by_problem[0] == by_problem[1]
    assert (out / "problems.jsonl").read_bytes() == (tmp_path / "whole/problems.jsonl").read_bytes()
    assert summary(out)["n"] == 3


def test_an_adapter(directory, forks, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", [{"messages": lesson(place), "weight": 1} for place in range(8)])
    train = ("train", "--data", data, "--student", directory / "untaught", "--lora-rank", 4, "--epochs", 2)
    more = ("--lr", 1e-2, "--global-batch", 2, "--seed", 1, "--lora-dropout", 0, "--dtype", "float32", "--lora")
    forks.run(*train, *more, "--out", tmp_path / "adapter")
    base = LlamaForCausalLM.from_pretrained(directory / "untaught")
    PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "merged")
    TOKENIZER.save_pretrained(tmp_path / "merged")
    told = []
    for name in ("adapter", "merged"):
        forks.run(*evaluate(tmp_path, tmp_path / f"e-{name}", model=name, benchmark=directory / "sums.jsonl"))
        told.append([line["answers"] for line in lines(tmp_path / f"e-{name}/generations.jsonl")])
    assert told[0] == told[1]
    forks.run(*evaluate(directory, tmp_path / "e-base", model="untaught"))
    assert told[0] != [line["answers"] for line in lines(tmp_path / "e-base/generations.jsonl")]
    # An adapter that was moved away from its base says so.
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config["base_model_name_or_path"] = "gone/away/entirely"
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    run = forks.run(*evaluate(tmp_path, tmp_path / "e", model="adapter", benchmark=directory / "sums.jsonl"), code=2)
    assert "--base" in run.stderr
    moved = evaluate(tmp_path, tmp_path / "e", "--base", directory / "untaught", model="adapter",
                     benchmark=directory / "sums.jsonl")  # fmt: skip
    forks.run(*moved)
    assert [line["answers"] for line in lines(tmp_path / "e/generations.jsonl")] == told[0]


def test_answers_made_elsewhere(directory, forks, tmp_path):
    answers = tmp_path / "answers.jsonl"
    once = [{"problem_id": str(place), "text": f"so\u2028A: {a + b}"} for place, (a, b) in enumerate(PROBLEMS)]
    # The line separator as it is, which ends no line of JSONL.
    answers.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in once * 2))
    given = ("eval", "--answers", answers, "--benchmark", directory / "sums.jsonl", "--out", tmp_path / "e")
    run = forks.run(*given)
    assert "ACC@1 100.0 %" in run.stdout
    assert summary(tmp_path / "e")["n"] == 2
    for text, said in [
        ('{"problem_id": "0", "text": "A: 6"}\n', "lacks 7 of 8"),
        ('{"problem_id": "77", "text": "A: 6"}\n', "answers.jsonl:1"),
        ('{"problem_id": "0"}\n', "answers.jsonl:1: holds no answer"),
        ("not JSON\n", "answers.jsonl:1: invalid JSON"),
    ]:
        answers.write_text(text)
        assert said in forks.run(*given[:-1], tmp_path / "f", code=2).stderr


def test_a_question_that_fills_the_model(directory, forks, tmp_path):
    write_jsonl(tmp_path / "long.jsonl", [{"problem": "so " * 600, "answer": "1"}, {"problem": "?", "answer": "1"}])
    forks.run(*evaluate(directory, tmp_path / "e", benchmark=tmp_path / "long.jsonl"))
    first, second = lines(tmp_path / "e/problems.jsonl")
    assert first["answers"][0]["fault"] == "nothing was written"
    assert first["answers"][0]["tokens"] == 0
    assert second["answers"][0]["tokens"] > 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--model", "nowhere/at/all"), "no such directory"),
        (("--benchmark", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--n", 3), "--temperature"),
        (("--top-p", 0), "--top-p"),
        (("--device", "cuda:77"), "--device cuda:77"),
        (("--backend", "vllm"), "pip install vllm"),
        (("--base", "x"), "is no adapter"),
        (("--answers", "x"), "give one of them"),
    ],
    ids=["model", "benchmark", "n", "top-p", "device", "backend", "base", "answers"],
)
def test_bad_input(directory, forks, tmp_path, more, said):
    run = forks.run(*evaluate(directory, tmp_path / "e", *more), code=2)
    assert said in run.stderr
    assert run.stderr.count("\n") == 1


def test_nothing_is_asked_that_nobody_could_judge(directory, forks, tmp_path):
    run = forks.run(*evaluate(directory, tmp_path / "e"), code=2, before="sys.modules['pebble'] = None")
    assert "needs pebble: pip install 'lark-fast[eval]'" in run.stderr
    assert not (tmp_path / "e").exists()


def test_a_directory_that_is_taken(directory, done, forks, tmp_path):
    out, _ = done
    assert (
        "max_new_tokens 40 there, 41 now" in forks.run(*evaluate(directory, out, "--max-new-tokens", 41), code=2).stderr
    )
    changed = tmp_path / "sums.jsonl"
    changed.write_text((directory / "sums.jsonl").read_text().replace("What is", "What was"))
    assert "is not what was asked before" in forks.run(*evaluate(directory, out, benchmark=changed), code=2).stderr
    (tmp_path / "notes.txt").touch()
    assert "holds something else" in forks.run(*evaluate(directory, tmp_path), code=2).stderr
