"""Evicted columns folded into kept ones: who goes where, and the sums. Keys are merged as stored, RoPE applied."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def others(kept: Tensor, n: int) -> Tensor:
    """Columns out of n that are not in kept (m,): (n - m,) int64, ascending."""
    mask = torch.ones(n, dtype=torch.bool, device=kept.device)
    mask[kept] = False
    return mask.nonzero()[:, 0]


def nearest_key(keys: Tensor, kept: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """For every gone column the kept one with the most similar key: (index into kept, cosine), (g,) each."""
    unit = normalize(keys.float(), dim=-1)
    best = (unit[gone] @ unit[kept].T).max(1)
    return best.indices, best.values


def nearest_place(kept: Tensor, gone: Tensor) -> Tensor:
    """For every gone column the kept one closest in the sequence, the earlier of two: index into kept (g,)."""
    right = torch.searchsorted(kept, gone).clamp(max=len(kept) - 1)
    left = (right - 1).clamp(min=0)
    return torch.where((gone - kept[left]).abs() <= (kept[right] - gone).abs(), left, right)


def folded(x: Tensor, kept: Tensor, gone: Tensor, into: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of every kept vector and those folded into it: (m, D) in x's dtype; x (n, D).

    weight (g,) float32 scales what is folded in; the divisor stays the number of vectors.
    """
    total, moved = x[kept].float(), x[gone].float()
    total.index_add_(0, into, moved if weight is None else moved * weight[:, None])
    count = torch.ones(len(kept), device=x.device).index_add_(0, into, torch.ones(len(gone), device=x.device))
    return (total / count[:, None]).to(x.dtype)
