"""Elastic Cache: the most attended columns are anchors, and the others are averaged into them (arXiv 2407.18121)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmfast.prefill.base import Choice, KVPolicy, Row
from vlmfast.prefill.merge import folded, nearest_place, others


@dataclass(frozen=True)
class ElasticCache(KVPolicy):
    """Score = accumulated attention. An evicted column joins the anchor closest in the sequence; buckets are averaged.

    This is the paper's prefill half. Its other half evicts, with every decoded token, the column at a fixed distance
    from the end; a cache that must take back refused drafts cannot, so decoded columns are all kept here. Attention is
    that of the text after the media (the paper sums over the whole instruction).

    queries  text queries summed over, the last ones
    """

    name: ClassVar[str] = "elasticcache"
    queries: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts(queries=1)

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
