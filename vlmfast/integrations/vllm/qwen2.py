"""Qwen2-VL and Qwen2.5-VL in vLLM, pruned after the vision tower: subclasses of vLLM's models and processors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import qwen2_5_vl, qwen2_vl
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptReplacement

from vlmfast.core import UserError
from vlmfast.families.patches import PatchLayout
from vlmfast.families.qwen import grid_items
from vlmfast.integrations.vllm import positions, processor
from vlmfast.integrations.vllm.selection import kept_rows, num_kept
from vlmfast.integrations.vllm.settings import Settings

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
START, END = "<|vision_start|>", "<|vision_end|>"


class QwenProcessor(processor.PlacedProcessor):
    """The part that Qwen2-VL and Qwen2.5-VL share."""

    def _resize(self, made: Any, settings: Settings) -> None:
        """`Downsample`: the same frames on a smaller grid, rebuilt from the patches as the library does."""
        if not getattr(settings.rule, "resizes", False):
            return
        vision = self.info.get_hf_config().vision_config
        layout = PatchLayout(int(vision.patch_size), int(vision.spatial_merge_size), int(vision.temporal_patch_size))
        for modality, pixels in PIXELS.items():
            if f"{modality}_grid_thw" not in made:
                continue
            if pixels not in made:
                raise UserError(
                    f"downsample resizes pixels, and embeddings of a {modality} came in: send the {modality}"
                )
            grids = [tuple(grid) for grid in made[f"{modality}_grid_thw"].tolist()]
            smaller = [layout.smaller(grid, settings.rule.keep) for grid in grids]
            parts = made[pixels].split([t * h * w for t, h, w in grids])
            resized = torch.cat(
                [layout.resized(part.float(), *to) for part, *to in zip(parts, grids, smaller, strict=True)]
            )
            whole = not made[pixels].is_floating_point()  # vLLM may leave pixels to the model as they are, 0 to 255
            made[pixels] = (resized.round() if whole else resized).to(made[pixels].dtype)
            made[f"{modality}_grid_thw"] = torch.tensor(smaller)

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        config = self.info.get_hf_config()
        token = {"image": config.image_token_id, "video": config.video_token_id}

        def replacement(index: int, modality: str) -> list[int]:
            item = out_mm_kwargs[modality][index]
            grid = item[f"{modality}_grid_thw"].data
            layout = grid_items(grid[None], config.vision_config.spatial_merge_size, modality == "video")[0]
            self._refuse_far(item, layout.grid, modality)
            return [token[modality]] * num_kept(processor.settings_of(item, modality).rule, layout)

        return [
            PromptReplacement(modality=m, target=[token[m]], replacement=partial(replacement, modality=m))
            for m in processor.MODALITIES
        ]

    def _refuse_far(self, item: Mapping[str, Any], grid: tuple[int, int, int], modality: str) -> None:
        """Refuse a video whose last frame is farther away than a row can say."""
        seconds = item.get("second_per_grid_ts") if modality == "video" else None
        step = step_of(self.info.get_hf_config(), None if seconds is None else float(seconds.data))
        positions.refuse_beyond_digits(max(int(grid[0] * step), *grid[1:]))


def step_of(config: Any, seconds: float | None) -> float:
    """What one frame of a video adds to its position in time, as vLLM has it."""
    tokens_per_second = float(getattr(config.vision_config, "tokens_per_second", 1.0))
    return (1.0 if seconds is None else seconds) * tokens_per_second


class Wrapped:
    """Goes before a vLLM builder of dummy inputs: media with text between them, as prompts have."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        tokens = {"image": f"{START}<|image_pad|>{END}", "video": f"{START}<|video_pad|>{END}"}
        return "".join(token * mm_counts.get(modality, 0) for modality, token in tokens.items())


