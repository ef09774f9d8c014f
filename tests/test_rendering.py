"""From records to ids and labels: borders of spans in tokens, limits, tokenizers of every kind."""

import pickle

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lark_fast.errors import RejectError
from lark_fast.pool.records import normalise
from lark_fast.rendering.renderer import Renderer, RenderOptions, TemplateError
from tests import templates
from tests.conversations import record, scored, scored_texts
from tests.tiny import byte_level_tokenizer, sentencepiece_tokenizer, slow_tokenizer, word_tokenizer

ASK = ("user", "How many?")
ANSWER = (ASK, ("assistant", "The answer is 42."))

# No special tokens anywhere, so that tokens can reach across every border.
PLAIN = """\
{%- for m in messages %}
  {{- 'Q: ' ~ m.content ~ '\\nA: ' if m.role == 'user' else m.content ~ ' stop\\n' }}
{%- endfor %}"""
# The same with the blank of "A: " left to the answer.
PLAIN_NO_BLANK = PLAIN.replace("A: ", "A:")


def tokens(tokenizer, rendered):
    ids = [label for label in rendered.labels if label != -100]
    return [tokenizer.decode([token]) for token in ids]


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_token_across_the_start_belongs_to_the_prompt(trim_offsets):
    """With trim_offsets the offsets of " answer" begin at the "a", as if its blank belonged to nobody."""
    tokenizer = byte_level_tokenizer(PLAIN, trim_offsets=trim_offsets)
    rendered = Renderer(tokenizer)(record(ASK, ("assistant", "answer the user")))
    assert "Ġanswer" in tokenizer.convert_ids_to_tokens(rendered.input_ids)
    assert scored_texts(tokenizer, rendered) == [" the user stop\n"]
    # A blank of its own before a line break: its trimmed offsets are empty and lie at the start itself.
    rendered = Renderer(tokenizer)(record(ASK, ("assistant", "\nthe user")))
    assert scored_texts(tokenizer, rendered) == ["\nthe user stop\n"]


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_token_that_begins_at_the_start_is_scored(trim_offsets):
    tokenizer = byte_level_tokenizer(PLAIN_NO_BLANK, trim_offsets=trim_offsets)
    assert scored(tokenizer, (ASK, ("assistant", " answer the user"))) == [" answer the user stop\n"]
    assert scored(tokenizer, (ASK, ("assistant", " answer the user")), span="content") == [" answer the user"]


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_token_across_the_end_is_not_the_contents(trim_offsets):
    """Two blanks are one token, and one of them is the content's; trimmed offsets cover neither."""
    tokenizer = byte_level_tokenizer(
        PLAIN.replace("' stop", "'  stop"), trim_offsets=trim_offsets, sentences=["a b", "answer    stop    stop"] * 9
    )
    rendered = Renderer(tokenizer, RenderOptions(span="content"))(record(ASK, ("assistant", "the answer ")))
    assert "  " in [tokenizer.decode([token]) for token in rendered.input_ids]
    assert scored_texts(tokenizer, rendered)[-1].endswith("answer")


def byte_of_letter() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for letters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_OF_LETTER = byte_of_letter()


def scored_by_bytes(tokenizer, ids, start, end):
    """Which tokens lie wholly between two byte positions, told from the bytes of the tokens alone."""
    added, inside, at = tokenizer.added_tokens_decoder, [], 0
    for position, token in enumerate(ids):
        name = tokenizer.convert_ids_to_tokens(token)
        behind = at + (len(name.encode()) if token in added else sum(1 for letter in name if letter in BYTE_OF_LETTER))
        if start <= at and behind <= end and position:
            inside.append(position)
        at = behind
    return inside


FRAGMENTS = [
    "\n",
    " ",
    "  ",
    "\t",
    "\r\n",
    "\u00a0",
    "\u3000",
    "é",
    "☃",
    "👩‍🔬",
    "the answer",
    "<think>\n",
    "</think>",
    "<|im_end|>",
]
CONTENTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=8).map("".join),
).filter(str.strip)
TOKENIZERS = {trim: templates.chatml(trim_offsets=trim) for trim in (False, True)}
KINDS = {"qwen25": templates.qwen25(), "qwen3": templates.qwen3(), "llama31": templates.llama31()}
BLANK_PROMPT = {
    (trim, split): byte_level_tokenizer(PLAIN, trim_offsets=trim, split_words=split)
    for trim in (False, True)
    for split in (False, True)
}


