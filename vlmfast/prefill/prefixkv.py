"""PrefixKV: every layer keeps the same share of its attention, the share that fills the budget (arXiv 2412.03409)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfast.fields import PositiveInt
from vlmfast.prefill.across import AcrossLayers
from vlmfast.prefill.base import Row


@dataclass(frozen=True)
class PrefixKV(AcrossLayers):
    """Columns of a layer in order of importance; a layer keeps the shortest prefix that holds a share p of it.

    p is one number for all layers, the largest for which the prefixes fit the budget together, found by bisection.
    The paper averages p's prefix lengths over ten sample prompts beforehand; here every prompt finds its own. The
    importance is the attention of the text after the media; each head keeps its own best columns, so a layer's share is
    the mean of its heads'. Sinks and recent columns stay anyway and are left out of the shares: they would hold most of
    every layer's attention, and a layer that looks at few things would be left with nothing beside them.

    queries: text queries observed, the last ones
    """

    name: ClassVar[str] = "prefixkv"
    queries: PositiveInt = 32

    def score(self, row: Row) -> Tensor:
        return row.relevance()

    def weigh(self, row: Row, scores: Tensor) -> list[Any]:
        """Of each layer (Hk, m) float32: the importance of its free columns."""
        return list(scores[:, self.sinks : row.n - self.recent].unflatten(0, (row.stacked, -1)))

    def curve(self, free_scores: Tensor) -> Tensor:
        """(m,) float64: the share of a layer's importance that its best 1, 2, ... m of the free columns hold."""
        cumulative_scores = free_scores.double().sort(dim=1, descending=True).values.cumsum(1)
        return (cumulative_scores / cumulative_scores[:, -1:].clamp(min=1e-12)).mean(0)

    def spread(self, weights: list[Any], n: int) -> list[int]:
        share_curves = torch.stack([self.curve(layer) for layer in torch.stack(weights).cpu()])  # the one wait
        lower_bound, upper_bound = 0.0, 1.0 + 1e-6
        for _ in range(50):
            attention_share = (lower_bound + upper_bound) / 2
            if sum(self.prefix(share_curves, attention_share)) <= self.total(n) * len(weights):
                lower_bound = attention_share
            else:
                upper_bound = attention_share
        return self.prefix(share_curves, lower_bound)

    def prefix(self, curves: Tensor, p: float) -> list[int]:
        """Columns of each layer, the shortest prefix whose share reaches p among them; curves (layers, m)."""
        lengths = (curves < p).sum(1) + int(p > 0)
        return (lengths.clamp(max=curves.shape[1]) + self.least()).tolist()
