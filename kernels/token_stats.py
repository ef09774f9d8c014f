"""Per-token statistics of a student's predictions, straight from hidden states, without the [T, V] logits.

For a row z of logits (kernels/head.py) that predicts token y, with p = softmax(z):

    nll     = logsumexp(z) - z_y
    brier   = 1 - 2 p_y + sum_v p_v^2
    entropy = -sum_v p_v log p_v                      (nats)
    rank    = 1 + #{v != y : z_v > z_y}               (ties take the better rank)

The column y is kept out of the running sums. With m = max(z) and, over v != y, S1' = sum e^(z-m),
S2' = sum e^(2(z-m)), SZ' = sum (z-m) e^(z-m), and with a = e^(z_y-m), S1 = S1' + a:

    log S1  = log1p(S1') where S1' < a (then m = z_y and a = 1), else log(S1)
    nll     = log S1 - (z_y-m)
    brier   = (S1'^2 + S2') / S1^2
    entropy = log S1 - (SZ' + (z_y-m) a) / S1

since 1 - 2p + sum p^2 = (1-p)^2 + sum_{v != y} p_v^2. The plain forms subtract numbers that agree in every digit once
p_y is near 1; these do not. ``token_stats_naive`` is the plain definition, the truth of tests and benchmarks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lark_fast.kernels.head import accumulation_dtype, head_logits, label_logits

IGNORE_INDEX = -100
# A block of logits is [rows, columns] float32: small enough to stay in a CPU's cache while the statistics read it,
# large enough for the matmul to run at full speed (docs/log.md).
CPU_BLOCK = (512, 4096)
GPU_BLOCK = (4096, 16384)
GROUP = 16  # columns of which the top-k search looks at the maximum first
LOWEST = -1e30  # "no logit here": finite, so that (z - m) e^(z - m) is 0 and not NaN


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Statistics of T predicted tokens; each field is ``[T]``.

    Rows whose label is ignored hold NaN (rank 0), and so do rows with a NaN or +inf logit.
    """

    nll: Tensor  # float32 (float64 for float64 inputs), nats
    brier: Tensor  # as nll, in [0, 2]
    entropy: Tensor  # as nll, nats
    rank: Tensor  # int64, 1 = no logit is larger
    brier_topk: Tensor | None = None  # as brier, with the softmax renormalised over the k largest logits


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    top_k: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    impl: str = "auto",
) -> TokenStats:
    """Exact nll, Brier score, entropy and rank of every label, holding one bounded block of logits at a time.

    Args:
        hidden: ``[T, D]`` inputs of the output embedding; row t predicts ``labels[t]``.
        weight: ``[V, D]`` output embedding.
        labels: ``[T]`` int64 in [0, V), or ``ignore_index``.
        bias: ``[V]`` or None.
        softcap: cap of the logits (Gemma-2), or None.
        logit_scale: factor on the logits (Cohere; 1 / Granite's ``logits_scaling``), or None.
        top_k: also give ``brier_topk`` over the ``top_k`` largest logits (LARK's released code uses 50). A label that
            ties with the k-th largest logit counts as one of the k.
        ignore_index: label of rows to leave out.
        impl: "auto" or "torch"; both are the blocked torch form in this build.

    Returns:
        TokenStats of ``[T]`` tensors on the device of ``hidden``; sums are kept in float32 or better.

    Raises:
        ValueError: shapes that do not fit, a label outside [0, V), ``top_k`` below 1, an unknown ``impl``.
    """
    if impl not in ("auto", "torch"):
        raise ValueError(f"impl={impl!r}: this build has 'auto' and 'torch'")
    _check(hidden, weight, labels, bias, top_k, ignore_index)
    block_rows, block_columns = GPU_BLOCK if hidden.is_cuda else CPU_BLOCK
    result = _empty(hidden, labels, top_k)
    scored = (labels != ignore_index).nonzero().squeeze(1)
    buffer = hidden.new_empty(block_rows * block_columns, dtype=accumulation_dtype(hidden.dtype))
    for rows in scored.split(block_rows):
        part, label = hidden[rows], labels[rows]
        walk = _Walk(label_logits(part, weight, label, bias, softcap, logit_scale), label, top_k)
        for start in range(0, weight.shape[0], block_columns):
            block = slice(start, start + block_columns)
            columns = weight[block]
            out = buffer[: len(part) * len(columns)].view(len(part), len(columns))
            logits = head_logits(part, columns, None if bias is None else bias[block], softcap, logit_scale, out)
            walk.add(logits, start)
        walk.finish(result, rows)
    return result


