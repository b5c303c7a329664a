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
    """Holds as many columns as the prefill left: every decoded token drives out the one at a fixed distance."""

    def evict(self, q: int) -> None:
        if q > 1:
            return
        d = self.rule["distance"]
        for store in self.stores():
            rows = [row for row, n in zip(store.rows, store.lengths, strict=True) if self.cut[row] and n >= d]
            if len(rows) == len(store):
                store.drop_at(d)
            elif rows:  # others of the batch fitted the budget and stay whole
                ends = {row: n for row, n in zip(store.rows, store.lengths, strict=True) if row in rows}
                everything = {row: torch.arange(n, device=store.keys.device) for row, n in ends.items()}
                store.keep({row: x[x != len(x) - d] for row, x in everything.items()}, room=32)


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
        choice.merged = []
        for keys, values, kept in zip(row.keys, row.values, choice.keep, strict=True):
            gone = others(kept, row.n)
            into = nearest_place(kept, gone)
            choice.merged.append((folded(keys, kept, gone, into), folded(values, kept, gone, into)))
        return choice
