"""Sequences that pass through a student in pieces."""

import pytest
import torch

from lark_fast.attention import Pack
from lark_fast.past import PackedPast, Past, with_pasts
from lark_fast.scoring.scorer import Scorer
from lark_fast.student import Student
from tests.tiny import PACKABLE, tiny_decoder, tiny_llama

LENGTHS = (37, 5, 61)
CUTS = ((0, 10, 11, 37), (0, 3, 4, 5), (0, 30, 31, 61))  # rounds, of each sequence


def pieces(student, keep=True):
    """Hidden states of the sequences, a round at a time, as one list of [t, D] a sequence."""
    sequences = [
        torch.arange(length).mul(7).add(place).remainder(student.vocab_size) for place, length in enumerate(LENGTHS)
    ]
    pasts, made = [Past() for _ in LENGTHS], [[] for _ in LENGTHS]
    with torch.no_grad(), student.packing():
        for turn in range(3):
            spans = [(cuts[turn], cuts[turn + 1]) for cuts in CUTS]
            for past in pasts:
                past.grows = keep and turn < 2
            ids = torch.cat([ids[start:end] for ids, (start, end) in zip(sequences, spans, strict=True)]).unsqueeze(0)
            places = torch.cat([torch.arange(*span) for span in spans]).unsqueeze(0)
            pack = with_pasts(Pack.of([end - start for start, end in spans]), pasts)
            past = PackedPast(pasts, pack)
            hidden = student.hidden(ids, pack, places, past)[0]
            past.commit()
            for own, part in zip(made, hidden.split([end - start for start, end in spans]), strict=True):
                own.append(part)
        pack = Pack.of(LENGTHS)
        places = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
        whole = student.hidden(torch.cat(sequences).unsqueeze(0), pack, places)[0].split(LENGTHS)
    return [torch.cat(own) for own in made], whole, pasts


def past_bytes(student):
    """By its config: a key and a value in every layer and head."""
    config = student.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * student.dtype.itemsize


@pytest.mark.parametrize("name", sorted(set(PACKABLE) - {"phi3_longrope"}))
def test_pieces_are_the_whole(name):
    student = Student(tiny_decoder(name).eval())
    assert student.continues
    if name != "deepseek3":  # which keeps latents
        assert student.past_bytes == past_bytes(student)
    ours, whole, _ = pieces(student)
    for a, b in zip(ours, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * float(b.abs().max()))


def test_what_is_not_kept_is_missed():
    ours, whole, _ = pieces(Student(tiny_llama(101).eval()), keep=False)
    assert (ours[0] - whole[0]).abs().max() > 1e-2


def test_the_last_piece_leaves_nothing_behind():
    *_, pasts = pieces(Student(tiny_llama(101).eval()))
    assert [past._layers for past in pasts] == [{}, {}, {}]


def test_a_student_that_cannot_go_on():
    model = tiny_llama(101, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    assert not Student(model).continues  # a longer sequence turns its first positions otherwise
    assert not Student(tiny_decoder("phi3_longrope")).continues
    assert Scorer(tiny_llama(101)).student.continues
