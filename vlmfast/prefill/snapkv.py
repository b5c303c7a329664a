"""SnapKV: keep what the last queries of the prompt attend to (arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.fields import OddInt, PositiveInt
from vlmfast.prefill.base import KVPolicy, Row, max_pool


@dataclass(frozen=True)
class SnapKV(KVPolicy):
    """Score = attention of the observation window, mean over its queries and the head group, max-pooled.

    Here the window is text after the media (the paper's last queries may hold none of the question's words). As in the
    paper, the pooling ends where the `recent` columns begin. kvpress pools by an average over 5 columns, so it keeps
    other columns; without pooling both keep the same.

    queries: size of the observation window (paper 32)
    pool: width of the max pooling over columns, odd (paper 7; 1 = none)
    """

    name: ClassVar[str] = "snapkv"
    stacks: ClassVar[bool] = True
    queries: PositiveInt = 32
    pool: OddInt = 7

    def score(self, row: Row) -> Tensor:
        relevance = row.relevance()
        num_past_columns = max(0, row.n - self.recent)
        return torch.cat([max_pool(relevance[:, :num_past_columns], self.pool), relevance[:, num_past_columns:]], 1)

    def tiebreak(self, row: Row) -> Tensor | None:
        """The attention before pooling, which makes neighbours equal."""
        return row.relevance() if self.pool > 1 else None
