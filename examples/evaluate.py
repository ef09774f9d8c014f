"""``token_stats`` in an evaluation or training loop around a Transformers model: one line where its loss would be.

    result = evaluate(model, **batch)
    result.means.nll, result.means.agreement, result.rsr     # a number a sequence: loss, accuracy, RSR

Everything stays on the batch's device. Models that cap or scale their logits (Gemma-2, Cohere, Granite) need
``token_stats``' arguments ``softcap`` or ``logit_scale`` too; ``lark_fast.Scorer`` finds them itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lark_fast import TokenStats, token_stats, token_stats_from_logits, trajectory_reduce
from lark_fast.kernels.trajectory_reduce import TrajectoryReduction


@torch.no_grad()
def evaluate(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> TrajectoryReduction:
    """A batch ``[B, T]`` by its sequences, from hidden states: the logits ``[B, T, V]`` are never made."""
    hidden = model.get_decoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    head, targets = model.get_output_embeddings(), next_tokens(labels)
    stats = token_stats(hidden.flatten(0, 1), head.weight, targets.flatten(), bias=head.bias)
    return by_sequence(stats, targets)


@torch.no_grad()
def evaluate_logits(logits: Tensor, labels: Tensor) -> TrajectoryReduction:
    """The same for a loop that has the logits ``[B, T, V]`` already."""
    targets = next_tokens(labels)
    return by_sequence(token_stats_from_logits(logits.flatten(0, 1), targets.flatten()), targets)


def next_tokens(labels: Tensor) -> Tensor:
    """Labels as Transformers takes them -> what each position predicts; -100 does not count."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def by_sequence(stats: TokenStats, targets: Tensor) -> TrajectoryReduction:
    """Sums and means over the positions of each sequence that count."""
    counted = targets != -100
    bounds = F.pad(counted.sum(1).cumsum(0), (1, 0))
    return trajectory_reduce(stats, bounds, rows=counted.flatten().nonzero().squeeze(1))
