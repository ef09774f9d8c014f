"""Questions as a model reads them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lark_fast.errors import RejectError, UserError
from lark_fast.evaluation.answers import THINK, THOUGHT
from lark_fast.evaluation.backends.backend import Prompt
from lark_fast.rendering.templates import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lark_fast.evaluation.benchmarks import Question


class Prompter:
    """Renders questions with a chat template, up to where the model takes over.

    Args:
        tokenizer: the model's.
        chat_template: a template to use instead of the tokenizer's own.
        max_positions: tokens that the model reads and writes at most, or None where it does not say.
        max_new_tokens: of an answer.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        chat_template: str | None = None,
        max_positions: int | None,
        max_new_tokens: int,
    ) -> None:
        self._tokenizer, self._max_positions, self._max_new_tokens = tokenizer, max_positions, max_new_tokens
        self.template = ChatTemplate(tokenizer, chat_template)

    def __call__(self, question: "Question") -> Prompt | None:
        """The prompt, or None where it leaves the model no position to write in.

        Raises:
            UserError: the template refuses the question.
        """
        try:
            text = self.template.render(question.messages, prompt=True)
        except RejectError as error:
            raise UserError(f"{question.source}:{question.line}: {error}") from error
        ids = tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        room = self._max_new_tokens
        if self._max_positions is not None:
            room = min(room, self._max_positions - len(ids))
        if room < 1:
            return None
        return Prompt(
            key=f"{question.benchmark}\0{question.problem_id}",
            ids=ids,
            thinking=opens_thoughts(text),
            max_new_tokens=room,
        )

    def stop_ids(self, more: Sequence[int] = ()) -> tuple[int, ...]:
        """Tokens that end a turn: the tokenizer's end of text, what the template writes behind a turn, and ``more``.

        Raises:
            UserError: there are none.
        """
        words = self._tokenizer.convert_tokens_to_ids
        found = [self._tokenizer.eos_token_id, *more]
        try:
            end = self.template.end_of_turn.strip()
        except RejectError as error:
            raise UserError(str(error)) from error
        if end in self._tokenizer.get_vocab():
            found.append(words(end))
        stops = tuple(dict.fromkeys(token for token in found if token is not None))
        if not stops:
            raise UserError("neither the tokenizer nor its chat template says which token ends an answer")
        return stops


def opens_thoughts(prompt: str) -> bool:
    """Whether a prompt ends inside of a block of thoughts."""
    return prompt.rfind(THINK) > prompt.rfind(THOUGHT)
