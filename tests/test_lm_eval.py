"""lm-evaluation-harness: its own tasks, by its own Transformers model and by ours."""

import json
import random

import datasets
import pytest
import torch
from lm_eval import evaluate
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from lark_fast.dropins.lm_eval import LarkLM, main
from lark_fast.errors import UserError
from tests.command import write_jsonl, write_student
from tests.tiny import SENTENCES, byte_level_tokenizer, tiny_decoder, tiny_gemma2, tiny_llama, tiny_phi

VOCAB = 400
WINDOW = 48  # tokens: less than some contexts have, and than all texts
LENGTHS = (1, 7, 31, 60)  # of contexts
WORDS = " ".join(SENTENCES).split()
HEADS = {"llama": tiny_llama, "gemma2": tiny_gemma2, "phi": tiny_phi}
# One has no place for a token more than WINDOW, one cannot be packed, one scales positions by the longest of a batch.
INNARDS = {"gpt2": {"max_position_embeddings": WINDOW}, "mamba": {}, "phi3_longrope": {}}
TASKS = {
    "options": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "brier_score")],
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{last}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{last}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def some(rng, least, most):
    return " ".join(rng.choices(WORDS, k=rng.randrange(least, most)))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The folder of four tasks over one JSON file: options of one token, options that begin alike, and one of many."""
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(0)
    docs = []
    for _ in range(8):
        options = [" A", " B", " the answer", " the answer is", " " + some(rng, 2, 6)]
        doc = {"question": some(rng, 2, 30), "last": " " + some(rng, 1, 3), "text": some(rng, 30, 120)}
        docs.append(doc | {"options": options, "right": rng.randrange(5)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        write_jsonl(folder / "docs.jsonl", docs)
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}}}
        for name, task in TASKS.items():
            (folder / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test"} | data | task))
        yield folder


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer(vocab_size=VOCAB)


def evaluated(lm, folder, *names):
    """What ``simple_evaluate`` does, but for the seconds in which it looks at the machine."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return evaluate(lm, manager.load(list(names)), bootstrap_iters=0)


def metrics(results, name):
    """What its table shows."""
    return {key: value for key, value in results["results"][name].items() if isinstance(value, float)}


def answers(results, name):
    """Every number of every request of a task."""
    resps = [resp for sample in results["samples"][name] for resp in sample["filtered_resps"]]
    return torch.stack([torch.tensor(resp).flatten() for resp in resps])


@pytest.mark.parametrize("name", HEADS)
def test_its_own_tasks_have_equal_results(name, tasks, tokenizer):
    model, names = HEADS[name](), ("options", "last_word", "text")
    theirs = evaluated(HFLM(model, tokenizer=tokenizer, max_length=WINDOW, batch_size=4), tasks, *names)
    ours = evaluated(LarkLM(model, tokenizer=tokenizer, max_length=WINDOW, tokens_per_batch=256), tasks, *names)
    for task in names:
        torch.testing.assert_close(answers(ours, task), answers(theirs, task), rtol=1e-5, atol=1e-5)
        assert metrics(ours, task) == pytest.approx(metrics(theirs, task), rel=1e-5), task


def continuations(model, seed=0):
    """Requests as token ids, half of whose continuations are the likeliest; contexts shared, repeated and too long."""
    generator, found = torch.Generator().manual_seed(seed), []
    for length in LENGTHS:
        ids = torch.randint(4, VOCAB, (1, length), generator=generator)
        end = ids[:, -(WINDOW - 2) :]  # as much as is read before three tokens
        likely = model.generate(end, max_new_tokens=3, do_sample=False, pad_token_id=0)[0, end.shape[1] :].tolist()
        drawn = torch.randint(4, VOCAB, (3,), generator=generator).tolist()
        for continuation in (likely, likely[:1], likely[:2], likely[:1], drawn, [*likely[:2], drawn[0]], drawn[:1]):
            found.append((("", ""), ids[0].tolist(), continuation))
    return found


