"""Shared by the tests of rendering: records from messages, and what of them is scored, as text."""

from itertools import groupby

from lark_fast.pool.records import NOT_SCORED, Record, normalise
from lark_fast.rendering.renderer import Rendered, Renderer, RenderOptions


def record(*messages: tuple[str, str], **columns) -> Record:
    """A record of (role, content) pairs."""
    return normalise({"messages": [{"role": role, "content": content} for role, content in messages], **columns})


def scored_texts(tokenizer, rendered: Rendered) -> list[str]:
    """The decoded text of every unbroken run of scored tokens."""
    runs = groupby(rendered.labels, lambda label: label != NOT_SCORED)
    return [tokenizer.decode(list(run), clean_up_tokenization_spaces=False) for scored, run in runs if scored]


def scored(tokenizer, messages: tuple[tuple[str, str], ...], **options) -> list[str]:
    """Render messages and return the scored texts."""
    return scored_texts(tokenizer, Renderer(tokenizer, RenderOptions(**options))(record(*messages)))
