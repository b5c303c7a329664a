"""H2O: half of the budget for columns with the most accumulated attention, half for recent ones (arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmfast.fields import NonNegativeInt, PositiveInt, Share
from vlmfast.prefill.base import Choice, KVPolicy, Row, best_of_heads, protect


@dataclass(frozen=True)
class H2O(KVPolicy):
    """Score = attention summed over queries, per head; the heaviest columns stay next to the most recent ones.

    The paper sums over every query of the prompt and goes on evicting while it decodes. Here the sum runs over the text
    after the media (no full attention map exists under FlashAttention) and the choice is made once, after the prefill.
    kvpress' observed attention also divides a column's sum by the number of queries that can see it and keeps no recent
    half, neither of which is in the paper: with that undone the scores agree.

    queries: text queries summed over, the last ones
    heavy: share of the budget for heavy hitters, in [0, 1]; the rest goes to recent columns (paper 0.5)
    sinks: the paper keeps none by rule
    """

    name: ClassVar[str] = "h2o"
    stacks: ClassVar[bool] = True
    sinks: NonNegativeInt = 0
    queries: PositiveInt = 64
    heavy: Share = 0.5

    def score(self, row: Row) -> Tensor:
        return row.relevance()  # the mean over queries ranks as the sum does

    def choose(self, row: Row) -> Choice:
        total = self.allowance(row)
        recent = max(self.recent, total - self.sinks - round(self.heavy * total))
        scores = protect(self.score(row), self.sinks, recent)
        return Choice(best_of_heads(scores, [total] * len(scores)))
