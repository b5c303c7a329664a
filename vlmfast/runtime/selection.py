"""Applies a pruner to a prefill: finds the media items in the rows, and gathers the kept columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vlmfast.core import TokenPruner, Unsupported, UserError, VisualTokens
from vlmfast.families import Family, Item
from vlmfast.runtime.request_state import RequestState, tower_layers
from vlmfast.runtime.tower_attention import TowerAttention, rotation_means
from vlmfast.runtime.transfers import to_device, true_places


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
    visual: Tensor  # (B, q) bool on the host, of any kind
    valid: Tensor  # (B, q) bool on the host, not padding
    keep: Tensor = field(init=False)  # (B, q) bool on the device, what is left so far
    left: list[int] = field(init=False)  # per row, how many that are

    def __post_init__(self) -> None:
        self.left = self.valid.sum(1).tolist()
        self.keep = to_device(self.valid.clone(), self.kw["inputs_embeds"].device)

    def rows(self) -> list[Tensor]:
        """Per row the columns that are left, ascending int64."""
        return [true_places(row_kept, count) for row_kept, count in zip(self.keep, self.left, strict=True)]

    def select(self, kind: str, where: Tensor) -> int:
        """Clear from `keep` the columns of one kind, at `where` (B, q) on the host, that are dropped; returns how many
        stay."""
        counts = where.sum(1).tolist()
        if not any(counts):
            return 0
        num_kept = 0
        for row_index, item_number, item, columns in self._items(kind, where, counts):
            chosen = self._choose(kind, item_number, item, row_index, columns)
            self.keep[row_index].index_fill_(0, columns, False).index_fill_(0, columns[chosen], True)
            self.left[row_index] -= item.n - chosen.shape[0]
            self.request.kept.setdefault(kind, []).append(chosen)
            num_kept += chosen.shape[0]
        return num_kept

    def _items(self, kind: str, placeholder_mask: Tensor, counts: list[int]) -> Iterator[tuple[int, int, Item, Tensor]]:
        """(row, number of the item, the item, its columns in the row) of everything in the batch."""
        media_items = self.request.media.get(kind)
        if not media_items:
            if kind in self.request.given:
                raise Unsupported(
                    f"{kind} features came in already encoded, and nothing in the call says their layout: pass their "
                    "grids with mm_encoder_outputs, or the pixels to generate()"
                )
            raise UserError(
                f"{sum(counts)} {kind} placeholder tokens came in without pixels: pass what the processor made of the "
                f"{kind}, or a prompt without it"
            )
        repeats, remainder = divmod(sum(counts), sum(candidate.n for candidate in media_items))
        if remainder or repeats == 0:
            raise UserError(
                f"{sum(counts)} {kind} placeholder tokens came in for {sum(item.n for item in media_items)} features: "
                "the prompt and the media do not match"
            )
        first_item, next_item = 0, 0  # the items of a row: from `first_item` to before `next_item`
        for row_index, tokens_left in enumerate(counts):
            if row_index % repeats == 0:  # num_return_sequences and beams repeat each row
                first_item = next_item
                while tokens_left > 0:
                    tokens_left -= media_items[next_item].n
                    next_item += 1
                if tokens_left < 0:
                    raise UserError(
                        f"row {row_index} has {counts[row_index]} {kind} tokens: not a whole number of items"
                    )
            columns = to_device(placeholder_mask[row_index].nonzero()[:, 0], self.keep.device)
            first_token = 0
            for item_number in range(first_item, next_item):
                item = media_items[item_number]
                yield row_index, item_number, item, columns[first_token : first_token + item.n]
                first_token += item.n

    def _choose(self, media_kind: str, item_number: int, item: Item, row_index: int, columns: Tensor) -> Tensor:
        """Kept indices of one item, from the tower's own selection or from the pruner at the tower's output."""
        request, kwargs, pruner = self.request, self.kw, self.request.pruner
        assert pruner is not None
        if request.tower_kept is not None:
            return request.tower_kept[media_kind][item_number].to(columns.device)
        embeddings, positions = kwargs["inputs_embeds"], kwargs.get("position_ids")
        question = None
        if "question" in pruner.needs:
            last_visual = int(self.visual[row_index].nonzero()[-1])
            after_media = self.valid[row_index].nonzero()[:, 0]
            after_media = to_device(after_media[after_media > last_visual], embeddings.device)
            question = embeddings[row_index, after_media]
            if question.shape[0] == 0:
                raise UserError(
                    f"{type(pruner).__name__} needs a question after the media and there is none: "
                    "put the text after the image, or use a pruner that needs none (vidcom2, maxmin)"
                )
        if positions is not None:
            position_axes = positions if positions.ndim == 3 else positions[None]
            positions = position_axes[-self.family.rope_axes :, row_index if position_axes.shape[1] > 1 else 0, columns]
        rotation = None
        if "rope" in pruner.needs:
            rotation = rotation_means(self.family.text(self.model), embeddings, positions)
        visual_tokens = VisualTokens(
            features=embeddings[row_index, columns],
            frame=to_device(item.frame, columns.device),
            grid=item.grid,
            video=item.video,
            protected=item.protected,
            positions=positions,
            question=question,
            attention=self._tower_attention(media_kind, item_number),
            rope=rotation,
        )
        kept_indices = pruner.select(visual_tokens)
        if isinstance(pruner, MergingPruner) and pruner.merges:
            kwargs["inputs_embeds"] = embeddings = embeddings.clone()
            embeddings[row_index, columns[kept_indices]] = pruner.merged(visual_tokens, kept_indices)
        return kept_indices

    def _tower_attention(self, media_kind: str, item_number: int) -> Tensor | None:
        """What the pruner asks for of one item: (n,), (A, n) for several layers, None for none."""
        pruner: Any = self.request.pruner
        layers = tower_layers(pruner)
        if layers and self.attention is None:
            raise Unsupported(
                f"{pruner.name} needs tower attention, which is recorded for the plan's own pruner only: "
                "give the draft a pruner of features (uniform, vidcom2)"
            )
        return None if self.attention is None or not layers else self.attention.of_item(media_kind, item_number, layers)


def left_padded(rows: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept columns of every row -> source (B, S) int64 and filled (B, S) bool, rows left-padded to the longest."""
    source_columns = torch.zeros(
        len(rows), max(len(row_columns) for row_columns in rows), dtype=torch.long, device=device
    )
    filled_mask = torch.zeros_like(source_columns, dtype=torch.bool)
    for row_index, row_columns in enumerate(rows):
        source_columns[row_index, source_columns.shape[1] - len(row_columns) :] = row_columns
        filled_mask[row_index, source_columns.shape[1] - len(row_columns) :] = True
    return source_columns, filled_mask


