"""How released code computes a trajectory's numbers, LARK's and the Rank-Surprisal Ratio's: in its own way, by every
logit, top-k and softmax."""

import torch
import torch.nn.functional as F


@torch.no_grad()
def eager_scores(model, input_ids, start, top_k):
    """(mean nll, mean top-k Brier) of the tokens from ``start`` on."""
    ids = torch.tensor([input_ids])
    logits = model(input_ids=ids).logits[0, start - 1 : -1].float()
    labels = ids[0, start:]
    top, where = logits.topk(min(top_k, logits.shape[1]), dim=1)
    p = F.softmax(top, dim=1)
    p_label = (p * (where == labels.unsqueeze(1))).sum(1)
    return F.cross_entropy(logits, labels).item(), (1 - 2 * p_label + (p * p).sum(1)).mean().item()


def eager_g_hat(nll, brier):
    """g_hat of one problem's candidates, as the released code sums it."""
    rho = [b / x if x > 1e-30 else 0.0 for b, x in zip(brier, nll, strict=True)]
    total, weighted = sum(nll), sum(r * x for r, x in zip(rho, nll, strict=True))
    return [x / total * (2 * r - weighted / total) for r, x in zip(rho, nll, strict=True)]


@torch.no_grad()
def eager_rsr(model, input_ids, positions, clip):
    """(nlls, probabilities, clipped ranks) of the tokens at ``positions``, as the released RSR code takes them."""
    nlls, probabilities, ranks = [], [], []
    logits = model(input_ids=torch.tensor([input_ids])).logits[0].float()
    for position in positions:
        row = logits[position - 1]
        own = row[input_ids[position]]
        nlls.append((torch.logsumexp(row, 0) - own).item())
        probabilities.append(torch.softmax(row, 0)[input_ids[position]].item())
        ranks.append(min(1 + int((row > own).sum()), clip))
    return nlls, probabilities, ranks
