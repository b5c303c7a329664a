"""PyramidKV: lower layers keep more columns than higher ones, falling linearly with depth (arXiv 2406.02069)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from vlmfast.fields import Range
from vlmfast.prefill.base import Row
from vlmfast.prefill.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV's scores, a budget per layer: with m the mean, the last layer keeps m / beta, the first 2 m - m / beta.

    The pyramid is built on what is left after sinks and recent columns, which every layer keeps. Where the first layer
    would keep more than there is, it keeps everything and the slope is flatter, so the mean stays. (kvpress counts the
    window into the pyramid, and falls back to equal budgets where the last layer could not hold it.)

    beta: mean budget over the smallest, at least 1 (1 = every layer the same; paper 20)
    """

    name: ClassVar[str] = "pyramidkv"
    beta: Annotated[float, Range(1)] = 20.0

    def allowance(self, row: Row, depth: int = 0) -> int:
        mean_free, minimum = self.total(row.n) - self.least(), self.least()
        first_layer_free = min(2 * mean_free - mean_free / self.beta, row.n - minimum)
        slope = 2 * (first_layer_free - mean_free) / max(1, row.layers - 1)
        free_columns = (
            [first_layer_free - slope * place for place in range(row.layers)] if row.layers > 1 else [float(mean_free)]
        )
        # rounding the running sum, not the layers, keeps the sum over the layers exact
        layer_index = (row.layer if row.rank is None else row.rank) + depth
        return minimum + round(sum(free_columns[: layer_index + 1])) - round(sum(free_columns[:layer_index]))
