"""Which text is scored under templates that behave as the well-known ones do, stated word for word."""

import pytest

from lark_fast.errors import RejectError
from lark_fast.rendering.renderer import Renderer, RenderOptions, TemplateError
from lark_fast.rendering.templates import SENTINEL
from tests import templates
from tests.conversations import record, scored

ASK = ("user", "How many?")
AGAIN = ("user", "And two?")

# Blanks around the answer: some templates trim them, and then they are not there to be scored.
PADDED = (ASK, ("assistant", " The answer is 42.\n"))
MULTI = (ASK, ("assistant", "It is 4."), AGAIN, ("assistant", "It is 5."))
THOUGHT = (ASK, ("assistant", "<think>\nLet me see.\n</think>\n\nIt is 4."))
# The teacher ran out of tokens while it was thinking.
UNFINISHED = (ASK, ("assistant", "<think>\nLet me see."))
# Reasoning on an earlier turn is what Qwen3 and DeepSeek-R1 forget.
THOUGHTS = (*THOUGHT, AGAIN, ("assistant", "<think>\nSo.\n</think>\n\nIt is 5."))
SYSTEM = (("system", "Be brief."), ASK, ("assistant", "It is 4."))

THOUGHT_TEXT, SO_TEXT = THOUGHT[1][1], THOUGHTS[3][1]
EMPTY = "<think>\n\n</think>\n\n"

# Tokenizer, its end of turn, conversation, what is scored of each turn before the end.
CASES = [
    (templates.qwen25, "<|im_end|>\n", PADDED, [" The answer is 42.\n"]),
    (templates.qwen25, "<|im_end|>\n", MULTI, ["It is 4.", "It is 5."]),
    (templates.qwen25, "<|im_end|>\n", THOUGHT, [THOUGHT_TEXT]),
    (templates.qwen25, "<|im_end|>\n", UNFINISHED, ["<think>\nLet me see."]),
    (templates.qwen25, "<|im_end|>\n", THOUGHTS, [THOUGHT_TEXT, SO_TEXT]),
    (templates.qwen25, "<|im_end|>\n", SYSTEM, ["It is 4."]),
    # What stands between the generation prompt and the content is part of the turn: the model would have to write it.
    (templates.qwen3, "<|im_end|>\n", PADDED, [EMPTY + " The answer is 42.\n"]),
    (templates.qwen3, "<|im_end|>\n", MULTI, ["It is 4.", EMPTY + "It is 5."]),
    (templates.qwen3, "<|im_end|>\n", THOUGHT, [THOUGHT_TEXT]),
    (templates.qwen3, "<|im_end|>\n", UNFINISHED, [EMPTY + "<think>\nLet me see."]),
    (templates.qwen3, "<|im_end|>\n", SYSTEM, [EMPTY + "It is 4."]),
    (templates.llama31, "<|eot_id|>", PADDED, ["The answer is 42."]),
    (templates.llama31, "<|eot_id|>", MULTI, ["It is 4.", "It is 5."]),
    (templates.llama31, "<|eot_id|>", THOUGHTS, [THOUGHT_TEXT, SO_TEXT]),
    (templates.llama31, "<|eot_id|>", SYSTEM, ["It is 4."]),
    (templates.gemma2, "<end_of_turn>\n", PADDED, ["The answer is 42."]),
    (templates.gemma2, "<end_of_turn>\n", MULTI, ["It is 4.", "It is 5."]),
    (templates.gemma2, "<end_of_turn>\n", THOUGHTS, [THOUGHT_TEXT, SO_TEXT]),
    (templates.mistral, "</s>", PADDED, ["  The answer is 42.\n"]),
    (templates.mistral, "</s>", MULTI, [" It is 4.", " It is 5."]),
    (templates.mistral, "</s>", THOUGHTS, [" " + THOUGHT_TEXT, " " + SO_TEXT]),
    (templates.mistral, "</s>", SYSTEM, [" It is 4."]),
    (templates.phi4, "<|im_end|>", PADDED, [" The answer is 42.\n"]),
    (templates.phi4, "<|im_end|>", MULTI, ["It is 4.", "It is 5."]),
    (templates.phi4, "<|im_end|>", THOUGHTS, [THOUGHT_TEXT, SO_TEXT]),
    (templates.phi4, "<|im_end|>", SYSTEM, ["It is 4."]),
    # Without reasoning the rendering lacks the "<think>\n" that the generation prompt ends with.
    (templates.deepseek_r1, "<｜end▁of▁sentence｜>", PADDED, [" The answer is 42.\n"]),
    (templates.deepseek_r1, "<｜end▁of▁sentence｜>", MULTI, ["It is 4.", "It is 5."]),
    (templates.deepseek_r1, "<｜end▁of▁sentence｜>", SYSTEM, ["It is 4."]),
    # Here the prompt wrote "<think>\n".
    (templates.deepseek_r1, "<｜end▁of▁sentence｜>", UNFINISHED, ["Let me see."]),
]


