"""AdaKV: one budget for all heads of a layer, spent where the scores are (arXiv 2407.11550)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from vlmfast.fields import Fraction
from vlmfast.kernels import highest
from vlmfast.prefill.base import KVPolicy, Row, check_scorer, under
from vlmfast.prefill.snapkv import SnapKV


@dataclass(frozen=True)
class AdaKV(KVPolicy):
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

    def counts(self, scores: Tensor, total: int, tiebreak: Tensor | None = None) -> list[int]:
        num_heads, num_columns = scores.shape
        head_minimum = max(self.least(), int(self.floor * total))
        remaining_scores = scores.scatter(1, highest(scores, head_minimum, tiebreak), -float("inf")).flatten()
        num_extra = min(num_heads * (total - head_minimum), remaining_scores.numel() - num_heads * head_minimum)
        extra_heads = (
            highest(remaining_scores, num_extra, None if tiebreak is None else tiebreak.flatten()) // num_columns
        )
        return (extra_heads.bincount(minlength=num_heads) + head_minimum).tolist()
