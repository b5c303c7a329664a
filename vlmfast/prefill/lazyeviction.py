"""LazyEviction: evicts columns during decoding, with a delay, by the time since their last use (arXiv 2506.15969)."""

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
from vlmfast.runtime.stacked_layers import LayerRows


class LaggedLayer(EvictingLayer):
    """Watches which columns are attended, and evicts down to its limit every `lag` decoded tokens."""

    def __init__(self, **rule: Any) -> None:
        super().__init__(**rule)
        self.limits: list[int] = []  # per row (batch row, head)
        self.evicted = 0  # `decoded` at the last eviction
        self.last = self.interval = torch.empty(0)  # (B * Hk, M) float32 by place: last use, longest gap between uses

    def compress(
        self, kept: CompressedLayer | None, positions: Tensor | None = None, rows: LayerRows | None = None
    ) -> None:
        super().compress(kept, positions, rows)
        held_lengths = self.lengths().flatten()
        self.limits = [
            max(self.rule["least"], self.rule["budget"] or row_length) for row_length in held_lengths.tolist()
        ]
        self.last = torch.zeros(len(held_lengths), int(held_lengths.max()), device=self.device)
        self.interval = torch.zeros_like(self.last)

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        num_tokens = query.shape[2]
        row_queries = query.reshape(self.batch * self.heads, -1, num_tokens, query.shape[-1])
        for store in self.stores():
            for entry_index, row_index in enumerate(store.rows):
                row_keys = store.segment(entry_index, query.dtype)[1]
                self._watch(
                    row_index,
                    kernels.window_attention(row_queries[row_index][None], row_keys[None, None], scaling)[0].amax(0),
                )
        return super().attend(query, scaling)

    def _watch(self, row_index: int, attention: Tensor) -> None:
        """weights (q, n): the most attention that any query head of the group pays, for the q newest tokens."""
        num_tokens, num_columns = attention.shape
        if num_columns > self.last.shape[1]:
            num_added = num_columns + 64 - self.last.shape[1]
            self.last, self.interval = pad(self.last, (0, num_added)), pad(self.interval, (0, num_added))
        last_use, longest_gap = self.last[row_index, :num_columns], self.interval[row_index, :num_columns]
        for token_index, token_attention in enumerate(attention):
            current_step = self.decoded - num_tokens + token_index + 1
            last_use[num_columns - num_tokens + token_index], longest_gap[num_columns - num_tokens + token_index] = (
                current_step,
                0,
            )
            is_used = token_attention >= self.rule["alpha"]
            longest_gap.copy_(torch.where(is_used, torch.maximum(longest_gap, current_step - last_use), longest_gap))
            last_use.masked_fill_(is_used, current_step)

    def evict(self, q: int) -> None:
        if self.decoded - self.evicted < self.rule["lag"]:
            return
        self.evicted = self.decoded
        for store in self.stores():
            kept_places: dict[int, Tensor] = {}
            for row_index, row_length in zip(store.rows, store.lengths, strict=True):
                row_limit = self.limits[row_index]
                if row_length > row_limit and (self.cut[row_index] or self.rule["budget"]):
                    overdue = (self.decoded - self.last[row_index, :row_length]) / self.interval[
                        row_index, :row_length
                    ].clamp(min=1)
                    kept_places[row_index] = best(protect(-overdue, self.rule["sinks"], self.rule["lag"]), row_limit)
                    for use_table in (self.last, self.interval):
                        use_table[row_index, :row_limit] = use_table[row_index, kept_places[row_index]]
            if kept_places:
                store.keep(kept_places, room=self.rule["lag"] + 32)

    def batch_select_indices(self, indices: Tensor) -> None:
        row_indices = self.rows_of(indices)
        if self.limits:
            self.last, self.interval = self.last[row_indices], self.interval[row_indices]
            self.limits = [self.limits[row_index] for row_index in row_indices]
        super().batch_select_indices(indices)

    def nbytes(self) -> dict[str, int]:
        """As in `KVLayer`; the two tables count as fast memory."""
        tier_bytes = super().nbytes()
        table_bytes = 2 * self.last.numel() * self.last.element_size()
        return tier_bytes | {
            tier_name: tier_bytes[tier_name] + table_bytes for tier_name in ("fast", "fast_allocated", "resident")
        }


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
