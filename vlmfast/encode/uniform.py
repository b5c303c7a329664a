"""Uniform: evenly spaced tokens. The baseline every method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.core import VisualTokens
from vlmfast.encode.base import Pruner

STEPS = (0.3247179572, 0.7548776662, 0.5698402910)  # per frame, row and column: powers of the plastic number


@dataclass(frozen=True)
class Uniform(Pruner):
    """Keep tokens at even steps through space and time. Needs nothing; the cheap draft view of SpecVLM
    (arXiv 2508.16201). A token's rank is its place on a lattice over frame, row and column: as even as fixed steps,
    without falling into step with the width of the grid (a quarter of a grid four wide would be one column)."""

    name: ClassVar[str] = "uniform"
    needs: ClassVar[tuple[str, ...]] = ()

    def score(self, tokens: VisualTokens) -> Tensor:
        t, h, w = tokens.grid
        index = torch.arange(tokens.n, device=tokens.features.device)
        place = (index // max(1, h * w) % max(1, t), index // max(1, w) % max(1, h), index % max(1, w))
        lattice = sum(step * axis.double() for step, axis in zip(STEPS, place, strict=True))
        return -torch.remainder(torch.as_tensor(lattice), 1.0)
