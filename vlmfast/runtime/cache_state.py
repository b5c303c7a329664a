"""What a cache remembers of the prompt that filled it, in one typed attribute: `cache_state(cache)`.

Which columns entered (physical against logical, kinds, padding), which of them were cut between layers, the hidden
states of what was seen, and the prompt as it came where its pixels were resized.
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

    def grow(self, length: int) -> None:
        """Append text columns up to logical `length`, or drop trailing ones beyond it."""
        n = length - self.logical
        if n > 0:
            b = self.kinds.shape[0]
            new = torch.arange(self.logical, length, device=self.index.device).expand(b, -1)
            self.index = torch.cat([self.index, new], 1)
            self.kinds = torch.cat([self.kinds, self.kinds.new_full((b, n), Kind.TEXT)], 1)
        elif n < 0:
            self.index, self.kinds = self.index[:, :n], self.kinds[:, :n]
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
        b, p = self.kinds.shape
        tail = length - self.logical
        new = (
            self.kinds.new_ones(b, tail, dtype=torch.long)
            if attention_mask is None
            else attention_mask[:, attention_mask.shape[1] - tail :].long()
        )
        left = new.new_ones(b, length - p - tail)
        return torch.cat([left, (self.kinds != Kind.PAD).long(), new], 1)


@dataclass
class CutColumns:
    """The columns of one cache that the layers from a cut on hold, up to the last prefill."""

    valid: Tensor  # (B, W) bool, not padding
    index: Tensor  # (B, W) int64 logical columns, -1 on padding
    uncut: int  # columns that the layers before any cut held at that time
    padded: bool

    def grown(self, width: int, tail: Tensor | None) -> Tensor:
        """(B, width) bool: what followed is valid unless the 2-D mask `tail` says otherwise; cut if cropped."""
        new = width - self.valid.shape[1]
        if new <= 0:
            return self.valid[:, :width]
        ones = self.valid.new_ones(self.valid.shape[0], new)
        if tail is not None and tail.shape[1] >= new:
            ones = tail[:, tail.shape[1] - new :].bool()
        return torch.cat([self.valid, ones], 1)


class VisualMemory:
    """The target's hidden states of the visual columns, normalised once: (n_v, D) in the model's dtype."""

    def __init__(self, states: Tensor, top: int) -> None:
        self.states = F.normalize(states.float(), dim=-1).to(states.dtype)
        self.top = min(top, states.shape[0])

    def score(self, hidden: Tensor) -> Tensor:
        """hidden (n, D) of text positions -> (n,) float32: mean of the `top` highest cosines."""
        cosine = F.normalize(hidden.float(), dim=-1).to(self.states.dtype) @ self.states.T
        return cosine.float().topk(self.top, -1).values.mean(-1)


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

    columns: Columns | None = None  # of the layers before any cut; None = nobody saw the prefill
    cuts: dict[int, CutColumns] = field(default_factory=dict)  # by layer: what the layers from it on hold
    visual: VisualMemory | None = None  # for acceptance rules that ask what a text position is about
    shortened: ShortenedPrompt | None = None  # the first turn's, whose later turns are shortened alike


def cache_state(cache: Any) -> CacheState:
    """What is remembered of a cache; an empty state for None and for a cache without any."""
    state: CacheState | None = getattr(cache, ATTRIBUTE, None)
    return CacheState() if state is None else state


def put_cache_state(cache: Any, **fields: Any) -> None:
    """Remember these fields of `CacheState` on a cache, the others stay as they are."""
    setattr(cache, ATTRIBUTE, replace(cache_state(cache), **fields))


def rows_width(rows: list[Tensor]) -> int:
    """Physical columns that enter: the longest row."""
    return max(len(r) for r in rows)


def entry_mask(state: Columns) -> Tensor | None:
    """(B, logical) mask of a prefill, physical part right-aligned; None when no row is padded."""
    if not state.padded:
        return None
    b, p = state.kinds.shape
    ones = torch.ones(b, state.logical - p, dtype=torch.long, device=state.kinds.device)
    return torch.cat([ones, (state.kinds != Kind.PAD).long()], 1)


def column_kinds(visual: Tensor, valid: Tensor, continued: bool) -> Tensor:
    """(B, q) int8 kinds: padding, text before the media (SYSTEM), visual, text after it."""
    after = visual.flip(1).long().cumsum(1).flip(1) == 0  # no visual column at or after this one
    kinds = torch.where(after, Kind.TEXT, Kind.SYSTEM).to(torch.int8)
    if not continued:  # a prompt without media is system + question in one: call it text
        kinds = kinds.masked_fill(~visual.any(1, keepdim=True), Kind.TEXT)
    return kinds.masked_fill(visual, Kind.VISUAL).masked_fill(~valid, Kind.PAD)


def contiguous_positions(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Layer pre-hook: positions handed to attention are contiguous (rotation uses `position_embeddings`)."""
    positions = kwargs.get("position_ids")
    if positions is None or positions.shape[-1] < 2:
        return None
    start = positions[..., :1]
    kwargs["position_ids"] = start + torch.arange(positions.shape[-1], device=positions.device)
    return args, kwargs
