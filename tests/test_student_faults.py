"""Students that cannot be scored: what is missing or wrong is said in one line."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.command import make_records, write_jsonl
from tests.students import TOKENIZER, WORDS, load, our_nll, same, score, scores_of, write_base, write_tied
from tests.templates import CHATML
from tests.tiny import byte_level_tokenizer, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("pool") / "pool.jsonl", make_records(2))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("students") / "base")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return write_tied(tmp_path_factory.mktemp("students") / "tied")


def changed_weights(student, change):
    weights = load_file(student / "model.safetensors")
    change(weights)
    save_file(weights, student / "model.safetensors", {"format": "pt"})


def rewrite_config(student, **changes):
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | changes))


def lack_a_tensor(student):
    changed_weights(student, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))


def lack_the_head(student):
    changed_weights(student, lambda weights: weights.pop("lm_head.weight"))


def be_cut_short(student):
    whole = (student / "model.safetensors").read_bytes()
    (student / "model.safetensors").write_bytes(whole[:-100])


def shards(student):
    AutoModelForCausalLM.from_pretrained(student).save_pretrained(student, max_shard_size="50KB")
    (student / "model.safetensors").unlink(missing_ok=True)
    return sorted(student.glob("model-*.safetensors"))


def lack_a_shard(student):
    shards(student)[1].unlink()


def have_a_torn_shard(student):
    torn = shards(student)[1]
    torn.write_bytes(torn.read_bytes()[:200])


def be_a_pickle(student):
    (student / "model.safetensors").unlink()
    torch.save({}, student / "pytorch_model.bin")


def be_of_other_shapes(student):
    rewrite_config(student, intermediate_size=40)


def have_a_smaller_embedding(student):
    tiny_llama(300).save_pretrained(student)


def be_an_encoder(student):
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    transformers.BertLMHeadModel(config).save_pretrained(student)


def be_two(student):
    config = transformers.T5Config(vocab_size=WORDS, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(student)


def be_unheard_of(student):
    rewrite_config(student, model_type="unheard-of")


def have_a_config_of_nonsense(student):
    rewrite_config(student, num_hidden_layers="two")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lack_a_tensor, ["lacks 1 of the model's tensors", "model.layers.1.mlp.up_proj.weight"]),
        (lack_the_head, ["lm_head.weight"]),
        (be_cut_short, ["model.safetensors is cut short or damaged"]),
        (lack_a_shard, ["model-00002-of-", "is missing", "model.safetensors.index.json"]),
        (have_a_torn_shard, ["model-00002-of-", "cut short or damaged"]),
        (be_a_pickle, ["pytorch_model.bin", "safetensors alone", "save_pretrained"]),
        (be_of_other_shapes, ["mlp.down_proj.weight is 32 x 48 in the checkpoint, and 32 x 40"]),
        (have_a_smaller_embedding, ["tokenizer does not go with the model", "300 rows"]),
        (be_an_encoder, ["bert is an encoder"]),
        (be_two, ["t5 is an encoder and a decoder"]),
        (be_unheard_of, ["unheard-of"]),
        (have_a_config_of_nonsense, ["num_hidden_layers"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_checkpoint_with_a_fault(tmp_path, command, pool, base, wrong, said):
    student = shutil.copytree(base, tmp_path / "student")
    wrong(student)
    command.refused(score(pool, student, tmp_path / "s"), f"{student}: ", *said)
    assert not (tmp_path / "s").exists()


def test_a_tied_head_is_not_missing_and_strangers_are_told(tmp_path, command, pool, tied):
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    student = shutil.copytree(tied, tmp_path / "student")
    changed_weights(student, lambda weights: weights.update({"value_head.weight": torch.zeros(1, 32)}))
    told = command.run(*score(pool, student, tmp_path / "s"))[1]
    assert "1 tensors of the checkpoint have no place in the model, the first is value_head.weight" in told
    command.run(*score(pool, tied, tmp_path / "t"))
    assert scores_of(tmp_path / "s") == scores_of(tmp_path / "t")


def test_sharded_checkpoints(tmp_path, base):
    student = shutil.copytree(base, tmp_path / "student")
    assert len(shards(student)) > 2
    same(our_nll(load(student)), our_nll(load(base)), 0)


def test_scores_do_not_go_among_the_students_files(tmp_path, command, pool, base):
    student = shutil.copytree(base, tmp_path / "student")
    before = sorted(student.iterdir())
    command.refused(score(pool, student, student), f"--out {student}: holds --student {student}")
    assert sorted(student.iterdir()) == before


@pytest.mark.parametrize(
    ("device", "said"), [("cuda:9", "cuda"), ("banana", "no device is called 'banana'"), ("meta", "holds no numbers")]
)
def test_a_device_that_is_not_there(tmp_path, command, pool, base, device, said):
    command.refused(score(pool, base, tmp_path / "s", "--device", device), f"--device {device}", said)


def test_added_tokens_may_lie_beyond_the_embedding(tmp_path, base):
    # Gemma-3's smallest has a token for images, and no row for it.
    student = shutil.copytree(base, tmp_path / "student")
    tiny_llama(len(TOKENIZER)).save_pretrained(student)
    longer = byte_level_tokenizer(CHATML)
    longer.add_tokens(["<image>"], special_tokens=True)
    longer.save_pretrained(student)
    assert load(student, tokenizer=True).vocab_size < len(longer)
