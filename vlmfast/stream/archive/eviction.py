"""Which blocks are given up first: those that bring little new and whose values are small, never the newest quarter.

A block's worth is its share of new tokens and the norm of its values, each relative to the mean (temporal redundancy
and value norm, after InfiniPot-V, arXiv 2506.15745). With a disk blocks are given up half a segment at a time, so that
few segments are rewritten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vlmfast.stream.blocks import Block

Entries = dict[str, dict[str, Any]]  # segment file -> {"blocks": ids, ...}, in stream order


def by_worth(blocks: Sequence[Block]) -> list[int]:
    """The ids of blocks, of least worth first."""
    if not blocks:
        return []
    norm = sum(block.norm for block in blocks) / len(blocks) or 1.0
    novelty = sum(block.novelty for block in blocks) / len(blocks) or 1.0
    worth = {block.id: block.novelty / novelty + block.norm / norm for block in blocks}
    return sorted(worth, key=lambda i: (worth[i], i))


def order_to_give_up(blocks: dict[int, Block], segments: Entries) -> Iterator[int]:
    """All ids but the newest quarter: the lesser half of every segment, the segments of least worth first, then the
    others."""
    stream_order = sorted(blocks)
    old = stream_order[: len(stream_order) - max(1, len(stream_order) // 4)]
    ids = by_worth([blocks[i] for i in old])
    first = [i for half in lesser_halves(segments, ids) for i in half]
    yield from first
    done = set(first)
    yield from (i for i in ids if i not in done)


def lesser_halves(segments: Entries, ids: list[int]) -> list[list[int]]:
    """The lesser half of every segment's blocks among `ids` (of least worth first); the segments of least mean rank
    first."""
    rank = {block_id: n for n, block_id in enumerate(ids)}
    halves = []
    for entry in segments.values():
        ranked = sorted((i for i in entry["blocks"] if i in rank), key=rank.__getitem__)
        if ranked:
            halves.append((sum(rank[i] for i in ranked) / len(ranked), ranked[: (len(ranked) + 1) // 2]))
    return [half for _, half in sorted(halves)]


def half_a_segment(blocks: dict[int, Block], segments: Entries) -> list[int]:
    """What to give up to make room on disk: half of the segment of least worth, among all but the newest quarter of the
    segments; nothing where there is but one."""
    files = list(segments)
    old = files[: len(files) - max(1, len(files) // 4)] or files[:-1]
    if not old:
        return []
    ids = by_worth([blocks[i] for file in old for i in segments[file]["blocks"]])
    return lesser_halves({file: segments[file] for file in old}, ids)[0]
