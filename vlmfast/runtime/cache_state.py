"""What a cache remembers of the columns that entered it: physical against logical, kinds, padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from vlmfast.core import Kind, Unsupported


class AnnouncedColumns:
    """A cache layer that only an accelerated model can read: our hooks announce every forward, others are refused.

    announced: the logical length at which the forward now running began; None = a plain model reads it rightly too.
    """

    announced: int | None = None
    get_seq_length: Any  # the cache layer's own

    def announce(self, begun: bool = True) -> None:
        """A forward has begun whose masks and attention our hooks provide; begun=False: every later one must be."""
        self.announced = self.get_seq_length() if begun else -1

    def check_announced(self) -> None:
        """Raise Unsupported when the columns that now come were not announced."""
        if self.announced is not None and self.announced != self.get_seq_length():
            raise Unsupported(
                f"a cache of {type(self).__name__}s, compressed or pruned by vlmfast, came to a model whose hooks are "
                "gone: accelerate the model with the same plan again, or start a new cache"
            )


class PrunedLayer(AnnouncedColumns, DynamicLayer):
    """A `DynamicLayer` that some columns never entered: reports the logical length, holds the physical one.

    A plain model reads it rightly where all rows dropped equally many columns, all layers the same; it is
    `AnnouncedColumns` where they did not.
    """

    keys: Any
    values: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skipped = 0

    def skip(self, n: int) -> None:
        """Count n logical columns that do not enter this layer."""
        self.skipped += n

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.check_announced()
        return super().update(*args, **kwargs)

    @property
    def physical(self) -> int:
        return super().get_seq_length()

    def get_seq_length(self, *args: Any) -> int:
        return self.physical + self.skipped

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        q = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.physical + q, self.skipped

    def crop(self, n: int) -> None:
        """Remove -n columns (n <= 0), or, as before transformers 5.20, crop to n logical columns (n > 0)."""
        remove = -n if n <= 0 else self.get_seq_length() - n
        if remove > 0:
            keys, values = self.keys, self.values
            self.keys, self.values = keys[..., :-remove, :], values[..., :-remove, :]

    def reset(self) -> None:
        super().reset()
        self.skipped, self.announced = 0, None


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


def count_skipped(cache: Any, n: int, text_layers: int) -> None:
    """Make every cache layer report the logical length."""
    layers = getattr(cache, "layers", None)
    if layers is None or (getattr(cache, "is_compileable", False) and type(cache) is not DynamicCache):
        raise Unsupported(
            f"{type(cache).__name__} has a fixed layout and cannot hold pruned columns: use the default dynamic cache"
        )
    if not layers:
        cache.layers.extend(PrunedLayer() for _ in range(text_layers))
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, CacheLayerMixin):  # a recurrent state alone: it counts no columns
            continue
        if type(layer) is DynamicLayer:
            new = PrunedLayer()
            new.__dict__.update(layer.__dict__)
            cache.layers[i] = layer = new
        if not hasattr(layer, "skip"):
            raise Unsupported(
                f"{type(layer).__name__} cannot hold pruned columns: use the default dynamic cache and full attention"
            )
        layer.skip(n)