def drop(kw: dict, source: Tensor, filled: Tensor, rows: list[Tensor], past: int) -> None:
    """Shrink everything that has a column axis from q to the kept columns."""
    embeddings = kw["inputs_embeds"]
    num_columns = embeddings.shape[1]
    batch_size, num_kept = source.shape
    kw["inputs_embeds"] = embeddings.gather(1, source[..., None].expand(-1, -1, embeddings.shape[-1]))
    positions = kw.get("position_ids")
    if positions is None:
        positions = torch.arange(past, past + num_columns, device=embeddings.device)[None]
    positions = positions.expand(*positions.shape[:-2], batch_size, num_columns)
    kept_positions = positions.gather(-1, source.expand(*positions.shape[:-2], batch_size, num_kept))
    if kept_positions.ndim == 3 and kept_positions.shape[0] == 4:
        # the first of four rows only drives FlashAttention's packing detector: it must be contiguous
        kept_positions = kept_positions.clone()
        kept_positions[0] = kept_positions[0, :, :1] + torch.arange(num_kept, device=kept_positions.device)
    kw["position_ids"] = kept_positions
    if kw.get("visual_pos_masks") is not None:
        visual_masks = kw["visual_pos_masks"]
        kw["visual_pos_masks"] = visual_masks.gather(1, source) & filled
        stays_mask = torch.zeros_like(visual_masks)
        for row_index, row_columns in enumerate(rows):
            stays_mask[row_index, row_columns] = True
        kw["deepstack_visual_embeds"] = [
            features[stays_mask[visual_masks]] for features in kw["deepstack_visual_embeds"]
        ]


def repack(output: Any, features: Tensor, deep: list[Tensor] | None, counts: list[int], n: int) -> Any:
    """What `get_*_features` returned, holding other rows: the media of every batch row n times.

    features (K, D) in (row, column) order, of which batch row i has counts[i]; deep: DeepStack's, likewise. The
    container stays what the model reads: one tensor, or a list of tensors of as many axes as before.
    """
    if n > 1:
        rows_by_item = torch.arange(len(features), device=features.device).split(counts)
        repeated = torch.cat([row_indices for row_indices in rows_by_item for _ in range(n)])
        features, deep = features[repeated], deep and [layer_features[repeated] for layer_features in deep]
    old_output = output.pooler_output
    if isinstance(old_output, Tensor):
        new_output: Any = features[None]
    else:
        new_output = [features[None] if old_output[0].ndim == 3 else features]
    return type(output)(
        pooler_output=new_output,
        **({"deepstack_features": [[layer_features] for layer_features in deep]} if deep else {}),
    )
