"""A vLLM processor whose prompts have the placeholders that stay, and whose cache keys say how media are pruned."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig

from vlmfast.core import UserError
from vlmfast.integrations.vllm.settings import KEY, Settings
from vlmfast.integrations.vllm.startup import refuse_for

MODALITIES = ("image", "video")


def field_of(modality: str) -> str:
    """The field of an item that holds the text of its settings, as bytes."""
    return f"{modality}_{KEY}"


def to_bytes(settings: Settings) -> torch.Tensor:
    """(characters,) uint8."""
    return torch.tensor(list(settings.text().encode()), dtype=torch.uint8)


def of_bytes(text: torch.Tensor) -> Settings:
    """The inverse of `to_bytes`."""
    return Settings.of_text(bytes(text.tolist()).decode())


def settings_of(item: Mapping[str, Any], modality: str) -> Settings:
    """The settings that an item of a request carries."""
    return of_bytes(item[field_of(modality)].data)


class PrunedProcessor:
    """Goes before a vLLM processor in the list of bases. A subclass lays prompts out in `_get_prompt_updates`.

    A request's own settings come in as mm_processor_kwargs["vlmfast"]; the transformers processor never sees them.
    """

    info: Any

    def _settings(self, kwargs: Mapping[str, Any]) -> Settings:
        """The server's settings with the request's. Raises UserError, which vLLM answers with a 400."""
        settings = Settings.of_text(getattr(self.info.get_hf_config(), KEY)).with_request(kwargs.get(KEY))
        refuse_for(self.info.ctx.model_config.architecture, settings)
        return settings

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        settings = self._settings(hf_kwargs)
        made = super()._apply_hf_processor_main(mm_items, without_ours(hf_kwargs))  # type: ignore[misc]
        counts = mm_items.get_all_counts()
        self._resize(made, settings)
        for modality in MODALITIES:
            if counts.get(modality, 0):
                made[field_of(modality)] = to_bytes(settings).expand(counts[modality], -1).contiguous()
        return made

    def _resize(self, made: Any, settings: Settings) -> None:
        """Put smaller media in the place of what the transformers processor made, where the settings resize."""

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        fields = super()._get_mm_fields_config(hf_inputs, without_ours(hf_processor_mm_kwargs))  # type: ignore[misc]
        ours = {field_of(m): MultiModalFieldConfig.batched(m, keep_on_cpu=True) for m in MODALITIES}
        return {**fields, **ours}

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        """The keys of vLLM's caches: of features, of prefixes, and of what is stored between processes."""
        settings = self._settings(inputs.hf_processor_mm_kwargs)
        plain = dataclasses.replace(inputs, hf_processor_mm_kwargs=without_ours(inputs.hf_processor_mm_kwargs))
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        return {
            modality: [
                MultiModalHasher.hash_kwargs(algorithm, mm_hash=item_hash, **{KEY: settings.text()})
                for item_hash in hashes
            ]
            for modality, hashes in super()._get_mm_hashes(plain).items()  # type: ignore[misc]
        }


class PlacedProcessor(PrunedProcessor):
    """The same for models with M-RoPE, whose rows carry their places."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        made = super().apply(inputs, timing_ctx)  # type: ignore[misc]
        refuse_neighbours(made["mm_placeholders"])
        return made


def without_ours(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords that are vLLM's and the transformers processor's."""
    return {name: value for name, value in kwargs.items() if name != KEY}


def refuse_neighbours(placeholders: Mapping[str, Sequence[Any]]) -> None:
    """Raise UserError where two items have no text between them: a row could not tell which of them it belongs to."""
    ranges = sorted((place.offset, place.length) for places in placeholders.values() for place in places)
    for (offset, length), (next_offset, _) in itertools.pairwise(ranges):
        if offset + length >= next_offset:
            raise UserError(
                "two images or videos came in with no text between them: put each between <|vision_start|> and "
                "<|vision_end|>, as the model's chat template does"
            )
