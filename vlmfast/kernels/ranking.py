"""The best of many scores, with ties broken by rule: the same choice on every device.

`topk` and a plain sort give no order among equal scores, and a CPU and a GPU order them differently. Whoever chooses
tokens, columns, chunks or heads by score chooses through `highest`. (`argmax`, and `max` over a dimension, need no rule
of ours: torch promises the first of equal values on every device.)
"""

from __future__ import annotations

import torch
from torch import Tensor


def ranking(scores: Tensor, tiebreak: Tensor | None = None) -> Tensor:
    """Places (..., n) int64 in the order of scores (..., n), the highest first.

    Of equal scores the one with the higher tiebreak (..., n) goes first, such as the score before pooling, then the
    earlier place. No host wait.
    """
    if tiebreak is None:
        return scores.argsort(dim=-1, descending=True, stable=True)
    if scores.device.type == "cpu" and scores.dtype == tiebreak.dtype == torch.float32:
        both = (_as_ordered(scores).long() << 32) + _as_ordered(tiebreak)  # one sort is faster than two
        return both.argsort(dim=-1, descending=True, stable=True)
    by_tiebreak = tiebreak.argsort(dim=-1, descending=True, stable=True)
    return by_tiebreak.gather(-1, scores.gather(-1, by_tiebreak).argsort(dim=-1, descending=True, stable=True))


def _as_ordered(numbers: Tensor) -> Tensor:
    """int32 in the order of float32 numbers: their bits, those of negative ones turned round; both zeros alike."""
    bits = (numbers + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def lowest_first(scores: Tensor) -> Tensor:
    """`ranking` of -scores: the lowest first, of equal scores the earlier place."""
    return scores.argsort(dim=-1, stable=True)


def ranks(order: Tensor) -> Tensor:
    """The inverse of an order (..., n) int64, each place once: where in the order every place stands. No sort."""
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def highest(scores: Tensor, count: int, tiebreak: Tensor | None = None) -> Tensor:
    """The first `count` of `ranking`: places (..., count) int64, the highest score first."""
    return ranking(scores, tiebreak)[..., :count]
