"""From a pruner's choice to shorter inputs: items found in the rows, kept columns gathered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vlmfast.core import TokenPruner, Unsupported, UserError, VisualTokens
from vlmfast.families import Family, Item
from vlmfast.runtime.request_state import RequestState
from vlmfast.runtime.tower_attention import TowerAttention, attention_of, rotation_means


@runtime_checkable
class MergingPruner(TokenPruner, Protocol):
    """A pruner that may add what it drops to what it keeps."""

    @property
    def merges(self) -> bool: ...

    def merged(self, tokens: VisualTokens, kept: Tensor) -> Tensor:
        """Features (K, D) of the kept indices (K,), after the dropped tokens were merged into them."""
        ...


@dataclass
class Selection:
    """One prefill (B, q) whose visual columns the pruner of a call chooses from, kind by kind of media."""

    model: nn.Module
    family: Family
    request: RequestState  # says what was encoded, and receives what was kept of it
    attention: TowerAttention | None  # where tower attention comes from
    kw: dict  # arguments of the text model; a pruner that merges changes the embeddings
    visual: Tensor  # (B, q) bool, of any kind
    valid: Tensor  # (B, q) bool, not padding
    keep: Tensor = field(init=False)  # (B, q) bool, what is left so far

    def __post_init__(self) -> None:
        self.keep = self.valid.clone()

    def select(self, kind: str, where: Tensor) -> int:
        """Clear from `keep` the columns of one kind, at `where` (B, q), that are dropped; returns how many stay."""
        counts = where.sum(1).tolist()
        if not any(counts):
            return 0
        kept = 0
        for row, number, item, columns in self._items(kind, where, counts):
            chosen = self._choose(kind, number, item, row, columns)
            gone = torch.ones(item.n, dtype=torch.bool, device=self.keep.device)
            gone[chosen] = False
            self.keep[row, columns[gone]] = False
            self.request.kept.setdefault(kind, []).append(chosen)
            kept += chosen.shape[0]
        return kept

    def _items(self, kind: str, where: Tensor, counts: list[int]) -> Iterator[tuple[int, int, Item, Tensor]]:
        """(row, number of the item, the item, its columns in the row) of everything in the batch."""
        items = self.request.media.get(kind)
        if not items:
            if kind in self.request.given:
                raise Unsupported(
                    f"{kind} features came in already encoded, and nothing in the call says their layout: pass their "
                    "grids with mm_encoder_outputs, or the pixels to generate()"
                )
            raise UserError(
                f"{sum(counts)} {kind} placeholder tokens came in without pixels: pass what the processor made of the "
                f"{kind}, or a prompt without it"
            )
        repeats, rest = divmod(sum(counts), sum(i.n for i in items))
        if rest or repeats == 0:
            raise UserError(
                f"{sum(counts)} {kind} placeholder tokens came in for {sum(i.n for i in items)} features: "
                "the prompt and the media do not match"
            )
        first, after = 0, 0  # the items of a row: numbers from `first` to before `after`
        for row, left in enumerate(counts):
            if row % repeats == 0:  # num_return_sequences and beams repeat each row
                first = after
                while left > 0:
                    left -= items[after].n
                    after += 1
                if left < 0:
                    raise UserError(f"row {row} has {counts[row]} {kind} tokens: not a whole number of items")
            columns = where[row].nonzero()[:, 0]
            at = 0
            for number in range(first, after):
                yield row, number, items[number], columns[at : at + items[number].n]
                at += items[number].n

    def _choose(self, kind: str, number: int, item: Item, row: int, columns: Tensor) -> Tensor:
        """Kept indices of one item, from the tower's own selection or from the pruner at the tower's output."""
        request, kw, pruner = self.request, self.kw, self.request.pruner
        assert pruner is not None
        if request.tower_kept is not None:
            return request.tower_kept[kind][number].to(columns.device)
        embeds, positions = kw["inputs_embeds"], kw.get("position_ids")
        question = None
        if "question" in pruner.needs:
            last = int(self.visual[row].nonzero()[-1])
            question = embeds[row, last + 1 :][self.valid[row, last + 1 :]]
            if question.shape[0] == 0:
                raise UserError(
                    f"{type(pruner).__name__} needs a question after the media and there is none: "
                    "put the text after the image, or use a pruner that needs none (vidcom2, maxmin)"
                )
        if positions is not None:
            axes = positions if positions.ndim == 3 else positions[None]
            positions = axes[-self.family.rope_axes :, row if axes.shape[1] > 1 else 0, columns]
        rope = None
        if "rope" in pruner.needs:
            rope = rotation_means(self.family.text(self.model), embeds, positions)
        tokens = VisualTokens(
            features=embeds[row, columns],
            frame=item.frame.to(columns.device),
            grid=item.grid,
            video=item.video,
            protected=item.protected,
            positions=positions,
            question=question,
            attention=attention_of(self.attention, request, kind, number),
            rope=rope,
        )
        chosen = pruner.select(tokens)
        if isinstance(pruner, MergingPruner) and pruner.merges:
            kw["inputs_embeds"] = embeds = embeds.clone()
            embeds[row, columns[chosen]] = pruner.merged(tokens, chosen)
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
