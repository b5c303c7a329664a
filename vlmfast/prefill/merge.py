"""Merges evicted columns into kept ones: finds the target of each, and averages. Keys are merged with RoPE applied."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def others(kept: Tensor, n: int) -> Tensor:
    """Columns out of n that are not in kept (m,): (n - m,) int64, ascending."""
    is_kept = torch.zeros(n, dtype=torch.uint8, device=kept.device)
    is_kept.index_fill_(0, kept, 1)
    return is_kept.argsort(stable=True)[: n - len(kept)]


def nearest_key(keys: Tensor, kept: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """For every evicted column the kept one with the most similar key: (index into kept, cosine), (g,) each."""
    unit_keys = normalize(keys.float(), dim=-1)
    best_matches = (unit_keys[gone] @ unit_keys[kept].T).max(1)
    return best_matches.indices, best_matches.values


def nearest_place(kept: Tensor, gone: Tensor) -> Tensor:
    """For every evicted column the kept one closest in the sequence, the earlier of two: index into kept (g,)."""
    next_kept = torch.searchsorted(kept, gone).clamp(max=len(kept) - 1)
    previous_kept = (next_kept - 1).clamp(min=0)
    return torch.where((gone - kept[previous_kept]).abs() <= (kept[next_kept] - gone).abs(), previous_kept, next_kept)


def folded(x: Tensor, kept: Tensor, gone: Tensor, into: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of every kept vector and the evicted ones merged into it: (m, D) in x's dtype; x (n, D).

    weight (g,) float32 scales the evicted vectors; the divisor stays the number of vectors.
    """
    vector_sums, evicted_vectors = x[kept].float(), x[gone].float()
    vector_sums.index_add_(0, into, evicted_vectors if weight is None else evicted_vectors * weight[:, None])
    vector_counts = torch.ones(len(kept), device=x.device).index_add_(0, into, torch.ones(len(gone), device=x.device))
    return (vector_sums / vector_counts[:, None]).to(x.dtype)
