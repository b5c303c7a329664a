"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL (also its experts): merged patch grid, M-RoPE, DeepStack columns (3-VL)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.families.base import Family, Item, frames_of


class Qwen(Family):
    model_types = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
    rope_axes = 3
    media = ("image", "video")
    tower_pruning = True

    def tower(self, model: nn.Module) -> nn.Module:
        return self.base(model).visual  # type: ignore[return-value]

    def stamped(self, model: nn.Module) -> bool:
        return str(model.config.model_type).startswith("qwen3_vl")  # type: ignore[union-attr]

    def items(self, model: nn.Module, kind: str, call: dict[str, Any], features: list[Tensor]) -> list[Item]:
        grids = call[f"{kind}_grid_thw"]
        merge = int(self.tower(model).spatial_merge_size)  # type: ignore[arg-type]
        return grid_items(grids, merge, kind == "video")

    def mergers(self, model: nn.Module) -> list[nn.Module]:
        """Tower modules that turn patches into merged rows (the last one and DeepStack's)."""
        tower = self.tower(model)
        return [tower.merger, *getattr(tower, "deepstack_merger_list", [])]  # type: ignore[list-item]

    def tower_order(self, model: nn.Module, grid: Tensor) -> Tensor | None:
        """(G,) permutation of merged rows that the tower applies for window attention, None if it keeps order."""
        tower = self.tower(model)
        if not hasattr(tower, "window_size"):
            return None
        if hasattr(tower, "get_window_index"):  # transformers before the helper moved out of the tower
            return tower.get_window_index(grid)[0].to(grid.device)  # type: ignore[operator]
        from transformers.vision_utils import get_vision_window_index

        index, _ = get_vision_window_index(
            grid,
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        return index.to(grid.device)


def grid_items(grids: Tensor, merge: int, video: bool) -> list[Item]:
    """Layouts from `*_grid_thw` (items, 3) in patches; `merge` x `merge` patches make one column."""
    items = []
    for t, h, w in grids.tolist():
        h, w = h // merge, w // merge
        items.append(Item(t * h * w, frames_of(t * h * w, t), (t, h, w), video))
    return items


def group_mean(hidden: Tensor, unit: int) -> Tensor:
    """(patches, D) -> (patches / unit, D): the mean of each merge group, the feature a pruner sees in the tower."""
    return hidden.view(-1, unit, hidden.shape[-1]).mean(1)


def kept_seqlens(cu: Tensor, kept_groups: Tensor, unit: int) -> Tensor:
    """Cumulative sequence lengths after dropping groups.

    cu: (S + 1,) int32 patch boundaries; kept_groups: (G,) bool in tower order; unit: patches per group.
    Segments that lost every patch vanish.
    """
    counts = torch.cat([kept_groups.new_zeros(1, dtype=torch.long), kept_groups.long().cumsum(0)]) * unit
    return torch.unique_consecutive(counts[(cu.long() // unit)]).to(cu.dtype)
