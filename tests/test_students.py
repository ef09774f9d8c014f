"""Students as people have them: adapters, quantised, spread over devices, with eyes, by hub id; and what they lack."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

from lark_fast.attention import Pack
from lark_fast.student_files import find_student
from tests.command import make_records, write_jsonl, write_student
from tests.students import (
    SEQUENCES,
    WORDS,
    load,
    our_nll,
    same,
    score,
    scores_of,
    with_tokenizer,
    write_base,
    write_tied,
)
from tests.tiny import tiny_decoder, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("students")


@pytest.fixture(scope="module")
def pool(place):
    return write_jsonl(place / "pool.jsonl", make_records(2))


@pytest.fixture(scope="module")
def base(place):
    return write_base(place / "base")


@pytest.fixture(scope="module")
def tied(place):
    return write_tied(place / "tied")


def write_adapter(base, out, *, seed=0, config=None, **options):
    """An adapter that changes a lot; ``options`` are LoRA's."""
    model = AutoModelForCausalLM.from_pretrained(base)
    options = {"target_modules": ["q_proj", "down_proj"]} | options
    adapted = get_peft_model(model, config or LoraConfig(task_type="CAUSAL_LM", r=4, **options))
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def adapter(place, base):
    return write_adapter(base, place / "adapter")


@pytest.fixture(scope="module")
def merged(place, base, adapter):
    """The same as a whole checkpoint, as PEFT merges it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(place / "merged")
    return with_tokenizer(place / "merged")


@torch.no_grad()
def eager_nll(model, sequences=SEQUENCES):
    """The same from the model's own logits, a sequence at a time."""
    logits = [model(input_ids=torch.tensor([ids])).logits[0, :-1].float() for ids in sequences]
    labels = [torch.tensor(ids[1:]) for ids in sequences]
    return [F.cross_entropy(*pair, reduction="none") for pair in zip(logits, labels, strict=True)]


# Adapters


def test_an_adapter_scores_as_its_merged_checkpoint_does(tmp_path, command, pool, base, adapter, merged):
    for name, student in (("a", adapter), ("m", merged), ("b", base)):
        command.run(*score(pool, student, tmp_path / name))
    assert scores_of(tmp_path / "a") == scores_of(tmp_path / "m")  # to the last bit
    assert scores_of(tmp_path / "a") != scores_of(tmp_path / "b")
    other = write_adapter(base, tmp_path / "other", seed=1)
    command.refused(score(pool, other, tmp_path / "a"), "adapter was")
    command.refused(score(pool, base, tmp_path / "a"), "adapter was")


def test_an_adapter_whose_base_has_moved(tmp_path, command, pool, base, adapter):
    moved = shutil.copytree(adapter, tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "gone/away/entirely"
    (moved / "adapter_config.json").write_text(json.dumps(config))
    command.refused(score(pool, moved, tmp_path / "s"), "gone/away/entirely: no such directory", "--base DIR")
    inspect = ("inspect", "--pool", pool, "--student", moved)
    command.refused(inspect, "--base DIR")
    assert "scored" in command.run(*inspect, "--base", base)[0]
    train = ("train", "--data", pool, "--student", moved, "--out", tmp_path / "t")
    command.refused(train, "--base DIR")
    own = write_adapter(base, tmp_path / "own")  # one that is found beside it: a relative path
    shutil.copytree(base, own / "base")
    config["base_model_name_or_path"] = "base"
    (own / "adapter_config.json").write_text(json.dumps(config))
    assert find_student(own).base == own / "base"
    command.refused(score(pool, base, tmp_path / "s", "--base", base), "is no adapter")
    command.refused(score(pool, moved, tmp_path / "s", "--base", adapter), "an adapter itself")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_merge_rounds_once(tmp_path, base, dtype):
    stored = tmp_path / "stored"
    AutoModelForCausalLM.from_pretrained(base).to(getattr(torch, dtype)).save_pretrained(stored)
    adapter = write_adapter(stored, tmp_path / "adapter", target_modules=["q_proj", "down_proj", "embed_tokens"])
    exact = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32)
    exact = PeftModel.from_pretrained(exact, adapter).merge_and_unload().to(getattr(torch, dtype)).state_dict()
    ours = load(adapter, dtype=dtype).model.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in exact.items())


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True, "use_rslora": True},
    ],
    ids=["head", "embedding", "whole-head", "dora"],
)
def test_adapters_of_tied_heads_and_embeddings(tmp_path, tied, options):
    # Head and embedding are one tensor, and the adapter is for one of them.
    adapter = write_adapter(tied, tmp_path / "adapter", **options)
    unmerged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tied), adapter).eval()
    same(our_nll(load(adapter)), eager_nll(unmerged), 1e-4)


