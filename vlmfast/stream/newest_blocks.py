"""The newest blocks, in fast memory: the sliding window that blocks are prefilled under, and the present, held whole.

The window holds keys and values, of the init tokens, which never leave, and of the newest blocks. The stream is counted
in segments of a quarter of the window. It slides only where a segment begins, so that what a block becomes does not
depend on how the stream was cut into pushes. After every slide it is re-based: its first block gets the position of the
first block of a video, and positions stay in the trained range however long the stream.

The present is the grids of the last seconds, as the tower made them. Redundancy keeps of a still scene only what
changed. What was dropped is in older blocks, and a question need not bring those back. So the features of the newest
grids are held beside the archive, and an answer prefills them behind what was retrieved, as the model would read a
short video there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from vlmfast.core import UserError
from vlmfast.runtime.stream_cache import WindowCache
from vlmfast.stream.blocks import Block, BlockInput
from vlmfast.stream.by_seconds import in_time
from vlmfast.stream.levels import Level
from vlmfast.stream.vision import VisionEncoder

FRAMES = 4  # of the default span (SimpleStream, arXiv 2604.02317)


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
        room_left = self.size - max(self.segment_size, n)
        num_held, num_gone = sum(block.num_tokens for block in self.blocks), 0
        while self.blocks and num_held - num_gone > room_left:
            num_gone += self.blocks.pop(0).num_tokens
        if not num_gone:
            return
        if self._checkpoint is not None and self._checkpoint.tensors is None:
            layers = self.cache.layers
            self._checkpoint.tensors = [
                (layer.raw[:, : layer.n].clone(), layer.val[:, : layer.n].clone()) for layer in layers
            ]
        # the first block sets the shift; where none is left, the one that comes next
        self.shift = self._shift_of(self.blocks[0]) if self.blocks else []
        self.cache.slide(self.num_init, self.num_init + num_gone, self._positions(self.blocks))
        self._count_columns()

    def _shift_of(self, first: Block) -> list[int]:
        return [in_stream - in_window for in_stream, in_window in zip(first.origin, self.origin, strict=True)]

    def positions(self, block: Block) -> Tensor:
        """Positions (A, n) of a block in the window as it is based now."""
        if not self.shift:
            self.shift = self._shift_of(block)
        origin = torch.tensor([in_stream - shift for in_stream, shift in zip(block.origin, self.shift, strict=True)])
        return block.relative_positions.long() + origin[:, None]

    def _positions(self, blocks: list[Block]) -> Tensor:
        """Positions (A, n) of the init tokens, then of blocks."""
        init_positions = torch.arange(self.num_init).expand(self.axes, -1)
        return torch.cat([init_positions, *(self.positions(block) for block in blocks)], 1)

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
        begin_column = self.num_columns
        positions = torch.cat([self.positions(block) for block in blocks], 1)
        try:
            self.vision.forward(self.cache, embeddings[None], positions[:, None], **deepstack)
        except BaseException:
            self.cache.keep(begin_column)
            raise
        end_column = self.num_columns
        keys = torch.stack([layer.raw[:, begin_column:end_column] for layer in self.cache.layers])
        values = torch.stack([layer.val[:, begin_column:end_column] for layer in self.cache.layers])
        norms = values.float().norm(dim=-1).mean((0, 1))
        first_token, by_block = 0, []
        for block in blocks:
            end_token = first_token + block.num_tokens
            self.first_column[block.id] = begin_column + first_token
            self.blocks.append(block)
            by_block.append(
                (keys[:, :, first_token:end_token], values[:, :, first_token:end_token], norms[first_token:end_token])
            )
            first_token = end_token
        return by_block

    def beside(self, room: int) -> WindowCache:
        """A cache that holds the same init tokens, and room for so many more."""
        cache, num_init = WindowCache(self.vision.text, self.num_init + room), self.num_init
        for layer, window_layer in zip(cache.layers, self.cache.layers, strict=True):
            if num_init:
                tensors = [
                    torch.cat([tensor[:, :num_init], tensor.new_empty(tensor.shape[0], room, tensor.shape[2])], 1)
                    for tensor in window_layer.tensors()
                ]
                layer.raw, layer.rot, layer.val = tensors
                layer.n, layer.is_initialized = num_init, True
        return cache

    def init_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Un-rotated keys and values (Hk, n, Dh) of the init tokens at one layer."""
        cache_layer = self.cache.layers[layer]
        return cache_layer.raw[:, : self.num_init], cache_layer.val[:, : self.num_init]

    def block_layer(self, block: Block, layer: int) -> tuple[Tensor, Tensor] | None:
        """Un-rotated keys and values (Hk, n, Dh) of a block at one layer; None when it has left the window, or is
        read as its representative."""
        begin_column = self.first_column.get(block.id)
        if begin_column is None or block.level == Level.REPRESENTATIVE:
            return None
        cache_layer, end_column = self.cache.layers[layer], begin_column + block.num_tokens
        return cache_layer.raw[:, begin_column:end_column], cache_layer.val[:, begin_column:end_column]

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
        layers, num_columns = self.cache.layers, self.num_columns
        return {
            "raw": torch.stack([layer.raw[:, :num_columns] for layer in layers]).cpu().contiguous(),
            "val": torch.stack([layer.val[:, :num_columns] for layer in layers]).cpu().contiguous(),
        }

    def newest(self, blocks: Sequence[Block]) -> list[Block]:
        """Those of `blocks` (in order) that a window holds before a segment begins, behind the last without keys."""
        newest_blocks: list[Block] = []
        room_left = self.size - self.segment_size
        for block in reversed(blocks):
            room_left -= block.num_tokens
            if room_left < 0 or block.level >= Level.FEATURES:
                break
            newest_blocks.insert(0, block)
        return newest_blocks

    def fill(self, blocks: list[Block], keys: Tensor, values: Tensor) -> None:
        """Hold these blocks, and no others, behind the init tokens: un-rotated keys, values (L, Hk, n, Dh)."""
        self.blocks = blocks
        if not blocks:
            return
        begin_column, end_column = self.num_init, self.num_init + keys.shape[2]
        for layer_index, layer in enumerate(self.cache.layers):
            if not layer.is_initialized:
                shape = (keys.shape[1], self.cache.capacity, keys.shape[3])
                layer.raw, layer.rot, layer.val = (
                    torch.empty(shape, dtype=keys.dtype, device=self.vision.device) for _ in range(3)
                )
                layer.is_initialized = True
            layer.raw[:, begin_column:end_column] = keys[layer_index].to(layer.raw)
            layer.val[:, begin_column:end_column] = values[layer_index].to(layer.val)
            layer.n = end_column
        self.cache.slide(end_column, end_column, self._positions(blocks))
        self._count_columns()


