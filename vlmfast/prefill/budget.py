"""Budgets handed down: a layer's columns to head types (level 1), a type's columns to its heads (level 2).

HybridKV (arXiv 2604.05887) states the two levels; the formulas are ours and every choice is a field of
`HybridAdvanced`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfast.kernels import ranking


def by_type(
    total: int, heads: int, dynamic: int, ratio: float, least_static: int, least_dynamic: int
) -> tuple[int, int]:
    """Level 1: (columns of all static heads, columns of all dynamic heads), together at most total * heads.

    ratio r: a dynamic head gets r times the mean budget `total`, as far as every head can still have its least.
    """
    everything, static = total * heads, heads - dynamic
    if not dynamic:
        return everything, 0
    if not static:
        return 0, everything
    share = int(ratio * total * dynamic)
    share = max(dynamic * least_dynamic, min(share, everything - static * least_static))
    return everything - share, share


def by_head(columns: int, weights: Tensor, least: int, most: int) -> list[int]:
    """Level 2: split `columns` among heads in proportion to weights (S,) >= 0, each within [least, most].

    Whole numbers whose sum is exactly min(columns, S * most); needs columns >= S * least.
    """
    heads = len(weights)
    columns = min(columns, heads * most)
    share = weights.double().clamp(min=1e-9)
    out = torch.full((heads,), float(least), dtype=torch.float64)
    left, open_ = float(columns - heads * least), torch.ones(heads, dtype=torch.bool)
    while left > 1e-6 and open_.any():  # fill in proportion, close heads that are full, go round again
        step = torch.where(open_, share, 0.0)
        out = out + left * step / step.sum()
        over = (out - most).clamp(min=0)
        left = float(over.sum())
        out, open_ = out - over, open_ & (out < most)
    whole = out.floor()
    missing = columns - int(whole.sum())
    order = ranking(out - whole)
    counts = whole.long()
    for head in order.tolist() + list(range(heads)):
        if missing > 0 and counts[head] < most:
            counts[head] += 1
            missing -= 1
    return counts.tolist()
