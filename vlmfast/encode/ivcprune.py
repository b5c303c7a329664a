"""IVCPrune: always keeps the tokens by which the language model locates things; another pruner chooses the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.core import UserError, VisualTokens, shown
from vlmfast.encode.base import Pruner
from vlmfast.encode.vidcom2 import VidCom2
from vlmfast.fields import Fraction
from vlmfast.kernels import highest

_GOLDEN = 0.6180339887


@dataclass(frozen=True)
class IVCPrune(Pruner):
    """Implicit visual coordinates (ICLR 2026): tokens at positions where the mean cosine or the mean sine of the rotary
    embedding is largest serve as coordinate axes; without them, grounding fails. The share
    `coordinates` of all tokens is kept for them (half by cosine, half by sine), at most half of the budget.

    The other part of the paper's budget goes to tokens relevant to the text; here it goes to any other pruner, `prune`,
    whose own keep is ignored.
    """

    keep: Fraction = 0.5
    coordinates: Fraction = 0.2
    prune: Pruner = field(default_factory=VidCom2)
    name: ClassVar[str] = "ivcprune"
    needs: ClassVar[tuple[str, ...]] = ("rope",)

    def __post_init__(self) -> None:
        if not isinstance(self.prune, Pruner) or isinstance(self.prune, IVCPrune):
            raise UserError(f"prune={shown(self.prune)}: ivcprune wraps another pruner, e.g. IVCPrune(prune=VidCom2())")
        # what the wrapped pruner asks for is asked for here too
        object.__setattr__(self, "needs", tuple(dict.fromkeys((*self.prune.needs, "rope"))))
        object.__setattr__(self, "video_only", self.prune.video_only)
        object.__setattr__(self, "attention_layers", self.prune.attention_layers)
        super().__post_init__()

    def select_body(self, tokens: VisualTokens, budget: int) -> Tensor:
        num_coordinates = max(1, min(round(self.coordinates * tokens.n), budget // 2)) // 2 * 2 or 1
        cosines, sines = self.need(tokens, "rope").float()
        by_cosine = highest(cosines, (num_coordinates + 1) // 2)
        by_sine = highest(sines.index_fill(0, by_cosine, float("-inf")), num_coordinates // 2)
        budgets = [budget, budget - num_coordinates] if budget > num_coordinates else [budget]
        chosen = self.prune.select_bodies(tokens, budgets)
        # the axes and the other pruner's best go first; what it keeps of a whole budget fills up for those it shares
        # with the axes, spread over the item by fractions of multiples of the golden ratio
        multiples = torch.arange(0, _GOLDEN * (tokens.n - 0.5), _GOLDEN, device=cosines.device, dtype=torch.float64)
        priority = multiples.frac_().scatter_(0, chosen[0], 1, reduce="add")
        priority.scatter_(0, torch.cat([by_cosine, by_sine, *chosen[1:]]), 2, reduce="add")
        return highest(priority, budget)
