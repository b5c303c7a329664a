"""LOOK-M: keeps text before visual columns, and merges evicted columns into kept ones (arXiv 2406.18139)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmfast.core import Kind
from vlmfast.fields import PositiveInt
from vlmfast.prefill.base import Choice, KVPolicy, Row
from vlmfast.prefill.merge import folded, nearest_key, others, taken


@dataclass(frozen=True)
class LookM(KVPolicy):
    """Score = accumulated attention, every text column raised above every visual one (text prior).

    Each evicted column is merged into the kept column of its head whose key is most similar, keys and values alike.
    Attention is that of the text after the media (the paper sums over the whole prompt). Text is evicted, and merged
    like the rest, only where it alone exceeds the budget.

    queries: text queries summed over, the last ones
    merge: a kept vector c takes in m evicted e: "averaged" (c + sum e) / (m + 1), "pivotal" (c + sum (c + e) / 2) /
    (m + 1), or "weighted" (c + sum s e) / (m + 1) with s the cosine of the keys (paper: pivotal does best)
    """

    name: ClassVar[str] = "lookm"
    stacks: ClassVar[bool] = True
    queries: PositiveInt = 64
    merge: Literal["averaged", "pivotal", "weighted"] = "pivotal"

    def score(self, row: Row) -> Tensor:
        scores = row.relevance()
        by_layer = scores.view(row.stacked, -1, row.n)
        return (by_layer + (row.kinds != Kind.VISUAL) * by_layer.amax((1, 2), keepdim=True)).view_as(scores)

    def tiebreak(self, row: Row) -> Tensor:
        """The attention alone: small differences are lost when text is raised."""
        return row.relevance()

    def choose(self, row: Row) -> Choice:
        choice = super().choose(row)
        choice.merged = list(zip(*self.merged(row.keys, row.values, torch.stack(choice.keep)), strict=True))
        return choice

    def merged(self, keys: Tensor, values: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (H, m, D) to store for the kept columns (H, m); keys and values (H, n, D)."""
        evicted_indices = others(kept, keys.shape[1])
        targets, cosine = nearest_key(keys, kept, evicted_indices)
        weight = cosine if self.merge == "weighted" else None
        mean_keys, mean_values = (folded(x, kept, evicted_indices, targets, weight) for x in (keys, values))
        if self.merge != "pivotal":
            return mean_keys, mean_values
        return (taken(keys, kept) + mean_keys) / 2, (taken(values, kept) + mean_values) / 2
