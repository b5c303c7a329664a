"""Turns frames into blocks: vision tower, redundant tokens dropped, prefill under a sliding window.

Everything a block becomes depends on the stream alone, never on how it was cut into pushes: the tower sees one temporal
grid at a time (with redundancy also what its windows gave in the grids before), redundancy compares with the last kept
feature of the same position, and the window slides only where a segment begins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.core import Unsupported, VisualTokens
from vlmfast.runtime import transfers
from vlmfast.runtime.transfers import columns
from vlmfast.stream.archive.representatives import LastKeys
from vlmfast.stream.blocks import Block, BlockInput, BlockTensors, joined
from vlmfast.stream.changed_grids import ChangedGrids, NewestGrid
from vlmfast.stream.newest_blocks import RecentGrids, SlidingWindow, WindowCheckpoint
from vlmfast.stream.vision import GridFeatures, VisionEncoder

MOST_TOKENS = 2048  # of one forward of the language model


@dataclass
class GridFrames:
    """The frames of G temporal grids, ready to encode: frames (G * p, H, W, 3) uint8, times[g] = seconds of the first
    and last frame of a grid, interval[g] = seconds between its last frame and the next one to expect."""

    frames: Tensor
    times: list[tuple[float, float]]
    interval: list[float]

    def __len__(self) -> int:
        return len(self.times)


@dataclass
class Progress:
    """How far an encoder has come; saved by its field names."""

    blocks: int = 0  # blocks encoded so far
    first: float | None = None  # seconds of the first frame
    cursor: int = 0  # where the next block starts (chained layouts)
    visual: int = 0  # visual tokens seen, and kept
    kept: int = 0


@dataclass
class Checkpoint:
    """What an encoder was before some frames: `Encoder.roll_back` goes back to it."""

    progress: Progress
    last_features: Tensor | None
    grid_size: tuple[int, int] | None
    first_extent: int
    last_keys: LastKeys
    recent: list[BlockInput]
    window: WindowCheckpoint
    grid: NewestGrid | None


@dataclass
class EncodedGrid:
    """A grid on its way through the language model: what it gives; kept (P,) bool, on the host, the positions of its
    tokens; new_size: is it the first of its size?"""

    made: BlockInput
    kept: Tensor
    new_size: bool


def not_redundant(features: Tensor, last: Tensor, redundancy: float) -> tuple[Tensor, Tensor]:
    """EfficientReKV's rule: keep a token iff its cosine distance to the last *kept* feature at its position exceeds
    `redundancy`.

    features, last (P, D) -> kept (P,) bool, at least one; distance (P,) float32.
    """
    distance = 1 - F.cosine_similarity(features.float(), last.float(), dim=-1)
    return _at_least_one(distance > redundancy, distance), distance


def _at_least_one(kept: Tensor, distance: Tensor) -> Tensor:
    """The mask kept (P,), or the token of the largest distance where it keeps none; nothing is read from a device."""
    farthest = torch.arange(len(kept), device=kept.device) == distance.argmax()
    return kept | (farthest & ~kept.any())


class Encoder:
    """Turns grids of frames into blocks.

    init_ids: the prompt before the video. window: tokens that a grid sees besides them. redundancy: cosine distance
    below which a token is dropped; None keeps every token, and encodes grids whole. pruner: of the plan, applied to
    every grid by itself. recent: seconds of the stream whose grids are held whole, see `RecentGrids`.
    """

    def __init__(
        self, vision: VisionEncoder, init_ids: list[int], window: int, redundancy: float | None, pruner: Any,
        recent: float | None = None,
    ) -> None:  # fmt: skip
        if pruner is not None:
            _check_pruner(pruner)
        self.vision, self.layout = vision, vision.layout
        self.redundancy, self.pruner = redundancy, pruner
        self.tower = ChangedGrids(vision, by_window=redundancy is not None)
        self.window = SlidingWindow(vision, init_ids, window)
        self.progress = Progress(cursor=len(init_ids))
        self.last_features: Tensor | None = None  # (P, D) last kept feature of every position of a grid
        self.last_keys = LastKeys()
        self.recent = RecentGrids(recent, vision.frames_per_grid)
        self.grid_size: tuple[int, int] | None = None  # of `last_features`
        self.first_extent = 0  # spatial extent of the first grid: where text begins under the timed rule

    @property
    def num_layers(self) -> int:
        return len(self.window.cache.layers)

    @torch.no_grad()
    def encode(self, grids: GridFrames) -> Iterator[list[tuple[Block, BlockTensors]]]:
        """The blocks of some grids, in order, those that went through the language model together at a time."""
        features = self.tower.features(grids.frames)
        new_size = [self.last_features is None or features.size != self.grid_size] + [False] * (len(grids) - 1)
        # all of them before the language model runs: a GPU is read once
        kept_masks = [self._kept(grid, features.size) for grid in features.features]
        kept, *whole = transfers.read_back([torch.stack(of_all) for of_all in zip(*kept_masks, strict=True)])
        grid_ends = [last + interval for (_, last), interval in zip(grids.times, grids.interval, strict=True)]
        first_held = self.recent.first(grid_ends)
        group: list[EncodedGrid] = []
        num_waiting = 0  # tokens of `group`
        for grid_index in range(len(grids)):
            hold, by_pruner = grid_index >= first_held, whole[0][grid_index] if whole else None
            block_input = self._block_input(features, grid_index, grids, kept[grid_index], hold, by_pruner)
            num_tokens = block_input.block.num_tokens
            if self.window.starts_segment(num_tokens):
                yield from self._forward(group)
                group, num_waiting = [], 0
                self.window.slide(num_tokens)
            elif num_waiting + num_tokens > MOST_TOKENS:
                yield from self._forward(group)
                group, num_waiting = [], 0
            self.window.segment += num_tokens
            num_waiting += num_tokens
            group.append(EncodedGrid(block_input, kept[grid_index], new_size[grid_index]))
        yield from self._forward(group)
        if not self.recent.watched:
            self.recent.trim()

    def _block_input(
        self, features: GridFeatures, grid_index: int, grids: GridFrames, kept: Tensor, hold: bool, whole: Tensor | None
    ) -> BlockInput:
        """What grid `grid_index` gives to the language model: the tokens kept, its time stamp (Qwen3-VL) around them.

        hold: keep it as part of the present, with its tokens `whole` (P,) bool, None for all.
        """
        progress, layout, (h, w) = self.progress, self.layout, features.size
        start, last_second = grids.times[grid_index]
        progress.first = start if progress.first is None else progress.first
        self.first_extent = self.first_extent or layout.extent(h, w)
        progress.visual += len(kept)
        progress.kept += int(kept.sum())
        stamp = self.vision.timestamp_ids(start - progress.first, last_second - progress.first)
        extent = layout.extent(h, w) + len(stamp) + bool(stamp)
        end = last_second + grids.interval[grid_index]
        if layout.timed:
            time_offset = layout.ticks(start - progress.first, progress.blocks)
            origin = (self.window.num_init + time_offset, *self.window.origin[1:])
            natural_step = layout.ticks(end - start, 1) or 1
            advance: tuple[int, ...] = (natural_step,) + (0,) * (layout.axes - 1)
        else:
            origin = (progress.cursor,) * layout.axes
            progress.cursor += extent
            advance = (extent,) * layout.axes
        novelty = float(kept.float().mean())
        positions = self._relative_positions(features.size, stamp, kept)
        block = Block(progress.blocks, start, end, origin, advance, positions, self.vision.frames_per_grid, novelty)
        self.window.check(block.num_tokens)
        progress.blocks += 1
        block_input = self._tokens(block, features, grid_index, stamp, kept)
        if hold:
            whole = torch.ones_like(kept) if whole is None else whole
            all_positions = self._relative_positions(features.size, stamp, whole)
            whole_block = dataclasses.replace(block, relative_positions=all_positions)
            self.recent.grids.append(self._tokens(whole_block, features, grid_index, stamp, whole))
        return block_input

    def _relative_positions(self, size: tuple[int, int], stamp: list[int], kept: Tensor) -> Tensor:
        """Positions (A, n) int16, less the grid's origin, of its stamp, its tokens kept (P,) bool, and what ends it."""
        layout = self.layout
        positions = [torch.arange(len(stamp)).expand(layout.axes, -1), layout.grid(*size)[:, kept] + len(stamp)]
        if stamp:
            positions.append(torch.full((layout.axes, 1), layout.extent(*size) + len(stamp)))
        return torch.cat(positions, 1).to(torch.int16)

    def _tokens(self, block: Block, features: GridFeatures, index: int, stamp: list[int], kept: Tensor) -> BlockInput:
        """The tokens kept (P,) bool of grid `index`, copied, its stamp before and what ends it after them."""
        level_features = [features.features[index], *(of_level[index] for of_level in features.deepstack)]
        if not kept.all():
            kept_columns = columns(kept, self.vision.device)
            level_features = [of_level[kept_columns] for of_level in level_features]
        elif features.deepstack:
            level_features = [of_level.clone() for of_level in level_features]  # not the whole chunk's
        embedding_parts = [self.vision.embed(stamp), level_features[0]]
        if stamp:
            embedding_parts.append(self.vision.embed([self.vision.end]))
        embeddings = torch.cat([part.to(embedding_parts[0]) for part in embedding_parts])
        visual = slice(len(stamp), len(stamp) + int(kept.sum()))
        return BlockInput(block, embeddings, visual, level_features[1:])

    def _kept(self, features: Tensor, grid_size: tuple[int, int]) -> tuple[Tensor, ...]:
        """Which of a grid's features (P, D) go on, (P,) bool: redundancy, then the plan's pruner; at least one does.
        With a pruner also which it alone keeps."""
        kept, distance = (torch.ones(len(features), dtype=d, device=features.device) for d in (torch.bool, torch.float))
        if self.last_features is None or grid_size != self.grid_size:  # the first grid, or a new size: all of it is new
            self.last_features, self.grid_size = features.clone(), grid_size
        elif self.redundancy is not None:
            kept, distance = not_redundant(features, self.last_features, self.redundancy)
            self.last_features = torch.where(kept[:, None], features, self.last_features)
        if self.pruner is not None and self.pruner.keep < 1:
            frame_of_token = torch.zeros(features.shape[0], dtype=torch.long, device=features.device)
            by_pruner = torch.zeros_like(kept)
            by_pruner[self.pruner.select(VisualTokens(features, frame_of_token, (1, *grid_size), video=True))] = True
            return _at_least_one(kept & by_pruner, distance * kept), by_pruner
        return (kept,)

    def _forward(self, group: list[EncodedGrid]) -> Iterator[list[tuple[Block, BlockTensors]]]:
        """The language model on a group of blocks, at most `MOST_TOKENS` tokens."""
        if not group:
            return
        embeddings, deepstack = joined([grid.made for grid in group], self.vision.device)
        forwarded = self.window.forward([grid.made.block for grid in group], embeddings, **deepstack)
        encoded = []
        for grid, (keys, values, norms) in zip(group, forwarded, strict=True):
            if grid.new_size:
                self.last_keys.forget()
            representative = self.last_keys.representative(keys[:, :, grid.made.visual], grid.kept)
            encoded.append((grid.made.block, BlockTensors(keys, values, representative, None, norms, grid.made)))
        yield encoded

    # -- going back, saving --------------------------------------------------------------------------------------------

    def checkpoint(self) -> Checkpoint:
        """Remember everything, until `forget_checkpoint`."""
        return Checkpoint(
            dataclasses.replace(self.progress), self.last_features, self.grid_size, self.first_extent,
            self.last_keys.copy(), list(self.recent.grids), self.window.checkpoint(), self.tower.newest,
        )  # fmt: skip

    def forget_checkpoint(self) -> None:
        self.window.forget_checkpoint()

    def roll_back(self, to: Checkpoint) -> None:
        """Be as at the checkpoint again."""
        self.progress, self.last_features, self.last_keys = to.progress, to.last_features, to.last_keys
        self.grid_size, self.first_extent, self.recent.grids = to.grid_size, to.first_extent, to.recent
        self.window.roll_back(to.window)
        self.tower.roll_back(to.grid)

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that `restore` needs: tensors, the window at full precision, and what JSON can hold."""
        recent_tensors, recent_records = self.recent.snapshot()
        tensors, grid = self.tower.snapshot()
        tensors |= self.window.snapshot() | self.last_keys.snapshot() | recent_tensors
        if self.last_features is not None:
            tensors["last"] = self.last_features.cpu().contiguous()
        state = dataclasses.asdict(self.progress) | {"shift": self.window.shift, "segment": self.window.segment}
        return tensors, {
            "state": state, "size": self.grid_size, "span": self.first_extent,
            "resident": [block.json() for block in self.window.blocks], "recent": recent_records, "grid": grid,
        }  # fmt: skip

    def restore(self, tensors: dict[str, Tensor], saved: dict[str, Any]) -> None:
        """Be as when `snapshot` was taken, bit for bit. Raises KeyError, TypeError, ... for what no snapshot holds."""
        state, window = dict(saved["state"]), self.window
        window.shift, window.segment = state.pop("shift"), state.pop("segment")
        self.progress = Progress(**state)
        self.grid_size = tuple(saved["size"]) if saved["size"] else None  # type: ignore[assignment]
        self.first_extent = saved["span"]
        if "last" in tensors:
            self.last_features = tensors["last"].to(self.vision.device)
        self.last_keys.restore(tensors, self.vision.device)
        self.recent.restore(tensors, saved.get("recent", []), self.vision.device)
        self.tower.restore(tensors, saved.get("grid"))
        blocks = [Block.from_json(block) for block in saved["resident"]]
        window.fill(blocks, tensors["raw"][:, :, window.num_init :], tensors["val"][:, :, window.num_init :])

    def rebuild(
        self, blocks: Sequence[Block], first: float, extent: int, stored: Callable[[int, int], tuple[Tensor, Tensor]]
    ) -> None:
        """Go on after `blocks` (in order, at least one) with a window of the newest of them; the next grid is taken
        whole.

        first: seconds of the stream's first frame. extent: that of its first grid. stored(id, layer): un-rotated keys
        and values (Hk, n, Dh); what it raises is raised, and nothing is changed then.
        """
        newest = self.window.newest(blocks)
        layers = [[stored(block.id, layer_index) for block in newest] for layer_index in range(self.num_layers)]
        last_block, progress = blocks[-1], self.progress
        progress.blocks, progress.first, self.first_extent = last_block.id + 1, first, extent
        if not self.layout.timed:
            progress.cursor = last_block.origin[0] + last_block.advance[0]
        # the next block begins a segment, which makes room for it
        self.window.segment, self.window.shift = self.window.segment_size, []
        if newest:
            keys = torch.stack([torch.cat([block_keys for block_keys, _ in layer], 1) for layer in layers])
            values = torch.stack([torch.cat([block_values for _, block_values in layer], 1) for layer in layers])
            self.window.fill(newest, keys, values)


def _check_pruner(pruner: Any) -> None:
    name = type(pruner).__name__
    if getattr(pruner, "resizes", False):
        raise Unsupported(f"{name} resizes the media of generate() calls: give a stream smaller frames instead")
    if getattr(pruner, "after_block", None) not in (None, "auto"):
        raise Unsupported(
            f"{name}(after_block=...) prunes inside the tower, a stream at its output: leave after_block=None"
        )
    if {"question", "tower_attention"} & set(pruner.needs):
        raise Unsupported(
            f"{name} needs {'/'.join(pruner.needs)}, and a stream is encoded before any question: use vidcom2"
        )
    if getattr(pruner, "video_only", False):
        raise Unsupported(
            f"{name} compares frames, which a stream does with redundancy=: use that, or a pruner of single frames"
        )