# -- the present -------------------------------------------------------------------------------------------------------


@dataclass
class Recent:
    """The last seconds that every working set holds: whole, grids as they are prefilled again; stored, the blocks of
    those that are no longer held so."""

    whole: list[BlockInput] = field(default_factory=list)
    stored: list[Block] = field(default_factory=list)

    @property
    def blocks(self) -> list[Block]:
        """All of them, in order."""
        return [*self.stored, *(grid.block for grid in self.whole)]

    def __len__(self) -> int:
        return len(self.whole) + len(self.stored)


class RecentGrids:
    """seconds: the span held, ending with the newest grid; None is that of the last `FRAMES` frames, 0 holds nothing.
    frames_per_grid: frames in a grid. watched: watch rules read every grid of a chunk, and trim."""

    def __init__(self, seconds: float | None, frames_per_grid: int) -> None:
        self.seconds, self.num_grids = seconds, -(-FRAMES // frames_per_grid)
        self.watched = False
        self.grids: list[BlockInput] = []  # oldest first; their blocks have all tokens, unlike those stored

    def count(self, ends: Sequence[float]) -> int:
        """How many of the newest grids lie in the span, of grids that end at these seconds (ascending)."""
        if self.seconds is None or not ends:
            return min(len(ends), self.num_grids)
        span_start = ends[-1] - self.seconds + 1e-6  # of two roundings of one second neither counts
        return sum(1 for _ in takewhile(lambda end: end > span_start, reversed(ends)))

    def first(self, ends: Sequence[float]) -> int:
        """Index of the first grid to hold, of a chunk whose grids end at these seconds."""
        return 0 if self.watched else len(ends) - self.count(ends)

    def trim(self) -> None:
        """Let go of grids that are no longer in the span, nor in what rules read next."""
        num_held = self.count([grid.block.end for grid in self.grids])
        num_held = max(num_held, self.num_grids) if self.watched else num_held
        self.grids = self.grids[-num_held:] if num_held else []

    def span(self, blocks: Sequence[Block]) -> list[Block]:
        """Those of `blocks` (in order) that are the present of the last of them."""
        return list(blocks[len(blocks) - self.count([block.end for block in blocks]) :])

    def read(self, blocks: Sequence[Block], at: float | None, between: tuple[float, float] | None) -> Recent:
        """What an answer reads anyway: the present as of second `at`, as far as it overlaps `between`. blocks: stored,
        in order."""
        held_grids = {grid.block.id: grid for grid in self.grids}
        seen_blocks = [block for block in blocks if block.id not in held_grids] + [grid.block for grid in self.grids]
        span = in_time(self.span(in_time(seen_blocks, at)), None, between)
        whole_grids = [held_grids[block.id] for block in span if block.id in held_grids]
        return Recent(whole_grids, [block for block in span if block.id not in held_grids])

    def nbytes(self) -> int:
        tensors = [tensor for grid in self.grids for tensor in (grid.embeddings, *grid.deepstack)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def snapshot(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """All that `restore` needs: tensors, and what JSON can hold."""
        tensors, records = {}, []
        for grid_index, grid in enumerate(self.grids):
            for tensor_index, tensor in enumerate([grid.embeddings, *grid.deepstack]):
                tensors[f"recent.{grid_index}.{tensor_index}"] = tensor.cpu().contiguous()
            visual = [grid.visual.start, grid.visual.stop]
            records.append({"block": grid.block.json(), "visual": visual, "levels": len(grid.deepstack)})
        return tensors, records

    def restore(self, tensors: dict[str, Tensor], held: list[dict[str, Any]], device: torch.device) -> None:
        """Take up a saved state, as far as it lies in the span; one of an older version has none."""
        self.grids = []
        for grid_index, grid in enumerate(held):
            embeddings, *deepstack = (
                tensors[f"recent.{grid_index}.{tensor_index}"].to(device) for tensor_index in range(1 + grid["levels"])
            )
            self.grids.append(BlockInput(Block.from_json(grid["block"]), embeddings, slice(*grid["visual"]), deepstack))
        self.trim()
