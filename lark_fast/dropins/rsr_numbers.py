"""The numbers of the released Rank-Surprisal Ratio code (arXiv 2601.14249, rsr_cal.py), without [T, V] logits.

An assistant's turn is what stands between two markers among the token ids of a rendered conversation. With a float32
student the numbers are that code's; with a bfloat16 one that code reads logits that were rounded to bfloat16.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from lark_fast.errors import UserError
from lark_fast.kernels.token_stats import IGNORE_INDEX, TokenStats
from lark_fast.kernels.trajectory_reduce import MAX_RANK, SMALLEST_NLL, trajectory_reduce
from lark_fast.packing import windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lark_fast.scoring.scorer import Scorer

MARKERS = {  # what opens and closes an assistant's turn
    "qwen": ("<|im_start|>assistant\n", "<|im_end|>"),
    "llama3": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
}


@dataclass(frozen=True, slots=True)
class Tokens:
    """A sample as the student reads it."""

    sample_id: int | str
    input_ids: list[int]
    labels: list[int]  # as many: the token itself where it is scored, else -100


def tokenise(
    samples: Iterable[tuple[str, Mapping[str, Any]]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    chat_template: str = "qwen",
    max_model_len: int | None = None,
) -> Iterator[Tokens]:
    """Yield the samples that have ``messages`` with something to score; others are passed over, as in the original.

    Args:
        samples: (where it stands, the sample).
        tokenizer: the student's.
        chat_template: whose markers, see ``MARKERS``.
        max_model_len: tokens at which a sample is cut; None: nowhere.

    Raises:
        UserError: the chat template cannot render a sample.
    """
    header, end = (tokenizer(marker, add_special_tokens=False)["input_ids"] for marker in MARKERS[chat_template])
    cut = {"truncation": True, "max_length": max_model_len} if max_model_len else {}
    for index, (where, sample) in enumerate(samples):
        if "messages" not in sample:
            continue
        try:
            ids = tokenizer.apply_chat_template(sample["messages"], tokenize=True, return_dict=True, **cut)["input_ids"]
        except Exception as error:  # a template's own, or of a sandbox that refuses it
            raise UserError(f"{where}: the chat template cannot render it: {error or type(error).__name__}") from error
        labels = assistant_labels(ids, header, end)
        if any(label != IGNORE_INDEX for label in labels):
            yield Tokens(sample_id(sample, index), ids, labels)


def sample_id(sample: Mapping[str, Any], index: int) -> Any:
    """A sample's name: its ``id``, ``_id``, or place in the file."""
    return sample.get("id", sample.get("_id", index))


def assistant_labels(ids: Sequence[int], header: Sequence[int], end: Sequence[int]) -> list[int]:
    """The ids behind each header, up to the end marker or, where that was cut off, to the last; -100 elsewhere."""

    def find(marker: Sequence[int], start: int) -> int:
        places = range(start, len(ids) - len(marker) + 1)
        return next((place for place in places if ids[place : place + len(marker)] == marker), len(ids))

    labels, stop = [IGNORE_INDEX] * len(ids), 0
    while (start := find(header, stop) + len(header)) < len(ids):
        stop = find(end, start)
        labels[start:stop] = ids[start:stop]
    return labels


def infer(
    scorer: "Scorer", sequences: Iterable[Tokens], *, rank_clip_r: int = MAX_RANK, skip: int = 0
) -> Iterator[list[dict[str, Any]]]:
    """Yield the original's inference results, a window of samples at a time.

    Args:
        scorer: with the student.
        sequences: of ``tokenise``.
        rank_clip_r: ranks beyond it count as it.
        skip: sequences that were done before.

    Raises:
        UserError: a token is outside the student's vocabulary, or the device's memory does not suffice.
    """
    sized = ((one, len(one.input_ids)) for one in islice(sequences, skip, None))
    for window in windows(sized, max_tokens=scorer.tokens_per_window):
        try:
            scored = scorer.score_tokens([one.input_ids for one in window], [one.labels for one in window])
        except (ValueError, torch.OutOfMemoryError) as error:
            raise UserError(f"samples {window[0].sample_id!r} to {window[-1].sample_id!r}: {error}") from error
        yield [_result(one, stats, rank_clip_r) for one, stats in zip(window, scored, strict=True)]


def _result(one: Tokens, stats: TokenStats, rank_clip_r: int) -> dict[str, Any]:
    return {
        "sample_id": one.sample_id,
        "resp_token_positions": [position for position, label in enumerate(one.labels) if label != IGNORE_INDEX],
        "probs": stats.nll.neg().exp().tolist(),
        "nlls": stats.nll.tolist(),
        "ranks": stats.rank.clamp(max=rank_clip_r).tolist(),
        "metadata": {},
    }


def sample_metrics(result: Mapping[str, Any], rank_clip_r: int = MAX_RANK) -> dict[str, Any]:
    """A sample's line of metrics, from its inference result, which has at least one token."""
    nll, rank = (torch.tensor(result[name], dtype=dtype) for name, dtype in _COLUMNS.items())
    stats = TokenStats(nll=nll, brier=None, entropy=None, rank=rank, agreement=rank == 1)
    reduced = trajectory_reduce(stats, torch.tensor([0, len(nll)]), max_rank=rank_clip_r)
    return {
        "sample_id": result["sample_id"],
        "resp_token_length": len(nll),
        "avg_rank_clip": reduced.means.rank.item(),
        "avg_surprisal": reduced.means.nll.item(),
        "rank_surprisal_ratio": reduced.rsr.item(),
        **result.get("metadata", {}),
    }


_COLUMNS = {"nlls": torch.float64, "ranks": torch.int64}


class DatasetMetrics:
    """The metrics of all samples together; the ratio is that of the means (the paper's appendix A.8)."""

    def __init__(self) -> None:
        self.n_samples, self._sums = 0, dict.fromkeys(("resp_token_length", "avg_rank_clip", "avg_surprisal"), 0.0)

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Take in a sample's line."""
        self.n_samples += 1
        for name in self._sums:
            self._sums[name] += metrics[name]

    def row(self) -> dict[str, float]:
        """The means over the samples; NaN where there is none."""
        n_samples = self.n_samples or math.nan
        length, rank, nll = (total / n_samples for total in self._sums.values())
        return {
            "avg_resp_token_length": length,
            "avg_rank_clip": rank,
            "avg_surprisal": nll,
            "rank_surprisal_ratio": rank / max(nll, SMALLEST_NLL),
        }
