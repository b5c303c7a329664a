"""LazyEviction: while decoding, columns leave late, by how overdue their next use is (arXiv 2506.15969)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmfast import kernels
from vlmfast.core import CompressedLayer
from vlmfast.fields import PositiveInt, Range
from vlmfast.prefill.base import best, protect
from vlmfast.prefill.evict import EvictingLayer
from vlmfast.prefill.snapkv import SnapKV


class LaggedLayer(EvictingLayer):
    """Watches which columns are attended, and evicts down to its limit every `lag` decoded tokens."""

    def __init__(self, **rule: Any) -> None:
        super().__init__(**rule)
        self.limits: list[int] = []  # per row (batch row, head)
        self.evicted = 0  # `decoded` at the last eviction
        self.last = self.interval = torch.empty(0)  # (B * Hk, M) float32 by place: last use, longest gap between uses

    def compress(self, kept: CompressedLayer | None, positions: Tensor | None = None) -> None:
        super().compress(kept, positions)
        held = self.lengths().flatten()
        self.limits = [max(self.rule["least"], self.rule["budget"] or n) for n in held.tolist()]
        self.last = torch.zeros(len(held), int(held.max()), device=self.device)
        self.interval = torch.zeros_like(self.last)

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        q = query.shape[2]
        packed = query.reshape(self.batch * self.heads, -1, q, query.shape[-1])
        for store in self.stores():
            for i, row in enumerate(store.rows):
                keys = store.segment(i, query.dtype)[1]
                self._watch(row, kernels.window_attention(packed[row][None], keys[None, None], scaling)[0].amax(0))
        return super().attend(query, scaling)

    def _watch(self, row: int, weights: Tensor) -> None:
        """weights (q, n): the most attention that any query head of the group pays, for the q newest tokens."""
        q, n = weights.shape
        if n > self.last.shape[1]:
            room = n + 64 - self.last.shape[1]
            self.last, self.interval = pad(self.last, (0, room)), pad(self.interval, (0, room))
        last, interval = self.last[row, :n], self.interval[row, :n]
        for t, w in enumerate(weights):
            now = self.decoded - q + t + 1
            last[n - q + t], interval[n - q + t] = now, 0
            used = w >= self.rule["alpha"]
            interval.copy_(torch.where(used, torch.maximum(interval, now - last), interval))
            last.masked_fill_(used, now)

    def evict(self, q: int) -> None:
        if self.decoded - self.evicted < self.rule["lag"]:
            return
        self.evicted = self.decoded
        for store in self.stores():
            kept: dict[int, Tensor] = {}
            for row, n in zip(store.rows, store.lengths, strict=True):
                limit = self.limits[row]
                if n > limit and (self.cut[row] or self.rule["budget"]):
                    overdue = (self.decoded - self.last[row, :n]) / self.interval[row, :n].clamp(min=1)
                    kept[row] = best(protect(-overdue, self.rule["sinks"], self.rule["lag"]), limit)
                    for table in (self.last, self.interval):
                        table[row, :limit] = table[row, kept[row]]
            if kept:
                store.keep(kept, room=self.rule["lag"] + 32)

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = self.rows_of(indices)
        if self.limits:
            self.last, self.interval = self.last[rows], self.interval[rows]
            self.limits = [self.limits[row] for row in rows]
        super().batch_select_indices(indices)

    def nbytes(self) -> dict[str, int]:
        """As in `KVLayer`; the two tables count as fast memory."""
        tiers = super().nbytes()
        tables = 2 * self.last.numel() * self.last.element_size()
        return tiers | {name: tiers[name] + tables for name in ("fast", "fast_allocated", "resident")}


@dataclass(frozen=True)
class LazyEviction(SnapKV):
    """Bounds the cache during long outputs; the prompt is compressed by SnapKV's rule if it exceeds the budget.

    A column is used when a query pays it at least alpha. Every `lag` tokens each head is cut back to its budget (with
    `keep`: to what the prompt left), and those columns leave whose time since their last use is longest in units of the
    longest gap between two uses so far. The newest `lag` columns always stay, so one that is needed again and again,
    but not now, survives. A prompt that fits a fraction `keep` leaves its output alone too; give a `budget` to bound it
    whatever the prompt. Of the paper's score we know this ratio only (through summaries), not its exact form; the paper
    leaves the prompt whole. Costs one more product of queries and keys per token. Refused together with a draft.

    lag: tokens between evictions, and newest columns that always stay (the paper sets it per task)
    alpha: attention from which a column counts as used (likewise)
    """

    name: ClassVar[str] = "lazyeviction"
    lag: PositiveInt = 32
    alpha: Annotated[float, Range(0, 1, "both")] = 0.001

    def least(self) -> int:
        """Sinks, and the larger of the recent columns and the lag."""
        return self.sinks + max(self.recent, self.lag)

    def cache_layer(self) -> LaggedLayer:
        return LaggedLayer(
            lag=self.lag, alpha=self.alpha, sinks=self.sinks, least=self.least(), budget=self.budget or 0
        )

    def fits(self, columns: int) -> bool:
        """A prompt within a `budget` is not the end of it: the output is held to it too."""
        return self.budget is None and super().fits(columns)
