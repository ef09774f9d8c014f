"""Transformers' and TRL's trainers with weights, against the definition by hand; a model's loss without logits."""

import gc
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from lark_fast.selection.exporters import export
from lark_fast.trainers import HeadLoss, WeightedSFTTrainer, read_sample_log, use_linear_cross_entropy
from lark_fast.trainers.collator import WeightedCollator
from tests.command import make_records
from tests.templates import CHATML
from tests.tiny import TINY_MODELS, byte_level_tokenizer, tiny_decoder, tiny_llama
from tests.trainer_runs import (
    LAYOUTS,
    ROWS,
    ROWS_OF_RANKS,
    TOKENIZER,
    VOCAB,
    by_hand,
    distance,
    global_batches,
    hf,
    nlls,
    settings,
    sft,
    token_rows,
    trained,
)

ROOT = Path(__file__).resolve().parents[1]
CUTS = [(1, 1), (1, 4), (2, 1), (2, 2), (12, 1)]  # rows a micro-batch, micro-batches a step


@pytest.fixture(scope="module", autouse=True)
def _nothing_to_collect():
    """Every training run collects garbage first: among all that TRL imports, that takes longer than the run."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("loss_norm", ["trajectory", "token"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sft_trainer_minimises_the_objective_however_the_batch_is_cut(layout, loss_norm, tmp_path):
    for batch, accumulation in CUTS:
        changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = sft(tmp_path, ROWS, layout=layout, loss_norm=loss_norm, **changes)
        batches = global_batches(trainer, ROWS, batch * accumulation)
        assert (len(trainer.train_dataset) < len(ROWS)) == (layout == "packed")
        expected = by_hand(tiny_llama(VOCAB), ROWS, batches, loss_norm=loss_norm)
        assert distance(trained(trainer), expected) < 1e-5, (batch, accumulation)


@pytest.mark.parametrize(("padding_free", "loss_norm"), [(False, "trajectory"), (True, "trajectory"), (True, "token")])
def test_transformers_trainer_minimises_the_objective_however_the_batch_is_cut(padding_free, loss_norm, tmp_path):
    rows = token_rows(11)  # the last step of an epoch has fewer
    for batch, accumulation in CUTS:
        changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = hf(tmp_path, rows, padding_free=padding_free, loss_norm=loss_norm, **changes)
        batches = global_batches(trainer, rows, batch * accumulation)
        expected = by_hand(tiny_llama(VOCAB), rows, batches, loss_norm=loss_norm)
        assert distance(trained(trainer), expected) < 1e-5, (batch, accumulation)


class OwnSum(WeightedSFTTrainer):
    """The released code's rule: a micro-batch is divided by the sum of its own weights."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        own = inputs["token_weights"].sum() * self.current_gradient_accumulation_steps
        return super().compute_loss(model, inputs, return_outputs, own)


