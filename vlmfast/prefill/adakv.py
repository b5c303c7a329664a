"""AdaKV: one budget for all heads of a layer, spent where the scores are (arXiv 2407.11550)."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.fields import Fraction
from vlmfast.kernels import highest
from vlmfast.prefill.base import Choice, KVPolicy, Row, best_of_heads, check_scorer, protect, under
from vlmfast.prefill.in_two_parts import InTwoParts
from vlmfast.prefill.snapkv import SnapKV
from vlmfast.runtime import transfers


@dataclass(frozen=True)
class AdaKV(InTwoParts):
    """Wraps a scorer: keeps the best columns over all heads of a layer together, with a minimum for every head.

    Heads store different numbers of columns; nothing is masked. The floor is a minimum, and the kept columns equal
    those of kvpress. The authors' code blends instead: a head gets (1 - floor) of its count in the ranking plus floor
    of the mean.

    scorer: any policy with a `score` (its own keep, budget, sinks and recent are not used)
    floor: share of the mean budget that each head gets whatever its scores, in (0, 1] (paper's code 0.5, kvpress 0.2)
    """

    name: ClassVar[str] = "adakv"
    scorer: KVPolicy = field(default_factory=SnapKV)
    floor: Fraction = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scorer(self, self.scorer)

    def window(self) -> int:
        return self.scorer.window()

    def score(self, row: Row) -> Tensor:
        return under(self, self.scorer).score(row)

    def tiebreak(self, row: Row) -> Tensor | None:
        return under(self, self.scorer).tiebreak(row)

    @property
    def stacks(self) -> bool:  # type: ignore[override]
        return self.scorer.stacks

    def choosing(self, row: Row) -> Generator[None, None, Choice]:
        scores = protect(self.score(row).float(), self.sinks, self.recent)
        tie_scores = self.tiebreak(row)
        counts = self.head_counts(scores, self.allowance(row), row.stacked, tie_scores)
        (head_counts,), arrival = transfers.send_back([counts])
        del row  # its keys and its attention may be freed
        yield
        arrival.wait()  # the one wait
        return Choice(best_of_heads(scores, head_counts.tolist(), tie_scores))

    def head_counts(self, scores: Tensor, total: int, num_layers: int, tiebreak: Tensor | None) -> Tensor:
        """(Hk,) int64 columns that each head keeps: of its layer's scores (Hk, n) the best, `total` a head."""
        num_heads, num_columns = len(scores) // num_layers, scores.shape[1]
        head_minimum = max(self.least(), int(self.floor * total))
        remaining_scores = scores.scatter(1, highest(scores, head_minimum, tiebreak), -float("inf"))
        by_layer, ties_by_layer = (
            None if heads is None else heads.view(num_layers, num_heads * num_columns)
            for heads in (remaining_scores, tiebreak)
        )
        assert by_layer is not None
        num_extra = min(num_heads * (total - head_minimum), num_heads * (num_columns - head_minimum))
        extra_heads = highest(by_layer, num_extra, ties_by_layer) // num_columns
        extra_columns = torch.zeros(num_layers, num_heads, dtype=torch.int64, device=scores.device)
        extra_columns.scatter_add_(1, extra_heads, torch.ones_like(extra_heads))
        return (extra_columns + head_minimum).flatten()
