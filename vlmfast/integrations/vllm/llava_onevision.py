"""LLaVA-OneVision in vLLM, pruned after the vision tower.

Its positions have one axis, and vLLM counts them without gaps: what stays of an item moves together, where the library
leaves every token at its place in the unpruned prompt. Rows need no columns for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import llava_onevision as base
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import EmbeddingItems
from vllm.multimodal.processing import PromptReplacement

from vlmfast.core import Unsupported
from vlmfast.families.base import Item, frames_of
from vlmfast.families.llava import item_of
from vlmfast.integrations.vllm import processor
from vlmfast.integrations.vllm.selection import kept_rows, num_kept


class LlavaOnevisionProcessor(processor.PrunedProcessor, base.LlavaOnevisionMultiModalProcessor):
    """vLLM's, with the placeholders that stay."""

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        plain = super()._get_prompt_updates(mm_items, processor.without_ours(hf_processor_mm_kwargs), out_mm_kwargs)

        def shortened(update: Any) -> PromptReplacement:
            modality = update.modality

            def replacement(index: int) -> list[int]:
                rule = processor.settings_of(out_mm_kwargs[modality][index], modality).rule
                ids: list[int] = update.replacement(index)
                return ids if rule is None else ids[: num_kept(rule, self._layout(mm_items, modality, index, len(ids)))]

            return PromptReplacement(modality=modality, target=update.target, replacement=replacement)

        return [shortened(update) for update in plain]

    def _layout(self, mm_items: Any, modality: str, index: int, num_columns: int) -> Item:
        """An item's frames or tiles and separators, before it is encoded; their order does not matter yet."""
        items = mm_items[modality]
        if isinstance(items, EmbeddingItems):
            raise Unsupported(f"embeddings of a {modality} came in: their layout is not known, send the {modality}")
        num_separators, num_frames = 1, 2  # a video: a newline at its end; an image: a base tile and a mosaic of tiles
        if modality == "video":
            num_frames = items.get_num_frames(index)
        else:
            num_separators = self._newlines(items.get_image_size(index))
        protected = torch.arange(num_columns) >= num_columns - num_separators
        grid = (num_frames, 1, (num_columns - num_separators) // num_frames)
        return Item(num_columns, frames_of(num_columns, 1), grid, modality == "video", protected)

    def _newlines(self, size: Any) -> int:
        """Lines of an image's mosaic, each of which ends in a newline."""
        encoder = self.info.get_vision_encoder_info()
        tiles = base.get_anyres_image_grid_shape(
            (size.height, size.width), self.info.get_hf_config().image_grid_pinpoints, encoder.get_image_size()
        )
        _, newlines = self.info._get_num_unpadded_features(
            original_height=size.height,
            original_width=size.width,
            npatches=encoder.get_patch_grid_length(),
            num_patch_height=tiles[0],
            num_patch_width=tiles[1],
        )
        return int(newlines)


@MULTIMODAL_REGISTRY.register_processor(
    LlavaOnevisionProcessor,
    info=base.LlavaOnevisionProcessingInfo,
    dummy_inputs=base.LlavaOnevisionDummyInputsBuilder,
)
class PrunedLlavaOnevision(base.LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision with pruned media."""

    def embed_multimodal(self, **kwargs: Any) -> tuple[Tensor, ...]:
        """Rows (kept, D) per item, in the order of the items."""
        ours = {m: kwargs.pop(processor.field_of(m), ()) for m in processor.MODALITIES}
        vision = self.config.vision_config
        tile_side = int(vision.image_size) // int(vision.patch_size)
        made: list[Tensor] = []
        for modality in ("image", "video"):
            for text, rows, num_frames in zip(ours[modality], *self._encoded(modality, kwargs), strict=True):
                item = item_of(rows, self.image_newline, modality == "video", num_frames, tile_side)
                made.append(rows[kept_rows(processor.of_bytes(text).rule, item, rows)])
        return tuple(made)

    def _encoded(self, modality: str, kwargs: dict[str, Any]) -> tuple[list[Tensor], list[int]]:
        """Rows (n, D) of each item of one modality, from vLLM's own tower, and the frames of each."""
        name = {"image": "pixel_values", "video": "pixel_values_videos"}[modality]
        if name not in kwargs:
            return [], []
        mine = {
            key: value for key, value in kwargs.items() if key == name or (key, modality) == ("image_sizes", "image")
        }
        rows = [each.reshape(-1, each.shape[-1]) for each in super().embed_multimodal(**mine)]
        return rows, [len(frames) if modality == "video" else 1 for frames in kwargs[name]]