@settings(max_examples=150, deadline=None)
@given(content=CONTENTS, trim=st.booleans(), render=st.sampled_from(["template", "raw"]))
@example(content="\nIt is 4.", trim=True, render="template")
@example(content=" \u2028 4", trim=True, render="template")
def test_any_content_under_chatml(content, trim, render):
    """The ids are those of the whole text, and the scored ones decode to the content and its end: nothing is lost but
    what a token across the start took."""
    tokenizer = TOKENIZERS[trim]
    rendered = Renderer(tokenizer, RenderOptions(render=render))(record(ASK, ("assistant", content)))
    prompt = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    assert rendered.text == f"{prompt}{content}<|im_end|>\n"
    assert rendered.input_ids == tokenizer(rendered.text, add_special_tokens=False)["input_ids"]
    positions = [position for position, label in enumerate(rendered.labels) if label != -100]
    start = len(prompt.encode())
    assert positions == scored_by_bytes(tokenizer, rendered.input_ids, start, len(rendered.text.encode()))
    assert all(rendered.labels[position] == rendered.input_ids[position] for position in positions)
    (text,) = scored_texts(tokenizer, rendered)
    if content[0].isspace():
        assert f"{content}<|im_end|>\n".endswith(text)
    else:
        assert text == f"{content}<|im_end|>\n"


@settings(max_examples=150, deadline=None)
@given(content=CONTENTS, kind=st.sampled_from(sorted(BLANK_PROMPT)), span=st.sampled_from(["turn", "content"]))
@example(content="the", kind=(True, True), span="turn")
@example(content="the  ", kind=(True, True), span="content")
@example(content="the answer is", kind=(True, False), span="content")
@example(content="the\nanswer\r", kind=(True, False), span="content")
def test_any_content_where_tokens_reach_across_the_borders(content, kind, span):
    """The offsets, trimmed or not, and the bytes of the tokens say the same."""
    tokenizer = BLANK_PROMPT[kind]
    prompt, end = "Q: How many?\nA: ", " stop\n"
    text = prompt + content + end
    stop = len(text) if span == "turn" else len(text) - len(end)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    expected = scored_by_bytes(tokenizer, ids, len(prompt.encode()), len(text[:stop].encode()))
    renderer = Renderer(tokenizer, RenderOptions(span=span))
    if len(expected) <= 1:
        with pytest.raises(RejectError, match="at least 2"):
            renderer(record(ASK, ("assistant", content)))
        return
    rendered = renderer(record(ASK, ("assistant", content)))
    assert [position for position, label in enumerate(rendered.labels) if label != -100] == expected


@settings(max_examples=100, deadline=None)
@given(contents=st.lists(CONTENTS, min_size=4, max_size=4), name=st.sampled_from(sorted(KINDS)))
def test_any_conversation_is_scored_whole_or_refused(contents, name):
    """What a template keeps is scored to the last letter; what it drops is an error, never a score of the rest."""
    tokenizer = KINDS[name]
    roles = ("user", "assistant", "user", "assistant")
    conversation = record(*zip(roles, contents, strict=True))
    try:
        rendered = Renderer(tokenizer, RenderOptions(span="content"))(conversation)
    except TemplateError:
        assert "think>" in contents[1] + contents[3]
        return
    for content, text in zip(contents[1::2], scored_texts(tokenizer, rendered), strict=True):
        assert "".join(text.split()).endswith("".join(content.split()))


def test_trimmed_offsets_at_the_end_of_the_content():
    """A token "answer " that ends beyond the content looks, by its offsets, as if it ended with it."""
    # Six merges, and all there is to merge is "answer ".
    sentences = [f"{before}answer {behind}" for before in "bcdfgh" for behind in "jklmpq"]
    options = {"special": (), "eos": None, "vocab_size": 1 + 256 + 6, "sentences": sentences}
    tokenizer = byte_level_tokenizer(PLAIN, trim_offsets=True, split_words=False, **options)
    renderer = Renderer(tokenizer, RenderOptions(span="content"))
    rendered = renderer(record(ASK, ("assistant", "x = answer")))
    assert "answer " in [tokenizer.decode([token]) for token in rendered.input_ids]
    assert scored_texts(tokenizer, rendered) == ["x = "]
    assert scored_texts(tokenizer, renderer(record(ASK, ("assistant", "x = answer ")))) == ["x = answer "]
    # The blank in front of the start is the prompt's last token's.
    template = PLAIN.replace("A: ", "answer ")
    renderer = Renderer(tokenizer, RenderOptions(span="content"), chat_template=template)
    assert scored_texts(tokenizer, renderer(record(ASK, ("assistant", "answer is")))) == ["answer is"]


