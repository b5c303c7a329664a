"""The present: the grids of the last seconds, held as the tower made them, whole.

Redundancy keeps of a still scene only what changed. What was dropped is in older blocks, and a question need not bring
those back. So the features of the newest grids are held beside the archive, and an answer prefills them behind what was
retrieved, as the model would read a short video there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from vlmfast.stream.blocks import Block, BlockInput
from vlmfast.stream.retrievers import in_time

FRAMES = 4  # of the default span (SimpleStream, arXiv 2604.02317)


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
        first = ends[-1] - self.seconds + 1e-6  # of two roundings of one second neither counts
        return sum(1 for _ in takewhile(lambda end: end > first, reversed(ends)))

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
        held = {grid.block.id: grid for grid in self.grids}
        seen = [block for block in blocks if block.id not in held] + [grid.block for grid in self.grids]
        span = in_time(self.span(in_time(seen, at)), None, between)
        whole = [held[block.id] for block in span if block.id in held]
        return Recent(whole, [block for block in span if block.id not in held])

    def nbytes(self) -> int:
        tensors = [x for grid in self.grids for x in (grid.embeddings, *grid.deepstack)]
        return sum(x.numel() * x.element_size() for x in tensors)

    def snapshot(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """All that `restore` needs: tensors, and what JSON can hold."""
        tensors, held = {}, []
        for i, grid in enumerate(self.grids):
            for j, x in enumerate([grid.embeddings, *grid.deepstack]):
                tensors[f"recent.{i}.{j}"] = x.cpu().contiguous()
            visual = [grid.visual.start, grid.visual.stop]
            held.append({"block": grid.block.json(), "visual": visual, "levels": len(grid.deepstack)})
        return tensors, held

    def restore(self, tensors: dict[str, Tensor], held: list[dict[str, Any]], device: torch.device) -> None:
        """Take up a saved state, as far as it lies in the span; one of an older version has none."""
        self.grids = []
        for i, grid in enumerate(held):
            embeddings, *deepstack = (tensors[f"recent.{i}.{j}"].to(device) for j in range(1 + grid["levels"]))
            self.grids.append(BlockInput(Block.from_json(grid["block"]), embeddings, slice(*grid["visual"]), deepstack))
        self.trim()
