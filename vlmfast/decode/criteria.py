"""The pieces of acceptance rules: pure functions on tensors.

Letters: ``k`` drafted tokens d_1..d_k, ``V`` vocabulary; the target scores k + 1 rows, row i predicts d_{i+1}.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def least_relevant(relevance: Tensor, share: float) -> Tensor:
    """(k,) -> (k,) bool: the floor(share * k) positions of lowest relevance (ties: earlier first)."""
    n = math.floor(share * relevance.shape[0] + 1e-9)
    out = torch.zeros_like(relevance, dtype=torch.bool)
    out[relevance.argsort(stable=True)[:n]] = True
    return out


def below_quantile(relevance: Tensor, past: Tensor | None, share: float) -> Tensor:
    """(k,) -> (k,) bool: positions under the `share` quantile of all relevances of this request, these included."""
    if share <= 0:
        return torch.zeros_like(relevance, dtype=torch.bool)
    seen = relevance if past is None else torch.cat([past, relevance])
    return relevance <= torch.quantile(seen, share, interpolation="lower")


def shifted(draft: Tensor, picks: Tensor, committed: list[int], window: int) -> Tensor:
    """(k,) bool: d_i is one of the target's picks at most `window` rows away, or one of the last `window` committed."""
    k = draft.shape[0]
    if window <= 0:
        return torch.zeros(k, dtype=torch.bool, device=draft.device)
    near = (torch.arange(k, device=draft.device)[:, None] - torch.arange(k + 1, device=draft.device)).abs() <= window
    out = ((draft[:, None] == picks) & near).any(1)
    if committed:
        tail = torch.tensor(committed[-window:], device=draft.device)
        reach = torch.arange(k, device=draft.device)[:, None] + tail.shape[0] - torch.arange(tail.shape[0]).to(draft)
        out |= ((draft[:, None] == tail) & (reach <= window)).any(1)
    return out


def repeats_bigram(draft: Tensor, committed: list[int]) -> Tensor:
    """(k,) bool: (previous token, d_i) already stands in what was emitted or drafted before it."""
    ids = committed + draft.tolist()
    seen, out = set(), []
    start = len(committed)
    for i in range(1, len(ids)):
        pair = (ids[i - 1], ids[i])
        if i >= start:
            out.append(pair in seen)
        seen.add(pair)
    return torch.tensor([False] * (draft.shape[0] - len(out)) + out, device=draft.device)


def within_top(scores: Tensor, draft: Tensor, top: int) -> Tensor:
    """scores (k, V), draft (k,) -> (k,) bool: fewer than `top` tokens score above the drafted one."""
    own = scores.gather(1, draft[:, None])
    return (scores > own).sum(1) < top


def within_ratio(scores: Tensor, draft: Tensor, ratio: float) -> Tensor:
    """(k,) bool: p(d_i) >= ratio * max p."""
    own = scores.gather(1, draft[:, None])[:, 0]
    return own - scores.amax(1) >= math.log(max(ratio, 1e-30))


def normalised_entropy(scores: Tensor) -> Tensor:
    """scores (k, V) -> (k,) float32 in [0, 1]: entropy of the target's distribution over log V."""
    logp = scores.log_softmax(-1)
    return -(logp.exp() * logp.clamp(min=-1e4)).sum(-1) / math.log(scores.shape[-1])


def residual(p: Tensor, q: Tensor) -> Tensor:
    """(V,), (V,) -> (V,): max(p - q, 0) normalised; p itself where nothing is left (p = q up to rounding)."""
    rest = (p - q).clamp(min=0)
    total = rest.sum()
    return rest / total if float(total) > 0 else p