def test_sentencepiece_keeps_its_borders():
    """Llama-2's kind: the blank is part of the next piece, in its offsets too."""
    template = templates.MISTRAL
    tokenizer = sentencepiece_tokenizer(template, special=("[INST]", "[/INST]"))
    rendered = Renderer(tokenizer)(record(ASK, ("assistant", "the answer is ☃.")))
    assert rendered.text == "<s> [INST] How many? [/INST] the answer is ☃.</s>"
    names = tokenizer.convert_ids_to_tokens([label for label in rendered.labels if label != -100])
    assert "".join(names).replace("▁", " ").split() == ["the", "answer", "is", "<0xE2><0x98><0x83>.</s>"]


def test_a_tokenizer_that_drops_blanks_loses_no_word():
    """No token has the blank before "The", so no token reaches across the start."""
    template = templates.CHATML.replace("assistant\\n'", "assistant\\n  '").replace("~ m.content", "~ '  ' ~ m.content")
    tokenizer = word_tokenizer(template)
    rendered = Renderer(tokenizer)(record(ASK, ("assistant", "The answer is 42.")))
    assert tokens(tokenizer, rendered) == ["The", "answer", "is", "42", ".", "<|im_end|>"]


def test_without_offsets_the_prefix_is_checked():
    conversation = (ASK, ("assistant", "42 it is"), ("user", "Yes?"), ("assistant", "Yes."))
    tokenizer = slow_tokenizer(templates.CHATML)
    assert not tokenizer.is_fast
    assert scored(tokenizer, conversation) == ["42 it is<|im_end|>\n", "Yes.<|im_end|>\n"]
    assert scored(tokenizer, conversation, span="content") == ["42 it is", "Yes."]
    # A word that begins in the prompt and ends in the answer.
    greedy = slow_tokenizer(templates.CHATML, words=["\n42"])
    with pytest.raises(RejectError, match="border of the answer"):
        scored(greedy, conversation)
    assert scored(greedy, conversation, last_turn_only=True) == ["Yes.<|im_end|>\n"]


def test_messages_behind_the_last_answer_are_left_out():
    """Nothing scored can see them, and Qwen3 would drop the answer's thoughts for a question that follows it."""
    conversation = (ASK, ("assistant", "<think>\nSo.\n</think>\n\nIt is 4."), ("user", "Thanks."))
    rendered = Renderer(templates.qwen3())(record(*conversation))
    assert rendered.text.endswith("It is 4.<|im_end|>\n")
    assert scored(templates.qwen3(), conversation) == ["<think>\nSo.\n</think>\n\nIt is 4.<|im_end|>\n"]


@pytest.mark.parametrize("render", ["template", "raw"])
def test_an_answer_without_a_question(render):
    for conversation in (
        [("assistant", "Hello there.")],
        [("assistant", "Hello there."), ASK, ("assistant", "It is 4.")],
    ):
        with pytest.raises(RejectError, match="there is no prompt"):
            scored(templates.chatml(), conversation, render=render)
    only_later = [("assistant", "Hello there."), ASK, ("assistant", "It is 4.")]
    assert scored(templates.chatml(), only_later, last_turn_only=True) == ["It is 4.<|im_end|>\n"]


def test_consecutive_answers_and_tools():
    conversation = (ASK, ("assistant", "One."), ("assistant", "Two."), ("tool", "3"), ("assistant", "Four."))
    ends = ["One.<|im_end|>\n", "Two.<|im_end|>\n", "Four.<|im_end|>\n"]
    assert scored(templates.chatml(), conversation) == ends
    assert scored(templates.chatml(), conversation, render="raw") == ends


@pytest.mark.parametrize(
    ("system", "messages", "text"),
    [
        ("keep", (("system", "S"), ("user", "Q")), "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"),
        ("merge", (("system", "S"), ("user", "Q")), "<|im_start|>user\nS\n\nQ<|im_end|>\n"),
        ("merge", (("user", "Q"),), "<|im_start|>user\nQ<|im_end|>\n"),
        ("merge", (("system", "S"),), "<|im_start|>user\nS<|im_end|>\n"),
        # Two instructions, one of them late: both stand before the first question.
        ("merge", (("system", "S"), ("user", "Q"), ("system", "T")), "<|im_start|>user\nS\n\nT\n\nQ<|im_end|>\n"),
        ("drop", (("system", "S"), ("user", "Q"), ("system", "T")), "<|im_start|>user\nQ<|im_end|>\n"),
    ],
)
def test_system_messages(system, messages, text):
    conversation = record(*messages, ("assistant", "It is 4."))
    before = conversation.content_hash()
    rendered = Renderer(templates.chatml(), RenderOptions(system=system))(conversation)
    assert rendered.text == text + "<|im_start|>assistant\nIt is 4.<|im_end|>\n"
    assert conversation.content_hash() == before


