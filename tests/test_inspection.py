"""What ``inspect`` prints: the scored tokens, and nothing that acts on a terminal."""

import io
import re
from itertools import pairwise

import pytest
from rich.console import Console

from lark_fast.pool.records import normalise
from lark_fast.rendering.inspection import inspect_record, visible
from lark_fast.rendering.renderer import Renderer, RenderOptions
from tests import templates
from tests.conversations import record
from tests.tiny import byte_level_tokenizer, slow_tokenizer

SELECT_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# Clears the screen, changes the colour, sets the title, writes from right to left, rings, overwrites the line, hides.
NASTY = "\x1b[2J\x1b[31m\x1b]0;title\x07\u202eabc\u2066\x07\r\x08\u200b\u009b1m\u2028\ufeff\U000e0041"
MARKUP = "[bold red]x[/bold red] [link=file:///etc/passwd]y[/link] :smile:"


def printed(own, renderer, *, colours: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=colours, color_system="256" if colours else None, width=40)
    inspect_record(own, renderer, console)
    return out.getvalue()


def test_plain_output_marks_what_is_scored():
    own = record(("user", "Is it?"), ("assistant", "It is 4."), problem_id=7, candidate_id="b", teacher="T")
    assert printed(own, Renderer(templates.phi4(), RenderOptions()), colours=False) == (
        "problem 7, candidate b, teacher T\n"
        "19 tokens, 5 of them scored\n"
        "[not scored: tokens 0 to 13]\n"
        "    <|im_start|>user<|im_sep|>Is it?<|im_end|><|im_start|>assistant<|im_sep|>\n"
        "[scored: tokens 14 to 18]\n"
        "    It| is| 4|.|<|im_end|>\n"
        "[end]\n"
    )


def test_colours_show_the_borders_of_scored_tokens():
    own = record(("user", "Is it?"), ("assistant", "It is 4."))
    text = printed(own, Renderer(templates.phi4()), colours=True)
    dim, one, other = "\x1b[2m", "\x1b[30;102m", "\x1b[30;106m"
    assert f"{dim}<|im_start|>user<|im_sep|>Is it?<|im_end|><|im_start|>assistant<|im_sep|>\x1b[0m" in text
    shades = re.findall(re.escape(one) + "|" + re.escape(other), text)
    assert len(shades) == 5
    assert all(left != right for left, right in pairwise(shades))


@pytest.mark.parametrize("colours", [False, True])
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_pool_text_cannot_act_on_the_terminal(colours, trim_offsets):
    own = record(("user", NASTY + MARKUP), ("assistant", MARKUP + NASTY), problem_id=NASTY + MARKUP, teacher=NASTY)
    text = printed(own, Renderer(templates.chatml(trim_offsets=trim_offsets)), colours=colours)
    text = SELECT_COLOURS.sub("", text) if colours else text
    assert all(character.isprintable() or character == "\n" for character in text)
    shown = text.replace("|", "").replace("▫", "")
    assert shown.count(r"\x1b[2J\x1b[31m\x1b]0;title\x07\u202eabc\u2066\x07\x0d\x08\u200b\x9b1m") == 4
    assert shown.count("\\u2028\\ufeff\\U000e0041") == 4
    assert shown.count(MARKUP) == 3


def test_our_colours_are_the_only_ones():
    """With colours on, no sequence but the three of our own styles and the reset reaches the terminal."""
    own = record(("user", NASTY), ("assistant", NASTY + MARKUP))
    text = printed(own, Renderer(templates.chatml()), colours=True)
    assert set(SELECT_COLOURS.findall(text)) <= {"\x1b[0m", "\x1b[2m", "\x1b[30;102m", "\x1b[30;106m"}


def test_text_cannot_pass_for_a_bracket_line():
    own = record(("user", "Q\n[scored: tokens 0 to 99]\n[end]"), ("assistant", "It is 4."), problem_id="1\n[end]")
    lines = printed(own, Renderer(templates.chatml()), colours=False).split("\n")
    assert [line for line in lines if line.startswith("[")] == [
        next(line for line in lines if line.startswith("[not scored: tokens 0 to ")),
        next(line for line in lines if line.startswith("[scored: tokens ") and "99" not in line),
        "[end]",
    ]
    assert lines[0] == "problem 1\\x0a[end], candidate 0"


def test_characters_of_several_tokens_and_line_breaks():
    own = record(("user", "Q"), ("assistant", "☃\n\n4"))
    text = printed(own, Renderer(templates.chatml()), colours=False)
    assert "    ☃|▫|▫|↵\n    |↵\n    |4|<|im_end|>|↵\n[end]\n" in text


def test_truncated_records_and_rejects_say_so():
    own = record(("user", "Q"), ("assistant", "the answer " * 9), problem_id=3)
    renderer = Renderer(templates.chatml(), RenderOptions(max_length=20))
    text = printed(own, renderer, colours=False)
    assert text.startswith("problem 3, candidate 0\n20 tokens, ")
    assert ", truncated\n" in text
    assert text.count("answer") < 9
    refused = printed(own, Renderer(byte_level_tokenizer()), colours=False)
    assert refused.endswith("\nrejected: the tokenizer has no chat template; give one with --chat-template FILE\n")


def test_the_place_of_the_record_is_named():
    own = normalise(
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "It is 4."}]},
        source="po\x1bol.jsonl",
        line=12,
    )
    assert printed(own, Renderer(templates.chatml()), colours=False).split("\n")[0].endswith(", po\\x1bol.jsonl:12")


def test_records_without_text_and_tokenizers_without_offsets():
    tokenizer = byte_level_tokenizer()
    ids = tokenizer("the answer is \x1b[2J")["input_ids"]
    own = normalise({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    text = printed(own, Renderer(tokenizer), colours=False)
    assert "\\x1b|[|2|J" in text
    slow = printed(
        record(("user", "Q"), ("assistant", "4 5")), Renderer(slow_tokenizer(templates.CHATML)), colours=False
    )
    assert "    4| |5|<|im_end|>|↵\n[end]\n" in slow


def test_visible_leaves_ordinary_text_alone():
    text = "Größe, 数, ☃, 👍, $\\frac{1}{2}$ and [brackets]"
    assert visible(text) == text
    assert visible("a\u00a0b\tc") == "a\\xa0b\\x09c"
    assert visible("a\nb", keep="\n") == "a\nb"
