"""Uniform: evenly spaced tokens. The baseline every method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.core import VisualTokens
from vlmfast.encode.base import Pruner


@dataclass(frozen=True)
class Uniform(Pruner):
    """Keep tokens at even steps through space and time. Needs nothing; the cheap draft view of SpecVLM
    (arXiv 2508.16201)."""

    name: ClassVar[str] = "uniform"
    needs: ClassVar[tuple[str, ...]] = ()

    def select_body(self, tokens: VisualTokens, budget: int) -> Tensor:
        steps = torch.arange(budget, device=tokens.features.device, dtype=torch.float64) + 0.5
        return (steps * (tokens.n / budget)).long().clamp(max=tokens.n - 1)
