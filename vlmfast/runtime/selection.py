"""From a pruner's choice to shorter inputs: items found in the rows, kept columns gathered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmfast.core import Unsupported, UserError, VisualTokens
from vlmfast.families import Item
from vlmfast.runtime.tower_attention import attention_of, rotation_means

if TYPE_CHECKING:
    from vlmfast.runtime.prune_input import InputPruning


def select_kind(
    hooks: InputPruning, kw: dict, kind: str, where: Tensor, visual: Tensor, valid: Tensor, keep: Tensor
) -> int:
    """Clear from keep (B, q) the columns of one kind of media that the pruner drops; returns how many stay."""
    counts = where.sum(1).tolist()
    if not any(counts):
        return 0
    items = hooks.media.get(kind)
    if not items:
        if kind in hooks.given:
            raise Unsupported(
                f"{kind} features came in already encoded, and nothing in the call says their layout: pass their grids "
                "with mm_encoder_outputs, or the pixels to generate()"
            )
        raise UserError(
            f"{sum(counts)} {kind} placeholder tokens came in without pixels: pass what the processor made of the "
            f"{kind}, or a prompt without it"
        )
    per_call, rest = divmod(sum(counts), sum(i.n for i in items))
    if rest or per_call == 0:
        raise UserError(
            f"{sum(counts)} {kind} placeholder tokens came in for {sum(i.n for i in items)} features: "
            "the prompt and the media do not match"
        )
    kept = 0
    todo: list[tuple[int, Item]] = []
    for row in range(len(counts)):  # num_return_sequences and beams repeat each row `per_call` times
        if row % per_call == 0:
            left = counts[row]
            mine: list[tuple[int, Item]] = []
            while left > 0:
                number = len(todo) + len(mine)
                mine.append((number, items[number]))
                left -= items[number].n
            if left < 0:
                raise UserError(f"row {row} has {counts[row]} {kind} tokens: not a whole number of items")
            todo += mine
        columns = where[row].nonzero()[:, 0]
        at = 0
        for number, item in mine:
            mine_columns = columns[at : at + item.n]
            at += item.n
            chosen = choose(hooks, kw, kind, number, item, row, mine_columns, visual, valid)
            gone = torch.ones(item.n, dtype=torch.bool, device=keep.device)
            gone[chosen] = False
            keep[row, mine_columns[gone]] = False
            hooks.kept.setdefault(kind, []).append(chosen)
            kept += chosen.shape[0]
    return kept


def choose(
    hooks: InputPruning,
    kw: dict,
    kind: str,
    number: int,
    item: Item,
    row: int,
    columns: Tensor,
    visual: Tensor,
    valid: Tensor,
) -> Tensor:
    """Kept indices of one item, from the tower's own selection or from the pruner at the tower's output."""
    assert hooks.pruner is not None
    if hooks.tower_kept is not None:
        return hooks.tower_kept[kind][number].to(columns.device)
    embeds, positions = kw["inputs_embeds"], kw.get("position_ids")
    question = None
    if "question" in hooks.pruner.needs:
        last = int(visual[row].nonzero()[-1])
        question = embeds[row, last + 1 :][valid[row, last + 1 :]]
        if question.shape[0] == 0:
            raise UserError(
                f"{type(hooks.pruner).__name__} needs a question after the media and there is none: "
                "put the text after the image, or use a pruner that needs none (vidcom2, maxmin)"
            )
    if positions is not None:
        axes = positions if positions.ndim == 3 else positions[None]
        positions = axes[-hooks.family.rope_axes :, row if axes.shape[1] > 1 else 0, columns]
    rope = None
    if "rope" in hooks.pruner.needs:
        rope = rotation_means(hooks.family.text(hooks.model), embeds, positions)
    tokens = VisualTokens(
        features=embeds[row, columns],
        frame=item.frame.to(columns.device),
        grid=item.grid,
        video=item.video,
        protected=item.protected,
        positions=positions,
        question=question,
        attention=attention_of(hooks.attention, hooks.pruner, kind, number),
        rope=rope,
    )
    chosen = hooks.pruner.select(tokens)
    if getattr(hooks.pruner, "merges", False):
        kw["inputs_embeds"] = embeds = embeds.clone()
        embeds[row, columns[chosen]] = hooks.pruner.merged(tokens, chosen)  # type: ignore[attr-defined]
    return chosen


def left_padded(rows: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept columns of every row -> source (B, S) int64 and filled (B, S) bool, rows left-padded to the longest."""
    source = torch.zeros(len(rows), max(len(r) for r in rows), dtype=torch.long, device=device)
    filled = torch.zeros_like(source, dtype=torch.bool)
    for i, r in enumerate(rows):
        source[i, source.shape[1] - len(r) :] = r
        filled[i, source.shape[1] - len(r) :] = True
    return source, filled


def drop(kw: dict, source: Tensor, filled: Tensor, rows: list[Tensor], past: int) -> None:
    """Shrink everything that has a column axis from q to the kept columns."""
    embeds = kw["inputs_embeds"]
    q = embeds.shape[1]
    b, s = source.shape
    kw["inputs_embeds"] = embeds.gather(1, source[..., None].expand(-1, -1, embeds.shape[-1]))
    positions = kw.get("position_ids")
    if positions is None:
        positions = torch.arange(past, past + q, device=embeds.device)[None]
    positions = positions.expand(*positions.shape[:-2], b, q)
    picked = positions.gather(-1, source.expand(*positions.shape[:-2], b, s))
    if picked.ndim == 3 and picked.shape[0] == 4:
        # the first of four rows only drives FlashAttention's packing detector: it must be contiguous
        picked = picked.clone()
        picked[0] = picked[0, :, :1] + torch.arange(s, device=picked.device)
    kw["position_ids"] = picked
    if kw.get("visual_pos_masks") is not None:
        masks = kw["visual_pos_masks"]
        kw["visual_pos_masks"] = masks.gather(1, source) & filled
        stays = torch.zeros_like(masks)
        for i, row in enumerate(rows):
            stays[i, row] = True
        kw["deepstack_visual_embeds"] = [e[stays[masks]] for e in kw["deepstack_visual_embeds"]]


def repack(output: Any, features: Tensor, deep: list[Tensor] | None, counts: list[int], n: int) -> Any:
    """What `get_*_features` returned, holding other rows: the media of every batch row n times.

    features (K, D) in (row, column) order, of which batch row i has counts[i]; deep: DeepStack's, likewise. The
    container stays what the model reads: one tensor, or a list of tensors of as many axes as before.
    """
    if n > 1:
        order = torch.arange(len(features), device=features.device).split(counts)
        repeated = torch.cat([rows for rows in order for _ in range(n)])
        features, deep = features[repeated], deep and [d[repeated] for d in deep]
    pooled = output.pooler_output
    if isinstance(pooled, Tensor):
        held: Any = features[None]
    else:
        held = [features[None] if pooled[0].ndim == 3 else features]
    return type(output)(pooler_output=held, **({"deepstack_features": [[d] for d in deep]} if deep else {}))