class QwenModel:
    """Goes before a vLLM model in the list of bases: its rows pruned, with their places in trailing columns."""

    supports_multimodal_pruning = True
    supported_video_pruning_methods = ("evs", "vidcom2")
    config: Any

    def embed_multimodal(self, **kwargs: Any) -> tuple[Tensor, ...]:
        """Rows (kept, D + `positions.COLUMNS`) per item, in the order of the items."""
        made: list[Tensor] = []
        for modality, settings in modalities_of(kwargs):
            seconds = kwargs.get("second_per_grid_ts") if modality == "video" else None
            grids = kwargs[f"{modality}_grid_thw"]
            for index, rows in enumerate(self._encode(modality, kwargs)):
                step = 1.0
                if modality == "video":
                    step = step_of(self.config, None if seconds is None else float(seconds[index]))
                item = grid_items(grids[index][None], self.config.vision_config.spatial_merge_size, modality == "video")
                made.append(with_columns(rows, settings[index].rule, item[0], step))
        return tuple(made)

    def _encode(self, modality: str, kwargs: dict[str, Any]) -> Sequence[Tensor]:
        """Rows (n, D) of each item of one modality, from vLLM's own tower."""
        inputs = getattr(self, f"_parse_and_validate_{modality}_input")(**kwargs)
        rows: Sequence[Tensor] = getattr(self, f"_process_{modality}_input")(inputs)
        return rows

    def get_encoder_cudagraph_config(self) -> Any:
        """None of vLLM's captured towers: they hand rows over without the pruning."""
        return dataclasses.replace(super().get_encoder_cudagraph_config(), modalities=[])  # type: ignore[misc]

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions of the pruned prompt: text final, media at their start until their rows are there."""
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        media = []
        for feature, (offset, *grid, step) in zip(features, self.iter_mm_grid_thw(features), strict=True):  # type: ignore[attr-defined]
            chosen = processor.settings_of(feature.data, feature.modality).positions
            far = positions.advance(tuple(grid), step, chosen)
            media.append(positions.Media(offset, feature.mm_position.length, far))
        return positions.prompt_positions(len(input_tokens), media)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        """Take the places off the rows of this chunk, and put them into the positions of the prompt (3, L)."""
        rows = [item[:, : -positions.COLUMNS] for item in multimodal_embeddings]
        ids = torch.as_tensor(input_ids, device=mrope_positions.device)
        is_media = (ids == self.config.image_token_id) | (ids == self.config.video_token_id)
        columns = [item[:, -positions.COLUMNS :] for item in multimodal_embeddings]
        places = positions.places_of(torch.cat(columns)) if columns else torch.empty(0, 3, dtype=torch.long)
        new_positions, delta = positions.with_places(mrope_positions, is_media, places, num_computed_tokens)
        return rows, new_positions, delta


def modalities_of(kwargs: dict[str, Any]) -> Iterator[tuple[str, list[Settings]]]:
    """The modalities in a call of the model in their order, with the settings of each item; takes ours out of it."""
    ours = {m: kwargs.pop(processor.field_of(m), ()) for m in processor.MODALITIES}
    for name in list(kwargs):
        modality = name.removesuffix("_grid_thw")
        if name != modality:
            yield modality, [processor.of_bytes(text) for text in ours[modality]]


def with_columns(rows: Tensor, rule: Any, item: Any, step: float = 1.0, width: int | None = None) -> Tensor:
    """The rows that stay of an item, (kept, D + `positions.COLUMNS`). rows: (n, D); the pruner sees `width` of them."""
    chosen = kept_rows(rule, item, rows[:, :width])
    places = positions.grid_places(item.grid, step).to(rows.device)[chosen]
    return torch.cat([rows[chosen], positions.columns_of(places, rows)], 1)


class Qwen2VLProcessor(QwenProcessor, qwen2_vl.Qwen2VLMultiModalProcessor):
    """Qwen2-VL's."""


class Qwen2VLDummy(Wrapped, qwen2_vl.Qwen2VLDummyInputsBuilder):
    """Qwen2-VL's."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2VLProcessor, info=qwen2_vl.Qwen2VLProcessingInfo, dummy_inputs=Qwen2VLDummy
)
class PrunedQwen2VL(QwenModel, qwen2_vl.Qwen2VLForConditionalGeneration):
    """Qwen2-VL with pruned media."""


class Qwen2_5_VLProcessor(QwenProcessor, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    """Qwen2.5-VL's."""


class Qwen2_5_VLDummy(Wrapped, qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder):
    """Qwen2.5-VL's."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2_5_VLProcessor, info=qwen2_5_vl.Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummy
)
class PrunedQwen2_5_VL(QwenModel, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with pruned media."""
