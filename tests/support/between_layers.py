"""The reference of pruners between layers: a run at full length whose later layers are masked."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from generation import NEW, logits, run
from torch import Tensor

import vlmfast
from vlmfast import families
from vlmfast.core import Kind
from vlmfast.runtime.cache_state import cache_state


def entering(model: Any, inputs: dict) -> dict[str, Any]:
    """What a plain run hands to the text model at its prefill."""
    seen: dict[str, Any] = {}

    def record(module: Any, args: tuple, kwargs: dict) -> None:
        seen.setdefault("kw", {k: v for k, v in kwargs.items() if k not in ("past_key_values", "cache")})

    handle = families.get(model).text(model).register_forward_pre_hook(record, with_kwargs=True)
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
    handle.remove()
    return seen["kw"]


def masked_reference(model: Any, inputs: dict, cuts: dict[int, Tensor], steps: int) -> Tensor:
    """Greedy logits (steps, V) of one unpadded row: everything runs at full length and without a cache, and the layers
    from each cut on are shown, by a 4-D mask, the columns `cuts[layer]` and what follows the prompt."""
    kw, text, table = entering(model, inputs), families.get(model).text(model), model.get_input_embeddings()
    embeds, positions = kw["inputs_embeds"], kw.get("position_ids")
    prompt = embeds.shape[1]
    positions = torch.arange(prompt)[None] if positions is None else positions
    positions = positions[-3:] if positions.ndim == 3 else positions
    extra = {k: kw[k] for k in ("visual_pos_masks", "deepstack_visual_embeds") if kw.get(k) is not None}

    def show(i: int) -> Any:
        at = max((c for c in cuts if c <= i), default=None)

        def pre(module: Any, args: tuple, kwargs: dict) -> Any:
            n = args[0].shape[1]
            shown = torch.ones(n, dtype=torch.bool)
            if at is not None:
                shown[:prompt] = False
                shown[cuts[at]] = True
            mask = shown[None] & torch.ones(n, n, dtype=torch.bool).tril() | torch.eye(n, dtype=torch.bool)
            kwargs["attention_mask"] = mask[None, None]
            return args, kwargs

        return pre

    handles = [x.register_forward_pre_hook(show(i), with_kwargs=True) for i, x in enumerate(text.layers)]
    out = []
    for _ in range(steps):
        ones = torch.ones(1, embeds.shape[1], dtype=torch.long)
        hidden = text(
            inputs_embeds=embeds, position_ids=positions, attention_mask=ones, use_cache=False, **extra
        ).last_hidden_state
        out.append(model.lm_head(hidden[:, -1])[0])
        embeds = torch.cat([embeds, table(out[-1].argmax()[None, None])], 1)
        positions = torch.cat([positions, positions[..., -1:] + 1], -1)
        if extra:
            extra["visual_pos_masks"] = torch.cat([extra["visual_pos_masks"], torch.zeros(1, 1).bool()], 1)
    for handle in handles:
        handle.remove()
    return torch.stack(out)


def kept_columns(cache: Any, row: int, pads: int = 0) -> dict[int, Tensor]:
    """Logical columns of one row that the layers from each cut on hold, without the row's padding."""
    return {i: held.index[row][held.index[row] >= 0] - pads for i, held in cache_state(cache).cuts.items()}


def equals_masked(family: str, media: tuple, method: Any) -> None:
    model, inputs = tiny.build(family), tiny.inputs(family, media=media, batch=2)
    with vlmfast.accelerate(model, prune=method) as fast:
        out = run(model, inputs)
    cache, prompt = out.past_key_values, inputs["input_ids"].shape[1]
    alone = tiny.rows(family, media=media, batch=2)
    for row, single in enumerate(alone):
        pads = prompt - single["input_ids"].shape[1]
        reference = masked_reference(model, single, kept_columns(cache, row, pads), NEW)
        torch.testing.assert_close(logits(out)[row], reference, rtol=2e-4, atol=2e-4)
    # what stays is what the rule says: text whole, a fraction of the visual columns per row, per layer
    base, columns = families.get(model).base(model), cache_state(cache).columns
    visual = (columns.kinds == Kind.VISUAL).sum(1)
    separators = fast.report.encode["visual_tokens"] - int(visual.sum())
    assert separators == 0
    newline = getattr(base, "image_newline", None)
    fixed = (columns.kinds == Kind.TEXT).sum(1) + (columns.kinds == Kind.SYSTEM).sum(1)
    if newline is not None:
        lines = torch.stack([(e == newline).all(-1).sum() for e in entering(model, inputs)["inputs_embeds"]])
        visual, fixed = visual - lines, fixed + lines
    widths = [prompt] * len(cache.layers)
    for at, fraction in method.cuts(len(cache.layers)):
        stay = (visual * fraction).round().long().clamp(min=1)
        widths[at:] = [int((fixed + stay).max())] * (len(widths) - at)
    assert [layer.keys.shape[2] for layer in cache.layers] == [w + NEW - 1 for w in widths]
    assert {layer.get_seq_length() for layer in cache.layers} == {prompt + NEW - 1}
    assert fast.report.encode["kept_tokens"] == int(stay.sum()) + (0 if newline is None else int(lines.sum()))
    assert fast.report.prefill["cached_tokens"] == sum(w + NEW - 1 for w in widths) / len(widths)
