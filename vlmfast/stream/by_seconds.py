"""Blocks by their seconds: those that a time filter leaves, and the intervals that chosen ones cover."""

from __future__ import annotations

from collections.abc import Sequence

from vlmfast.core import UserError
from vlmfast.stream.blocks import Block


def in_time(
    blocks: Sequence[Block], at: float | None = None, between: tuple[float, float] | None = None
) -> list[Block]:
    """Blocks that had begun by second `at` and that overlap `between` (start, end)."""
    if between is not None and not between[0] <= between[1]:
        raise UserError(f"between={between} runs backwards: give (start, end) in seconds")
    matching = [block for block in blocks if at is None or block.start <= at]
    if between is not None:
        first, last = between  # where they are equal: the block of that second
        matching = [block for block in matching if block.end > first and (block.start < last or block.start <= first)]
    return matching


def intervals(weights: dict[int, float], blocks: dict[int, Block]) -> list[tuple[float, float, float]]:
    """(start, end, score) of runs of neighbouring blocks, best first; the score is the best weight in the run."""
    runs: list[list[float]] = []
    last_id = None
    for block_id in sorted(weights):
        block = blocks[block_id]
        if last_id is not None and block_id == last_id + 1:
            runs[-1][1], runs[-1][2] = block.end, max(runs[-1][2], weights[block_id])
        else:
            runs.append([block.start, block.end, weights[block_id]])
        last_id = block_id
    rounded = [(float(start), float(end), round(float(score), 4)) for start, end, score in runs]
    return sorted(rounded, key=lambda run: (-run[2], run[0]))
