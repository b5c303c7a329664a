"""LLaVA-1.5, LLaVA-NeXT (tiles and newlines), LLaVA-NeXT-Video, LLaVA-OneVision: 1-D positions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.families.base import Family, Item, frames_of, joined_parts


class Llava(Family):
    model_types = ("llava", "llava_next", "llava_next_video", "llava_onevision")
    media = ("image", "video")
    separate_grids = True
    pieces_along = 1

    def visual_ids(self, model: nn.Module) -> dict[str, int]:
        token_ids = super().visual_ids(model)
        if not hasattr(self.base(model), "get_video_features"):
            token_ids.pop("video", None)
        return token_ids

    def frame_size(
        self, video_processor: Any, frames: int, height: int, width: int, **options: Any
    ) -> tuple[int, int] | None:
        """What the processor scales a frame to before it crops, asked with a frame without data."""
        shape = torch.empty(1, 3, height, width, dtype=torch.uint8, device="meta")
        made = video_processor([shape], return_tensors="pt", **options | {"do_center_crop": False})
        return tuple(made["pixel_values_videos"].shape[-2:])

    def video_grid(self, model: nn.Module, made: Any) -> list[int]:
        num_frames, _, height, width = made["pixel_values_videos"].shape[1:]
        patch_size = int(model.config.vision_config.patch_size)  # type: ignore[union-attr, arg-type]
        return [num_frames, height // patch_size, width // patch_size]

    def video_call(self, pixels: Tensor, grid: Tensor) -> dict[str, Tensor]:
        return {"pixel_values_videos": pixels}

    def usual_features(self, model: nn.Module, call: dict[str, Any]) -> bool:
        names = ("vision_feature_layer", "vision_feature_select_strategy")
        return all(call.get(name) in (None, getattr(model.config, name, None)) for name in names)

    def joined(self, model: nn.Module, outputs: list[Any]) -> Any:
        pooled = [output.pooler_output for output in outputs]
        if model.config.model_type == "llava_onevision":  # type: ignore[union-attr]
            pooled[:-1] = [rows[:, :-1] for rows in pooled[:-1]]  # a newline ends a video, and so every piece
        names = [name for name in outputs[0] if name != "pooler_output"]
        fields = {name: joined_parts([output[name] for output in outputs]) for name in names}
        return type(outputs[0])(**fields, pooler_output=torch.cat(pooled, 1))

    def items(self, model: nn.Module, kind: str, call: dict[str, Any], features: list[Tensor]) -> list[Item]:
        newline: Tensor | None = getattr(self.base(model), "image_newline", None)
        num_frames = int(call["pixel_values_videos"].shape[1]) if kind == "video" else 1
        vision_config: Any = model.config.vision_config  # type: ignore[union-attr]
        tile_side = int(vision_config.image_size) // int(vision_config.patch_size)
        return [item_of(item_features, newline, kind == "video", num_frames, tile_side) for item_features in features]


def item_of(feature: Tensor, newline: Tensor | None, video: bool, num_frames: int, tile_side: int) -> Item:
    """Layout of one item from its rows (n, D). newline: (D,), the row that ends a line; tile_side: in columns."""
    num_columns = feature.shape[0]
    # newline rows are exact copies of one learned vector: found by value, so no packing rule is repeated here
    separators = None if newline is None else (feature == newline.to(feature)).all(-1)
    num_separators = 0 if separators is None else int(separators.sum())
    if separators is None or num_separators == 0:
        side_length = math.isqrt(num_columns // num_frames)
        grid = (num_frames, side_length, num_columns // num_frames // side_length)
        return Item(num_columns, frames_of(num_columns, num_frames), grid, video)
    if video or num_separators == 1:
        num_visual = num_columns - num_separators
        side_length = math.isqrt(num_visual // num_frames)
        frame_index = torch.cat([frames_of(num_visual, num_frames), torch.full((num_separators,), num_frames - 1)])
        return Item(
            num_columns,
            frame_index,
            (num_frames, side_length, num_visual // num_frames // side_length),
            video,
            separators,
        )
    # any-resolution image: one base tile, then a mosaic whose rows each end in a newline
    num_base_columns = tile_side * tile_side
    width = int(separators.nonzero()[0]) - num_base_columns
    frame_index = torch.ones(num_columns, dtype=torch.long)
    frame_index[:num_base_columns] = 0
    return Item(num_columns, frame_index, (2, num_separators, width), False, separators)
