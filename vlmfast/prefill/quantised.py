"""Quantised: columns outside the budget are stored as int8 (MiKV, arXiv 2402.18096; ZipCache, 2405.14256)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.core import UserError
from vlmfast.prefill.base import Choice, KVPolicy, Row, check_scorer, under
from vlmfast.prefill.merge import others
from vlmfast.prefill.snapkv import SnapKV


@dataclass(frozen=True)
class Quantised(KVPolicy):
    """Wraps a scorer: its best columns stay exact, all others stay as int8 with a float32 scale per vector.

    `keep` is the share that stays exact; nothing is lost entirely. Sinks, recent and decoded columns are exact. The
    papers go down to 2 to 4 bits with balanced or channel-wise scales; here the low tier has 8, so the cache shrinks to
    about half at most in bfloat16.

    scorer: any policy with a `score` (its own keep, budget, sinks and recent are not used); ZipCache ranks by attention
    per query
    """

    name: ClassVar[str] = "quantised"
    scorer: KVPolicy = field(default_factory=SnapKV)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.int8:
            raise UserError(
                f"int8=True in {self.name}: its low tier is int8 already, what is kept is meant to be exact"
            )
        check_scorer(self, self.scorer)

    @property
    def stacks(self) -> bool:  # type: ignore[override]
        return self.scorer.stacks

    def window(self) -> int:
        return self.scorer.window()

    def score(self, row: Row) -> Tensor:
        return under(self, self.scorer).score(row)

    def tiebreak(self, row: Row) -> Tensor | None:
        return under(self, self.scorer).tiebreak(row)

    def choose(self, row: Row) -> Choice:
        choice = super().choose(row)
        choice.low = list(others(torch.stack(choice.keep), row.n))
        return choice