@pytest.mark.parametrize(("tokenizer", "end", "conversation", "contents"), CASES)
def test_every_turn_is_scored_with_its_end(tokenizer, end, conversation, contents):
    assert scored(tokenizer(), conversation) == [content + end for content in contents]


@pytest.mark.parametrize(("tokenizer", "end", "conversation", "contents"), CASES)
def test_content_span_stops_before_the_end_of_turn(tokenizer, end, conversation, contents):
    assert scored(tokenizer(), conversation, span="content") == contents


@pytest.mark.parametrize(("tokenizer", "end", "conversation", "contents"), CASES)
def test_last_turn_only(tokenizer, end, conversation, contents):
    assert scored(tokenizer(), conversation, last_turn_only=True) == [contents[-1] + end]


@pytest.mark.parametrize(("tokenizer", "end", "conversation", "contents"), CASES)
def test_what_is_not_scored_is_the_prompt_as_it_would_be_at_generation(tokenizer, end, conversation, contents):
    tokenizer = tokenizer()
    rendered = Renderer(tokenizer, RenderOptions(last_turn_only=True))(record(*conversation))
    messages = [{"role": role, "content": content} for role, content in conversation[:-1]]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    unscored = tokenizer.decode(rendered.input_ids[: -rendered.n_scored])
    assert prompt in (unscored, unscored + "<think>\n")


@pytest.mark.parametrize("conversation", [PADDED, MULTI, THOUGHT, UNFINISHED, THOUGHTS])
@pytest.mark.parametrize(
    ("tokenizer", "end"),
    [
        (templates.qwen25, "<|im_end|>\n"),
        (templates.qwen3, "<|im_end|>\n"),
        (templates.llama31, "<|eot_id|>"),
        (templates.gemma2, "<end_of_turn>\n"),
        (templates.mistral, "</s>"),
        (templates.phi4, "<|im_end|>"),
    ],
)
def test_raw_scores_contents_letter_by_letter(tokenizer, end, conversation):
    contents = [content for role, content in conversation if role == "assistant"]
    assert scored(tokenizer(), conversation, render="raw") == [content + end for content in contents]
    assert scored(tokenizer(), conversation, render="raw", span="content") == contents


def test_raw_behind_a_prompt_that_opens_the_thought():
    """DeepSeek-R1: the "<think>\\n" of the prompt is the content's own; it stands there once and is not scored."""
    tokenizer = templates.deepseek_r1()
    rendered = Renderer(tokenizer, RenderOptions(render="raw"))(record(*THOUGHTS))
    assert rendered.text == (
        "<｜begin▁of▁sentence｜><｜User｜>How many?<｜Assistant｜><think>\nLet me see.\n</think>\n\nIt is 4."
        "<｜end▁of▁sentence｜><｜User｜>And two?<｜Assistant｜><think>\nSo.\n</think>\n\nIt is 5.<｜end▁of▁sentence｜>"
    )
    end = "<｜end▁of▁sentence｜>"
    assert scored(tokenizer, THOUGHTS, render="raw") == [
        "Let me see.\n</think>\n\nIt is 4." + end,
        "So.\n</think>\n\nIt is 5." + end,
    ]
    # Teachers write the marker with other blanks behind it, or none.
    glued = (ASK, ("assistant", "<think>Let me see.</think>It is 4."))
    assert scored(tokenizer, glued, render="raw") == ["Let me see.</think>It is 4." + end]
    assert scored(tokenizer, (ASK, ("assistant", "It is 4.")), render="raw") == ["It is 4." + end]