def test_adapters_that_do_not_fit(tmp_path, command, pool, base, adapter):
    wide, deep, other = tmp_path / "wide", tmp_path / "deep", tmp_path / "gpt2"
    tiny_llama(WORDS, hidden_size=48).save_pretrained(wide)
    tiny_llama(WORDS, num_hidden_layers=3).save_pretrained(deep)
    tiny_decoder("gpt2").save_pretrained(other)
    command.refused(score(pool, adapter, tmp_path / "s", "--base", wide), "does not go with the base", "size mismatch")
    command.refused(score(pool, adapter, tmp_path / "s", "--base", deep), "does not go with", "are missing")
    command.refused(score(pool, adapter, tmp_path / "s", "--base", other), "does not go with the base", "q_proj")
    longer = write_adapter(deep, tmp_path / "longer")
    command.refused(score(pool, longer, tmp_path / "s", "--base", base), "have no place in the base", "layers.2")
    bare = shutil.copytree(adapter, tmp_path / "bare")
    (bare / "adapter_model.safetensors").rename(bare / "adapter_model.bin")
    command.refused(score(pool, bare, tmp_path / "s"), "adapter_model.bin", "safetensors alone")
    (bare / "adapter_model.bin").unlink()
    command.refused(score(pool, bare, tmp_path / "s"), "there is no adapter_model.safetensors")
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    prompt = write_adapter(base, tmp_path / "prompt", config=prompts)
    command.refused(score(pool, prompt, tmp_path / "s"), "PROMPT_TUNING puts tokens of its own before every text")
    assert not (tmp_path / "s").exists()


def test_training_on_an_adapter(tmp_path, command, pool, base, adapter, merged):
    train = ("train", "--data", pool, "--max-steps", 1, "--dtype", "float32", "--save-every", 0)
    command.refused((*train, "--student", adapter, "--out", tmp_path / "t", "--lora"), "--lora-merge")
    rows = write_jsonl(tmp_path / "train.jsonl", ({**record, "weight": 1.0} for record in make_records(2)))
    trained = []
    for name, student in (("a", adapter), ("m", merged)):
        more = ("--data", rows, "--student", student, "--out", tmp_path / name)
        command.run(*train, *more)
        trained.append(load_file(tmp_path / name / "model.safetensors"))
        told = command.run(*train, *more, "--lora", "--lora-merge", "--lora-rank", 2, "--overwrite")[1]
        assert "merged" not in told
        trained.append(load_file(tmp_path / name / "model.safetensors"))
    for ours, theirs in zip(trained[:2], trained[2:], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (tmp_path / "a" / "tokenizer.json").is_file()


# Quantised checkpoints


FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
EIGHT_BITS = {"load_in_8bit": True}
HEAD_TOO = {"llm_int8_skip_modules": ["none"]}


@pytest.fixture(scope="module")
def wider(place):
    """bitsandbytes packs blocks of 64 numbers."""
    tiny_llama(WORDS, hidden_size=64, intermediate_size=128).save_pretrained(place / "wider")
    return place / "wider"


def quantise(base, out, **settings):
    settings = BitsAndBytesConfig(**settings)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=settings).save_pretrained(out)
    return with_tokenizer(out)


@pytest.mark.parametrize(
    ("settings", "alone", "together"),
    [
        (FOUR_BITS, 1e-5, 1e-5),
        # LLM.int8 looks for large activations in all tokens of a pass: in packs a text rounds otherwise.
        (EIGHT_BITS, 1e-5, 5e-2),
        # A quantised head is unpacked: our products are exact, those of the model are not.
        (FOUR_BITS | HEAD_TOO, 5e-2, 1e-2),
        (EIGHT_BITS | HEAD_TOO, 5e-2, 5e-2),
    ],
    ids=["4bit", "8bit", "4bit-head", "8bit-head"],
)
def test_bitsandbytes(tmp_path, wider, settings, alone, together):
    student = load(quantise(wider, tmp_path / "q", **settings), dtype="auto")
    assert student.quantised
    assert student.unpackable is None
    eager = eager_nll(student.model)
    same([our_nll(student, [ids])[0] for ids in SEQUENCES], eager, alone)
    means = [torch.stack([row.mean() for row in rows]) for rows in (our_nll(student), eager)]
    torch.testing.assert_close(*means, rtol=together, atol=0)
    apart = torch.cat(eager) - torch.cat(eager_nll(load(wider).model))
    assert 1e-3 < apart.abs().mean() < 1  # it is quantised, and it is this student


