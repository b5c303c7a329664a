"""Idefics3 and SmolVLM: images and video frames as equal tiles between text markers, 1-D positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vlmfast.families.base import Family, Item, tile_item


class Idefics(Family):
    """Every tile is an item of its own (the text between tiles says where they stand), frames of a video too."""

    model_types = ("idefics3", "smolvlm")

    def text(self, model: nn.Module) -> nn.Module:
        return self.base(model).text_model  # type: ignore[return-value]

    def tower(self, model: nn.Module) -> nn.Module:
        return self.base(model).vision_model  # type: ignore[return-value]

    def takes_any_rows(self, model: nn.Module) -> bool:
        config: Any = model.config
        # older versions of SmolVLM put features in by whole tiles
        return not (config.model_type == "smolvlm" and hasattr(self.base(model), "inputs_merger"))

    def items(self, model: nn.Module, kind: str, call: dict[str, Any], features: list[Tensor]) -> list[Item]:
        tile_columns = int(self.base(model).image_seq_len)  # type: ignore[arg-type]
        num_tiles = sum(item_features.shape[0] // tile_columns for item_features in features)
        return [tile_item(tile_columns) for _ in range(num_tiles)]