def test_long_records_are_cut_at_the_end_and_marked():
    tokenizer = templates.chatml()
    whole = Renderer(tokenizer)(record(*ANSWER))
    assert not whole.truncated
    n = len(whole.input_ids)
    assert not Renderer(tokenizer, RenderOptions(max_length=n))(record(*ANSWER)).truncated
    for length in (n - 1, n - whole.n_scored + 2):
        cut = Renderer(tokenizer, RenderOptions(max_length=length))(record(*ANSWER))
        assert cut.truncated
        assert cut.input_ids == whole.input_ids[:length]
        assert cut.labels == whole.labels[:length]
        assert cut.n_scored == whole.n_scored - (n - length)
    with pytest.raises(RejectError, match=f"{n} tokens, more than the limit of {n - 1}"):
        Renderer(tokenizer, RenderOptions(max_length=n - 1, long="reject"))(record(*ANSWER))


@pytest.mark.parametrize("left", [0, 1])
def test_at_most_one_scored_token_left_is_a_reject(left):
    tokenizer = templates.chatml()
    whole = Renderer(tokenizer)(record(*ANSWER))
    length = len(whole.input_ids) - whole.n_scored + left
    with pytest.raises(RejectError, match=f"^{left} assistant tokens to score within the first {length} tokens"):
        Renderer(tokenizer, RenderOptions(max_length=length))(record(*ANSWER))


def test_one_token_without_its_end_is_a_reject():
    assert scored(templates.chatml(), (ASK, ("assistant", "4"))) == ["4<|im_end|>\n"]
    with pytest.raises(RejectError, match=r"^1 assistant tokens to score, at least 2 are needed"):
        scored(templates.chatml(), (ASK, ("assistant", "4")), span="content")


def test_ids_beyond_the_students_vocabulary():
    tokenizer = templates.chatml()
    largest = max(Renderer(tokenizer)(record(*ANSWER)).input_ids)
    Renderer(tokenizer, vocab_size=largest + 1)(record(*ANSWER))
    with pytest.raises(
        RejectError, match=f"token id {largest} .*vocabulary of {largest}: the tokenizer and the student"
    ):
        Renderer(tokenizer, vocab_size=largest)(record(*ANSWER))


def pretokenised(labels, ids=(5, 6, 7, 8)):
    return normalise({"input_ids": list(ids), "labels": list(labels)})


def test_token_records_pass_through_with_the_same_limits():
    tokenizer = byte_level_tokenizer()  # no chat template is needed
    rendered = Renderer(tokenizer, vocab_size=9)(pretokenised([-100, -100, 7, 8]))
    assert (rendered.input_ids, rendered.labels) == ([5, 6, 7, 8], [-100, -100, 7, 8])
    assert (rendered.n_scored, rendered.truncated, rendered.text) == (2, False, "")
    # Nothing predicts the first token.
    assert Renderer(tokenizer)(pretokenised([5, 6, 7, 8])).labels == [-100, 6, 7, 8]
    with pytest.raises(RejectError, match=r"^1 assistant tokens"):
        Renderer(tokenizer)(pretokenised([5, -100, -100, 8]))
    with pytest.raises(RejectError, match="token id 8"):
        Renderer(tokenizer, vocab_size=8)(pretokenised([-100, 6, 7, 8]))
    cut = Renderer(tokenizer, RenderOptions(max_length=3))(pretokenised([-100, 6, 7, 8]))
    assert (cut.input_ids, cut.labels, cut.truncated) == ([5, 6, 7], [-100, 6, 7], True)


def test_the_record_is_not_changed():
    own = pretokenised([5, 6, 7, 8])
    Renderer(byte_level_tokenizer())(own)
    assert own.labels == (5, 6, 7, 8)


@pytest.mark.parametrize(
    "wrong", [{"span": "answer"}, {"render": "plain"}, {"system": "user"}, {"long": "cut"}, {"max_length": 0}]
)
def test_options_say_what_they_take(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RenderOptions(**wrong)


def test_renderers_travel_to_worker_processes():
    renderer = Renderer(templates.deepseek_r1(), RenderOptions(render="raw"))
    expected = renderer(record(*ANSWER))
    assert pickle.loads(pickle.dumps(renderer))(record(*ANSWER)) == expected


def test_single_turns_cost_two_renderings(monkeypatch):
    """A pool holds millions of records, and the template is the slower half of what is done in Python."""
    tokenizer = templates.chatml()
    renderer, calls = Renderer(tokenizer), []
    renderer(record(*ANSWER))
    original = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: calls.append(1) or original(*a, **k))
    renderer(record(*ANSWER))
    assert len(calls) == 2
