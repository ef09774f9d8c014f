"""A record -> the token ids a student reads and which of them are scored."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import TYPE_CHECKING, Literal, get_args

from lark_fast.errors import RejectError
from lark_fast.pool.records import NOT_SCORED, Message, Record
from lark_fast.rendering.templates import ChatTemplate, TemplateError, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RenderOptions", "Rendered", "Renderer", "TemplateError"]

Span = Literal["turn", "content"]
Render = Literal["template", "raw"]
System = Literal["keep", "merge", "drop"]
Long = Literal["truncate", "reject"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderOptions:
    """How conversations become tokens; the fields are the command line's flags of the same names.

    Attributes:
        span: "turn" scores all that follows the generation prompt up to the next message, the end-of-turn token with
            it; "content" stops where the content ends. What a template itself writes between the generation prompt
            and the content (Qwen3's empty think block) is scored in both.
        render: "template" renders as the template does and refuses what it loses; "raw" sets the contents unchanged
            into the template's frame.
        system: what happens to system messages: kept, set in front of the first user message, or dropped.
        last_turn_only: score the last assistant turn alone.
        long: what happens to a record of more than ``max_length`` tokens.
        max_length: in tokens.

    Raises:
        ValueError: a value that is none of these.
    """

    span: Span = "turn"
    render: Render = "template"
    system: System = "keep"
    last_turn_only: bool = False
    long: Long = "truncate"
    max_length: int = 32768

    def __post_init__(self) -> None:
        for name, kind in (("span", Span), ("render", Render), ("system", System), ("long", Long)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is one of {', '.join(get_args(kind))}, not {getattr(self, name)!r}")
        if self.max_length < 1:
            raise ValueError(f"max_length is at least 1, not {self.max_length}")

    def fitting(self, max_positions: int | None) -> "RenderOptions":
        """These options with ``max_length`` held to what a student can read; None where that is not known."""
        return self if max_positions is None else replace(self, max_length=min(self.max_length, max_positions))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A record as the student sees it."""

    input_ids: list[int]
    labels: list[int]  # as many: the token itself where it is scored, else NOT_SCORED; never scored at position 0
    truncated: bool
    text: str = ""  # the whole rendering, also of what was cut off; "" for records that came as token ids

    @property
    def n_scored(self) -> int:
        """How many tokens are scored."""
        return len(self.labels) - self.labels.count(NOT_SCORED)


class Renderer:
    """Turns records into token ids and labels. It can be pickled, so that worker processes can share the work.

    Messages after the last assistant's are left out: no scored token could see them.

    Args:
        tokenizer: the student's.
        options: see ``RenderOptions``.
        vocab_size: rows of the student's embedding; ids beyond it are refused.
        chat_template: a Jinja template to use in place of the tokenizer's own.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        options: RenderOptions | None = None,
        *,
        vocab_size: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.options = options or RenderOptions()
        self.vocab_size = vocab_size
        self.template = ChatTemplate(tokenizer, chat_template)

    @property
    def template_hash(self) -> str:
        """SHA-256 of the template's text, in hexadecimal."""
        return self.template.hash

    def __call__(self, record: Record) -> Rendered:
        """Render one record.

        Raises:
            TemplateError: the template cannot do with records like this one; the message names it and the way out.
            RejectError: this record cannot be scored.
        """
        if record.messages is None:
            return self._limited(list(record.input_ids), list(record.labels))
        messages = _with_system(record.messages, self.options.system)
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if not messages:
            raise RejectError("no assistant message")
        find = self.template.raw_spans if self.options.render == "raw" else self.template.spans
        text, turns = find(messages, last_only=self.options.last_turn_only)
        ids, offsets = self.tokenise(text)
        labels = [NOT_SCORED] * len(ids)
        for turn in turns:
            first, behind = self._tokens_of(turn, text, ids, offsets)
            labels[first:behind] = ids[first:behind]
        return self._limited(ids, labels, text)

    def tokenise(self, text: str) -> tuple[list[int], list[tuple[int, int]] | None]:
        """Token ids of a rendered text, and where in it each stands; None where the tokenizer cannot tell."""
        with_offsets = self.tokenizer.is_fast
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=with_offsets, verbose=False)
        return encoding["input_ids"], encoding["offset_mapping"] if with_offsets else None

    def _tokens_of(
        self, turn: Turn, text: str, ids: list[int], offsets: list[tuple[int, int]] | None
    ) -> tuple[int, int]:
        """The tokens that lie wholly inside the turn, as a range of positions."""
        end = turn.end if self.options.span == "turn" else turn.content_end
        if offsets is None:
            return self._count_before(turn.start, text, ids), self._count_before(end, text, ids)
        first = bisect_left(offsets, turn.start, key=itemgetter(0))
        while first < len(ids) and self._untrimmed(first, ids, offsets)[0] < turn.start:
            first += 1
        behind = max(bisect_right(offsets, end, key=itemgetter(1)), first)
        while behind > first and self._untrimmed(behind - 1, ids, offsets)[1] > end:
            behind -= 1
        return first, behind

    def _untrimmed(self, position: int, ids: list[int], offsets: list[tuple[int, int]]) -> tuple[int, int]:
        """A token's true extent.

        Byte-level tokenizers may leave the blanks of `` foo`` out of its offsets. Others leave blanks out of their
        tokens altogether; so a gap between two tokens belongs to one of them only if its own text has the blank and is
        longer than what its offsets cover.
        """
        start, end = offsets[position]
        gap_before = start - offsets[position - 1][1] if position else start
        gap_behind = offsets[position + 1][0] - end if position + 1 < len(offsets) else 0
        if gap_before > 0 or gap_behind > 0:
            own = self.tokenizer.decode([ids[position]], clean_up_tokenization_spaces=False)
            missing = max(len(own) - (end - start), 0)
            before = min(max(gap_before, 0), len(own) - len(own.lstrip()), missing)
            behind = min(max(gap_behind, 0), len(own) - len(own.rstrip()), missing - before)
            return start - before, end + behind
        return start, end

    def _count_before(self, end: int, text: str, ids: list[int]) -> int:
        """How many tokens ``text[:end]`` has, for a tokenizer without offsets.

        Raises:
            RejectError: a token of the whole text reaches across ``end``.
        """
        before, _ = self.tokenise(text[:end])
        if ids[: len(before)] != before:
            raise RejectError("a token reaches across the border of the answer, and the tokenizer gives no offsets")
        return len(before)

    def _limited(self, ids: list[int], labels: list[int], text: str = "") -> Rendered:
        limit = self.options.max_length
        truncated = len(ids) > limit
        if truncated and self.options.long == "reject":
            raise RejectError(f"{len(ids)} tokens, more than the limit of {limit}")
        if truncated:
            ids, labels = ids[:limit], labels[:limit]
        if labels:
            labels[0] = NOT_SCORED
        rendered = Rendered(input_ids=ids, labels=labels, truncated=truncated, text=text)
        if rendered.n_scored <= 1:
            cut = f" within the first {limit} tokens" if truncated else ""
            raise RejectError(f"{rendered.n_scored} assistant tokens to score{cut}, at least 2 are needed")
        if min(ids) < 0 or (self.vocab_size is not None and max(ids) >= self.vocab_size):
            wrong, size = min(ids) if min(ids) < 0 else max(ids), self.vocab_size
            raise RejectError(
                f"token id {wrong} is outside the student's vocabulary{f' of {size}' if size is not None else ''}: "
                "the tokenizer and the student do not fit"
            )
        return rendered


def _with_system(messages: Sequence[Message], system: System) -> list[Message]:
    """The messages, with system messages treated as asked."""
    instructions = [message["content"] for message in messages if message["role"] == "system"]
    if system == "keep" or not instructions:
        return list(messages)
    others = [message for message in messages if message["role"] != "system"]
    if system == "drop":
        return others
    first = next((index for index, message in enumerate(others) if message["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": "\n\n".join(instructions)}, *others]
    merged = "\n\n".join([*instructions, others[first]["content"]])
    others[first] = {**others[first], "content": merged}
    return others
