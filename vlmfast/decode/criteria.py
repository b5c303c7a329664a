"""The pieces of acceptance rules: pure functions on tensors.

Letters: ``k`` drafted tokens d_1..d_k, ``V`` vocabulary; the target scores k + 1 rows, row i predicts d_{i+1}.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def least_relevant(relevance: Tensor, share: float) -> Tensor:
    """(k,) -> (k,) bool: the floor(share * k) positions of lowest relevance (ties: earlier first)."""
    num_loosened = math.floor(share * relevance.shape[0] + 1e-9)
    loosened = torch.zeros_like(relevance, dtype=torch.bool)
    loosened[relevance.argsort(stable=True)[:num_loosened]] = True
    return loosened


def below_quantile(relevance: Tensor, past_relevance: Tensor | None, share: float) -> Tensor:
    """(k,) -> (k,) bool: positions under the `share` quantile of all relevances of this request, these included."""
    if share <= 0:
        return torch.zeros_like(relevance, dtype=torch.bool)
    all_relevance = relevance if past_relevance is None else torch.cat([past_relevance, relevance])
    return relevance <= torch.quantile(all_relevance, share, interpolation="lower")


def shifted(draft: Tensor, picks: Tensor, committed: list[int], window: int) -> Tensor:
    """(k,) bool: d_i is one of the target's picks at most `window` rows away, or one of the last `window` committed."""
    num_drafted = draft.shape[0]
    if window <= 0:
        return torch.zeros(num_drafted, dtype=torch.bool, device=draft.device)
    positions = torch.arange(num_drafted + 1, device=draft.device)
    within_window = (positions[:-1, None] - positions).abs() <= window
    is_shifted = ((draft[:, None] == picks) & within_window).any(1)
    if committed:
        last_committed = torch.tensor(committed[-window:], device=draft.device)
        num_committed = last_committed.shape[0]
        distance = positions[:-1, None] + num_committed - torch.arange(num_committed).to(draft)
        is_shifted |= ((draft[:, None] == last_committed) & (distance <= window)).any(1)
    return is_shifted


def repeats_bigram(draft: Tensor, committed: list[int]) -> Tensor:
    """(k,) bool: (previous token, d_i) already stands in what was emitted or drafted before it."""
    token_ids = committed + draft.tolist()
    earlier_bigrams, repeated = set(), []
    draft_start = len(committed)
    for position in range(1, len(token_ids)):
        bigram = (token_ids[position - 1], token_ids[position])
        if position >= draft_start:
            repeated.append(bigram in earlier_bigrams)
        earlier_bigrams.add(bigram)
    return torch.tensor([False] * (draft.shape[0] - len(repeated)) + repeated, device=draft.device)


def within_top(scores: Tensor, draft: Tensor, top: int) -> Tensor:
    """scores (k, V), draft (k,) -> (k,) bool: fewer than `top` tokens score above the drafted one."""
    drafted_scores = scores.gather(1, draft[:, None])
    return (scores > drafted_scores).sum(1) < top


def within_ratio(scores: Tensor, draft: Tensor, ratio: float) -> Tensor:
    """(k,) bool: p(d_i) >= ratio * max p."""
    drafted_scores = scores.gather(1, draft[:, None])[:, 0]
    return drafted_scores - scores.amax(1) >= math.log(max(ratio, 1e-30))


def normalised_entropy(scores: Tensor) -> Tensor:
    """scores (k, V) -> (k,) float32 in [0, 1]: entropy of the target's distribution over log V."""
    log_probs = scores.log_softmax(-1)
    return -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(-1) / math.log(scores.shape[-1])


def speculated(probs: Tensor, draft: list[int], draft_probs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Speculative sampling without a host read.

    probs: (k + 1, V) of the target; draft_probs: (k, V), None = the draft was certain.
    Returns (k,) bool, which drafted tokens pass, and (k + 1,) int64, what follows where the first of them does not.
    """
    num_drafted = len(draft)
    target = torch.stack([probs[row, token] for row, token in enumerate(draft)]) if draft else probs[:0, 0]
    if draft_probs is None:
        passes, remaining = torch.rand_like(target) < target, probs[:num_drafted].clone()
        for row, token in enumerate(draft):
            remaining[row, token].zero_()
    else:
        drafted = torch.stack([draft_probs[row, token] for row, token in enumerate(draft)]) if draft else target
        passes, remaining = torch.rand_like(target) < target / drafted, (probs[:num_drafted] - draft_probs).clamp(min=0)
    remaining = remaining.where(remaining.sum(-1, keepdim=True) > 0, probs[:num_drafted])
    return passes, torch.multinomial(torch.cat([remaining, probs[num_drafted:]]), 1)[:, 0]


def residual(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """(V,), (V,) -> (V,): max(p - q, 0) normalised; p itself where nothing is left (p = q up to rounding)."""
    remaining = (target_probs - draft_probs).clamp(min=0)
    total = remaining.sum()
    return remaining / total if float(total) > 0 else target_probs
