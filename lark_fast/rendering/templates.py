"""Messages -> one text and, in it, the character span of every assistant turn, by way of a chat template."""

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lark_fast.errors import RejectError
from lark_fast.pool.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENTINEL = "lark0b51probe"
RAW = "use --render raw"

# Some templates (Llama-3.2, Mistral-Small) write today's date into the prompt, and a score must not depend on the day
# it is computed. The date that Llama-3.1's template falls back to stands in.
FIXED_DATE = {
    "%Y": "2024", "%y": "24", "%m": "07", "%B": "July", "%b": "Jul", "%d": "26", "%-d": "26", "%e": "26",
    "%A": "Friday", "%a": "Fri", "%H": "00", "%M": "00", "%S": "00",
}  # fmt: skip
FIXED_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{code}', '{text}')" for code, text in FIXED_DATE.items())
    + " }}{% endmacro %}\n"
)


class TemplateError(RejectError):
    """The template, not the record, is at fault: every record like this one meets the same end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Where one assistant turn stands in the rendered text, in characters."""

    start: int  # behind what the generation prompt writes
    content_end: int  # behind the content's last character
    end: int  # behind the end-of-turn text: the next message's start, or the text's end


@dataclass(frozen=True, slots=True)
class Frame:
    """What a template writes around an assistant's content."""

    generation_prompt: str  # from the end of the user's message up to where the model takes over
    end_of_turn: str


class ChatTemplate:
    """A tokenizer's chat template (or another one) and what has to be known about it to find the answers in a text.

    Args:
        tokenizer: renders through Transformers' sandboxed Jinja.
        source: a Jinja template to use in place of the tokenizer's own.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", source: str | None = None) -> None:
        self._tokenizer = tokenizer
        try:
            self.source = tokenizer.get_chat_template(source)
        except ValueError:
            self.source = None
        self.hash = hashlib.sha256((self.source or "").encode()).hexdigest()
        own = source is None and getattr(tokenizer, "name_or_path", "")
        self.name = f"the chat template of {own}" if own else f"the chat template with hash {self.hash[:12]}"

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """The conversation as the template writes it, with the generation prompt behind it when ``prompt``.

        Raises:
            TemplateError: there is no template, its Jinja is broken, or it refuses the system role.
            RejectError: it refuses these messages for another reason.
        """
        import jinja2

        if self.source is None:
            raise TemplateError("the tokenizer has no chat template; give one with --chat-template FILE")
        try:
            return self._apply(messages, prompt)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"{self.name} is not valid Jinja: {_one_line(error)}") from error
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            others = [message for message in messages if message["role"] != "system"]
            if 0 < len(others) < len(messages) and self._accepts(others, prompt):
                raise TemplateError(
                    f"{self.name} refuses the system role ({_one_line(error)}); use --system merge or --system drop"
                ) from error
            raise RejectError(f"{self.name} refuses the conversation: {_one_line(error)}") from error

    def spans(self, messages: Sequence[Message], *, last_only: bool = False) -> tuple[str, list[Turn]]:
        """Render the conversation as it is and find its assistant turns.

        Args:
            messages: the last one is an assistant's.
            last_only: look for the last turn alone.

        Returns:
            The text and the turns in their order.

        Raises:
            TemplateError: as ``render``; or the text does not hold what an assistant said, or not behind the prompt
                that the model would have seen.
            RejectError: as ``render``; or nothing stands in front of an assistant's turn.
        """
        text = self.render(messages)
        turns: list[Turn] = []
        for index in _assistants(messages, last_only):
            turns.append(self._turn(text, messages, index, turns[-1].start if turns else len(text)))
        return text, turns[::-1]

    def raw_spans(self, messages: Sequence[Message], *, last_only: bool = False) -> tuple[str, list[Turn]]:
        """Set what the assistant said, letter by letter, into the template's frame.

        The last turn is generation prompt + content + end of turn. Earlier turns stand where the template puts an
        assistant's content, whatever it would have made of it (with ``last_only`` they are context, which the template
        writes as it likes). A marker such as ``<think>`` that the generation prompt already ends with is neither
        written twice nor scored.

        Args, returns and errors are those of ``spans``.
        """
        _, *earlier = _assistants(messages, last_only)
        marks = {index: f"{SENTINEL}{index};" for index in earlier}
        framed = [
            {**message, "content": marks[index]} if index in marks else message
            for index, message in enumerate(messages[:-1])
        ]
        rest = self.render(framed, prompt=True)
        frame, text, turns = self._frame, "", []
        for index in sorted(marks):
            head, _, rest = rest.partition(marks[index])
            if marks[index] in head + rest or not (head and rest):
                raise RejectError(f"{self.name} does not write message {index + 1} once; use --last-turn-only")
            content = messages[index]["content"]
            start, text = len(text + head), text + head + content
            end = len(text) + _shared(rest, frame.end_of_turn)
            written = _written(frame.generation_prompt, content)
            turns.append(Turn(start=start + written, content_end=len(text), end=end))
        text += rest
        content = messages[-1]["content"]
        start, text = len(text), text + content[_written(frame.generation_prompt, content) :]
        turns.append(Turn(start=start, content_end=len(text), end=len(text + frame.end_of_turn)))
        return text + frame.end_of_turn, turns

    @property
    def end_of_turn(self) -> str:
        """What the template writes behind an assistant's content.

        Raises:
            TemplateError: it cannot even render a question and an answer.
        """
        return self._frame.end_of_turn

    def _apply(self, messages: Sequence[Message], prompt: bool) -> str:
        clock = FIXED_CLOCK if "strftime_now" in self.source else ""
        return self._tokenizer.apply_chat_template(
            list(messages), chat_template=clock + self.source, tokenize=False, add_generation_prompt=prompt
        )

    def _accepts(self, messages: Sequence[Message], prompt: bool) -> bool:
        try:
            self._apply(messages, prompt)
        except Exception:  # whatever it is, the template does not accept them
            return False
        return True

    @cached_property
    def _frame(self) -> Frame:
        user = {"role": "user", "content": "probe"}
        try:
            whole = self.render([user, {"role": "assistant", "content": SENTINEL}])
            bare, prompt = self.render([user]), self.render([user], prompt=True)
        except RejectError as error:
            raise TemplateError(f"not even a question and an answer can be rendered: {error}") from error
        _, found, tail = whole.rpartition(SENTINEL)
        end_of_turn = tail if found else self._tokenizer.eos_token or ""
        return Frame(prompt[_shared(bare, prompt) :], end_of_turn)

    def _turn(self, text: str, messages: Sequence[Message], index: int, limit: int) -> Turn:
        """The turn of message ``index``, which ends before ``limit``."""
        content = messages[index]["content"]
        prompt = self.render(messages[:index], prompt=True)
        shared = _shared(text, prompt)
        floor = len(prompt) - len(self._frame.generation_prompt)
        if shared < floor:
            raise TemplateError(
                f"{self.name} writes what stands before the assistant's message {index + 1} in another way once that "
                f"message follows, so its prompt cannot be told from it; {RAW} or --last-turn-only"
            )
        last = index == len(messages) - 1
        ends = self._last_ends(text) if last else self._inner_ends(text, messages, index, floor, limit)
        content_start = _content_start(text, content, floor, ends[0]) if ends else None
        if content_start is None:
            raise TemplateError(
                f"{self.name} does not write all that the assistant says in message {index + 1}"
                f"{' (it may drop <think> text)' if '</think>' in content else ''}; {RAW}"
            )
        start = shared if shared == len(prompt) else min(shared, content_start)
        return Turn(start=start, content_end=max(ends[0], start), end=max(ends[1], start))

    def _last_ends(self, text: str) -> tuple[int, int]:
        """Where content and turn of the text's last message end."""
        tail = self._frame.end_of_turn
        return len(text.removesuffix(tail)), len(text)

    def _inner_ends(
        self, text: str, messages: Sequence[Message], index: int, floor: int, limit: int
    ) -> tuple[int, int] | None:
        """The same for an earlier message; None where its content is not to be found."""
        tail = self._frame.end_of_turn
        so_far = self.render(messages[: index + 1])
        shared = min(_shared(text, so_far), limit)
        content_end = len(so_far.removesuffix(tail))
        if shared >= content_end:
            return content_end, shared
        # The template wrote the turn in another way while it was the last (Qwen3 adds an empty think block to it).
        content = messages[index]["content"]
        for body in (content, content.lstrip(), content.strip()):
            at = text.find(body + tail, floor, limit)
            if at >= 0:
                return at + len(body), at + len(body + tail)
        return None


