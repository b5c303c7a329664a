"""Which blocks are given up first: those that bring little new and whose values are small, never the newest quarter.

Temporal redundancy and value norm, after InfiniPot-V (arXiv 2506.15745). With a disk they are taken half a segment at a
time, so that few segments are rewritten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vlmfast.stream.blocks import Block

Entries = dict[str, dict[str, Any]]  # segment file -> {"blocks": ids, ...}, in stream order


def ranked(blocks: Sequence[Block]) -> list[int]:
    """The ids of blocks by what they are worth, least first."""
    if not blocks:
        return []
    norm = sum(b.norm for b in blocks) / len(blocks) or 1.0
    new = sum(b.novelty for b in blocks) / len(blocks) or 1.0
    worth = {b.id: b.novelty / new + b.norm / norm for b in blocks}
    return sorted(worth, key=lambda i: (worth[i], i))


def least(blocks: dict[int, Block], segments: Entries) -> Iterator[int]:
    """All ids but the newest quarter in the order of giving up: the lesser half of every segment, the segments that are
    worth least first, then the others."""
    order = sorted(blocks)
    by_worth = ranked([blocks[i] for i in order[: len(order) - max(1, len(order) // 4)]])
    place = {i: n for n, i in enumerate(by_worth)}
    first = [i for half in halves(segments, place) for i in half]
    yield from first
    done = set(first)
    yield from (i for i in by_worth if i not in done)


def halves(segments: Entries, place: dict[int, int]) -> list[list[int]]:
    """The lesser half of every segment's blocks, the segments of least mean `place` (rank by worth) first."""
    out = []
    for entry in segments.values():
        held = sorted((i for i in entry["blocks"] if i in place), key=place.__getitem__)
        if held:
            out.append((sum(place[i] for i in held) / len(held), held[: (len(held) + 1) // 2]))
    return [half for _, half in sorted(out)]


def from_segments(blocks: dict[int, Block], segments: Entries) -> list[int]:
    """What to give up to make room on disk: half of the segment whose blocks are worth least, among all but the newest
    quarter of the segments; nothing where there is but one."""
    files = list(segments)
    old = files[: len(files) - max(1, len(files) // 4)] or files[:-1]
    if not old:
        return []
    by_worth = ranked([blocks[i] for f in old for i in segments[f]["blocks"]])
    return halves({f: segments[f] for f in old}, {i: n for n, i in enumerate(by_worth)})[0]
