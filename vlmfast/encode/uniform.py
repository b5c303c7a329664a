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
    (arXiv 2508.16201). A token's rank is its place on a lattice over frame, row and column: as even as fixed steps, but
    without their fault that a step equal to the grid's width keeps a single column."""

    name: ClassVar[str] = "uniform"
    needs: ClassVar[tuple[str, ...]] = ()

    def score(self, tokens: VisualTokens) -> Tensor:
        num_frames, height, width = (max(1, size) for size in tokens.grid)
        index = torch.arange(tokens.n, device=tokens.features.device)
        coordinates = (index // (height * width) % num_frames, index // width % height, index % width)
        lattice = sum(step * coordinate.double() for step, coordinate in zip(STEPS, coordinates, strict=True))
        return -torch.remainder(torch.as_tensor(lattice), 1.0)
