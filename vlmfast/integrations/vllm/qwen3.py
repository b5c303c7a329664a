"""Qwen3-VL in vLLM, pruned after the vision tower. Every frame of a video has a time stamp, and DeepStack's features
are pruned with the rest.

How many tokens of which frame stay is known after the tower only, and the prompt is laid out before. So a video's
placeholders cover its time stamps too, as in vLLM's own pruning: the model fills all of them, the stamps with the
embeddings of their text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptReplacement

from vlmfast.families.qwen import grid_items
from vlmfast.integrations.vllm import positions, processor
from vlmfast.integrations.vllm.qwen2 import QwenModel, modalities_of, with_columns
from vlmfast.integrations.vllm.selection import kept_rows, num_kept


def stamped(config: Any, tokenizer: Any, timestamps: Sequence[float], counts: Sequence[int]) -> list[int]:
    """The ids of a video whose frames keep `counts` tokens: time stamp, start, tokens, end, frame by frame."""
    ids = qwen3_vl.Qwen3VLMultiModalProcessor.get_video_repl(
        tokens_per_frame=list(counts),
        timestamps=timestamps,
        tokenizer=tokenizer,
        vision_start_token_id=config.vision_start_token_id,
        vision_end_token_id=config.vision_end_token_id,
        video_token_id=config.video_token_id,
    ).full
    return list(ids)


class Qwen3VLProcessor(processor.PlacedProcessor, qwen3_vl.Qwen3VLMultiModalProcessor):
    """Qwen3-VL's."""

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        config = self.info.get_hf_config()
        token = {"image": config.image_token_id, "video": config.video_token_id}

        def replacement(index: int, modality: str) -> list[int]:
            item = out_mm_kwargs[modality][index]
            grid = item[f"{modality}_grid_thw"].data
            layout = grid_items(grid[None], config.vision_config.spatial_merge_size, modality == "video")[0]
            count = num_kept(processor.settings_of(item, modality).rule, layout)
            if modality == "video":
                none_of_each = [0] * layout.grid[0]
                stamps = stamped(config, self.info.get_tokenizer(), item["timestamps"].data, none_of_each)
                positions.refuse_beyond_digits(len(stamps) + layout.grid[0] * max(layout.grid[1:]))
                count += len(stamps)
            return [token[modality]] * count

        return [
            PromptReplacement(modality=m, target=[token[m]], replacement=partial(replacement, modality=m))
            for m in processor.MODALITIES
        ]


class PrunedQwen3VLModel(QwenModel):
    """What `QwenModel` does, with time stamps and DeepStack's features."""

    def embed_multimodal(self, **kwargs: Any) -> tuple[Tensor, ...]:
        made: list[Tensor] = []
        merge = self.config.vision_config.spatial_merge_size
        for modality, settings in modalities_of(kwargs):
            grids = kwargs[f"{modality}_grid_thw"]
            for index, rows in enumerate(self._encode(modality, kwargs)):
                item = grid_items(grids[index][None], merge, modality == "video")[0]
                rule = settings[index].rule
                if modality == "image":
                    made.append(with_columns(rows, rule, item, width=self.visual_dim))  # type: ignore[attr-defined]
                else:
                    made.append(self._stamped_rows(rows, rule, item, kwargs["timestamps"][index]))
        return tuple(made)

    def _stamped_rows(self, rows: Tensor, rule: Any, item: Any, timestamps: Any) -> Tensor:
        """Rows (n, D * levels) of a video -> the rows that fill its placeholders, with their places."""
        chosen = kept_rows(rule, item, rows[:, : self.visual_dim])  # type: ignore[attr-defined]
        whole = [item.grid[1] * item.grid[2]] * item.grid[0]
        counts = torch.bincount(item.frame[chosen.cpu()], minlength=item.grid[0]).tolist()
        make = partial(stamped, self.config, self._tokenizer, timestamps)  # type: ignore[attr-defined]
        ids, ids_unpruned = (torch.tensor(make(each), device=rows.device) for each in (counts, whole))
        is_token, was_token = (each == self.config.video_token_id for each in (ids, ids_unpruned))
        places_unpruned = positions.stamped_places(was_token.cpu(), item.frame, item.grid)
        places_unpruned = places_unpruned.to(rows.device)
        text = self.get_language_model().embed_input_ids(ids)  # type: ignore[attr-defined]
        out = rows.new_zeros(len(ids), rows.shape[1])
        out[:, : text.shape[1]] = text
        out[is_token] = rows[chosen]
        places = places_unpruned.new_zeros(len(ids), 3)
        places[is_token] = places_unpruned[was_token][chosen]
        places[~is_token] = places_unpruned[~was_token]
        return torch.cat([out, positions.columns_of(places, rows)], 1)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        merge, media = self.config.vision_config.spatial_merge_size, []
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            place, modality = feature.mm_position, feature.modality
            grid = feature.data[f"{modality}_grid_thw"].data
            item = grid_items(grid[None], merge, modality == "video")[0]
            far = item.grid[0] * max(item.grid[1:])
            if modality == "video":  # its columns are the tokens that stay and the text of its stamps
                far += place.length - num_kept(processor.settings_of(feature.data, modality).rule, item)
            media.append(positions.Media(place.offset, place.length, far))
        return positions.prompt_positions(len(input_tokens), media)


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor, info=qwen3_vl.Qwen3VLProcessingInfo, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder
)
class PrunedQwen3VL(PrunedQwen3VLModel, qwen3_vl.Qwen3VLForConditionalGeneration):
    """Qwen3-VL with pruned media."""