def token_stats_naive(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    top_k: int | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> TokenStats:
    """The definition, word for word, with every logit in float64; arguments and result as ``token_stats``."""
    _check(hidden, weight, labels, bias, top_k, ignore_index)
    z = head_logits(hidden.double(), weight.double(), bias, softcap, logit_scale)
    label = labels.where(labels != ignore_index, 0).unsqueeze(1)
    log_p = z.log_softmax(1)
    p = log_p.exp()
    one_hot = torch.zeros_like(p).scatter_(1, label, 1.0)
    rank = 1 + (z > z.gather(1, label)).sum(1)
    brier_topk = None
    if top_k is not None:
        # The label leads its ties: a stable descending sort of the other logits behind it.
        others = z.scatter(1, label, float("-inf")).sort(1, descending=True).values[:, :-1]
        inside = rank <= top_k
        q_in = torch.cat([z.gather(1, label), others[:, : top_k - 1]], 1).softmax(1)
        q_out = others[:, :top_k].softmax(1) if others.shape[1] else q_in
        brier_topk = torch.where(inside, (1 - q_in[:, 0]) ** 2 + (q_in[:, 1:] ** 2).sum(1), 1 + (q_out**2).sum(1))
    ignored = (labels == ignore_index) | ~log_p.gather(1, label).squeeze(1).isfinite()
    nan = float("nan")
    return TokenStats(
        nll=(-log_p.gather(1, label).squeeze(1)).masked_fill(ignored, nan),
        brier=((one_hot - p) ** 2).sum(1).masked_fill(ignored, nan),
        entropy=torch.special.entr(p).sum(1).masked_fill(ignored, nan),
        rank=rank.masked_fill(ignored, 0),
        brier_topk=None if brier_topk is None else brier_topk.masked_fill(ignored, nan),
    )


class _Walk:
    """Running sums of some rows over blocks of columns; the label's own column never enters them."""

    def __init__(self, label_logit: Tensor, labels: Tensor, top_k: int | None) -> None:
        self.label_logit, self.labels = label_logit.unsqueeze(1), labels.unsqueeze(1)  # [T, 1] each
        self.m = torch.full_like(self.label_logit, LOWEST)  # maximum over v != y
        self.s1, self.s2, self.sz, self.above = torch.zeros(4, *self.m.shape, dtype=self.m.dtype, device=self.m.device)
        self.top_k = top_k
        self.largest = self.m.new_empty(len(labels), 0)  # [T, <= k] the k largest logits of v != y

    def add(self, z: Tensor, start: int) -> None:
        """Take in the logits of columns start, start + 1, ...: ``[T, C]``, overwritten."""
        column = (self.labels - start).clamp(0, z.shape[1] - 1)
        here = column == self.labels - start
        z.scatter_(1, column, z.gather(1, column).masked_fill_(here, LOWEST))
        z.clamp_(min=LOWEST)
        if self.top_k is not None:
            self._keep_largest(z)
        m = torch.maximum(self.m, z.amax(1, keepdim=True))
        self._rescale(m)
        e = torch.gt(z, self.label_logit, out=torch.empty_like(z))
        self.above += e.sum(1, keepdim=True)
        z.sub_(m)
        torch.exp(z, out=e)
        self.s1 += e.sum(1, keepdim=True)
        self.s2 += torch.linalg.vector_norm(e, dim=1, keepdim=True).square()
        self.sz += z.mul_(e).sum(1, keepdim=True)

    def _keep_largest(self, z: Tensor) -> None:
        """Merge a block into the k largest logits so far, and look at few of its logits to do so.

        Split the columns into groups. Where k groups have a maximum that is at least some logit's, that logit is not
        needed; so the k largest are in the k groups with the largest maxima, and once k are known, in those groups
        whose maximum exceeds the smallest of them.
        """
        n_groups = z.shape[1] // GROUP
        groups = z[:, : n_groups * GROUP].unflatten(1, (GROUP, n_groups))  # [T, GROUP, n]; a group's columns lie apart
        maxima = groups.amax(1)
        wanted = min(self.top_k, n_groups)
        if self.largest.shape[1] == self.top_k:
            wanted = min(wanted, int((maxima > self.largest.amin(1, keepdim=True)).sum(1).max()))
        best = maxima.topk(wanted, dim=1, sorted=False).indices.unsqueeze(1).expand(-1, GROUP, -1)
        candidates = torch.cat([self.largest, groups.gather(2, best).flatten(1), z[:, n_groups * GROUP :]], 1)
        self.largest = candidates.topk(min(self.top_k, candidates.shape[1]), dim=1, sorted=False).values

    def _rescale(self, m: Tensor) -> None:
        """Move the sums from the old maximum to ``m``."""
        shift = self.m - m
        scale = shift.exp()
        self.sz = (self.sz + shift * self.s1) * scale
        self.s1 = self.s1 * scale
        self.s2 = self.s2 * scale * scale
        self.m = m

    def finish(self, result: TokenStats, rows: Tensor) -> None:
        """Write these rows' statistics into ``result`` (formulas: the module's docstring)."""
        self._rescale(torch.maximum(self.m, self.label_logit))
        x = self.label_logit - self.m
        a = x.exp()
        s1 = self.s1 + a
        log_s1 = torch.where(self.s1 < a, self.s1.log1p(), s1.log())
        nll = log_s1 - x
        broken = ~nll.isfinite()
        result.nll[rows] = _nan_where(broken, nll)
        result.brier[rows] = _nan_where(broken, _brier(self.s1, self.s2, a))
        result.entropy[rows] = _nan_where(broken, log_s1 - (self.sz + x * a) / s1)
        rank = 1 + self.above
        result.rank[rows] = rank.masked_fill(broken, 0).squeeze(1).long()
        if self.top_k is not None:
            result.brier_topk[rows] = _nan_where(broken, self._brier_topk(rank))

    def _brier_topk(self, rank: Tensor) -> Tensor:
        """The k largest logits are the label and k - 1 others where the label's rank allows, else k others."""
        inside = rank <= self.top_k
        e = (self.largest.sort(1, descending=True).values - self.m).exp()  # [T, <= k]
        e[:, self.top_k - 1 :].masked_fill_(inside, 0.0)
        a = (self.label_logit - self.m).exp()
        s1, s2 = e.sum(1, keepdim=True), (e * e).sum(1, keepdim=True)
        return torch.where(inside, _brier(s1, s2, a), 1.0 + s2 / (s1 * s1))


def _brier(others: Tensor, others_squared: Tensor, a: Tensor) -> Tensor:
    """(1 - p_y)^2 + sum_{v != y} p_v^2 from sums over v != y of e^(z-m), of its square, and from a = e^(z_y-m)."""
    return (others * others + others_squared) / (others + a) ** 2


def _nan_where(broken: Tensor, values: Tensor) -> Tensor:
    return values.masked_fill(broken, float("nan")).squeeze(1)


def _empty(hidden: Tensor, labels: Tensor, top_k: int | None) -> TokenStats:
    """Statistics of T ignored rows."""
    floats = hidden.new_full((4, len(labels)), float("nan"), dtype=accumulation_dtype(hidden.dtype))
    return TokenStats(floats[0], floats[1], floats[2], torch.zeros_like(labels), None if top_k is None else floats[3])


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, top_k: int | None, ignore_index: int
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or labels.ndim != 1:
        raise ValueError(
            f"hidden [T, D], weight [V, D] and labels [T] are expected, not {tuple(hidden.shape)}, "
            f"{tuple(weight.shape)} and {tuple(labels.shape)}"
        )
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"D differs: hidden has {hidden.shape[1]}, weight has {weight.shape[1]}")
    if hidden.shape[0] != labels.shape[0]:
        raise ValueError(f"T differs: hidden has {hidden.shape[0]}, labels has {labels.shape[0]}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is [V] = [{weight.shape[0]}], not {tuple(bias.shape)}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: at least 1")
    outside = (labels != ignore_index) & ((labels < 0) | (labels >= weight.shape[0]))
    if outside.any():
        raise ValueError(f"label {labels[outside][0].item()} is outside [0, {weight.shape[0]})")