def test_greedy_continuations_and_inputs_that_begin_others(tokenizer):
    model = tiny_llama(VOCAB)
    theirs = HFLM(model, tokenizer=tokenizer, max_length=WINDOW, batch_size=4)
    ours = LarkLM(model, tokenizer=tokenizer, max_length=WINDOW)
    requests, shapes = continuations(model), []
    hooks = [
        model.get_input_embeddings().register_forward_hook(lambda _, args, __: shapes.append(args[0].numel())),
        model.get_output_embeddings().register_forward_hook(lambda _, __, logits: shapes.append(logits.numel())),
    ]
    ours._loglikelihood_tokens(requests[:1])  # a look at how the model packs goes before
    shapes.clear()
    got = ours._loglikelihood_tokens(requests)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(torch.tensor(got), torch.tensor(theirs._loglikelihood_tokens(requests)))
    assert {greedy for _, greedy in got} == {True, False}
    # Two of a context's continuations have three tokens and begin differently; the others lie in their inputs, but for
    # those that reach further back into the context that is too long. And no logit was made.
    fitting = [2 * (length + 2) for length in LENGTHS[:-1]]
    assert shapes == [sum(fitting) + 4 * WINDOW, 0]
    alone = LarkLM(model, tokenizer=tokenizer, max_length=WINDOW, logits_cache=False)
    torch.testing.assert_close(torch.tensor(alone._loglikelihood_tokens(requests)), torch.tensor(got))
    with pytest.raises(ValueError, match="0 tokens of context and 1 of continuation"):
        ours._loglikelihood_tokens([(("", "x"), [], [5])])


@pytest.mark.parametrize("name", INNARDS)
def test_models_of_other_kinds(name, tokenizer):
    model = tiny_decoder(name, VOCAB, **INNARDS[name])
    requests = continuations(model)
    theirs = HFLM(model, tokenizer=tokenizer, max_length=WINDOW)._loglikelihood_tokens(requests)
    ours = LarkLM(model, tokenizer=tokenizer, max_length=WINDOW)._loglikelihood_tokens(requests)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-5)


def test_what_was_answered_is_remembered(tasks, tokenizer, tmp_path):
    model, names = tiny_llama(VOCAB), ("options", "last_word", "text")
    lm = LarkLM(model, tokenizer=tokenizer, max_length=WINDOW)
    first = evaluated(CachingLM(lm, str(tmp_path / "known")), tasks, *names)
    model.forward = None  # whoever calls it fails
    again = evaluated(CachingLM(lm, str(tmp_path / "known")), tasks, *names)
    assert [metrics(again, task) for task in names] == [metrics(first, task) for task in names]


def test_adapters(tasks, tokenizer):
    model = get_peft_model(tiny_llama(VOCAB), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    theirs = evaluated(HFLM(model, tokenizer=tokenizer, max_length=WINDOW), tasks, "last_word")
    ours = evaluated(LarkLM(model, tokenizer=tokenizer, max_length=WINDOW), tasks, "last_word")
    assert metrics(ours, "last_word") == pytest.approx(metrics(theirs, "last_word"), rel=1e-5)
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UserError, match="puts tokens in front of the prompt"):
        LarkLM(get_peft_model(tiny_llama(VOCAB), prompt), tokenizer=tokenizer)


def test_the_command_line_is_its_own(tasks, tokenizer, tmp_path, monkeypatch, capsys):
    student = write_student(tmp_path / "student", tokenizer=tokenizer)
    # Half a minute for its catalogue of 13,000 tasks and a list of what is installed here.
    monkeypatch.setattr(TaskManager.__init__, "__defaults__", (None, None, False, None))
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", str)

    def called(arguments):
        words = ["lm_eval", "run", "--model", "lark-fast", "--model_args", f"pretrained={student},{arguments}"]
        words += ["--device", "cpu", "--include_path", str(tasks), "--tasks", "options,written"]
        monkeypatch.setattr("sys.argv", [*words, "--output_path", str(tmp_path / "out")])
        main()

    called("dtype=float32,tokens_per_batch=300,max_length=300")
    assert "acc_norm" in capsys.readouterr().out
    (file,) = (tmp_path / "out").rglob("results_*.json")
    theirs = evaluated(HFLM(str(student), device="cpu", max_length=300), tasks, "options", "written")
    for task in ("options", "written"):
        own = metrics(json.loads(file.read_text()), task)
        shown = {name: value for name, value in metrics(theirs, task).items() if "stderr" not in name}
        assert shown == pytest.approx({name: own[name] for name in shown}, rel=1e-5)
    for arguments, message in (("tokens_per_batch=0", "at least 1"), ("tp_plan=auto", "--model hf spreads")):
        with pytest.raises(SystemExit, match="2"):
            called(arguments)
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("lark-fast: ")
        assert message in line
