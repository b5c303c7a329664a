"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5 (the last two also with experts): merged patch grid, M-RoPE, DeepStack
columns (3-VL), layers with a recurrent state (3.5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.families.base import Family, Item, frames_of, joined_parts


class Qwen(Family):
    model_types: tuple[str, ...] = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
    rope_axes = 3
    media = ("image", "video")
    tower_loops = True
    separate_grids = True
    tower_pruning = True

    def tower(self, model: nn.Module) -> nn.Module:
        return self.base(model).visual  # type: ignore[return-value]

    def stamped(self, model: nn.Module) -> bool:
        return str(model.config.model_type).startswith("qwen3_vl")  # type: ignore[union-attr]

    def frame_size(
        self, video_processor: Any, frames: int, height: int, width: int, **options: Any
    ) -> tuple[int, int] | None:
        """The processor's own rule (`smart_resize`, within its limits of pixels), asked with frames without data."""
        shapes = torch.empty(frames, 3, height, width, dtype=torch.uint8, device="meta")
        made = video_processor([shapes], return_tensors="pt", **options)
        _, rows, columns = made["video_grid_thw"][0].tolist()
        return rows * video_processor.patch_size, columns * video_processor.patch_size

    def items(self, model: nn.Module, kind: str, call: dict[str, Any], features: list[Tensor]) -> list[Item]:
        grids = call[f"{kind}_grid_thw"]
        merge = int(self.tower(model).spatial_merge_size)  # type: ignore[arg-type]
        return grid_items(grids, merge, kind == "video")

    def window_side(self, model: nn.Module) -> int | None:
        vision_tower: Any = self.tower(model)
        if len(getattr(vision_tower, "fullatt_block_indexes", vision_tower.blocks)) == len(vision_tower.blocks):
            return None
        return int(vision_tower.window_size)

    def temporal_patch(self, video_processor: Any) -> int:
        return int(video_processor.temporal_patch_size)

    def video_grid(self, model: nn.Module, made: Any) -> list[int]:
        return made["video_grid_thw"][0].tolist()  # type: ignore[no-any-return]

    def video_call(self, pixels: Tensor, grid: Tensor) -> dict[str, Tensor]:
        return {"pixel_values_videos": pixels, "video_grid_thw": grid}

    def joined(self, model: nn.Module, outputs: list[Any]) -> Any:
        fields = {name: joined_parts([output[name] for output in outputs]) for name in outputs[0]}
        return type(outputs[0])(**fields)

    def mergers(self, model: nn.Module) -> list[nn.Module]:
        """Tower modules that turn patches into merged rows (the last one and DeepStack's)."""
        vision_tower = self.tower(model)
        return [vision_tower.merger, *getattr(vision_tower, "deepstack_merger_list", [])]  # type: ignore[list-item]

    def tower_order(self, model: nn.Module, grid: Tensor) -> Tensor | None:
        """(G,) permutation of merged rows that the tower applies for window attention, None if it keeps order."""
        vision_tower = self.tower(model)
        if not hasattr(vision_tower, "window_size"):
            return None
        if hasattr(vision_tower, "get_window_index"):  # transformers before the helper moved out of the tower
            return vision_tower.get_window_index(grid)[0].to(grid.device)  # type: ignore[operator]
        from transformers.vision_utils import get_vision_window_index

        window_index, _ = get_vision_window_index(
            grid,
            spatial_merge_size=vision_tower.spatial_merge_size,
            window_size=vision_tower.window_size,
            patch_size=vision_tower.patch_size,
        )
        return window_index.to(grid.device)


class Qwen35(Qwen):
    """Three layers of four are gated delta nets: each folds every column into a state of fixed size.

    Pruned columns simply never enter them, and a KV policy leaves them alone. Nothing can be taken out of a state
    again: what takes tokens back (drafts) or brings columns back by name (streams, reuse of a prefix) is refused.
    """

    model_types = ("qwen3_5", "qwen3_5_moe")
    recurrent = True

    def stamped(self, model: nn.Module) -> bool:
        return True


def grid_items(grids: Tensor, merge: int, video: bool) -> list[Item]:
    """Layouts from `*_grid_thw` (items, 3) in patches; `merge` x `merge` patches make one column."""
    items = []
    for num_frames, height, width in grids.tolist():
        height, width = height // merge, width // merge
        num_columns = num_frames * height * width
        items.append(Item(num_columns, frames_of(num_columns, num_frames), (num_frames, height, width), video))
    return items


def group_mean(hidden: Tensor, unit: int) -> Tensor:
    """(patches, D) -> (patches / unit, D): the mean of each merge group, the feature a pruner sees in the tower."""
    return hidden.view(-1, unit, hidden.shape[-1]).mean(1)


def kept_seqlens(cu: Tensor, kept_groups: Tensor, unit: int) -> Tensor:
    """Cumulative sequence lengths after dropping groups.

    cu: (S + 1,) int32 patch boundaries; kept_groups: (G,) bool in tower order; unit: patches per group.
    Segments that lost every patch vanish.
    """
    kept_before = torch.cat([kept_groups.new_zeros(1, dtype=torch.long), kept_groups.long().cumsum(0)]) * unit
    return torch.unique_consecutive(kept_before[(cu.long() // unit)]).to(cu.dtype)
