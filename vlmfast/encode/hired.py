"""HiRED: share the budget between image tiles by what the tower sees early, fill it by what it sees late."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.core import VisualTokens, check_fraction
from vlmfast.encode.base import Pruner, largest_remainder, ranked


@dataclass(frozen=True)
class HiRED(Pruner):
    """High-resolution early dropping (arXiv 2408.10945). The base view of a tiled image gets the share `alpha` of the
    budget; the rest is shared between the tiles in proportion to the attention which the tower's first layer pays to
    each tile's region of the base view. Within each, the tokens most attended in the last layer stay.

    The mosaic is cut into equal parts of about one tile, because its padding has been cropped when we see it. Media
    without tiles (one view, video) have one ranking by the last layer.
    """

    alpha: float = 0.5
    name: ClassVar[str] = "hired"
    needs: ClassVar[tuple[str, ...]] = ("tower_attention",)
    attention_layers: ClassVar[tuple[int, ...]] = (0, -1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("alpha", self.alpha)

    def select_body(self, tokens: VisualTokens, budget: int) -> Tensor:
        early, late = self.need(tokens, "attention").float()
        t, h, w = tokens.grid
        base = tokens.n - h * w
        side = math.isqrt(max(0, base))
        if tokens.video or t != 2 or base <= 0 or side * side != base:
            return ranked(late, tokens.frame, budget, self.floor, None)
        rows, cols = math.ceil(h / side), math.ceil(w / side)
        device = late.device
        region = parts(side, side, rows, cols).to(device)
        seen = early.new_zeros(rows * cols).index_add_(0, region, early[:base])
        first = min(base, max(self.floor, round(self.alpha * budget)))
        quota = torch.cat([torch.tensor([first], device=device), largest_remainder(seen, budget - first)])
        group = torch.cat([torch.zeros(base, dtype=torch.long, device=device), 1 + parts(h, w, rows, cols).to(device)])
        return ranked(late, group, budget, 0, quota)


def parts(h: int, w: int, rows: int, cols: int) -> Tensor:
    """(h * w,) int64: which of rows x cols equal parts each cell of an h x w grid lies in."""
    r = torch.arange(h) * rows // h
    c = torch.arange(w) * cols // w
    return (r[:, None] * cols + c[None]).flatten()
