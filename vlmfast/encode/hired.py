"""HiRED: share the budget between image tiles by what the tower sees early, fill it by what it sees late."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.core import VisualTokens
from vlmfast.encode.base import Pruner, largest_remainder, ranked
from vlmfast.fields import Fraction


@dataclass(frozen=True)
class HiRED(Pruner):
    """High-resolution early dropping (arXiv 2408.10945). The base view of a tiled image gets the share `alpha` of the
    budget. Of its tokens, the share 1 - alpha that the tower's first layer attends most is marked, and the rest of the
    budget is shared between the tiles by how many marked tokens lie in each tile's region of the base view. Within
    each, the tokens most attended in the last layer stay.

    Differs from the authors' code in three ways. A tile's region is its rectangle of the base view, as in the paper;
    their code cuts the flattened view into equal runs, which are bands of rows. What rounding leaves of the budget is
    given out by largest remainder; theirs drops it. The mosaic is cut into equal parts of about one tile, because its
    padding has been cropped when we see it. Media without tiles (one view, video) have one ranking by the last layer.
    """

    alpha: Fraction = 0.5
    name: ClassVar[str] = "hired"
    needs: ClassVar[tuple[str, ...]] = ("tower_attention",)
    attention_layers: ClassVar[tuple[int, ...]] = (0, -1)

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
        marked = early[:base].argsort(descending=True, stable=True)[: max(1, int(base * (1 - self.alpha)))]
        seen = torch.bincount(region[marked], minlength=rows * cols).float()
        first = min(base, max(self.floor, round(self.alpha * budget)))
        quota = torch.cat([torch.tensor([first], device=device), largest_remainder(seen, budget - first)])
        group = torch.cat([torch.zeros(base, dtype=torch.long, device=device), 1 + parts(h, w, rows, cols).to(device)])
        return ranked(late, group, budget, 0, quota)


def parts(h: int, w: int, rows: int, cols: int) -> Tensor:
    """(h * w,) int64: which of rows x cols equal parts each cell of an h x w grid lies in."""
    r = torch.arange(h) * rows // h
    c = torch.arange(w) * cols // w
    return (r[:, None] * cols + c[None]).flatten()
