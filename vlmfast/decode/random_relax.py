"""RandomRelax: every mismatch passes with one probability, the baseline of loose rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmfast.decode.accept import EXACT, LOOSE, REFUSED, Exact, Round, Rule, Verdict, guarded, leading
from vlmfast.fields import NonNegativeInt, Share


@dataclass(frozen=True)
class RandomRelax(Rule):
    """Every mismatch passes with probability `relax`, drawn from `seed`: the baseline of every loose rule
    (survey arXiv 2604.05546, App. D.2). Changes the output. eos: never loosen the end of the answer."""

    relax: Share = 0.5
    seed: NonNegativeInt = 0
    eos: bool = True
    name: ClassVar[str] = "randomrelax"

    def judge(self, verified: Round) -> Verdict:
        num_drafted = verified.draft.shape[0]
        if num_drafted == 0:
            return Exact().judge(verified)
        target_picks = verified.picks()
        drawn = torch.rand(num_drafted, generator=verified.random) < self.relax
        loosened = drawn.to(verified.draft.device) & guarded(verified, target_picks)
        codes = torch.where(verified.draft == target_picks[:-1], EXACT, torch.where(loosened, LOOSE, REFUSED))
        return leading(codes.tolist(), verified)
