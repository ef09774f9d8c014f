"""What the callback writes during real trainers' runs, against the scorer's numbers of the same samples."""

import gc
import json

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from trl import SFTTrainer

from lark_fast import Scorer
from lark_fast.kernels.token_stats import token_stats
from lark_fast.kernels.trajectory_reduce import MAX_RANK
from lark_fast.scoring.feed import token_hash
from lark_fast.trainers import SampleLog, read_sample_log, use_linear_cross_entropy
from tests.tiny import byte_level_tokenizer, tiny_gemma2, tiny_llama
from tests.trainer_runs import LAYOUTS, ROWS, VOCAB, hf, settings, sft, trained

# Of every other sample all tokens are scored, but for the first, which nothing predicts.
ROWS = [row | ({"labels": row["input_ids"]} if place % 2 else {}) for place, row in enumerate(ROWS)]
PLAIN = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in ROWS]
MEANS = ("n_tokens", "nll", "brier", "entropy", "rank_mean")
WHOLE = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 6}  # an epoch is a step


@pytest.fixture(scope="module", autouse=True)
def _nothing_to_collect():
    """As in test_trainers.py."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def name_of(row):
    return token_hash(row["input_ids"], [-100, *row["labels"][1:]]).hex()


def scored(model, rows=ROWS):
    """The scorer's numbers of every row, by the sample's name."""
    stats = Scorer(model).score_tokens([row["input_ids"] for row in rows], [row["labels"] for row in rows])
    found = {}
    for row, own in zip(rows, stats, strict=True):
        columns = (own.nll, own.brier, own.entropy, own.rank.clamp(max=MAX_RANK))
        found[name_of(row)] = [len(own.nll), *(column.double().mean().item() for column in columns)]
    return found


def lines(folder, **wanted):
    written = [json.loads(line) for line in (folder / "rank-00000.jsonl").read_text().splitlines()]
    return [line for line in written if all(line[key] == value for key, value in wanted.items())]


def assert_as_scored(folder, expected, **wanted):
    """Each sample once, and its numbers the scorer's."""
    found = lines(folder, **wanted)
    assert sorted(line["sample"] for line in found) == sorted(expected)
    for line in found:
        assert [line[name] for name in MEANS] == pytest.approx(expected[line["sample"]], rel=1e-5, abs=1e-5)


def plain(out, rows=PLAIN, *, model=None, callbacks=(), eval_rows=None, columns=(), **changes):
    """Transformers' trainer, padding on the left."""
    tokenizer = byte_level_tokenizer(vocab_size=VOCAB)
    tokenizer.padding_side = "left"
    collator = DataCollatorForSeq2Seq(tokenizer)

    def collate(rows):
        named = {name: torch.tensor([row[name] for row in rows]) for name in columns}
        return collator([{k: v for k, v in row.items() if k not in columns} for row in rows]) | named

    compute_loss_func = changes.pop("compute_loss_func", None)
    return Trainer(
        model or tiny_llama(VOCAB),
        TrainingArguments(**settings(out, **(WHOLE | changes))),
        data_collator=collate,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        callbacks=list(callbacks),
        compute_loss_func=compute_loss_func,
    )


def runs(out, layout, *, ours):
    """A trainer of each kind, with a model of its own."""
    if ours:
        return lambda model: sft(out, ROWS, model=model, layout=layout, num_train_epochs=2, **WHOLE)
    return lambda model: sft(out, PLAIN, model=model, layout=layout, num_train_epochs=2, kind=SFTTrainer, **WHOLE)


