"""Greedy generation on tiny models, what installing could leave on them, and the reference of pruned prompts."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import StoppingCriteria

import vlmfast
from vlmfast import families
from vlmfast.runtime.cache_state import cache_state

NEW = 5


MEDIA = {
    family: [("image",), ("image", "image")]
    + ([("video",), ("image", "video")] if family in tiny.VIDEO_FAMILIES else [])
    for family in tiny.FAMILIES
}


CASES = [pytest.param(f, m, id=f"{f}-{'+'.join(m)}") for f in tiny.FAMILIES for m in MEDIA[f]]


def run(model: Any, inputs: dict, **kwargs: Any) -> Any:
    """Greedy generation with logits and the cache."""
    return model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True, **kwargs
    )


def logits(out: Any) -> Tensor:
    return torch.stack(out.logits, 1)


def state(model: Any) -> dict[str, Any]:
    """Everything that installing could leave behind: hooks and instance attributes of every module."""
    left = {}
    for name, module in model.named_modules():
        hooks = [len(module._forward_pre_hooks), len(module._forward_hooks)]
        left[name] = (hooks, {k for k in vars(module) if not k.startswith("_forward")})
    return left | {"attention": attention_names(model)}


def attention_names(model: Any) -> list[str]:
    c = model.config
    return [c._attn_implementation, c.get_text_config()._attn_implementation, c.vision_config._attn_implementation]


def short_reference(model: Any, inputs: dict, kept: list[Tensor], steps: int) -> Tensor:
    """Greedy logits (B, steps, V) of each row alone, fed the kept columns only, without cache, hooks or generate.

    The columns that reach the text model are recorded from a plain run; positions are the plain run's own.
    """
    family, seen = families.get(model), {}

    def record(module: Any, args: tuple, kwargs: dict) -> None:
        seen.setdefault("kw", {k: v for k, v in kwargs.items() if k not in ("past_key_values", "cache")})

    handle = family.text(model).register_forward_pre_hook(record, with_kwargs=True)
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
    handle.remove()
    kw = seen["kw"]
    table, text = model.get_input_embeddings(), family.text(model)
    rows = []
    for row, columns in enumerate(kept):
        embeds = kw["inputs_embeds"][row : row + 1, columns]
        positions = kw.get("position_ids")
        if positions is None:
            positions = torch.arange(kw["inputs_embeds"].shape[1])[None]
        if positions.ndim == 3:
            positions = positions[-3:, row : row + 1][..., columns]
            length = 3
        else:
            positions, length = positions[min(row, len(positions) - 1)][None, columns], 1
        extra = {}
        if kw.get("visual_pos_masks") is not None:
            masks = kw["visual_pos_masks"]
            stays = torch.zeros_like(masks)
            stays[row, columns] = True
            extra["visual_pos_masks"] = masks[row : row + 1, columns]
            extra["deepstack_visual_embeds"] = [e[stays[masks]] for e in kw["deepstack_visual_embeds"]]
        out = []
        for _ in range(steps):
            ones = torch.ones(1, embeds.shape[1], dtype=torch.long)  # else gaps in positions read as packing
            hidden = text(
                inputs_embeds=embeds, position_ids=positions, attention_mask=ones, use_cache=False, **extra
            ).last_hidden_state
            out.append(model.lm_head(hidden[:, -1]))
            new = table(out[-1].argmax(-1, keepdim=True))
            embeds = torch.cat([embeds, new], 1)
            positions = torch.cat([positions, positions[..., -1:] + 1], -1)
            if extra:
                extra["visual_pos_masks"] = torch.cat([extra["visual_pos_masks"], torch.zeros(1, 1).bool()], 1)
        assert length in (1, 3)
        rows.append(torch.stack(out, 1)[0])
    return torch.stack(rows)


def capture_columns(fast: vlmfast.Accelerated, call: Any) -> tuple[Any, Any]:
    """Run `call` and return (its output, the column map left on the cache)."""
    out = call()
    return out, cache_state(out.past_key_values).columns


class Heard:
    """A streamer that writes down what it was given."""

    def __init__(self) -> None:
        self.puts: list[Tensor] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.puts.append(value.flatten().clone())

    def end(self) -> None:
        self.ended += 1


class StopAfter(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)
