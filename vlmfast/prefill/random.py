"""Keeps random columns: the baseline of every scorer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.fields import NonNegativeInt
from vlmfast.prefill.base import KVPolicy, Row
from vlmfast.runtime.transfers import to_device


@dataclass(frozen=True)
class Random(KVPolicy):
    """Uniformly random columns, drawn per layer and head.

    seed: of the draw; the same seed, layer and length give the same columns
    """

    name: ClassVar[str] = "random"
    seed: NonNegativeInt = 0

    def score(self, row: Row) -> Tensor:
        random_state = torch.Generator().manual_seed(self.seed * 10_007 + row.layer)
        drawn = torch.rand(row.keys.shape[0], row.n, generator=random_state)
        return to_device(drawn, row.keys.device)