def test_raw_takes_no_line_break_for_the_prompts():
    """ChatML's prompt ends in a line break; one that the content begins with is the content's."""
    tokenizer = templates.phi4()
    rendered = Renderer(templates.qwen25(), RenderOptions(render="raw"))(record(ASK, ("assistant", "\nIt is 4.")))
    assert rendered.text.endswith("<|im_start|>assistant\n\nIt is 4.<|im_end|>\n")
    assert scored(tokenizer, (ASK, ("assistant", "\nIt is 4.")), render="raw") == ["\nIt is 4.<|im_end|>"]


def test_raw_with_last_turn_only_leaves_the_context_to_the_template():
    rendered = Renderer(templates.qwen3(), RenderOptions(render="raw", last_turn_only=True))(record(*THOUGHTS))
    assert rendered.text == (
        "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\nIt is 4.<|im_end|>\n"
        "<|im_start|>user\nAnd two?<|im_end|>\n<|im_start|>assistant\n<think>\nSo.\n</think>\n\nIt is 5.<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("tokenizer", "conversation", "message"),
    [
        (templates.deepseek_r1, THOUGHT, "message 2"),
        (templates.deepseek_r1, THOUGHTS, "message 4"),
        (templates.qwen3, THOUGHTS, "message 2"),
    ],
)
@pytest.mark.parametrize("span", ["turn", "content"])
def test_a_dropped_thought_is_an_error_with_a_way_out(tokenizer, conversation, message, span):
    tokenizer = tokenizer()
    tokenizer.name_or_path = "some/student"
    with pytest.raises(TemplateError, match=rf"template of some/student .*{message} .*<think>.*--render raw"):
        scored(tokenizer, conversation, span=span)


def test_qwen3_last_turn_only_needs_no_earlier_thoughts():
    assert scored(templates.qwen3(), THOUGHTS, last_turn_only=True) == [SO_TEXT + "<|im_end|>\n"]


def test_qwen3_spaces_thoughts_anew():
    """All that was said is there, with other line breaks around it; the scored text is what the template wrote."""
    conversation = (ASK, ("assistant", "<think>Let me see.\n\n\n</think>It is 4. "))
    text = "<think>\nLet me see.\n</think>\n\nIt is 4. "
    assert scored(templates.qwen3(), conversation) == [text + "<|im_end|>\n"]
    assert scored(templates.qwen3(), conversation, span="content") == [text]


@pytest.mark.parametrize(
    ("tokenizer", "bos"),
    [
        (templates.llama31, "<|begin_of_text|>"),
        (templates.gemma2, "<bos>"),
        (templates.mistral, "<s>"),
        (templates.deepseek_r1, "<｜begin▁of▁sentence｜>"),
    ],
)
@pytest.mark.parametrize("render", ["template", "raw"])
def test_bos_stands_once(tokenizer, bos, render):
    """The template writes it and the tokenizer would add another."""
    tokenizer = tokenizer()
    rendered = Renderer(tokenizer, RenderOptions(render=render))(record(*MULTI))
    bos_id = tokenizer.convert_tokens_to_ids(bos)
    assert tokenizer(rendered.text)["input_ids"].count(bos_id) == 2
    assert rendered.input_ids.count(bos_id) == 1
    assert rendered.input_ids[0] == bos_id


def test_gemma_refuses_a_system_role_and_the_message_says_what_to_do():
    tokenizer = templates.gemma2()
    with pytest.raises(TemplateError, match=r"System role not supported.*--system merge or --system drop"):
        scored(tokenizer, SYSTEM)
    merged = Renderer(tokenizer, RenderOptions(system="merge"))(record(*SYSTEM))
    assert merged.text == (
        "<bos><start_of_turn>user\nBe brief.\n\nHow many?<end_of_turn>\n<start_of_turn>model\nIt is 4.<end_of_turn>\n"
    )
    dropped = Renderer(tokenizer, RenderOptions(system="drop"))(record(*SYSTEM))
    assert "brief" not in dropped.text
    assert scored(tokenizer, SYSTEM, system="drop") == ["It is 4.<end_of_turn>\n"]


