"""The scorer against the eager way of doing it, on every kind of head; and what must not change a score."""

import copy

import numpy as np
import pytest
import torch

from lark_fast import Scorer, g_hat
from lark_fast.kernels.token_stats import IGNORE_INDEX, token_stats_naive
from lark_fast.pool.records import normalise
from lark_fast.rendering.renderer import Rendered, RenderOptions
from lark_fast.student import Student
from tests.eager import eager_g_hat, eager_scores
from tests.templates import CHATML
from tests.tiny import TINY_MODELS, byte_level_tokenizer, tiny_llama

ANSWERS = ["It is 4.", "Let me think. 12 / 3 = 4, so the answer is 4.", "Five!", "the answer " * 30, "四 ≠ 5 🙂"]


def record(answer, problem="p", candidate=0):
    turns = [{"role": "user", "content": f"What is 12 / 3? ({problem})"}, {"role": "assistant", "content": answer}]
    return {"problem_id": problem, "candidate_id": candidate, "teacher": "t", "messages": turns}


RECORDS = [record(answer, f"p{i % 2}", i) for i, answer in enumerate(ANSWERS)]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer(CHATML)


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("top_k", [None, 50])
def test_every_kind_of_head_gives_the_reference_numbers(name, top_k, tokenizer):
    # A padded vocabulary, as checkpoints have it: 61 rows that no token uses.
    model = TINY_MODELS[name](len(tokenizer) + 61)
    scores = Scorer(model, tokenizer, top_k=top_k).score(RECORDS)
    vocabulary = len(tokenizer) + 61
    nll, brier = [], []
    for raw, score in zip(RECORDS, scores, strict=True):
        prompt = f"<|im_start|>user\n{raw['messages'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        whole = f"{prompt}{raw['messages'][1]['content']}<|im_end|>\n"
        ids = tokenizer(whole, add_special_tokens=False).input_ids
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        expected = eager_scores(model, ids, start, top_k or vocabulary)
        nll.append(expected[0])
        brier.append(expected[1])
        assert score.n_tokens == len(ids) - start
        assert score.n_input_tokens == len(ids)
        assert score.nll == pytest.approx(expected[0], rel=1e-5)
        used = score.brier if top_k is None else score.brier_topk
        assert used == pytest.approx(expected[1], rel=1e-5)
        assert score.rho == pytest.approx(expected[1] / expected[0], rel=1e-5)
    ours = g_hat([s.nll for s in scores], [s.brier_topk or s.brier for s in scores], [s.problem_id for s in scores])
    for p in ("p0", "p1"):
        own = [i for i, s in enumerate(scores) if s.problem_id == p]
        expected = eager_g_hat([nll[i] for i in own], [brier[i] for i in own])
        np.testing.assert_allclose(ours[own], expected, rtol=1e-4, atol=1e-5)


def test_all_statistics_against_float64(tokenizer):
    model = tiny_llama(len(tokenizer))
    score = Scorer(model, tokenizer, top_k=7).score([RECORDS[1]])[0]
    double = Student(copy.deepcopy(model).double())
    item = Scorer(model, tokenizer).renderer(normalise(RECORDS[1]))
    ids, labels = torch.tensor([item.input_ids]), torch.tensor(item.labels)
    with torch.no_grad():
        hidden = double.hidden(ids)[0, :-1]
    truth = token_stats_naive(hidden, double.head.weight, labels[1:], top_k=7)
    kept = labels[1:] != IGNORE_INDEX
    rank = truth.rank[kept].clamp(max=100).double()
    assert score.nll == pytest.approx(truth.nll[kept].mean().item(), rel=1e-5)
    assert score.brier == pytest.approx(truth.brier[kept].mean().item(), rel=1e-5)
    assert score.brier_topk == pytest.approx(truth.brier_topk[kept].mean().item(), rel=1e-5)
    assert score.entropy == pytest.approx(truth.entropy[kept].mean().item(), rel=1e-5)
    assert score.rank_mean == pytest.approx(rank.mean().item(), rel=1e-12)
    assert score.rsr == pytest.approx((rank.sum() / truth.nll[kept].sum()).item(), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])
@pytest.mark.parametrize("tokens_per_batch", [1, 64, 100_000])
def test_batch_mates_and_order_change_nothing(name, tokens_per_batch, tokenizer):
    model = TINY_MODELS[name](len(tokenizer))
    alone = [Scorer(model, tokenizer).score([raw])[0] for raw in RECORDS]
    scorer = Scorer(model, tokenizer, tokens_per_batch=tokens_per_batch)
    backwards = scorer.score(RECORDS[::-1])[::-1]
    for one, other in zip(alone, backwards, strict=True):
        assert one.nll == pytest.approx(other.nll, rel=1e-6)
        assert one.brier == pytest.approx(other.brier, rel=1e-6)


def test_bfloat16_batch_mates_within_its_resolution(tokenizer):
    # The bound: bf16 keeps 8 bits, and the hidden states pass two layers; 2 % on a mean of tens of tokens.
    model = tiny_llama(len(tokenizer)).bfloat16()
    alone = [Scorer(model, tokenizer).score([raw])[0] for raw in RECORDS]
    together = Scorer(model, tokenizer).score(RECORDS)
    for one, other in zip(alone, together, strict=True):
        assert one.nll == pytest.approx(other.nll, rel=2e-2)


