"""CAKE: layers whose attention is dispersed or shifts over time keep more (arXiv 2503.12491)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfast.fields import NonNegativeFloat, OddInt, PositiveFloat, PositiveInt
from vlmfast.prefill.across import AcrossLayers
from vlmfast.prefill.base import Row, max_pool
from vlmfast.prefill.budget import by_head


@dataclass(frozen=True)
class CAKE(AcrossLayers):
    """A layer's share of all columns goes with H^(1/tau1) V^(1/tau2); a column's score is mean + gamma variance.

    H is the entropy of the mean attention (spatial dispersion), V the sum over columns of the variance over the
    window's queries (temporal shift), both averaged over heads. The paper compresses in a cascade, again after every
    layer; its last budgets are those of one division after the last layer, which is what happens here, so the whole
    prefill is held until then. The window is text after the media.

    queries: size of the observation window (paper 32)
    tau1: temperature of the dispersion (paper: tuned per model, 0.2 to 2)
    tau2: temperature of the shift (likewise)
    gamma: weight of the variance in a column's score (paper 200)
    pool: width of the max pooling over columns, odd (5)
    """

    name: ClassVar[str] = "cake"
    per_query: ClassVar[bool] = True
    queries: PositiveInt = 32
    tau1: PositiveFloat = 1.0
    tau2: PositiveFloat = 1.0
    gamma: NonNegativeFloat = 200.0
    pool: OddInt = 5

    def score(self, row: Row) -> Tensor:
        return max_pool(self._indicator(row), self.pool)

    def tiebreak(self, row: Row) -> Tensor | None:
        """The score before pooling, which makes neighbours equal."""
        return self._indicator(row) if self.pool > 1 else None

    def _indicator(self, row: Row) -> Tensor:
        mean_attention, variance = row.moments
        indicator = torch.add(mean_attention, variance, alpha=self.gamma)
        return indicator.view(row.keys.shape[0], -1, row.n).mean(1)

    def weigh(self, row: Row, scores: Tensor) -> list[Any]:
        """Of each layer (2,) float32: dispersion and temporal shift."""
        mean_attention, variance = row.moments
        dispersion = -(mean_attention * mean_attention.clamp(min=1e-12).log()).sum(-1)
        temporal_shift = variance.sum(-1)
        per_layer = [statistic.view(row.stacked, -1).mean(1) for statistic in (dispersion, temporal_shift)]
        return list(torch.stack(per_layer, 1))

    def preference(self, statistics: list[float]) -> float:
        """The logarithm of a layer's preference: a power of 1 / tau overflows where tau is small."""
        log_terms = (
            math.log(max(1e-12, statistic)) / temperature
            for statistic, temperature in zip(statistics, (self.tau1, self.tau2), strict=True)
        )
        return sum(min(1e300, max(-1e300, log_term)) for log_term in log_terms)

    def spread(self, weights: list[Any], n: int) -> list[int]:
        statistics = torch.stack(weights).tolist()  # the one wait
        log_preferences = torch.tensor([self.preference(layer) for layer in statistics], dtype=torch.float64)
        return by_head(self.total(n) * len(weights), (log_preferences - log_preferences.max()).exp(), self.least(), n)
