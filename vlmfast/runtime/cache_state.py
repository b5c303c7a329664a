"""The facts that are kept on a cache about the prompt that filled it, in one attribute: `cache_state(cache)`.

They say which columns entered (physical against logical, kinds, padding) and which were cut between layers. They also
hold the hidden states of the visual columns, and the original prompt where its pixels were resized.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmfast.core import Kind
from vlmfast.runtime.pruned_layer import PrunedLayer

ATTRIBUTE = "vlmfast_state"  # the one attribute that a cache gets from us


@dataclass
class Columns:
    """The physical columns that entered a cache, up to the last prefill (decoded columns follow and are text)."""

    kinds: Tensor  # (B, P) int8, `Kind`
    index: Tensor  # (B, P) int64, logical column of each physical one; -1 on padding
    logical: int  # logical length of the sequence so far
    padded: bool  # does any row hold padding?
    host: Tensor | None = None  # `kinds` on the host, where they are known without waiting for the device

    def grow(self, length: int) -> None:
        """Append text columns up to logical `length`, or drop trailing ones beyond it."""
        num_added = length - self.logical
        self.host = self.host if num_added == 0 else None
        if num_added > 0:
            batch_size = self.kinds.shape[0]
            new_columns = torch.arange(self.logical, length, device=self.index.device).expand(batch_size, -1)
            self.index = torch.cat([self.index, new_columns], 1)
            self.kinds = torch.cat([self.kinds, self.kinds.new_full((batch_size, num_added), Kind.TEXT)], 1)
        elif num_added < 0:
            self.index, self.kinds = self.index[:, :num_added], self.kinds[:, :num_added]
        self.logical = length

    def announce(self, cache: Any, begun: bool = True) -> None:
        """Announce a forward to the layers of a cache whose masks a plain model would get wrong."""
        for layer in cache.layers if self.padded else ():
            if isinstance(layer, PrunedLayer):
                layer.announce(begun)

    def mask(self, attention_mask: Tensor | None, length: int) -> Tensor | None:
        """The (B, length) mask whose last P + new columns are physical; None when nothing is padded.

        transformers reads a mask from its right end (and at kv_offset), so the physical part is right-aligned.
        """
        if not self.padded:
            return None if attention_mask is None or attention_mask.ndim != 2 else attention_mask
        batch_size, num_physical = self.kinds.shape
        num_new = length - self.logical
        new_mask = (
            self.kinds.new_ones(batch_size, num_new, dtype=torch.long)
            if attention_mask is None
            else attention_mask[:, attention_mask.shape[1] - num_new :].long()
        )
        left_columns = new_mask.new_ones(batch_size, length - num_physical - num_new)
        return torch.cat([left_columns, (self.kinds != Kind.PAD).long(), new_mask], 1)


@dataclass
class CutColumns:
    """The columns of one cache that the layers from a cut on hold, up to the last prefill."""

    valid: Tensor  # (B, W) bool, not padding
    index: Tensor  # (B, W) int64 logical columns, -1 on padding
    uncut: int  # columns that the layers before any cut held at that time
    padded: bool

    def grown(self, width: int, tail: Tensor | None) -> Tensor:
        """(B, width) bool: what followed is valid unless the 2-D mask `tail` says otherwise; cut if cropped."""
        num_new = width - self.valid.shape[1]
        if num_new <= 0:
            return self.valid[:, :width]
        new_mask = self.valid.new_ones(self.valid.shape[0], num_new)
        if tail is not None and tail.shape[1] >= num_new:
            new_mask = tail[:, tail.shape[1] - num_new :].bool()
        return torch.cat([self.valid, new_mask], 1)


class VisualMemory:
    """The target's hidden states of the visual columns, normalised once: (n_v, D) in the model's dtype."""

    def __init__(self, states: Tensor, top: int) -> None:
        self.states = F.normalize(states.float(), dim=-1).to(states.dtype)
        self.top = min(top, states.shape[0])

    def score(self, hidden: Tensor) -> Tensor:
        """hidden (n, D) of text positions -> (n,) float32: mean of the `top` highest cosines."""
        similarity = F.normalize(hidden.float(), dim=-1).to(self.states.dtype) @ self.states.T
        return similarity.float().topk(self.top, -1).values.mean(-1)


@dataclass
class ShortenedPrompt:
    """A prompt without the placeholders that lost their token, where the pixels of a call were resized."""

    ids: Tensor  # (B, P) as it came
    short: Tensor  # (B, S)
    mask: Tensor  # (B, S) int64
    types: Tensor | None  # (B, S) token types
    counts: tuple[int, int]  # visual tokens as it came, and now


@dataclass(frozen=True)
class CacheState:
    """Everything that vlmfast remembers of one cache. Empty for a cache that no hook of ours has seen.

    Deep copies of the cache copy it, shallow ones share it until `put_cache_state` gives one of them another.
    """

    columns: Columns | None = None  # of the layers before any cut; None = the prefill was not observed
    cuts: dict[int, CutColumns] = field(default_factory=dict)  # by layer: what the layers from it on hold
    # of every row, for acceptance rules that score the relevance of a text position to the media; empty = not asked for
    visual: tuple[VisualMemory | None, ...] = ()
    shortened: ShortenedPrompt | None = None  # the first turn's; later turns are shortened in the same way


def cache_state(cache: Any) -> CacheState:
    """What is remembered of a cache; an empty state for None and for a cache without any."""
    state: CacheState | None = getattr(cache, ATTRIBUTE, None)
    return CacheState() if state is None else state


def put_cache_state(cache: Any, **fields: Any) -> None:
    """Remember these fields of `CacheState` on a cache, the others stay as they are."""
    setattr(cache, ATTRIBUTE, replace(cache_state(cache), **fields))


def repeat_rows(cache: Any, times: int) -> None:
    """Make every row of a prefilled cache `times` rows, one after the other."""

    def repeated(rows: Tensor) -> Tensor:
        return rows.repeat_interleave(times, 0)

    cache.batch_repeat_interleave(times)
    columns, cuts = cache_state(cache).columns, cache_state(cache).cuts
    if columns is not None:
        host = None if columns.host is None else repeated(columns.host)
        columns = replace(columns, kinds=repeated(columns.kinds), index=repeated(columns.index), host=host)
    cuts = {at: replace(cut, valid=repeated(cut.valid), index=repeated(cut.index)) for at, cut in cuts.items()}
    put_cache_state(cache, columns=columns, cuts=cuts)


def rows_width(rows: list[Tensor]) -> int:
    """Physical columns that enter: the longest row."""
    return max(len(row_indices) for row_indices in rows)


def entry_mask(state: Columns) -> Tensor | None:
    """(B, logical) mask of a prefill, physical part right-aligned; None when no row is padded."""
    if not state.padded:
        return None
    batch_size, num_physical = state.kinds.shape
    dropped_mask = torch.ones(batch_size, state.logical - num_physical, dtype=torch.long, device=state.kinds.device)
    return torch.cat([dropped_mask, (state.kinds != Kind.PAD).long()], 1)


def column_kinds(visual: Tensor, valid: Tensor, continued: bool) -> Tensor:
    """(B, q) int8 kinds: padding, text before the media (SYSTEM), visual, text after it."""
    after_media = visual.flip(1).long().cumsum(1).flip(1) == 0  # no visual column at or after this one
    kind_codes = torch.where(after_media, Kind.TEXT, Kind.SYSTEM).to(torch.int8)
    if not continued:  # a prompt without media is system + question in one: call it text
        kind_codes = kind_codes.masked_fill(~visual.any(1, keepdim=True), Kind.TEXT)
    return kind_codes.masked_fill(visual, Kind.VISUAL).masked_fill(~valid, Kind.PAD)


def contiguous_positions(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Layer pre-hook: positions handed to attention are contiguous (rotation uses `position_embeddings`)."""
    positions = kwargs.get("position_ids")
    if positions is None or positions.shape[-1] < 2:
        return None
    first_position = positions[..., :1]
    kwargs["position_ids"] = first_position + torch.arange(positions.shape[-1], device=positions.device)
    return args, kwargs


def logical_columns(cache: Any, num_columns: int, layer: int | None) -> Tensor:
    """(B or 1, num_columns) int64, logical columns of the last physical ones at a layer; -1 on padding.

    layer: from 0; -1 = the last, None = as they entered the first.
    """
    layer_cuts = {} if layer is None else cache_state(cache).cuts  # columns dropped between layers
    wanted = -1 if layer is None else layer
    last_cut = max((cut_layer for cut_layer in layer_cuts if wanted < 0 or cut_layer <= wanted), default=None)
    if last_cut is not None:
        return layer_cuts[last_cut].index[:, -num_columns:]
    columns = cache_state(cache).columns  # columns dropped before the language model
    if columns is not None and columns.index.shape[1] >= num_columns:
        return columns.index[:, -num_columns:]
    cache_length = cache.get_seq_length()
    return torch.arange(cache_length - num_columns, cache_length)[None]