def test_these_tests_fail_where_a_micro_batch_is_divided_by_its_own_weights(tmp_path):
    for layout in LAYOUTS:
        changes = {"layout": layout, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        trainer = sft(tmp_path, ROWS, kind=OwnSum, **changes)
        expected = by_hand(tiny_llama(VOCAB), ROWS, global_batches(trainer, ROWS, 2))
        assert distance(trained(trainer), expected) > 1e-2  # a thousand times what is allowed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_scale_of_weights_and_rows_of_weight_0_change_nothing(layout, tmp_path):
    plain = trained(sft(tmp_path, ROWS, layout=layout, per_device_train_batch_size=3))
    assert len(set(plain.losses)) > 1
    scaled = [row | {"weight": 10 * row["weight"]} for row in ROWS]
    assert distance(trained(sft(tmp_path, scaled, layout=layout, per_device_train_batch_size=3)), plain) < 1e-6
    others = [row | {"weight": 0.0} for row in token_rows(5, seed=1)]
    mixed = [row for pair in zip(ROWS, others, strict=False) for row in pair] + ROWS[5:]
    assert trained(sft(tmp_path, mixed, layout=layout, per_device_train_batch_size=3)).losses == plain.losses


def test_equal_weights_by_token_are_trls_own_loss(tmp_path):
    rows = [row | {"weight": 0.7} for row in ROWS]
    changes = {"num_train_epochs": 3, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
    for layout in ("padded", "padding_free"):  # the whole set a step: its mean length is TRL's divisor too
        ours = trained(sft(tmp_path, rows, layout=layout, loss_norm="token", **changes))
        assert distance(ours, trained(sft(tmp_path, rows, layout=layout, kind=SFTTrainer, **changes))) < 1e-5


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_kind_of_head_trains(name, tmp_path):
    trainer = sft(tmp_path, ROWS, model=TINY_MODELS[name](VOCAB), layout="packed", per_device_train_batch_size=2)
    expected = by_hand(TINY_MODELS[name](VOCAB), ROWS, global_batches(trainer, ROWS, 2))
    assert distance(trained(trainer), expected) < 1e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layout", ["padding_free", "packed"])
def test_no_trajectory_of_a_row_sees_another(layout, attention, tmp_path):
    model = tiny_llama(VOCAB, attn_implementation=attention)
    trainer = sft(tmp_path, ROWS, model=model, layout=layout)
    own = [HeadLoss(model)]

    def per_trajectory(rows):
        batch = trainer.data_collator.collator(rows)
        with own[0], torch.no_grad():
            nll = model(**batch, per_token=True).token_stats.nll
        places = batch["position_ids"][0]
        bounds = [*(places == 0).nonzero().flatten().tolist(), len(places)]
        return [nll[a : b - 1] for a, b in pairwise(bounds)]  # b - 1 predicts the next one's first

    rows = [dict(row) for row in trainer.train_dataset]
    before = per_trajectory(rows)
    length = (rows[0].get("seq_lengths") or [len(rows[0]["input_ids"])])[0]
    rows[0]["input_ids"] = [(token + 5) % VOCAB for token in rows[0]["input_ids"][:length]] + rows[0]["input_ids"][
        length:
    ]
    after = per_trajectory(rows)
    assert not torch.equal(before[0].nan_to_num(), after[0].nan_to_num())
    for one, other in zip(before[1:], after[1:], strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def test_a_model_that_lets_them_see_each_other_is_refused(tmp_path):
    with pytest.raises(ValueError, match="see each other in BloomForCausalLM"):
        sft(tmp_path, ROWS, model=tiny_decoder("bloom", VOCAB), layout="padding_free")
    with pytest.raises(ValueError, match="see each other in Lfm2ForCausalLM"):
        hf(tmp_path, ROWS, model=tiny_decoder("lfm2", VOCAB), padding_free=True)
    with pytest.raises(ValueError, match="see each other in MambaForCausalLM"):
        hf(tmp_path, ROWS, model=tiny_decoder("mamba", VOCAB), data_collator=DataCollatorWithFlattening())
    for name in ("llama", "qwen3_moe"):  # and one that does not is not, however coarse its numbers
        sft(tmp_path, ROWS, model=tiny_decoder(name, VOCAB).bfloat16(), layout="padding_free")


def test_conversations_as_selection_writes_them(tmp_path):
    weights = [0.4, 0.35, 0.25] * 3
    records = list(make_records(3))
    rows = [{"messages": r["messages"], "weight": w, "meta": {}} for r, w in zip(records, weights, strict=True)]
    tokenizer = byte_level_tokenizer(CHATML)
    ids = [tokenizer.apply_chat_template(row["messages"])["input_ids"] for row in rows]
    tokenised = [{"input_ids": x, "labels": x, "weight": row["weight"]} for x, row in zip(ids, rows, strict=True)]
    changes = {"max_length": 100, "per_device_train_batch_size": 2}
    for layout in ("padded", "packed"):
        trainer = WeightedSFTTrainer(
            tiny_llama(len(tokenizer)),
            SFTConfig(**settings(tmp_path, **(LAYOUTS[layout] | changes))),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        batches = global_batches(trainer, tokenised, 2)
        assert distance(trained(trainer), by_hand(tiny_llama(len(tokenizer)), tokenised, batches)) < 1e-5


@pytest.mark.parametrize(("name", "options"), [("trl", {"assistant_only_loss": True}), ("trl-prompt-completion", {})])
def test_exports_for_trl_train_on_the_answers_with_the_weights(name, options, tmp_path):
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    turns += "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    marked = turns + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer = byte_level_tokenizer(marked if options else CHATML)
    weights = [1.0, 0.25, 1e-3]
    rows = [{"messages": row["messages"], "weight": w} for row, w in zip(make_records(3, 1), weights, strict=True)]
    mean = sum(weights) / 3
    (path,) = export(name, rows, tmp_path, mean)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None, **options)
    trainer = WeightedSFTTrainer(
        tiny_llama(len(tokenizer)), config, train_dataset=Dataset.from_list(lines), processing_class=tokenizer
    )
    for given, line in zip(rows, trainer.train_dataset, strict=True):
        scored = [token for token, factor in zip(line["input_ids"], line["token_weights"], strict=True) if factor]
        assert tokenizer.decode(scored).removesuffix("\n") == given["messages"][-1]["content"] + "<|im_end|>"
        assert sum(line["token_weights"]) == pytest.approx(given["weight"] / mean, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_cut_off_is_not_counted(layout, tmp_path):
    rows = token_rows(8, longest=90)
    if layout == "padding_free":  # TRL wants rows as they are to be
        rows = [{**row, "input_ids": row["input_ids"][:64], "labels": row["labels"][:64]} for row in rows]
    cut = [{**row, "input_ids": row["input_ids"][:64], "labels": row["labels"][:64]} for row in rows]
    trainer = sft(tmp_path, rows, layout=layout, per_device_train_batch_size=2)
    assert distance(trained(trainer), by_hand(tiny_llama(VOCAB), cut, global_batches(trainer, cut, 2))) < 1e-5


def test_rows_without_a_scored_token_are_left_out(tmp_path):
    nothing = {"input_ids": [5, 6, 7], "labels": [5, -100, -100], "weight": 1e3}  # nothing predicts the first token
    with pytest.warns(UserWarning, match="1 rows of the train dataset have no scored token"):
        trainer = hf(tmp_path, [nothing, *ROWS], per_device_train_batch_size=4)
    plain = hf(tmp_path, ROWS, per_device_train_batch_size=4)
    assert trained(trainer).losses == trained(plain).losses


def test_lora(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    changes = {"layout": "packed", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    trainer = sft(tmp_path, ROWS, peft_config=config, eval_rows=ROWS, **changes)
    copy = get_peft_model(tiny_llama(VOCAB), config)
    copy.load_state_dict(trainer.model.state_dict())
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    got, expected = trained(trainer), by_hand(copy, ROWS, global_batches(trainer, ROWS, 2))
    assert distance(got, expected) < 1e-5
    moved = {name for name, p in got.parameters.items() if not torch.equal(p, before[name].double())}
    assert moved == {name for name in before if "lora_" in name}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(weighted_mean(copy, ROWS), rel=1e-5)


def weighted_mean(model, rows, loss_norm="trajectory"):
    with torch.no_grad():
        parts = [(row.get("weight", 1.0), *nlls(model.double(), row)) for row in rows]
    if loss_norm == "token":
        return sum(w * s for w, s, _ in parts).item() / sum(w * t for w, _, t in parts)
    return sum(w * s / t for w, s, t in parts).item() / sum(w for w, _, _ in parts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_is_the_weighted_mean_of_the_set(layout, tmp_path):
    held_out = token_rows(7, seed=2)
    for batch, loss_norm in ((1, "trajectory"), (3, "trajectory"), (2, "token")):
        changes = {"layout": layout, "per_device_eval_batch_size": batch, "loss_norm": loss_norm}
        trainer = sft(tmp_path, ROWS, eval_rows=held_out, **changes)
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(weighted_mean(tiny_llama(VOCAB), held_out, loss_norm), rel=1e-6)
        unweighted = [{k: v for k, v in row.items() if k != "weight"} for row in held_out]
        other = trainer.evaluate(Dataset.from_list(unweighted))
        assert other["eval_loss"] == pytest.approx(weighted_mean(tiny_llama(VOCAB), unweighted, loss_norm), rel=1e-6)
        theirs = sft(tmp_path, ROWS, eval_rows=unweighted, kind=SFTTrainer, per_device_eval_batch_size=7).evaluate()
        for name in ("eval_mean_token_accuracy", "eval_entropy"):
            assert other[name] == pytest.approx(theirs[name], rel=1e-5)


def test_transformers_trainer_evaluates_and_predicts(tmp_path):
    def shape(prediction):
        return {"rows": len(prediction.predictions), "words": prediction.predictions.shape[2]}

    trainer = hf(tmp_path, ROWS, eval_rows=ROWS[:5], padding_free=False, compute_metrics=shape)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(weighted_mean(tiny_llama(VOCAB), ROWS[:5]), rel=1e-6)
    assert (metrics["eval_rows"], metrics["eval_words"]) == (5, VOCAB)
    several = trainer.evaluate({"one": Dataset.from_list(ROWS[:3]), "two": Dataset.from_list(ROWS[3:])})
    assert several["eval_two_loss"] == pytest.approx(weighted_mean(tiny_llama(VOCAB), ROWS[3:]), rel=1e-6)


def test_no_logits_are_made(tmp_path):
    model, widths = tiny_llama(VOCAB), set()
    trainer = sft(tmp_path, ROWS, model=model, layout="packed", eval_rows=ROWS, max_steps=1)
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: widths.add(output.shape[-1]))
    trainer.train()
    trainer.evaluate()
    assert widths == {0}
    assert model(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, VOCAB)


@pytest.mark.parametrize("make", [hf, lambda *a, **k: sft(*a, layout="packed", **k)], ids=["transformers", "trl"])
def test_resuming_goes_on_as_if_nothing_had_happened(make, tmp_path):
    changes = {"max_steps": 4, "per_device_train_batch_size": 2, "optim": "adamw_torch", "learning_rate": 1e-2}
    changes |= {"train_sampling_strategy": "random", "save_strategy": "steps", "save_steps": 2}
    whole = trained(make(tmp_path / "whole", ROWS, **changes))
    resumed = make(tmp_path / "again", ROWS, **changes)
    rest = trained(resumed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert rest.losses == whole.losses
    assert all(torch.equal(p, whole.parameters[name]) for name, p in rest.parameters.items())


RANKS = """
import sys, torch
from pathlib import Path
from lark_fast.trainers import SampleLog
from tests.trainer_runs import ROWS_OF_RANKS, sft, trained
out = Path(sys.argv[1])
found = {}
for layout in ("padded", "packed"):
    changes = {"layout": layout, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    trainer = sft(out, ROWS_OF_RANKS, eval_rows=ROWS_OF_RANKS[:5], per_device_eval_batch_size=2, **changes)
    trainer.add_callback(SampleLog(out / layout))
    found[layout] = trained(trainer)
    found[layout].losses.append(trainer.evaluate()["eval_loss"])
    rank = trainer.args.process_index
torch.save({name: (curve.losses, curve.parameters) for name, curve in found.items()}, out / f"rank{rank}.pt")
"""


def test_two_ranks_take_the_steps_of_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    (tmp_path / "ranks.py").write_text(RANKS)
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, tmp_path / "ranks.py", tmp_path],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for layout in ("padded", "packed"):
        changes = {"layout": layout, "per_device_train_batch_size": 4}
        trainer = sft(tmp_path, ROWS_OF_RANKS, eval_rows=ROWS_OF_RANKS[:5], **changes)
        one = trained(trainer)
        one.losses.append(trainer.evaluate()["eval_loss"])
        logged = read_sample_log(tmp_path / layout)  # a file of each rank
        assert len(list((tmp_path / layout).iterdir())) == 2
        assert len(logged) == sum(map(len, logged.values())) == len(ROWS_OF_RANKS)
        for rank in (0, 1):
            losses, parameters = torch.load(tmp_path / f"rank{rank}.pt")[layout]
            assert distance(type(one)(losses, parameters), one) < 1e-5


BAD = [
    ([{k: v for k, v in row.items() if k != "weight"} for row in ROWS], "no column 'weight'"),
    ([*ROWS[:2], ROWS[2] | {"weight": float("nan")}], "row 2 of the train dataset: weight is nan"),
    ([*ROWS[:2], ROWS[2] | {"weight": None}], "row 2 of the train dataset: weight is null"),
    ([ROWS[0], ROWS[1] | {"weight": -1.0}], "row 1 of the train dataset: weight is -1"),
    ([row | {"weight": "much"} for row in ROWS], "row 0 of the train dataset: weight is 'much', not a number"),
    ([row | {"weight": True} for row in ROWS], "row 0 of the train dataset: weight is True, not a number"),
    ([row | {"weight": 0.0} for row in ROWS], "no row of weight above 0"),
]


@pytest.mark.parametrize(("rows", "message"), BAD, ids=[message[-20:] for _, message in BAD])
def test_bad_weights_are_named(rows, message, tmp_path):
    for make in (sft, hf):
        with pytest.raises(ValueError, match=message):
            make(tmp_path, rows)


def test_what_cannot_be_honoured_is_refused(tmp_path):
    for strategy in ("wrapped", "bfd_split"):
        with pytest.raises(ValueError, match="packing_strategy='bfd'"):
            sft(tmp_path, ROWS, layout="packed", packing_strategy=strategy)
    with pytest.raises(ValueError, match="loss of its own"):
        sft(tmp_path, ROWS, loss_type="dft")
    with pytest.raises(ValueError, match="loss of its own"):
        hf(tmp_path, ROWS, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="loss of its own"):
        hf(tmp_path, ROWS, compute_loss_func=lambda *_, **__: 0)
    with pytest.raises(ValueError, match="does not compile the whole model"):
        hf(tmp_path, ROWS, torch_compile=True, torch_compile_backend="eager")
    with pytest.raises(ValueError, match="skip_prepare_dataset"):
        sft(tmp_path, ROWS, dataset_kwargs={"skip_prepare_dataset": True})
    with pytest.raises(ValueError, match="loss_norm='mean'"):
        hf(tmp_path, ROWS, loss_norm="mean")
    with pytest.raises(ValueError, match="tokenise it first"):
        hf(tmp_path, [{"text": "a", "weight": 1.0}])
    with pytest.raises(ValueError, match="padded rows"):
        hf(tmp_path, [{**row, "attention_mask": [0] + [1] * (len(row["labels"]) - 1)} for row in ROWS])
    config = SFTConfig(**settings(tmp_path, max_steps=1))
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    with pytest.raises(TypeError, match="the mean weight has to be known"):
        WeightedSFTTrainer(tiny_llama(VOCAB), config, train_dataset=stream, processing_class=TOKENIZER)


def test_any_collator_that_keeps_the_tokens(tmp_path):
    left = byte_level_tokenizer(vocab_size=VOCAB)
    left.padding_side = "left"
    collator = DataCollatorForSeq2Seq(left, pad_to_multiple_of=8)
    rows = [row | {"token_weights": [1.0 + i for i in range(len(row["labels"]))]} for row in ROWS[:3]]
    for row in rows:
        row["labels"] = [-100, *row["input_ids"][1:]]
        row["token_weights"][0] = 0.0
    batch = WeightedCollator(collator)(rows)
    for place, row in enumerate(rows):
        n = len(row["labels"])
        assert batch["token_weights"][place, -n:].tolist() == row["token_weights"]
        assert not batch["token_weights"][place, :-n].any()
    with pytest.raises(ValueError, match="scores other tokens"):
        WeightedCollator(lambda rows: {**collator(rows), "labels": torch.full_like(collator(rows)["labels"], -100)})(
            rows
        )
    with pytest.raises(ValueError, match="without token_weights"):
        WeightedCollator(collator)(ROWS)
    trainer = hf(tmp_path, ROWS, data_collator=DataCollatorForSeq2Seq(TOKENIZER), per_device_train_batch_size=4)
    plain = hf(tmp_path, ROWS, per_device_train_batch_size=4)
    assert trained(trainer).losses == trained(plain).losses


def a_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB, (3, 17), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    return {"input_ids": ids, "labels": labels}


def gradients(model, **call):
    model.zero_grad()
    outputs = model(**call)
    outputs.loss.backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, expected):
    torch.testing.assert_close(got[0].loss, expected[0].loss, rtol=1e-5, atol=0)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (got[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


CALLS = {"mean": {}, "sum over n": {"num_items_in_batch": 77}, "tensor n": {"num_items_in_batch": torch.tensor(77)}}


@pytest.mark.parametrize("name", [*TINY_MODELS, "qwen3_moe", "gpt2"])
def test_a_model_gives_its_own_loss_without_logits(name):
    model = TINY_MODELS[name](VOCAB) if name in TINY_MODELS else tiny_decoder(name, VOCAB)
    calls = dict(CALLS)
    if name == "qwen3_moe":
        calls["balanced"] = {"output_router_logits": True}
    for more in calls.values():
        expected = gradients(model, **a_batch(), **more)
        with use_linear_cross_entropy(model):
            got = gradients(model, **a_batch(), **more)
        assert got[0].logits is None
        assert_same(got, expected)
    shifted = torch.nn.functional.pad(a_batch()["labels"], (0, 1), value=-100)[:, 1:]
    expected = gradients(model, **a_batch())
    with use_linear_cross_entropy(model):
        assert_same(gradients(model, input_ids=a_batch()["input_ids"], shift_labels=shifted), expected)
        assert model(input_ids=a_batch()["input_ids"]).logits.shape == (3, 17, VOCAB)


def test_token_weights_weigh_tokens():
    model, batch = tiny_llama(VOCAB), a_batch()
    weights = torch.rand(3, 17, generator=torch.Generator().manual_seed(1))
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    model.zero_grad()
    (weights[:, 1:] * nll).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    with use_linear_cross_entropy(model):
        got = gradients(model, **batch, token_weights=weights)
        stats = model(**batch, per_token=True).token_stats
    torch.testing.assert_close(got[0].loss, (weights[:, 1:] * nll).sum(), rtol=1e-5, atol=0)
    assert all((got[1][name] - g).norm() <= 1e-5 * g.norm() for name, g in expected.items())
    scored = batch["labels"][:, 1:] != -100
    torch.testing.assert_close(stats.nll.view(3, 16)[scored], nll[scored], rtol=1e-4, atol=1e-5)


def test_the_switch_goes_on_and_off():
    model, batch = tiny_llama(VOCAB), a_batch()
    switch = use_linear_cross_entropy(model)
    assert model(**batch).logits is None
    switch.undo()
    assert "forward" not in model.__dict__
    assert model(**batch).logits is not None
    own = model.forward = model.forward  # another patch, as TRL's and accelerate's
    with switch.install():
        assert model(**batch).logits is None
    assert model.__dict__["forward"] is own
    with pytest.raises(RuntimeError, match="already installed"):
        switch.install().install()


def test_trainers_of_others_take_it_as_it_is(tmp_path):
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in ROWS]
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}

    def run(model):
        collator, arguments = DataCollatorForSeq2Seq(TOKENIZER), TrainingArguments(**settings(tmp_path, **changes))
        data = Dataset.from_list(rows)
        trainer = Trainer(model, arguments, data_collator=collator, train_dataset=data, eval_dataset=data)
        curve = trained(trainer)
        curve.losses.append(trainer.evaluate()["eval_loss"])
        return curve

    model = tiny_llama(VOCAB)
    with use_linear_cross_entropy(model):
        without_logits = run(model)
    assert distance(without_logits, run(tiny_llama(VOCAB))) < 1e-5


@pytest.mark.parametrize("trained_parts", [{"target_modules": ["q_proj"]}, {"modules_to_save": ["lm_head"]}])
def test_the_switch_with_peft(trained_parts):
    model = get_peft_model(tiny_llama(VOCAB), LoraConfig(r=4, init_lora_weights=False, **trained_parts))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(4)))
    expected = gradients(model, **a_batch())
    with use_linear_cross_entropy(model):
        assert_same(gradients(model, **a_batch()), expected)


def test_an_adapter_on_the_head_is_refused():
    model = get_peft_model(tiny_llama(VOCAB), LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="modules_to_save"):
        use_linear_cross_entropy(model)


def test_under_autocast():
    model = tiny_llama(VOCAB)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradients(model, **a_batch())
        with use_linear_cross_entropy(model):
            got = gradients(model, **a_batch())
    torch.testing.assert_close(got[0].loss, expected[0].loss, rtol=1e-2, atol=0)
    assert got[0].loss.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in got[1].values())
    with torch.no_grad():
        exact = model(**a_batch()).loss
    assert abs(got[0].loss - exact) <= abs(expected[0].loss - exact) + 1e-3


def test_imports_are_lazy_and_say_what_is_missing():
    program = (
        "import sys, lark_fast.trainers as t; assert not {'torch', 'trl', 'transformers'} & set(sys.modules)\n"
        "sys.modules['trl'] = None\n"
        "try: t.WeightedSFTTrainer\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'WeightedSFTTrainer needs trl: pip install "lark-fast[trl]"'
