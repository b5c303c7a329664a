"""Merges evicted columns into kept ones: finds the target of each, and averages. Keys are merged with RoPE applied.

All heads of a row at once, H of them: each keeps m of its n columns and gives up g = n - m, in ascending order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

AT_ONCE = 2**28  # bytes of cosines that are held at once, of one head at least


def others(kept: Tensor, n: int) -> Tensor:
    """Columns out of n that are not in kept (H, m): (H, n - m) int64, ascending."""
    is_kept = torch.zeros(len(kept), n, dtype=torch.uint8, device=kept.device)
    is_kept.scatter_(1, kept, 1)
    return is_kept.argsort(dim=1, stable=True)[:, : n - kept.shape[1]].contiguous()


def taken(x: Tensor, columns: Tensor) -> Tensor:
    """Some columns of every head: x (H, n, ...), columns (H, m) int64 -> (H, m, ...)."""
    return x[torch.arange(len(x), device=x.device)[:, None], columns]


def nearest_key(keys: Tensor, kept: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """For every evicted column the kept one with the most similar key: (index into kept, cosine), (H, g) each.

    On a CPU head by head, elsewhere as many heads at once as `AT_ONCE` allows.
    """
    unit_keys = normalize(keys.float(), dim=-1)
    gone_keys, kept_keys = taken(unit_keys, gone), taken(unit_keys, kept)
    head_bytes = 4 * gone.shape[1] * kept.shape[1]
    num_at_once = 1 if keys.device.type == "cpu" else max(1, AT_ONCE // max(1, head_bytes))
    best_matches = [
        (some_gone @ some_kept.transpose(1, 2)).max(2)
        for some_gone, some_kept in zip(gone_keys.split(num_at_once), kept_keys.split(num_at_once), strict=True)
    ]
    return torch.cat([best.indices for best in best_matches]), torch.cat([best.values for best in best_matches])


def nearest_place(kept: Tensor, gone: Tensor) -> Tensor:
    """For every evicted column the kept one closest in the sequence, the earlier of two: index into kept (H, g)."""
    next_kept = torch.searchsorted(kept, gone).clamp(max=kept.shape[1] - 1)
    previous_kept = (next_kept - 1).clamp(min=0)
    distance_back, distance_on = (gone - kept.gather(1, previous_kept)).abs(), (kept.gather(1, next_kept) - gone).abs()
    return torch.where(distance_back <= distance_on, previous_kept, next_kept)


def add_to(totals: Tensor, into: Tensor, added: Tensor) -> Tensor:
    """Add to every head's own totals (H, m, ...), in place: into (H, g) int64 below m, added (H, g, ...)."""
    num_totals = totals.shape[1]
    flat_index = into + torch.arange(0, totals.shape[0] * num_totals, num_totals, device=into.device)[:, None]
    totals.flatten(0, 1).index_add_(0, flat_index.flatten(), added.flatten(0, 1))
    return totals


def folded(x: Tensor, kept: Tensor, gone: Tensor, into: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of every kept vector and the evicted ones merged into it: (H, m, D) in x's dtype; x (H, n, D).

    weight (H, g) float32 scales the evicted vectors; the divisor stays the number of vectors.
    """
    vector_sums, evicted_vectors = taken(x, kept).float(), taken(x, gone).float()
    added = evicted_vectors if weight is None else evicted_vectors * weight[..., None]
    add_to(vector_sums, into, added)
    vector_counts = torch.ones(kept.shape, device=x.device)
    add_to(vector_counts, into, torch.ones(gone.shape, device=x.device))
    return (vector_sums / vector_counts[..., None]).to(x.dtype)
