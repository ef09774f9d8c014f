"""A model for EleutherAI's lm-evaluation-harness (``lm_eval``) that scores without ``[B, T, V]`` logits.

    python -m lark_fast.dropins.lm_eval run --model lark-fast --model_args pretrained=DIR --tasks hellaswag

    lm_eval.simple_evaluate(LarkLM("DIR"), tasks=["hellaswag"])

The harness finds only models that have been imported, so this module's command line is the harness's own with one model
more. All but the scoring of tokens is its Transformers model: loading, tokenisation, chat templates, generation.
"""

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from lark_fast.batch import Targets
from lark_fast.errors import UserError
from lark_fast.scoring.scorer import Scorer
from lark_fast.student import Student

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    if error.name not in ("lm_eval", "accelerate", "peft", "datasets"):
        raise
    raise ImportError(f'{__name__} needs {error.name}: pip install "lark-fast[lm-eval]"') from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # its texts, context and continuation
REFUSED = {
    "mixed_precision_dtype": "give dtype=bfloat16 instead",
    "tp_plan": "--model hf spreads a model over devices",
}


class Share(NamedTuple):
    """Where a request's answer lies: tokens start to end of what is asked about one sequence."""

    request: int
    start: int
    end: int


@register_model("lark-fast")
class LarkLM(HFLM):
    """``lm_eval``'s Transformers model, with ``loglikelihood`` and ``loglikelihood_rolling`` from packed passes.

    Requests are packed without padding, ``tokens_per_batch`` tokens a pass; ``batch_size`` is for generation alone. A
    request whose input is the beginning of another's takes its numbers from that pass: options of one token share a
    single one, as in ``HFLM``, and so do options that begin alike. In low precision the log-probabilities are better
    than those of ``HFLM``, which rounds logits and log-softmax. ``is_greedy`` is that no token is more probable, where
    ``HFLM`` takes the first of several equal logits.

    Args:
        pretrained: a directory, a hub id, or a Transformers model.
        tokens_per_batch: tokens of one forward pass; None: as for ``Scorer``.
        **kwargs: as ``HFLM``.

    Raises:
        UserError: an encoder and decoder, a prompt-tuning adapter, a head that is not known, or an argument that is not
            honoured here.
    """

    def __init__(
        self, pretrained: "str | PreTrainedModel", *, tokens_per_batch: int | None = None, **kwargs: Any
    ) -> None:
        for name, remedy in REFUSED.items():
            if kwargs.get(name):
                raise UserError(f"{name}={kwargs[name]}: not honoured by --model lark-fast; {remedy}")
        if tokens_per_batch is not None and tokens_per_batch < 1:
            raise UserError(f"tokens_per_batch={tokens_per_batch}: at least 1")
        super().__init__(pretrained, **kwargs)
        name = pretrained if isinstance(pretrained, str) else type(pretrained).__name__
        if self.backend != "causal":
            raise UserError(f"pretrained={name}: not a causal language model; --model hf evaluates it")
        model = self.model
        if hasattr(model, "get_base_model"):
            if model.active_peft_config.is_prompt_learning:
                raise UserError(f"peft={self.peft}: it puts tokens in front of the prompt; --model hf evaluates it")
            model = model.get_base_model()
        try:
            self._scorer = Scorer(Student(model), tokens_per_batch=tokens_per_batch)
        except ValueError as error:
            raise UserError(f"pretrained={name}: {error}; --model hf evaluates it") from error

    def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, cut into disjoint windows as ``HFLM`` cuts them, in nats.

        All windows are there before the first pass, so that packs are full.
        """
        windows, owners = [], []
        quiet = disable_tqdm or self.rank != 0
        for owner, request in enumerate(tqdm(requests, desc="Tokenizing inputs", disable=quiet)):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Sum of the log-probabilities of each continuation, and whether no token of it had a better one.

        Raises:
            ValueError: a context or continuation without a token, or a continuation longer than ``max_length``.
            torch.OutOfMemoryError: one sequence alone is too much for the device.
        """
        sequences, shares = self._sequences(requests)
        lengths = [len(ids) for ids, _ in sequences]
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm or self.rank != 0)
        with bar, self._scorer.passes(statistics=("nll",)) as passes:
            layout = passes.layout
            batches = (layout.prepare(group, [sequences[i] for i in group]) for group in layout.plan(lengths))
            for batch, scored in passes.run(batches):
                if scored is None:
                    raise torch.OutOfMemoryError(f"no memory for a sequence of {batch.n_tokens} tokens")
                for member, one in zip(batch.members, scored, strict=True):
                    nll, agreement = one.tokens.nll.double().numpy(), one.tokens.agreement.numpy()
                    for request, start, end in shares[member]:
                        answer = -float(nll[start:end].sum()), bool(agreement[start:end].all())
                        answers[request] = answer
                        if requests[request][0] is not None:  # windows of a text are none's answer by themselves
                            self.cache_hook.add_partial("loglikelihood", requests[request][0], answer)
                    bar.update(len(shares[member]))
        return answers

    def _sequences(self, requests: Sequence[Request]) -> tuple[list[tuple[np.ndarray, Targets]], list[list[Share]]]:
        """What has to pass through the model, and whose answers lie in each.

        The last token of a continuation is predicted and never read, so ``max_length`` + 1 tokens are kept.
        """
        inputs, words, cut = [], [], 0
        for texts, context, continuation in requests:
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"{len(context)} tokens of context and {len(continuation)} of continuation, where there must be "
                    f"at least one of each and at most max_length={self.max_length} of the latter: {texts!r:.200}"
                )
            cut += len(context) + len(continuation) > self.max_length + 1
            # Big-endian bytes are in the order of their tokens, and one begins another where its tokens do.
            whole = np.array([*context, *continuation][-(self.max_length + 1) :], dtype=">u4")
            inputs.append(whole[:-1].tobytes())
            words.append(whole[-len(continuation) :].astype(np.int64))
        if cut:
            limit = f"max_length={self.max_length}"
            logging.getLogger("lm_eval").warning("%d requests lose their beginning: longer than %s", cut, limit)
        sequences, shares = [], []
        for holder, held in self._holders(inputs):
            rows = [np.arange(len(inputs[i]) // 4 - len(words[i]), len(inputs[i]) // 4) for i in held]
            ends = np.cumsum([0, *map(len, rows)]).tolist()
            asked = Targets(np.concatenate(rows), np.concatenate([words[i] for i in held]))
            sequences.append((np.frombuffer(inputs[holder], dtype=">u4").astype(np.int64), asked))
            shares.append([Share(*of) for of in zip(held, ends, ends[1:], strict=False)])
        return sequences, shares

    def _holders(self, inputs: Sequence[bytes]) -> list[tuple[int, list[int]]]:
        """Each input that begins no other, with those that begin it or are it."""
        if not self.logits_cache:
            return [(index, [index]) for index in range(len(inputs))]
        border = self._scorer.student.length_regime or 0
        found: list[tuple[int, list[int]]] = []
        # Backwards, an input comes right after those that it begins.
        for index in sorted(range(len(inputs)), key=inputs.__getitem__, reverse=True):
            own, last = inputs[index], inputs[found[-1][0]] if found else b""
            crossed = len(own) <= 4 * border < len(last)  # positions there are scaled otherwise
            if last.startswith(own) and not crossed:
                found[-1][1].append(index)
            else:
                found.append((index, [index]))
        return found


def main() -> None:
    """``lm_eval``'s command line, to which the model is known."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        print(f"lark-fast: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
