"""Elastic Cache: the most attended columns are anchors, and the others are averaged into them (arXiv 2407.18121)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.fields import PositiveInt
from vlmfast.prefill.base import Choice, KVPolicy, Row
from vlmfast.prefill.evict import EvictingLayer
from vlmfast.prefill.merge import folded, nearest_place, others
from vlmfast.prefill.ragged_layer import KVLayer


class FixedPointLayer(EvictingLayer):
    """Keeps its length after the prefill: every decoded token evicts the column at a fixed distance from the end."""

    def evict(self, q: int) -> None:
        if q > 1:
            return
        distance_to_end = self.rule["distance"]
        for store in self.stores():
            cut_rows = [
                store_row
                for store_row, row_length in zip(store.rows, store.lengths, strict=True)
                if self.cut[store_row] and row_length >= distance_to_end
            ]
            if len(cut_rows) == len(store):
                store.drop_at(distance_to_end)
            elif cut_rows:  # others of the batch fitted the budget and stay whole
                cut_lengths = {
                    store_row: row_length
                    for store_row, row_length in zip(store.rows, store.lengths, strict=True)
                    if store_row in cut_rows
                }
                all_places = {
                    store_row: torch.arange(row_length, device=store.keys.device)
                    for store_row, row_length in cut_lengths.items()
                }
                store.keep(
                    {
                        store_row: row_places[row_places != len(row_places) - distance_to_end]
                        for store_row, row_places in all_places.items()
                    },
                    room=32,
                )


@dataclass(frozen=True)
class ElasticCache(KVPolicy):
    """Score = accumulated attention. An evicted column joins the anchor closest in the sequence; buckets are averaged.

    Then, with every decoded token, the column at a fixed distance from the end leaves, so the cache stays as large as
    the prefill left it (later turns of several tokens are appended whole). A cache that does so cannot take back
    refused drafts, so this half is off unless `distance` is given. Attention is that of the text after the media (the
    paper sums over the whole instruction).

    queries: text queries summed over, the last ones
    distance: columns before the end where decoding evicts (paper 25); None = decoded columns are all kept
    """

    name: ClassVar[str] = "elasticcache"
    stacks: ClassVar[bool] = True
    queries: PositiveInt = 64
    distance: PositiveInt | None = None

    def least(self) -> int:
        """Sinks and recent columns, and no less than the distance."""
        return max(super().least(), self.distance or 0)

    def cache_layer(self) -> KVLayer:
        return KVLayer() if self.distance is None else FixedPointLayer(distance=self.distance)

    def score(self, row: Row) -> Tensor:
        return row.relevance()

    def choose(self, row: Row) -> Choice:
        choice = super().choose(row)
        kept = torch.stack(choice.keep)
        evicted_indices = others(kept, row.n)
        targets = nearest_place(kept, evicted_indices)
        merged_vectors = [folded(x, kept, evicted_indices, targets) for x in (row.keys, row.values)]
        choice.merged = list(zip(*merged_vectors, strict=True))
        return choice
