"""Transformers' own ``generate``, a batch at a time: runs everywhere, on a CPU too.

A batch is written in stretches. Between two of them the answers that are done leave it, with their keys and values, so
that the rest of a batch does not carry them along.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import TemperatureLogitsWarper

from lark_fast.errors import UserError
from lark_fast.evaluation.answers import has_answered
from lark_fast.evaluation.backends.backend import Answer, Prompt
from lark_fast.evaluation.backends.draws import GumbelNoise, TopP
from lark_fast.evaluation.backends.seeds import stream
from lark_fast.evaluation.config import Sampling

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

_STRETCHES = (32, 64, 128, 256)  # tokens; the last again and again
_MOST_ROWS = 512
_BOX_TOKENS = 256  # a box that is longer ends no answer early
_USABLE_MEMORY = 0.7


@dataclass(slots=True)
class _Row:
    """An answer while it is written."""

    key: tuple[int, int]  # position of its prompt, and which of that one's answers it is
    asked: Prompt
    generator: torch.Generator | None
    written: list[int] = field(default_factory=list)
    finish: str = ""


class TransformersBackend:
    """Lets a model in memory answer.

    Args:
        model: a causal language model; its own generation defaults (penalties, top-k) are left out.
        tokenizer: the model's.
        stop_ids: tokens that end a turn.
        batch_size: answers written at a time; None: what the memory holds at their longest.
    """

    name = "transformers"

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        stop_ids: Sequence[int],
        *,
        batch_size: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.stop_ids, self.batch_size = model, tokenizer, tuple(stop_ids), batch_size
        self._closing = frozenset(number for word, number in tokenizer.get_vocab().items() if "}" in word)
        # What a checkpoint's generation_config.json has (Qwen2.5: top-k, a repetition penalty) was not asked for here.
        model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=list(stop_ids), pad_token_id=stop_ids[0], return_dict_in_generate=True
        )

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_tokens: Callable[[int], None] = lambda _: None
    ) -> Iterator[tuple[int, list[Answer]]]:
        """Yield (position of a prompt, its answers) as they are done.

        Raises:
            UserError: the device has no memory for a single answer.
        """
        with _quiet():
            yield from self._generate(prompts, sampling, on_tokens)

    def _generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_tokens: Callable[[int], None]
    ) -> Iterator[tuple[int, list[Answer]]]:
        waiting = [(place, sample) for place in range(len(prompts)) for sample in range(sampling.n)]
        done: dict[int, dict[int, Answer]] = {}
        limit = self.batch_size or self._rows_that_fit(prompts)
        while waiting:
            batch = waiting[:limit]
            finished: set[tuple[int, int]] = set()
            try:
                for key, answer in self._write(prompts, batch, sampling, on_tokens):
                    finished.add(key)
                    place, sample = key
                    of_prompt = done.setdefault(place, {})
                    of_prompt[sample] = answer
                    if len(of_prompt) == sampling.n:
                        yield place, [of_prompt[sample] for sample in range(sampling.n)]
                        del done[place]
            except torch.OutOfMemoryError as error:
                limit = len(batch) // 2
                if not limit:
                    raise UserError("the GPU has no memory for one answer: lower --max-new-tokens") from error
                torch.cuda.empty_cache()
            waiting = [key for key in waiting if key not in finished]

    @torch.no_grad()
    def _write(
        self,
        prompts: Sequence[Prompt],
        batch: Sequence[tuple[int, int]],
        sampling: Sampling,
        on_tokens: Callable[[int], None],
    ) -> Iterator[tuple[tuple[int, int], Answer]]:
        """Yield ((position of the prompt, sample), answer) of one batch."""
        device = self.model.get_input_embeddings().weight.device
        rows = [
            _Row(
                (place, sample),
                prompts[place],
                torch.Generator(device).manual_seed(stream(sampling.seed, prompts[place].key, sample))
                if sampling.temperature
                else None,
            )
            for place, sample in batch
        ]
        ids, mask, cache = *self._padded([row.asked.ids for row in rows], device), None
        stretches = iter(_STRETCHES)
        stretch = 0
        while rows:
            stretch = next(stretches, stretch)
            before = sum(len(row.written) for row in rows)
            watch = _Watch(rows, self.tokenizer, self._closing, self.stop_ids, stop_at_answer=sampling.stop_at_answer)
            made = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=stretch,
                logits_processor=_draw(rows, sampling),
                stopping_criteria=StoppingCriteriaList([watch]),
            )
            written = made.sequences[:, ids.shape[1] :]
            on_tokens(sum(len(row.written) for row in rows) - before)
            alive = [place for place, row in enumerate(rows) if not row.finish]
            for row in rows:
                if row.finish:
                    text = self.tokenizer.decode(row.written, skip_special_tokens=True)
                    yield row.key, Answer(text=text, tokens=len(row.written), finish=row.finish)
            if alive:
                keep = torch.tensor(alive, device=device)
                mask = torch.cat([mask, torch.ones_like(written)], dim=1)[keep]
                ids, cache = made.sequences[keep], _kept(getattr(made, "past_key_values", None), keep, len(rows))
            rows = [rows[place] for place in alive]

    def _padded(self, prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Token ids ``[B, T]``, padded on the left so that all answers begin in one place, and their mask."""
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.stop_ids[0])
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        return ids.to(device), mask.to(device)

    def _rows_that_fit(self, prompts: Sequence[Prompt]) -> int:
        """Answers whose keys and values fit beside the model at their full length.

        As many as may be: the last of a batch, however few, take as many steps as its longest answer has tokens.
        """
        embedding = self.model.get_input_embeddings().weight
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        a_token = 2 * config.num_hidden_layers * heads * width * embedding.element_size()
        longest = max((len(prompt.ids) + prompt.max_new_tokens for prompt in prompts), default=1)
        if embedding.device.type == "cuda":
            free = int(torch.cuda.mem_get_info(embedding.device)[0] * _USABLE_MEMORY)
        else:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        return max(1, min(_MOST_ROWS, free // (a_token * longest)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Padding makes a batch wider than the model's positions, of which Transformers warns; no answer is longer."""
    told = logging.getLogger("transformers.generation.stopping_criteria")
    before = told.level
    told.setLevel(logging.ERROR)
    try:
        yield
    finally:
        told.setLevel(before)


def _draw(rows: Sequence[_Row], sampling: Sampling) -> LogitsProcessorList:
    """From logits to logits whose largest is the next token."""
    if not sampling.temperature:
        return LogitsProcessorList()
    draw = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_p < 1:
        draw.append(TopP(sampling.top_p))
    return LogitsProcessorList([*draw, GumbelNoise([row.generator for row in rows])])


def _kept(cache: "Cache | None", keep: Tensor, rows: int) -> "Cache | None":
    """The cache of the rows that go on; None, and they are read anew, where a model's cache cannot be cut."""
    if len(keep) == rows or cache is None:
        return cache
    # A layer that has the states of a convolution too would cut its keys and values alone.
    if not all(hasattr(layer, "batch_select_indices") and not hasattr(layer, "conv_states") for layer in cache.layers):
        return None
    cache.batch_select_indices(keep)
    return cache


class _Watch(StoppingCriteria):
    """Takes every new token down and says which rows are done.

    A row that is done is written on with padding until all are or the stretch ends, which is not taken down.
    """

    def __init__(
        self,
        rows: Sequence[_Row],
        tokenizer: "PreTrainedTokenizerBase",
        closing: frozenset[int],
        stop_ids: Sequence[int],
        *,
        stop_at_answer: bool,
    ) -> None:
        self._rows, self._tokenizer, self._stop_at_answer = rows, tokenizer, stop_at_answer
        self._closing, self._stop_ids = closing, frozenset(stop_ids)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        """``[B]``: which rows are done."""
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            if not row.finish:
                row.written.append(token)
                row.finish = self._finish(row, token)
        return torch.tensor([bool(row.finish) for row in self._rows], device=input_ids.device)

    def _finish(self, row: _Row, token: int) -> str:
        if token in self._stop_ids:
            return "stop"
        if self._stop_at_answer and token in self._closing and self._answered(row):
            return "answer"
        return "length" if len(row.written) >= row.asked.max_new_tokens else ""

    def _answered(self, row: _Row) -> bool:
        """Whether the token closes a box outside of thoughts. Only then is the whole answer looked at."""
        tail = self._tokenizer.decode(row.written[-_BOX_TOKENS:], skip_special_tokens=True)
        if not has_answered(tail, thinking=False):
            return False
        return has_answered(self._tokenizer.decode(row.written, skip_special_tokens=True), thinking=row.asked.thinking)
