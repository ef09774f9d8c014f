"""The examples, as they stand."""

import json
import runpy
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from tests.eager import eager_rsr, eager_scores
from tests.templates import chatml
from tests.tiny import TINY_MODELS

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_score_one_gives_the_reference_numbers(name):
    score_one = example("patch_scorer")["score_one"]
    model = TINY_MODELS[name](400)
    ids = torch.randint(0, 400, (57,), generator=torch.Generator().manual_seed(3)).tolist()
    got = score_one(model, ids, 11, len(ids), 50, "cpu")
    assert got == pytest.approx(eager_scores(model, ids, 11, 50), rel=1e-5)
    assert score_one(model, ids, 57, 57, 50, "cpu") is None


def turn(role, content):
    return {"role": role, "content": content}


QUESTION = turn("user", "How many apples does she have?")
SAMPLES = [
    {"id": "one", "messages": [QUESTION, turn("assistant", "She has 9 apples, so the answer is 9.")]},
    {"_id": 7, "messages": [QUESTION, turn("assistant", "9"), QUESTION, turn("assistant", "Two and two is four.")]},
    {"text": "not a conversation"},
    {"messages": [QUESTION]},
    {"messages": [turn("assistant", "the answer is 42. " * 12)]},
    {"messages": [QUESTION, turn("assistant", "")]},
]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("limit", [None, 40])
def test_rsr_inference_gives_the_reference_numbers(name, limit, suffix, tmp_path):
    model, tokenizer, pool = TINY_MODELS[name](400), chatml(), tmp_path / f"pool{suffix}"
    pool.write_text(json.dumps(SAMPLES) if suffix == ".json" else "".join(json.dumps(s) + "\n\n" for s in SAMPLES))
    results = example("rsr_inference")["infer_dataset"](model, tokenizer, pool, 8, max_model_len=limit, rank_clip_r=50)
    assert [result["sample_id"] for result in results][:3] == ["one", 7, 4]
    for result in results:
        messages = next(s for i, s in enumerate(SAMPLES) if s.get("id", s.get("_id", i)) == result["sample_id"])
        ids = tokenizer.apply_chat_template(messages["messages"], return_dict=False)[:limit]
        said = tokenizer.decode([ids[place] for place in result["resp_token_positions"]])
        answers = "".join(m["content"] for m in messages["messages"] if m["role"] == "assistant")
        assert said == answers if limit is None else answers.startswith(said)
        nlls, probabilities, ranks = eager_rsr(model, ids, result["resp_token_positions"], 50)
        assert result["nlls"] == pytest.approx(nlls, rel=1e-5, abs=1e-6)
        assert result["probs"] == pytest.approx(probabilities, rel=1e-4)
        assert result["ranks"] == ranks
        assert max(ranks) <= 50
        assert result["metadata"] == {}


def test_rsr_inference_of_nothing_to_score(tmp_path):
    infer_dataset, pool = example("rsr_inference")["infer_dataset"], tmp_path / "pool.json"
    pool.write_text('[{"text": "no messages"}]')
    assert infer_dataset(TINY_MODELS["llama"](400), chatml(), pool, 8) == []
    with pytest.raises(ValueError, match="multimodal_messages"):
        infer_dataset(None, None, pool, 8, input_format="multimodal_messages")


def test_evaluate_gives_transformers_loss_and_accuracy():
    module, model = example("evaluate"), TINY_MODELS["phi"](400)  # a head with a bias
    ids = torch.randint(0, 400, (3, 29), generator=torch.Generator().manual_seed(5))
    lengths = torch.tensor([29, 11, 20]).unsqueeze(1)
    place = torch.arange(29).unsqueeze(0)
    labels = ids.masked_fill((place < 4) | (place >= lengths), -100)
    batch = {"input_ids": ids, "attention_mask": (place < lengths).long()}
    with torch.no_grad():
        logits = model(**batch).logits
        losses = [
            model(**{k: v[row : row + 1] for k, v in (batch | {"labels": labels}).items()}).loss for row in range(3)
        ]
    predicted = logits[:, :-1].argmax(2) == labels[:, 1:]
    counted = labels[:, 1:] != -100
    p = logits[:, :-1].double().softmax(2)
    brier = (p - F.one_hot(labels[:, 1:].clamp(min=0), 400)).square().sum(2)
    for result in (module["evaluate"](model, **batch, labels=labels), module["evaluate_logits"](logits, labels)):
        assert result.n_tokens.tolist() == counted.sum(1).tolist() == [25, 7, 16]
        torch.testing.assert_close(result.means.nll, torch.stack(losses).double(), rtol=1e-5, atol=0)
        assert result.sums.agreement.tolist() == (predicted & counted).sum(1).tolist()
        torch.testing.assert_close(result.means.brier, (brier * counted).sum(1) / counted.sum(1), rtol=1e-5, atol=0)


