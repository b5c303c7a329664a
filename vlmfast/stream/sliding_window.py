"""The sliding window that blocks are prefilled under: the init tokens, which never leave, and the newest blocks.

The stream is counted in segments of a quarter of the window. The window slides only where a segment begins, so that
what a block becomes does not depend on how the stream was cut into pushes. After every slide it is re-based: its first
block gets the position of the first block of a video, and positions stay in the trained range however long the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmfast.core import UserError
from vlmfast.runtime.stream_cache import WindowCache
from vlmfast.stream.blocks import Block
from vlmfast.stream.levels import Level
from vlmfast.stream.vision import VisionEncoder


@dataclass
class WindowCheckpoint:
    """What a window was: `SlidingWindow.roll_back` goes back to it."""

    blocks: list[Block]
    first_column: dict[int, int]
    shift: list[int]
    segment: int
    columns: int
    tensors: list[tuple[Tensor, Tensor]] | None = None  # keys and values by layer


class SlidingWindow:
    """init_ids: the prompt before the video. size: tokens of blocks that it holds at most. A position axes."""

    def __init__(self, vision: VisionEncoder, init_ids: list[int], size: int) -> None:
        self.vision, self.axes, self.size = vision, vision.layout.axes, size
        self.init_ids, self.num_init = init_ids, len(init_ids)
        self.cache = WindowCache(vision.text, self.num_init + size)
        self.blocks: list[Block] = []  # oldest first
        self.first_column: dict[int, int] = {}  # block id -> its first column in the cache
        self.shift = [0] * self.axes  # of positions, by re-basing; [] until a block is the first one
        self.segment = 0  # tokens in the running segment
        self._checkpoint: WindowCheckpoint | None = None
        if init_ids:
            with torch.inference_mode(False), torch.no_grad():
                vision.forward(self.cache, vision.embed(init_ids)[None], self._positions([])[:, None])

    @property
    def origin(self) -> tuple[int, ...]:
        """(A,) position of the first block of a video."""
        return (self.num_init,) * self.axes

    @property
    def num_columns(self) -> int:
        """Columns in use, those of the init tokens included."""
        return self.cache.layers[0].n

    @property
    def segment_size(self) -> int:
        """Tokens of a segment."""
        return max(1, self.size // 4)

    def check(self, n: int) -> None:
        """Raise UserError for a block of n tokens that does not fit."""
        if n > self.size:
            raise UserError(f"window={self.size} tokens cannot hold one frame of {n}: give a larger window")

    def starts_segment(self, n: int) -> bool:
        """Does the next block, of n tokens, begin a segment? Then `slide` comes before it."""
        return self.segment > 0 and self.segment + n > self.segment_size

    def slide(self, n: int) -> None:
        """A segment begins with a block of n tokens: make room for all of it, re-base what stays."""
        self.segment = 0
        room = self.size - max(self.segment_size, n)
        before, gone = sum(block.num_tokens for block in self.blocks), 0
        while self.blocks and before - gone > room:
            gone += self.blocks.pop(0).num_tokens
        if not gone:
            return
        if self._checkpoint is not None and self._checkpoint.tensors is None:
            layers = self.cache.layers
            self._checkpoint.tensors = [(x.raw[:, : x.n].clone(), x.val[:, : x.n].clone()) for x in layers]
        # the first block sets the shift; where none is left, the one that comes next
        self.shift = self._shift_of(self.blocks[0]) if self.blocks else []
        self.cache.slide(self.num_init, self.num_init + gone, self._positions(self.blocks))
        self._count_columns()

    def _shift_of(self, first: Block) -> list[int]:
        return [a - b for a, b in zip(first.origin, self.origin, strict=True)]

    def positions(self, block: Block) -> Tensor:
        """Positions (A, n) of a block in the window as it is based now."""
        if not self.shift:
            self.shift = self._shift_of(block)
        origin = torch.tensor([o - s for o, s in zip(block.origin, self.shift, strict=True)])
        return block.relative_positions.long() + origin[:, None]

    def _positions(self, blocks: list[Block]) -> Tensor:
        """Positions (A, n) of the init tokens, then of blocks."""
        init = torch.arange(self.num_init).expand(self.axes, -1)
        return torch.cat([init, *(self.positions(block) for block in blocks)], 1)

    def _count_columns(self) -> None:
        self.first_column, column = {}, self.num_init
        for block in self.blocks:
            self.first_column[block.id] = column
            column += block.num_tokens

    def forward(self, blocks: list[Block], embeddings: Tensor, **deepstack: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Append blocks by one forward of the language model over their embeddings (n, D), n tokens in all; after an
        error none.

        Returns for every block its un-rotated keys and values (L, Hk, n, Dh) and the mean norm of each token's values
        (n,) float32.
        """
        begin = self.num_columns
        positions = torch.cat([self.positions(block) for block in blocks], 1)
        try:
            self.vision.forward(self.cache, embeddings[None], positions[:, None], **deepstack)
        except BaseException:
            self.cache.keep(begin)
            raise
        end = self.num_columns
        keys = torch.stack([layer.raw[:, begin:end] for layer in self.cache.layers])
        values = torch.stack([layer.val[:, begin:end] for layer in self.cache.layers])
        norms = values.float().norm(dim=-1).mean((0, 1))
        first, out = 0, []
        for block in blocks:
            last = first + block.num_tokens
            self.first_column[block.id] = begin + first
            self.blocks.append(block)
            out.append((keys[:, :, first:last], values[:, :, first:last], norms[first:last]))
            first = last
        return out

    def beside(self, room: int) -> WindowCache:
        """A cache that holds the same init tokens, and room for so many more."""
        cache, n = WindowCache(self.vision.text, self.num_init + room), self.num_init
        for layer, mine in zip(cache.layers, self.cache.layers, strict=True):
            if n:
                tensors = [torch.cat([x[:, :n], x.new_empty(x.shape[0], room, x.shape[2])], 1) for x in mine.tensors()]
                layer.raw, layer.rot, layer.val = tensors
                layer.n, layer.is_initialized = n, True
        return cache

    def init_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Un-rotated keys and values (Hk, n, Dh) of the init tokens at one layer."""
        kept = self.cache.layers[layer]
        return kept.raw[:, : self.num_init], kept.val[:, : self.num_init]

    def block_layer(self, block: Block, layer: int) -> tuple[Tensor, Tensor] | None:
        """Un-rotated keys and values (Hk, n, Dh) of a block at one layer; None when it has left the window, or is
        read as its representative."""
        begin = self.first_column.get(block.id)
        if begin is None or block.level == Level.REPRESENTATIVE:
            return None
        kept, end = self.cache.layers[layer], begin + block.num_tokens
        return kept.raw[:, begin:end], kept.val[:, begin:end]

    # -- going back, saving --------------------------------------------------------------------------------------------

    def checkpoint(self) -> WindowCheckpoint:
        """Remember everything, until `forget_checkpoint`; the tensors only once the window slides."""
        self._checkpoint = WindowCheckpoint(
            list(self.blocks), dict(self.first_column), list(self.shift), self.segment, self.num_columns
        )
        return self._checkpoint

    def forget_checkpoint(self) -> None:
        self._checkpoint = None

    def roll_back(self, to: WindowCheckpoint) -> None:
        """Be as at the checkpoint again."""
        self.blocks, self.first_column, self.shift, self.segment = to.blocks, to.first_column, to.shift, to.segment
        if to.tensors is None:
            self.cache.keep(to.columns)
            return
        for layer, (keys, values) in zip(self.cache.layers, to.tensors, strict=True):
            layer.n = to.columns
            layer.raw[:, : layer.n], layer.val[:, : layer.n] = keys[:, : layer.n], values[:, : layer.n]
        self.cache.slide(to.columns, to.columns, self._positions(self.blocks))

    def snapshot(self) -> dict[str, Tensor]:
        """Un-rotated keys "raw" and values "val" (L, Hk, n, Dh) of all columns, on the CPU."""
        layers, n = self.cache.layers, self.num_columns
        return {
            "raw": torch.stack([layer.raw[:, :n] for layer in layers]).cpu().contiguous(),
            "val": torch.stack([layer.val[:, :n] for layer in layers]).cpu().contiguous(),
        }

    def newest(self, blocks: Sequence[Block]) -> list[Block]:
        """Those of `blocks` (in order) that a window holds before a segment begins, behind the last without keys."""
        out: list[Block] = []
        room = self.size - self.segment_size
        for block in reversed(blocks):
            room -= block.num_tokens
            if room < 0 or block.level >= Level.FEATURES:
                break
            out.insert(0, block)
        return out

    def fill(self, blocks: list[Block], keys: Tensor, values: Tensor) -> None:
        """Hold these blocks, and no others, behind the init tokens: un-rotated keys, values (L, Hk, n, Dh)."""
        self.blocks = blocks
        if not blocks:
            return
        begin, end = self.num_init, self.num_init + keys.shape[2]
        for i, layer in enumerate(self.cache.layers):
            if not layer.is_initialized:
                shape = (keys.shape[1], self.cache.capacity, keys.shape[3])
                layer.raw, layer.rot, layer.val = (
                    torch.empty(shape, dtype=keys.dtype, device=self.vision.device) for _ in range(3)
                )
                layer.is_initialized = True
            layer.raw[:, begin:end] = keys[i].to(layer.raw)
            layer.val[:, begin:end] = values[i].to(layer.val)
            layer.n = end
        self.cache.slide(end, end, self._positions(blocks))
        self._count_columns()
