"""How answers come about: the same in every batch, drawn as they should be, and stopped where they end."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import TopPLogitsWarper

from lark_fast.errors import UserError
from lark_fast.evaluation.backends.backend import Prompt, choose_backend
from lark_fast.evaluation.backends.draws import GumbelNoise, TopP
from lark_fast.evaluation.backends.seeds import stream
from lark_fast.evaluation.backends.transformers import TransformersBackend, _draw, _Row, _Watch
from lark_fast.evaluation.config import Sampling
from tests.templates import CHATML
from tests.tiny import byte_level_tokenizer, tiny_decoder, tiny_gemma2, tiny_llama

TOKENIZER = byte_level_tokenizer(CHATML)
STOP = TOKENIZER.eos_token_id
LENGTHS = (3, 11, 1, 7, 20)  # of the prompts
LIMITS = (60, 20, 45, 30, 40)  # of the answers: some leave their batch after the first stretch


def prompts():
    rng = np.random.default_rng(3)
    ids = [tuple(rng.integers(10, len(TOKENIZER), size=length).tolist()) for length in LENGTHS]
    return [
        Prompt(key=str(place), ids=words, thinking=False, max_new_tokens=limit)
        for place, (words, limit) in enumerate(zip(ids, LIMITS, strict=True))
    ]


def answers(model, sampling, *, batch_size, asked=None):
    backend = TransformersBackend(model, TOKENIZER, (STOP,), batch_size=batch_size)
    made = dict(backend.generate(asked or prompts(), sampling))
    return [made[place] for place in range(len(asked or LENGTHS))]


def by_hand(model, prompt):
    """Greedy, a token at a time, without a cache, a batch or padding."""
    ids = list(prompt.ids)
    for _ in range(prompt.max_new_tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == STOP:
            break
    return ids[len(prompt.ids) :]


@pytest.fixture(scope="module")
def llama():
    return tiny_llama(len(TOKENIZER), seed=1).eval()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma2], ids=["llama", "sliding window and softcap"])
@torch.no_grad()
def test_greedy_answers_are_the_likeliest_tokens(make):
    model = make(len(TOKENIZER), seed=1).eval()
    expected = [by_hand(model, prompt) for prompt in prompts()]
    for batch_size in (5, 2, 1):
        found = answers(model, Sampling(), batch_size=batch_size)
        assert [one.tokens for (one,) in found] == [len(tokens) for tokens in expected]
        assert [one.text for (one,) in found] == [
            TOKENIZER.decode(tokens, skip_special_tokens=True) for tokens in expected
        ]
        assert [one.finish for (one,) in found] == ["stop" if tokens[-1] == STOP else "length" for tokens in expected]


def test_draws_do_not_depend_on_the_batch_or_on_who_was_asked_before(llama):
    sampling = Sampling(n=3, temperature=1.3, top_p=0.9, seed=5)
    whole = answers(llama, sampling, batch_size=15)
    assert len({one.text for one in whole[0]}) == 3
    assert {one.tokens <= 32 for (one, *_) in whole} == {True, False}, "all leave at once: nothing is shown"
    for batch_size in (4, 1):
        assert answers(llama, sampling, batch_size=batch_size) == whole
    assert answers(llama, sampling, batch_size=4, asked=prompts()[2:4]) == whole[2:4]
    assert answers(llama, Sampling(n=3, temperature=1.3, top_p=0.9, seed=6), batch_size=15) != whole


def test_a_checkpoints_own_settings_do_not_count(llama):
    expected = answers(llama, Sampling(), batch_size=5)
    llama.generation_config = GenerationConfig(repetition_penalty=5.0, top_k=1, do_sample=True, max_new_tokens=2)
    assert answers(llama, Sampling(), batch_size=5) == expected


def test_gumbel_noise_draws_from_the_softmax():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -float("inf")])
    draw = GumbelNoise([torch.Generator().manual_seed(stream(0, "problem", row)) for row in range(20_000)])
    drawn = draw(None, logits.repeat(20_000, 1)).argmax(dim=1).bincount(minlength=5)
    expected = 20_000 * logits.softmax(0)
    assert drawn[4] == 0
    chi2 = ((drawn - expected) ** 2 / expected)[:4].sum()
    assert chi2 < 16.3, "more than 99.9 % of such draws"  # three degrees of freedom


def test_temperature_and_top_p_come_before_the_draw():
    row = _Row((0, 0), prompts()[0], torch.Generator().manual_seed(0))
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    draw = _draw([row], Sampling(n=2, temperature=1.0, top_p=0.75))
    kept = torch.stack([draw(None, logits)[0] for _ in range(50)])
    assert torch.isinf(kept[:, 2:]).all()
    assert torch.isfinite(kept[:, :2]).all()
    # At temperature 1/2 probabilities are squared: the first has 0.25 of 0.365, which is 0.68.
    draw = _draw([row], Sampling(n=2, temperature=0.5, top_p=0.65))
    assert torch.isinf(draw(None, logits)[0, 1:]).all()
    assert len(_draw([row], Sampling())) == 0


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.95, 0.9999])
def test_top_p_keeps_what_transformers_keeps(top_p):
    scale = torch.tensor([[0.0], [0.01], [1.0], [5.0], [60.0]])  # flat rows need more than the likeliest few
    logits = scale * torch.randn(5, 3000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits[0] = -torch.arange(3000) * 1e-5
    expected = TopPLogitsWarper(top_p)(None, logits.clone())
    torch.testing.assert_close(TopP(top_p)(None, logits), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("text", "thinking", "finish"),
    [
        ("so \\boxed{42} and", False, "answer"),
        ("so \\boxed{\\frac{1}{2}} and", False, "answer"),
        ("a set {1, 2} and", False, ""),
        ("so \\boxed{42", False, ""),
        ("<think> it is \\boxed{1} maybe", False, ""),
        ("<think> it is \\boxed{1} maybe </think> \\boxed{2} so", False, "answer"),
        ("it is \\boxed{1} maybe", True, ""),
        ("it is \\boxed{1} maybe </think> so \\boxed{2} it", True, "answer"),
    ],
    ids=["box", "nested", "braces", "open", "in thoughts", "behind thoughts", "in opened thoughts", "behind opened"],
)
def test_an_answer_ends_behind_its_box(text, thinking, finish):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    closing = frozenset(number for word, number in TOKENIZER.get_vocab().items() if "}" in word)
    for stop_at_answer in (True, False):
        row = _Row((0, 0), Prompt(key="", ids=(1,), thinking=thinking, max_new_tokens=1000), None)
        watch = _Watch([row], TOKENIZER, closing, (STOP,), stop_at_answer=stop_at_answer)
        for place in range(len(ids)):
            watch(torch.tensor([ids[: place + 1]]), None)
        assert row.finish == (finish if stop_at_answer else "")
        written = TOKENIZER.decode(row.written)
        assert written.endswith("}") if row.finish else written == text


@pytest.mark.parametrize("name", ["mamba", "qwen3_next", "falcon_h1"])
def test_models_that_keep_more_than_keys_and_values(name):
    model = tiny_decoder(name, len(TOKENIZER), seed=1).eval()
    whole = answers(model, Sampling(), batch_size=5)
    assert answers(model, Sampling(), batch_size=1) == whole


def test_settings_that_no_backend_can_do():
    for settings, said in [
        ({"n": 0}, "--n 0"),
        ({"n": 2}, "temperature"),
        ({"temperature": -1.0}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"top_p": 0.0}, "--top-p"),
        ({"max_new_tokens": 0}, "--max-new-tokens"),
    ]:
        with pytest.raises(ValueError, match=said):
            Sampling(**settings)


def test_which_backend():
    assert choose_backend("auto", "cpu") == "transformers"
    assert choose_backend("transformers", "cuda") == "transformers"
    with pytest.raises(UserError, match="unknown"):
        choose_backend("tgi", "cpu")
    for name in ("vllm", "sglang"):
        if find_spec(name) is None:
            with pytest.raises(UserError, match=f"pip install {name}"):
                choose_backend(name, "cuda")