def test_trl_weights_trains_on_a_selection(tmp_path):
    pytest.importorskip("trl")
    tokenizer = chatml()
    TINY_MODELS["llama"](len(tokenizer)).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    rows = [
        {"messages": sample["messages"], "weight": weight} for sample, weight in zip(SAMPLES, [0.7, 0.3], strict=False)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"use_cpu": True, "bf16": False, "num_train_epochs": 3, "learning_rate": 1e-2, "logging_steps": 1}
    paths = [str(tmp_path / name) for name in ("student", "train.jsonl", "out")]
    trainer = example("trl_weights")["train"](*paths, **settings)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[2] < losses[0]
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.fixture
def stands_alone(tmp_path, monkeypatch, capsys, one_thread):
    """Runs an example as a program in an empty directory; returns what it prints."""
    from lark_fast.scoring import facts

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(facts, "matmul_ceiling", lambda *_: 1e12)  # takes longer than the examples

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def selected(path):
    """Rows of a selection by their problem."""
    rows = {}
    for line in map(json.loads, Path(path).read_text(encoding="utf-8").splitlines()):
        rows.setdefault(line["meta"]["problem_id"], []).append(line)
    return rows


def test_own_pool_stands_alone(stands_alone, tmp_path):
    printed = stands_alone("own_pool")
    assert "48 trajectories scored" in printed
    assert "24 of 48 trajectories for 12 problems" in printed
    rows = selected("example-run/selection/train.jsonl")
    assert [len(own) for own in rows.values()] == [2] * 12
    assert [sum(row["weight"] for row in own) for own in rows.values()] == pytest.approx([1] * 12)
    # Again, told where everything is, with a table that has grown.
    table = tmp_path / "example-run" / "answers.csv"
    table.write_text(table.read_text() + '"What is 1, and 1?",mine,"2, I think"\n')
    printed = stands_alone("own_pool", table, "example-run/student", "example-run")
    assert "1 trajectories scored" in printed
    assert "48 trajectories had been scored before and were kept" in printed
    (own,) = [own for own in selected("example-run/selection/train.jsonl").values() if len(own) == 1]
    assert own[0]["messages"][0]["content"] == "What is 1, and 1?"
    assert own[0]["meta"]["teacher"] == "mine"


def test_custom_policy_stands_alone(stands_alone):
    assert "policy=custom_policy.short_first" in stands_alone("custom_policy")
    scores = pq.read_table(sorted(Path("example-run/policy-scores").glob("part-*"))).to_pylist()
    (own,) = Path("example-run/policies").glob("*short_first*/weights.parquet")
    weights = {(row["problem_id"], row["candidate_id"]): row["weight"] for row in pq.read_table(own).to_pylist()}
    expected = {}
    for problem in {row["problem_id"] for row in scores}:
        short = sorted((row for row in scores if row["problem_id"] == problem), key=lambda row: row["n_tokens"])[:2]
        for place, row in enumerate(sorted(short, key=lambda row: -row["g_hat"])):
            expected[problem, row["candidate_id"]] = (2 / 3, 1 / 3)[place]
    assert weights == pytest.approx(expected)


def test_patch_scorer_stands_alone(stands_alone):
    *lines, last = stands_alone("patch_scorer").splitlines()
    assert len(lines) == 8
    assert all("before 5." in line and "patched 5." in line for line in lines)
    assert last.startswith("of 48 answers, the largest difference: ")
    assert float(last.split()[-1]) < 1e-5


def test_trl_weights_stands_alone(stands_alone):
    pytest.importorskip("trl")
    losses = stands_alone("trl_weights").splitlines()[-1].split()
    assert losses[:2] == ["example-run/trl:", "loss"]
    assert float(losses[-1]) < float(losses[2]) - 0.1
    assert Path("example-run/trl/model.safetensors").exists()
