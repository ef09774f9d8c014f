"""The five sums over a row of logits that its statistics are made of, and the statistics made of them.

For a row z of logits that predicts token y, with p = softmax(z):

    nll     = logsumexp(z) - z_y
    brier   = 1 - 2 p_y + sum_v p_v^2
    entropy = -sum_v p_v log p_v                      (nats)
    rank    = 1 + #{v != y : z_v > z_y}               (ties take the better rank)

The column y is kept out of the sums. Over v != y, with m = max z_v,

    S1' = sum e^(z-m),   S2' = sum e^(2(z-m)),   SZ' = sum (z-m) e^(z-m),   count = #{z_v > z_y}.

Sums over parts of a row are merged after moving them to their common maximum: with s = m - m_new and f = e^s,
S1' -> S1' f, S2' -> S2' f^2, SZ' -> (SZ' + s S1') f. Once all are merged, they are moved to max(m, z_y); then, with
a = e^(z_y-m) and S1 = S1' + a,

    log S1  = log1p(S1') where S1' < a (then m = z_y and a = 1), else log(S1)
    nll     = log S1 - (z_y-m)
    brier   = (S1'^2 + S2') / S1^2
    entropy = log S1 - (SZ' + (z_y-m) a) / S1

since 1 - 2p + sum p^2 = (1-p)^2 + sum_{v != y} p_v^2. The plain forms subtract numbers that agree in every digit once
p_y is near 1; these do not.

``[splits, 5, T]`` partial sums, in the order m, S1', S2', SZ', count, are what every form of the head makes: a split is
a tile of columns, a block of them, or another rank's share of the vocabulary. This file has the plain definition of
what follows; softmax_sums_triton.py has the same as kernels.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

STATISTICS = ("nll", "brier", "entropy", "rank")
LOWEST = -(2.0**100)  # "no logit here": finite, so that (z - m) e^(z - m) is 0 and not NaN


class Wanted(NamedTuple):
    """Which statistics to compute beside nll and agreement, which cost nothing more."""

    brier: bool = True
    entropy: bool = True
    rank: bool = True

    @classmethod
    def of(cls, statistics: Collection[str]) -> "Wanted":
        """From names out of ``STATISTICS``.

        Raises:
            ValueError: another name, or a string where a collection of names belongs.
        """
        if isinstance(statistics, str) or not set(statistics) <= set(STATISTICS):
            raise ValueError(f"statistics={statistics!r}: a collection of names out of {', '.join(STATISTICS)}")
        return cls(*(name in statistics for name in cls._fields))


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Statistics of T predicted tokens; each field is ``[T]``, or None where it was not asked for.

    Rows whose label is ignored hold NaN (rank 0, agreement False), and so do rows with a NaN or +inf logit, and rows
    whose label has probability 0 (a logit of -inf). The Triton forms take logits beyond 10^8 for broken, too.
    """

    nll: Tensor  # float32 (float64 for float64 inputs), nats
    brier: Tensor | None  # as nll, in [0, 2]
    entropy: Tensor | None  # as nll, nats
    rank: Tensor | None  # int64, 1 = no logit is larger
    agreement: Tensor  # bool: no token is more probable than the label
    brier_topk: Tensor | None = None  # as brier, with the softmax renormalised over the k largest logits

    def map(self, function: Callable[[Tensor], Tensor]) -> "TokenStats":
        """``function`` of every field that there is."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return TokenStats(**{name: None if value is None else function(value) for name, value in values.items()})


def concatenate(parts: Sequence[TokenStats]) -> TokenStats:
    """Statistics of one run of tokens after the other, at least one; all hold the same fields."""
    if len(parts) == 1:
        return parts[0]
    columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(TokenStats)}
    return TokenStats(**{name: None if column[0] is None else torch.cat(column) for name, column in columns.items()})


def merge(partials: Tensor) -> Tensor:
    """Partial sums ``[splits, 5, T]``, at least one split -> the sums over all of them ``[5, T]``."""
    if len(partials) == 1:
        return partials[0]
    m = partials[:, 0].amax(0)
    return torch.cat([m.unsqueeze(0), move(partials, m)[:, 1:].sum(0)])


def move(sums: Tensor, m: Tensor) -> Tensor:
    """Sums ``[..., 5, T]`` relative to another maximum ``m`` [T]."""
    old_m, s1, s2, sz, count = sums.unbind(-2)
    shift = old_m - m
    scale = shift.exp()
    return torch.stack([m.expand_as(s1), s1 * scale, s2 * scale * scale, (sz + shift * s1) * scale, count], -2)


def finish(partials: Tensor, label_logit: Tensor, wanted: Wanted) -> TokenStats:
    """Statistics of rows with partial sums ``[splits, 5, T]``, at least one split, and the label's logit ``[T]``."""
    sums = merge(partials)
    agreement = label_logit >= sums[0]
    m, s1, s2, sz, count = move(sums, torch.maximum(sums[0], label_logit))
    x = label_logit - m
    a = x.exp()
    total = s1 + a
    log_total = torch.where(s1 < a, s1.log1p(), total.log())
    nll = log_total - x
    broken = ~nll.isfinite()
    nan = float("nan")
    return TokenStats(
        nll=nll.masked_fill(broken, nan),
        brier=brier_score(s1, s2, a).masked_fill(broken, nan) if wanted.brier else None,
        entropy=(log_total - (sz + x * a) / total).clamp(min=0.0).masked_fill(broken, nan) if wanted.entropy else None,
        rank=(1 + count).masked_fill(broken, 0).long() if wanted.rank else None,
        agreement=agreement & ~broken,
    )


def brier_score(others: Tensor, others_squared: Tensor, a: Tensor) -> Tensor:
    """(1 - p_y)^2 + sum_{v != y} p_v^2 from S1', S2' and a."""
    return (others * others + others_squared) / (others + a) ** 2