def test_a_quantised_student_through_the_commands(tmp_path, command, pool, wider):
    four = quantise(wider, tmp_path / "q4", **FOUR_BITS)
    command.run("score", "--pool", pool, "--student", four, "--out", tmp_path / "s", "--workers", 0)
    assert json.loads((tmp_path / "s" / "manifest.json").read_text())["identity"]["dtype"] == "float32"
    # An adapter stays beside quantised weights: merged, they would be rounded anew.
    adapter = write_adapter(four, tmp_path / "adapter")
    unmerged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(four), adapter).eval()
    same(our_nll(load(adapter)), eager_nll(unmerged))
    rows = write_jsonl(tmp_path / "train.jsonl", ({**record, "weight": 1.0} for record in make_records(2)))
    train = ("train", "--data", rows, "--student", four, "--out", tmp_path / "t", "--max-steps", 1)
    command.refused(train, "is quantised", "give --lora")
    command.refused((*train, "--lora", "--lora-merge"), "round it anew")
    command.run(*train, "--lora", "--lora-rank", 2, "--dtype", "float32")
    assert (tmp_path / "t" / "adapter_model.safetensors").is_file()
    diagnose = ("diagnose", "--pool", pool, "--student", four, "--out", tmp_path / "d")
    command.refused(diagnose, "--parameters lora")