def test_equal_candidates_tie_exactly(tokenizer):
    # The twins would land in different batches, and so get different roundings, were they not scored once.
    model = tiny_llama(len(tokenizer))
    twins = [
        record(ANSWERS[1], "p", 0),
        *[record(a, "p", 9 + i) for i, a in enumerate(ANSWERS)],
        record(ANSWERS[1], "p", 1),
    ]
    scores = Scorer(model, tokenizer, tokens_per_batch=70).score(twins)
    assert scores[0].nll == scores[2].nll == scores[-1].nll
    assert scores[0].brier == scores[-1].brier


def test_score_tokens_takes_one_sequence_or_several(tokenizer):
    model = tiny_llama(len(tokenizer))
    scorer = Scorer(model)
    ids = torch.randint(0, len(tokenizer), (3, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :5] = IGNORE_INDEX
    labels[2, 8] = IGNORE_INDEX
    several = scorer.score_tokens(ids, labels)
    assert [len(s.nll) for s in several] == [7, 7, 6]
    with torch.no_grad():
        log_p = model(input_ids=ids).logits.log_softmax(-1)
    expected = -log_p[0, 4:-1].gather(1, ids[0, 5:, None]).squeeze(1)
    torch.testing.assert_close(several[0].nll, expected, rtol=1e-5, atol=1e-6)
    one = scorer.score_tokens(ids[2].tolist(), labels[2].tolist())
    torch.testing.assert_close(one.nll, several[2].nll, rtol=1e-5, atol=1e-6)
    # Position 0 has nothing to be predicted from, whatever its label says.
    assert len(scorer.score_tokens(ids[0], ids[0]).nll) == 11
    ragged = scorer.score_tokens([ids[0, :6].tolist(), ids[1].tolist()], [ids[0, :6].tolist(), ids[1].tolist()])
    assert [len(s.nll) for s in ragged] == [5, 11]
    with pytest.raises(ValueError, match="shape"):
        scorer.score_tokens([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="vocabulary"):
        scorer.score_tokens([1, 10_000], [1, 10_000])


def test_the_model_is_left_as_it_was(tokenizer):
    model = tiny_llama(len(tokenizer)).train()
    Scorer(model, tokenizer).score(RECORDS)
    assert model.training
    assert "forward" not in model.get_output_embeddings().__dict__
    assert model(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, len(tokenizer))


def test_bad_records_say_which(tokenizer):
    scorer = Scorer(tiny_llama(len(tokenizer)), tokenizer)
    with pytest.raises(ValueError, match="record 1: "):
        scorer.score([RECORDS[0], {"messages": []}])
    with pytest.raises(ValueError, match="no tokenizer"):
        Scorer(tiny_llama(len(tokenizer))).score(RECORDS)


def test_not_a_known_head():
    class Odd(type(tiny_llama())):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 3 + 1
            return out

    model = tiny_llama()
    model.__class__ = Odd
    with pytest.raises(ValueError, match="does not know"):
        Student(model)


def test_long_trajectories_are_marked(tokenizer):
    scorer = Scorer(tiny_llama(len(tokenizer)), tokenizer, options=RenderOptions(max_length=60))
    score = scorer.score([RECORDS[3]])[0]
    assert score.truncated
    assert score.n_input_tokens == 60


def test_progress_is_told_after_every_forward_pass(tokenizer):
    scorer = Scorer(tiny_llama(len(tokenizer)), tokenizer, tokens_per_batch=64)
    rendered = [scorer.renderer(normalise(raw)) for raw in [*RECORDS, *RECORDS]]
    told = []
    scorer.score_rendered(rendered, told.append)
    assert len(told) >= 3
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_score_tokens_refuses_what_is_no_word():
    scorer = Scorer(TINY_MODELS["llama"](60))
    with pytest.raises(ValueError, match="token id"):
        scorer.score_tokens([1, 60, 2], [-100, 3, 2])
    with pytest.raises(ValueError, match="a label is neither -100 nor"):
        scorer.score_tokens([1, 5, 2], [-100, 3, 60])


@pytest.mark.parametrize("impl", ["fused", "chunked"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_every_form_of_the_head_gives_the_same_scores(name, impl):
    model = TINY_MODELS[name](300)
    ids = torch.randint(0, 300, (3, 25), generator=torch.Generator().manual_seed(5)).tolist()
    rendered = [Rendered(input_ids=row, labels=[-100] * 7 + row[7:], truncated=False) for row in ids]
    for top_k in (None, 9):
        plain, kernels = (Scorer(model, top_k=top_k, impl=form).score_rendered(rendered) for form in ("torch", impl))
        for a, b in zip(plain, kernels, strict=True):
            for field in ("nll", "brier_used", "entropy", "rank_mean", "rsr", "rho"):
                assert getattr(a, field) == pytest.approx(getattr(b, field), rel=1e-5), field
