"""HiRED: the tower's first layer divides the budget between image tiles, its last layer chooses within each."""

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
        first_layer, last_layer = self.need(tokens, "attention").float()
        num_frames, height, width = tokens.grid
        num_base_tokens = tokens.n - height * width
        side = math.isqrt(max(0, num_base_tokens))
        if tokens.video or num_frames != 2 or num_base_tokens <= 0 or side * side != num_base_tokens:
            return ranked(last_layer, tokens.frame, budget, self.floor, None, tokens.frame_size)
        num_rows, num_columns = math.ceil(height / side), math.ceil(width / side)
        device = last_layer.device
        base_region = parts(side, side, num_rows, num_columns).to(device)
        num_marked = max(1, int(num_base_tokens * (1 - self.alpha)))
        marked = first_layer[:num_base_tokens].argsort(descending=True, stable=True)[:num_marked]
        marked_counts = torch.bincount(base_region[marked], minlength=num_rows * num_columns).float()
        base_quota = min(num_base_tokens, max(self.floor, round(self.alpha * budget)))
        tile_quotas = largest_remainder(marked_counts, budget - base_quota)
        quotas = torch.cat([torch.tensor([base_quota], device=device), tile_quotas])
        tile_of_token = 1 + parts(height, width, num_rows, num_columns).to(device)
        view_of_token = torch.cat([tile_of_token.new_zeros(num_base_tokens), tile_of_token])  # 0 is the base view
        return ranked(last_layer, view_of_token, budget, 0, quotas)


def parts(height: int, width: int, num_rows: int, num_columns: int) -> Tensor:
    """(height * width,) int64: which of num_rows x num_columns equal parts each cell of a grid lies in."""
    row_part = torch.arange(height) * num_rows // height
    column_part = torch.arange(width) * num_columns // width
    return (row_part[:, None] * num_columns + column_part[None]).flatten()