def test_roles_that_must_alternate_reject_the_record_with_the_templates_words():
    conversation = (ASK, ASK, ("assistant", "It is 4."))
    with pytest.raises(RejectError, match="Roles must alternate") as caught:
        scored(templates.gemma2(), conversation)
    assert not isinstance(caught.value, TemplateError)
    # A system message is not to blame where the conversation is refused without it too.
    with pytest.raises(RejectError, match="Roles must alternate") as caught:
        scored(templates.mistral(), (SYSTEM[0], *conversation))
    assert not isinstance(caught.value, TemplateError)


def test_a_prompt_that_changes_when_the_answer_follows_is_an_error():
    """Mistral-7B-v0.3 forgets the system text as soon as the answer stands behind the question."""
    tokenizer = templates.mistral(templates.MISTRAL_V3)
    with pytest.raises(TemplateError, match=r"message 3 .*--render raw"):
        scored(tokenizer, SYSTEM)
    rendered = Renderer(tokenizer, RenderOptions(render="raw"))(record(*SYSTEM))
    assert rendered.text == "<s>[INST] Be brief.\n\nHow many?[/INST]It is 4.</s>"
    assert scored(tokenizer, SYSTEM, render="raw") == ["It is 4.</s>"]
    assert scored(tokenizer, MULTI) == [" It is 4.</s>", " It is 5.</s>"]


def test_text_behind_the_last_turn_alone():
    """Phi-3 writes eos at the very end: the last turn has it, the earlier ones end without, and no header is scored."""
    texts = ["It is 4.<|end|>\n", "It is 5.<|end|>\n<|end_of_text|>"]
    assert scored(templates.phi3(), MULTI) == texts
    assert scored(templates.phi3(), MULTI, render="raw") == texts
    assert scored(templates.phi3(), MULTI, span="content") == ["It is 4.", "It is 5."]


def test_an_end_that_differs_between_earlier_turns_and_the_last():
    """gpt-oss: only what the two ends share is known to be the turn's, so the earlier one's token is left out."""
    lead = "<|channel|>final<|message|>"
    assert scored(templates.harmony(), MULTI) == [lead + "It is 4.", lead + "It is 5.<|return|>"]
    assert scored(templates.harmony(), MULTI, span="content") == [lead + "It is 4.", lead + "It is 5."]


def test_equal_answers_are_told_apart():
    """The same words in two turns, in the question and in the header: each is found where it stands."""
    same = (("user", "user"), ("assistant", "user"), ("user", "assistant"), ("assistant", "user"))
    for tokenizer, ends in (
        (templates.qwen25, ["user<|im_end|>\n"] * 2),
        (templates.qwen3, ["user<|im_end|>\n", EMPTY + "user<|im_end|>\n"]),
        (templates.phi3, ["user<|end|>\n", "user<|end|>\n<|end_of_text|>"]),
    ):
        assert scored(tokenizer(), same) == ends
    # Words of the frame as content.
    for word in ("think", "im_end", "<|im_end|>", "assistant", "<think>", "n"):
        assert scored(templates.qwen3(), (ASK, ("assistant", word)), span="content") == [EMPTY + word]
        assert scored(templates.qwen25(), (ASK, ("assistant", f"{word} 4")), span="content") == [f"{word} 4"]


def test_the_date_does_not_move():
    """Llama-3.2 writes today's date into the prompt; scores must not depend on the day."""
    rendered = Renderer(templates.llama31(templates.LLAMA32))(record(*SYSTEM))
    assert "Today Date: 26 Jul 2024\n" in rendered.text
    clock = "{{ strftime_now('%Y-%m-%d, %A %-d %B') }}" + templates.CHATML
    rendered = Renderer(templates.qwen25(), chat_template=clock)(record(*SYSTEM))
    assert rendered.text.startswith("2024-07-26, Friday 26 July<|im_start|>system\nBe brief.")


@pytest.mark.parametrize(
    "body",
    ["m.content | upper", "m.content[:-1]", "m.content[1:]", "m.content.replace('4', '5')", "''"],
)
def test_content_that_does_not_survive(body):
    template = templates.CHATML.replace("m.content", f"({body} if m.role == 'assistant' else m.content)")
    with pytest.raises(TemplateError, match="--render raw"):
        Renderer(templates.qwen25(), chat_template=template)(record(*SYSTEM))