def test_fp8_without_a_gpu(tmp_path, base):
    # Blocks of 16 x 16 with a scale each, as DeepSeek-V3's and Qwen3's are; Transformers unpacks them here.
    weights, exact = load_file(base / "model.safetensors"), {}
    for name in [name for name in weights if name.endswith("proj.weight")]:
        blocks = weights[name].unflatten(1, (-1, 16)).unflatten(0, (-1, 16))  # [N / 16, 16, D / 16, 16]
        scale = blocks.abs().amax((1, 3), keepdim=True) / 448
        codes = (blocks / scale).to(torch.float8_e4m3fn)
        exact[name] = (codes.float() * scale).flatten(2).flatten(0, 1)
        weights[name] = codes.flatten(2).flatten(0, 1)
        weights[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
    student = shutil.copytree(base, tmp_path / "fp8")
    save_file(weights, student / "model.safetensors", {"format": "pt"})
    config = json.loads((student / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (student / "config.json").write_text(json.dumps(config))
    loaded = load(student)
    same(our_nll(loaded), eager_nll(loaded.model), 1e-4)
    own = loaded.model.state_dict()
    assert all(torch.allclose(own[name].float(), value, rtol=1e-2, atol=1e-6) for name, value in exact.items())


# Larger than one device


PLACES = {
    "layer": {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"},
    "all": {"model.embed_tokens": "disk", "model.layers": "disk", "model.norm": "disk"},
}


@pytest.mark.parametrize("make", ["llama", "tied", "mixtral"])
def test_layers_on_disk(tmp_path, base, tied, make):
    student = {"llama": base, "tied": tied}.get(make) or tmp_path / make
    if make == "mixtral":  # its experts are stored one by one and used as one tensor: they are written anew
        tiny_decoder("mixtral").save_pretrained(student)
    plain = our_nll(load(student))
    for name, devices in PLACES.items():
        head = "cpu" if make == "tied" and name == "layer" else "disk"
        devices = devices | {"model.rotary_emb": "cpu", "lm_head": head}
        (tmp_path / "map.json").write_text(json.dumps(devices))
        spread = load(student, device_map=str(tmp_path / "map.json"))
        assert any(parameter.is_meta for parameter in spread.model.parameters())
        for ours, theirs in zip(our_nll(spread), plain, strict=True):
            assert torch.equal(ours, theirs)


def test_device_maps_through_the_command(tmp_path, monkeypatch, command, pool, base, adapter):
    places = tmp_path / "map.json"
    places.write_text(json.dumps(PLACES["layer"] | {"model.rotary_emb": "cpu", "lm_head": "disk"}))
    command.run(*score(pool, base, tmp_path / "s"))
    told = command.run(*score(pool, base, tmp_path / "d", "--device-map", places))[1]
    assert told.count("\n") == 0 or "offload" not in told
    assert scores_of(tmp_path / "d") == scores_of(tmp_path / "s")
    command.run(*score(pool, base, tmp_path / "a", "--device-map", "auto"))
    assert scores_of(tmp_path / "a") == scores_of(tmp_path / "s")

    def says(*said, device_map=places, student=base, more=()):
        command.refused(score(pool, student, tmp_path / "x", "--device-map", device_map, *more), *said)

    says("elsewhere; merge the adapter", student=adapter)
    says("give one of them", more=("--device", "cpu"))
    says("does not go with --device-map", more=("--compile",))
    says("give one of them", more=("--devices", 2))
    says("neither one of auto", device_map="everywhere")
    for text, said in (('{"": "nowhere"}', "'nowhere'"), ('{"": 9}', "no GPU"), ("[]", "not an object"), ("{", "read")):
        places.write_text(text)
        says(said)
    monkeypatch.setattr("lark_fast.loading.find_spec", lambda _: None)
    says("needs accelerate: pip install")


def test_a_pack_goes_along_from_device_to_device():
    pack = Pack.of((3, 4))
    there = pack.on(torch.device("meta"))
    assert there.cu_seqlens.is_meta
    assert pack.on(torch.device("meta")) is there  # for all layers
    assert pack.on(torch.device("cpu")) is pack
    assert (there.bounds, there.longest) == (pack.bounds, pack.longest)


# Models that see


TEXT = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
EYES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
QWEN_EYES = {
    "depth": 1, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 24,
    "fullatt_block_indexes": [0],
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
QWEN_IDS = {"image_token_id": 99, "video_token_id": 98, "vision_start_token_id": 97, "vision_end_token_id": 96}
SEEING = {
    "Qwen2_5_VLConfig": {"text_config": TEXT | MROPE, "vision_config": QWEN_EYES} | QWEN_IDS,
    "LlavaConfig": {"text_config": TEXT | {"model_type": "llama"}, "vision_config": EYES, "image_token_index": 99},
    "Gemma3Config": {
        "text_config": TEXT | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5},
        "vision_config": EYES,
        "image_token_index": 99,
        "mm_tokens_per_image": 4,
    },
    # Its tokens see all of a prompt.
    "PaliGemmaConfig": {
        "text_config": TEXT | {"model_type": "gemma", "head_dim": 8},
        "vision_config": EYES | {"projection_dim": 32, "vision_use_head": False},
        "image_token_index": 99,
        "projection_dim": 32,
        "hidden_size": 32,
    },
}


def write_seeing(name, out):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(getattr(transformers, name)(**SEEING[name]))
        for parameter in model.parameters():
            parameter.data += torch.randn(parameter.shape) * (
                2 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.2
            )
    model.float().save_pretrained(out)
    return with_tokenizer(out)


@pytest.mark.parametrize("name", ["Qwen2_5_VLConfig", "LlavaConfig", "Gemma3Config"])
def test_models_that_see_read_text(tmp_path, name):
    student = load(write_seeing(name, tmp_path / "eyes"))
    assert student.unpackable is None
    assert student.max_positions == 512
    same(our_nll(student), eager_nll(student.model))


def test_a_model_that_sees_through_the_commands(tmp_path, command):
    student = write_seeing("Qwen2_5_VLConfig", tmp_path / "eyes")
    records = list(make_records(2))
    picture = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}]
    records[1]["messages"][0]["content"] = picture
    pool = write_jsonl(tmp_path / "pool.jsonl", records)
    assert "1 of 6 records rejected" in command.run(*score(pool, student, tmp_path / "s"))[0]
    rejected = json.loads((tmp_path / "s" / "rejected.jsonl").read_text())
    assert rejected["line"] == 2
    assert "scored" in command.run("inspect", "--pool", pool, "--student", student)[0]
    command.refused(score(pool, write_seeing("PaliGemmaConfig", tmp_path / "p"), tmp_path / "x"), "no causal model")


# By hub id


def test_hub_ids_from_the_cache(tmp_path, monkeypatch, command, pool, base, adapter):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def cache(name, directory, revision="main", commit="c" * 40):
        root = tmp_path / "hub" / f"models--org--{name}"
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / revision).write_text(commit)
        shutil.copytree(directory, root / "snapshots" / commit)
        return root / "snapshots" / commit

    cache("tiny", base)
    cache("tiny", write_student(tmp_path / "second", seed=1), "v2", "d" * 40)
    tuned = cache("tuned", adapter)
    config = json.loads((tuned / "adapter_config.json").read_text())
    (tuned / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/tiny"}))
    found = {}
    for name in ("org/tiny", "org/tiny@v2", "org/tuned", base, tmp_path / "second", adapter):
        command.run(*score(pool, name, tmp_path / "s", "--overwrite"))
        found[name] = scores_of(tmp_path / "s")
    assert found["org/tiny"] == found[base]
    assert found["org/tiny@v2"] == found[tmp_path / "second"] != found[base]
    assert found["org/tuned"] == found[adapter]
    for name in ("org/tiny@v3", "org/none"):
        command.refused(score(pool, name, tmp_path / "x"), f"{name}: no such directory", "Hugging Face hub")
