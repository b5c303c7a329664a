"""Random: keeps a random set of tokens. The second baseline that every method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.core import VisualTokens
from vlmfast.encode.base import Pruner


@dataclass(frozen=True)
class Random(Pruner):
    """Keep a random set, the same for the same seed and number of tokens."""

    seed: int = 0
    name: ClassVar[str] = "random"
    needs: ClassVar[tuple[str, ...]] = ()

    def score(self, tokens: VisualTokens) -> Tensor:
        # drawn on the CPU so that every device keeps the same tokens
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + tokens.n)
        return torch.rand(tokens.n, generator=generator).to(tokens.features.device, non_blocking=True)
