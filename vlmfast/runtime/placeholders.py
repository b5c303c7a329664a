"""Refuses questions that contain a placeholder token of media, which would break the count of visual tokens."""

from __future__ import annotations

from typing import Any

from vlmfast import families
from vlmfast.core import UserError

_PARTS = ("image_token", "video_token", "audio_token", "fake_image_token", "vision_start_token", "vision_end_token",
          "start_image_token", "end_image_token", "image_start_token", "image_end_token")  # fmt: skip


def refuse_placeholders(question: str, model: Any, processor: Any) -> None:
    """Raise UserError when the question holds a token that stands for media or its borders in this model's prompts."""
    tokenizer = processor.tokenizer
    placeholder_tokens = {
        candidate
        for candidate in (getattr(processor, attribute_name, None) for attribute_name in _PARTS)
        if isinstance(candidate, str) and candidate
    }
    media_ids = sorted(set(families.get(model).visual_ids(model).values()))
    placeholder_tokens |= {candidate for candidate in tokenizer.convert_ids_to_tokens(media_ids) if candidate}
    for token in sorted(placeholder_tokens, key=len, reverse=True):
        if token in question:
            raise UserError(
                f"the question holds {token!r}, which stands for media in this model's prompts: leave it out"
            )
