"""Questions that name a placeholder: such a token stands for pixels, so one that is typed breaks the count."""

from __future__ import annotations

from typing import Any

from vlmfast import families
from vlmfast.core import UserError

_PARTS = ("image_token", "video_token", "audio_token", "fake_image_token", "vision_start_token", "vision_end_token",
          "start_image_token", "end_image_token", "image_start_token", "image_end_token")  # fmt: skip


def refuse_placeholders(question: str, model: Any, processor: Any) -> None:
    """Raise UserError when the question holds a token that stands for media or its borders in this model's prompts."""
    tokenizer = processor.tokenizer
    known = {t for t in (getattr(processor, name, None) for name in _PARTS) if isinstance(t, str) and t}
    ids = sorted(set(families.get(model).visual_ids(model).values()))
    known |= {t for t in tokenizer.convert_ids_to_tokens(ids) if t}
    for token in sorted(known, key=len, reverse=True):
        if token in question:
            raise UserError(
                f"the question holds {token!r}, which stands for media in this model's prompts: leave it out"
            )