def _assistants(messages: Sequence[Message], last_only: bool) -> list[int]:
    """Indices of the assistant's messages to be found, the last one first."""
    found = [index for index in reversed(range(len(messages))) if messages[index]["role"] == "assistant"]
    found = found[:1] if last_only else found
    if 0 in found:
        raise RejectError("the conversation begins with an assistant's message: there is no prompt")
    return found


def _content_start(text: str, content: str, floor: int, end: int) -> int | None:
    """Where ``content`` starts if ``text[floor:end]`` ends with it, spaces around it and between its words aside.

    The part of it in front of the turn's start, if any, is then what the generation prompt wrote.
    """
    while end > floor and text[end - 1].isspace():
        end -= 1
    core = content.strip()
    start = end - len(core)
    if start >= floor and text.startswith(core, start):
        return start
    start = end
    for character in reversed("".join(core.split())):
        start -= 1
        while start >= floor and text[start].isspace():
            start -= 1
        if start < floor or text[start] != character:
            return None
    return start


def _written(generation_prompt: str, content: str) -> int:
    """How many of the content's first characters the generation prompt ends with, a marker such as ``<think>``.

    Only what opens a bracket counts: a prompt that ends in a line break says nothing about a content that happens to
    start with one.
    """
    if not content.startswith(("<", "[", "◁")):
        return 0
    marker = generation_prompt.rstrip()
    blank = generation_prompt[len(marker) :]
    for length in range(min(len(marker), len(content)), 0, -1):
        if marker.endswith(content[:length]):
            return length + _shared(content[length:], blank)
    return 0


def _shared(one: str, other: str) -> int:
    """Length of the longest common prefix."""
    if one.startswith(other):
        return len(other)
    longest = min(len(one), len(other))
    return bisect_left(range(longest), True, key=lambda length: not one.startswith(other[: length + 1]))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
