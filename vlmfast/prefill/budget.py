"""Splits a layer's budget between head types (level 1), and a type's budget among its heads (level 2).

HybridKV (arXiv 2604.05887) names the two levels. The formulas are ours; every choice is a field of `HybridAdvanced`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfast.kernels import ranking


def by_type(
    total: int, heads: int, dynamic: int, ratio: float, least_static: int, least_dynamic: int
) -> tuple[int, int]:
    """Level 1: (columns of all static heads, columns of all dynamic heads), together at most total * heads.

    ratio r: a dynamic head gets r times the mean budget `total`, but every head gets at least its minimum.
    """
    all_columns, num_static = total * heads, heads - dynamic
    if not dynamic:
        return all_columns, 0
    if not num_static:
        return 0, all_columns
    dynamic_columns = int(ratio * total * dynamic)
    dynamic_columns = max(dynamic * least_dynamic, min(dynamic_columns, all_columns - num_static * least_static))
    return all_columns - dynamic_columns, dynamic_columns


def evenly(columns: int, heads: int, most: int) -> list[int]:
    """Level 2 where all heads weigh the same: as many columns each, the first ones one more; at most `most`."""
    share, rest = divmod(min(columns, heads * most), heads)
    return [share + 1] * rest + [share] * (heads - rest)


def by_head(columns: int, weights: Tensor, least: int, most: int) -> list[int]:
    """Level 2: split `columns` among heads in proportion to weights (S,) >= 0, each within [least, most].

    Whole numbers whose sum is exactly min(columns, S * most); needs columns >= S * least.
    """
    num_heads = len(weights)
    columns = min(columns, num_heads * most)
    if bool((weights == weights[0]).all()):  # the usual case needs no rounds
        return evenly(columns, num_heads, most)
    proportions = weights.double().clamp(min=1e-9)
    allotted = torch.full((num_heads,), float(least), dtype=torch.float64)
    unspent, is_open = float(columns - num_heads * least), torch.ones(num_heads, dtype=torch.bool)
    while unspent > 1e-6 and is_open.any():  # share out in proportion, close full heads, repeat with the excess
        increments = torch.where(is_open, proportions, 0.0)
        allotted = allotted + unspent * increments / increments.sum()
        excess = (allotted - most).clamp(min=0)
        unspent = float(excess.sum())
        allotted, is_open = allotted - excess, is_open & (allotted < most)
    whole_columns = allotted.floor()
    num_missing = columns - int(whole_columns.sum())
    head_order = ranking(allotted - whole_columns)
    head_counts = whole_columns.long()
    for head_index in head_order.tolist() + list(range(num_heads)):
        if num_missing > 0 and head_counts[head_index] < most:
            head_counts[head_index] += 1
            num_missing -= 1
    return head_counts.tolist()