@pytest.mark.parametrize("ours", [False, True], ids=["trl", "weighted"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_sample_in_each_pass(layout, ours, tmp_path):
    make = runs(tmp_path, layout, ours=ours)
    model = tiny_gemma2(VOCAB) if layout == "padded" else tiny_llama(VOCAB)
    state, expected = {name: value.clone() for name, value in model.state_dict().items()}, scored(model)
    trainer = make(model)
    trainer.add_callback(SampleLog(tmp_path / "log"))
    logged = trained(trainer)
    assert_as_scored(tmp_path / "log", expected, step=0, epoch=0.0, split="train")
    assert {(line["step"], line["epoch"]) for line in lines(tmp_path / "log")} == {(0, 0.0), (1, 1.0)}
    nll = read_sample_log(tmp_path / "log")
    assert nll.keys() == expected.keys()
    assert all(len(own) == 2 and own[1] != own[0] for own in nll.values())
    assert not model._forward_pre_hooks
    model.load_state_dict(state)
    without = trained(make(model))
    assert without.losses == logged.losses
    assert all(torch.equal(p, without.parameters[name]) for name, p in logged.parameters.items())


def test_transformers_trainer_with_its_evaluations_and_a_column_of_names(tmp_path):
    model = tiny_llama(VOCAB)
    expected = scored(model)
    rows = [row | {"index": 100 + place} for place, row in enumerate(PLAIN)]
    settings = {"remove_unused_columns": False, "gradient_checkpointing": True, "eval_strategy": "epoch"}
    log = SampleLog(tmp_path / "log", sample_column="index", evaluation=True)
    trainer = plain(tmp_path, rows, model=model, callbacks=[log], columns=["index"], eval_rows=rows[:5], **settings)
    trained(trainer)
    assert_as_scored(tmp_path / "log", {str(100 + i): expected[name_of(row)] for i, row in enumerate(ROWS)}, step=0)
    after = scored(model, ROWS[:5])
    named = {str(100 + i): after[name_of(row)] for i, row in enumerate(ROWS[:5])}
    assert_as_scored(tmp_path / "log", named, split="eval", step=1)
    silent = SampleLog(tmp_path / "silent")
    trained(plain(tmp_path, callbacks=[silent], eval_rows=PLAIN[:5], eval_strategy="epoch"))
    assert len(lines(tmp_path / "silent")) == len(ROWS)
    lost = plain(tmp_path, callbacks=[SampleLog(tmp_path / "lost", sample_column="index")])
    with pytest.raises(ValueError, match="no column 'index' gets to the model"):
        lost.train()


def test_without_logits_and_with_adapters(tmp_path):
    model = get_peft_model(tiny_llama(VOCAB), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    expected = scored(model.get_base_model())
    with use_linear_cross_entropy(model):
        trained(plain(tmp_path, model=model, callbacks=[SampleLog(tmp_path / "log")]))
    assert_as_scored(tmp_path / "log", expected, step=0)
    trainer = hf(tmp_path, ROWS, padding_free=True, **WHOLE)
    trainer.add_callback(SampleLog(tmp_path / "flat"))
    trained(trainer)
    assert_as_scored(tmp_path / "flat", scored(tiny_llama(VOCAB)), step=0)
    adapted = get_peft_model(tiny_llama(VOCAB), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="carries a PEFT adapter"):
        plain(tmp_path, model=adapted, callbacks=[SampleLog(tmp_path / "adapted")]).train()


def test_under_autocast(tmp_path):
    model, expected = tiny_llama(VOCAB), {}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for row in PLAIN:
            hidden = model.model(torch.tensor([row["input_ids"]])).last_hidden_state[0, :-1].bfloat16()
            labels = torch.tensor(row["labels"][1:])
            nll = token_stats(hidden, model.lm_head.weight.bfloat16(), labels).nll
            expected[name_of(row)] = nll[labels != -100].double().mean().item()
    alone = {"bf16": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": len(PLAIN)}
    logged = trained(plain(tmp_path, model=model, callbacks=[SampleLog(tmp_path / "log")], **alone))
    assert logged.losses == trained(plain(tmp_path, **alone)).losses
    assert {line["sample"]: line["nll"] for line in lines(tmp_path / "log")} == pytest.approx(expected, rel=1e-6)


def test_losses_outside_of_the_model(tmp_path):
    for changes in (
        {"label_smoothing_factor": 0.1},
        {"compute_loss_func": lambda outputs, *_, **__: outputs[0].mean()},
    ):
        with pytest.raises(ValueError, match="has seen no labels"):
            plain(tmp_path, callbacks=[SampleLog(tmp_path / "log", overwrite=True)], **changes).train()
    trainer = sft(tmp_path, PLAIN, kind=SFTTrainer, label_smoothing_factor=0.1, **WHOLE)  # whose metrics need them
    trainer.add_callback(SampleLog(tmp_path / "log", overwrite=True))
    trained(trainer)
    assert_as_scored(tmp_path / "log", scored(tiny_llama(VOCAB)))


def test_a_resumed_run_goes_on_with_its_file(tmp_path):
    changes = {"max_steps": 4, "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 2}
    changes |= {"eval_strategy": "steps", "eval_steps": 1, "eval_rows": PLAIN[:3]}

    def run(out, **arguments):
        return trained(plain(out, callbacks=[SampleLog(out / "log", evaluation=True)], **changes), **arguments)

    run(tmp_path)
    file = tmp_path / "log" / "rank-00000.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])  # as a kill leaves it
    run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert file.read_bytes() == whole
    assert [len(own) for own in read_sample_log(tmp_path / "log", "rank_mean", split="eval").values()] == [4, 4, 4]
    with pytest.raises(ValueError, match="holds another run's log"):
        run(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no rank-\*\.jsonl"):
        read_sample_log(tmp_path)


@pytest.mark.parametrize("marks", ["position_ids", "cu_seq_lens_q", "seq_idx", "attention_mask"])
def test_samples_of_a_row_are_told_apart_by(marks, tmp_path):
    flatten = DataCollatorWithFlattening(
        return_position_ids=marks == "position_ids",
        return_flash_attn_kwargs=marks == "cu_seq_lens_q",
        return_seq_idx=marks == "seq_idx",
    )

    def collate(rows):
        batch = dict(flatten(rows))
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        if marks == "attention_mask":
            batch |= {marks: torch.arange(1, 1 + len(rows)).repeat_interleave(lengths)[None]}
        names = torch.tensor([row["input_ids"][-1] for row in rows]).repeat_interleave(lengths)[None]
        return batch | {"names": names[:, : names.shape[1] - of_rows * (names.shape[1] - 1)]}

    rows = [{"input_ids": [9], "labels": [9]}, *PLAIN, *PLAIN[:1]]  # of a lone token there is nothing to say
    for of_rows in (False, True):
        log = SampleLog(tmp_path / "log", sample_column="names", overwrite=True)
        trainer = plain(tmp_path, rows, callbacks=[log], remove_unused_columns=False)
        trainer.data_collator = collate
        if of_rows:
            with pytest.raises(ValueError, match=r"2 samples in 1 rows, and a sample_column of 1 names"):
                trainer.train()
        else:
            trainer.train()
            assert sorted(read_sample_log(tmp_path / "log")) == sorted({str(row["input_ids"][-1]) for row in ROWS})
            tokens = {str(row["input_ids"][-1]): sum(label != -100 for label in row["labels"][1:]) for row in ROWS}
            assert {line["sample"]: line["n_tokens"] for line in lines(tmp_path / "log")} == tokens


class Shrinks(LlamaForCausalLM):
    """Puts something between its layers and its head."""

    def forward(self, input_ids=None, **kwargs):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        return type("Outputs", (), {"logits": self.lm_head(hidden / 2)})()


def test_what_is_not_known_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not give its head what its layers end with"):
        plain(tmp_path, model=Shrinks(tiny_llama(VOCAB).config), callbacks=[SampleLog(tmp_path / "log")]).train()
    changes = {"torch_compile": True, "torch_compile_backend": "eager"}
    with pytest.raises(ValueError, match="sees nothing of a compiled model"):
        plain(tmp_path, callbacks=[SampleLog(tmp_path / "log")], **changes).train()
