"""LLaVA-1.5, LLaVA-NeXT (tiles and newlines), LLaVA-NeXT-Video, LLaVA-OneVision: 1-D positions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.families.base import Family, Item, frames_of


class Llava(Family):
    model_types = ("llava", "llava_next", "llava_next_video", "llava_onevision")
    media = ("image", "video")

    def visual_ids(self, model: nn.Module) -> dict[str, int]:
        ids = super().visual_ids(model)
        if not hasattr(self.base(model), "get_video_features"):
            ids.pop("video", None)
        return ids

    def items(self, model: nn.Module, kind: str, call: dict[str, Any], features: list[Tensor]) -> list[Item]:
        newline: Tensor | None = getattr(self.base(model), "image_newline", None)
        frames = int(call["pixel_values_videos"].shape[1]) if kind == "video" else 1
        vision: Any = model.config.vision_config  # type: ignore[union-attr]
        tile = int(vision.image_size) // int(vision.patch_size)
        return [_item(f, newline, kind == "video", frames, tile) for f in features]


def _item(feature: Tensor, newline: Tensor | None, video: bool, t: int, tile: int) -> Item:
    n = feature.shape[0]
    # newline rows are exact copies of one learned vector: found by value, so no packing rule is repeated here
    separators = None if newline is None else (feature == newline.to(feature)).all(-1)
    count = 0 if separators is None else int(separators.sum())
    if separators is None or count == 0:
        side = math.isqrt(n // t)
        return Item(n, frames_of(n, t), (t, side, n // t // side), video)
    if video or count == 1:
        body = n - count
        side = math.isqrt(body // t)
        frame = torch.cat([frames_of(body, t), torch.full((count,), t - 1)])
        return Item(n, frame, (t, side, body // t // side), video, separators)
    # any-resolution image: one base tile, then a mosaic whose rows each end in a newline
    base = tile * tile
    width = int(separators.nonzero()[0]) - base
    frame = torch.cat([torch.zeros(base, dtype=torch.long), torch.ones(n - base, dtype=torch.long)])
    return Item(n, frame, (2, count, width), False, separators)
