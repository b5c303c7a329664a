"""New positions for retrieved blocks: contiguous, as if they were the video (ReKV, arXiv 2503.00540), or their own.

Under M-RoPE a block keeps its own (h, w) grid; only its origin moves. Pure functions on `Block`s and tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmfast.stream.blocks import Block


def origins(blocks: Sequence[Block], base: Sequence[int], contiguous: bool) -> list[tuple[int, ...]]:
    """The origin of every block (ascending ids), the first one at `base` (A,).

    contiguous: blocks that follow one another in the stream keep their distance, any gap closes to the natural step
    of the block before it; otherwise distances are those of the stream.
    """
    out: list[tuple[int, ...]] = []
    for i, block in enumerate(blocks):
        if i == 0:
            out.append(tuple(base))
            continue
        before = blocks[i - 1]
        step: Sequence[int] = [a - b for a, b in zip(block.origin, before.origin, strict=True)]
        if contiguous and block.id != before.id + 1:
            step = before.advance
        out.append(tuple(a + s for a, s in zip(out[-1], step, strict=True)))
    return out


def place(blocks: Sequence[Block], base: Sequence[int], contiguous: bool) -> Tensor:
    """Positions (A, n) int64 of all tokens of `blocks`, in order."""
    if not blocks:
        return torch.zeros(len(base), 0, dtype=torch.long)
    starts = origins(blocks, base, contiguous)
    return torch.cat([b.rel.long() + torch.tensor(o)[:, None] for b, o in zip(blocks, starts, strict=True)], 1)


def end(blocks: Sequence[Block], base: Sequence[int], contiguous: bool, timed: bool, after_max: bool, span: int) -> int:
    """Where text after the blocks begins (the same on every axis).

    Chained layouts (1-D RoPE, Qwen3-VL): after the last block. Timed ones (Qwen2/2.5-VL): after the maximum of all
    axes, or, where the model's own rule is not `after_max`, after the spatial extent `span` of the first grid.
    """
    if not blocks:
        return max(base)
    last = origins(blocks, base, contiguous)[-1]
    if not timed:
        return max(o + a for o, a in zip(last, blocks[-1].advance, strict=True))
    spatial = max(base) + span
    return max(last[0] + 1, spatial) if after_max else spatial