@pytest.mark.parametrize("squeeze", ["", " | replace('  ', ' ')"])
def test_the_questions_words_do_not_stand_in_for_the_answers(squeeze):
    """The template drops "A:" from the answer, and the user's message happens to end with it."""
    template = """\
{%- for m in messages %}
  {{- 'Q: ' ~ m.content ~ '\\nA:' if m.role == 'user' else m.content.replace('A:', '') SQUEEZE ~ '<|im_end|>' }}
{%- endfor %}""".replace("SQUEEZE", squeeze)
    renderer = Renderer(templates.qwen25(), chat_template=template)
    assert "A:42 " in renderer(record(ASK, ("assistant", "42  it is"))).text
    with pytest.raises(TemplateError, match="--render raw"):
        renderer(record(ASK, ("assistant", "A:42  it is")))


def test_an_answer_that_begins_as_the_prompts_marker_does():
    """DeepSeek-R1's prompt and this rendering share "<", which is the answer's."""
    end = "<｜end▁of▁sentence｜>"
    for answer in ("<b>4</b>", "<thin ice>"):
        assert scored(templates.deepseek_r1(), (ASK, ("assistant", answer))) == [answer + end]


@pytest.mark.parametrize(("trim", "text"), [("", " It is 4.\n"), (".lstrip()", "It is 4.\n"), (" | trim", "It is 4.")])
def test_earlier_turns_that_are_trimmed_and_written_in_another_way_than_the_last(trim, text):
    template = templates.QWEN3.replace("set body = m.content", f"set body = m.content{trim}")
    tokenizer = templates.byte_level_tokenizer(template)
    conversation = (ASK, ("assistant", " It is 4.\n"), AGAIN, ("assistant", "It is 5."))
    assert scored(tokenizer, conversation, span="content") == [text, EMPTY + "It is 5."]


def test_raw_refuses_what_it_cannot_take_apart():
    """The mark that stands in for an earlier answer has to be in the rendering once."""
    marked = (("user", f"{SENTINEL}1;"), *MULTI[1:])
    with pytest.raises(RejectError, match="--last-turn-only"):
        scored(templates.qwen25(), marked, render="raw")
    forgetful = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    renderer = Renderer(templates.qwen25(), RenderOptions(render="raw"), chat_template=forgetful)
    with pytest.raises(RejectError, match="--last-turn-only"):
        renderer(record(*MULTI))


def test_a_template_reaches_nothing_beyond_its_sandbox():
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(RejectError, match="unsafe"):
        Renderer(templates.qwen25(), chat_template=escape + templates.CHATML)(record(*SYSTEM))
    # And pool text is no template.
    text = "{{ 6 * 7 }}{% raise %}"
    assert scored(templates.qwen25(), (ASK, ("assistant", text)), span="content") == [text]


def test_no_template_and_a_broken_one():
    with pytest.raises(TemplateError, match="--chat-template FILE"):
        Renderer(templates.byte_level_tokenizer())(record(*SYSTEM))
    with pytest.raises(TemplateError, match="not valid Jinja"):
        Renderer(templates.qwen25(), chat_template="{% for m in messages %}")(record(*SYSTEM))
    picky = "{{ raise_exception('never') if messages | length == 2 and messages[0].role == 'user' }}" + templates.CHATML
    with pytest.raises(TemplateError, match=r"not even a question and an answer.*never"):
        Renderer(templates.qwen25(), chat_template=picky)(record(*SYSTEM))


def test_template_hash_names_the_template_in_use():
    own, plain = Renderer(templates.qwen25()), Renderer(templates.qwen25(), chat_template=templates.CHATML)
    assert own.template_hash != plain.template_hash
    assert plain.template_hash == Renderer(templates.chatml()).template_hash
    assert len(own.template_hash) == 64
    assert "You are Qwen" not in plain(record(*MULTI)).text


def test_named_templates():
    """A tokenizer may bring several; "default" is the one for conversations without tools."""
    tokenizer = templates.chatml()
    tokenizer.chat_template = {"default": templates.CHATML, "rag": templates.QWEN3}
    assert scored(tokenizer, PADDED) == [" The answer is 42.\n<|im_end|>\n"]
    tokenizer.chat_template = {"rag": templates.QWEN3}
    with pytest.raises(TemplateError, match="--chat-template FILE"):
        scored(tokenizer, PADDED)
