"""InternVL (the transformers port): images and video frames as equal tiles, 1-D positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vlmfast.families.base import Family, Item, tile_item


class InternVL(Family):
    """Every tile is an item of its own, also each frame of a video: the model itself sees rows of tiles. So rules that
    compare frames leave them whole, and each tile keeps its share."""

    model_types = ("internvl",)

    def items(self, model: nn.Module, kind: str, call: dict[str, Any], features: list[Tensor]) -> list[Item]:
        return [tile_item(item_features.shape[0]) for item_features in features]
