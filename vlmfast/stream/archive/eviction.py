"""Gives up blocks where a limit is reached: those that bring little new and whose values are small come first.

The newest quarter is never given up. A block's worth is its share of new tokens and the norm of its values, each
relative to the mean (temporal redundancy and value norm, after InfiniPot-V, arXiv 2506.15745). With a disk blocks are
given up half a segment at a time, so that few segments are rewritten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vlmfast.stream.archive.folder import NoRoom
from vlmfast.stream.blocks import Block

RECORD_BYTES = 600  # bytes that a block's own record takes in RAM, about
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
    ids = by_worth([blocks[block_id] for block_id in old])
    from_segments = [block_id for half in lesser_halves(segments, ids) for block_id in half]
    yield from from_segments
    given_up = set(from_segments)
    yield from (block_id for block_id in ids if block_id not in given_up)


def lesser_halves(segments: Entries, ids: list[int]) -> list[list[int]]:
    """The lesser half of every segment's blocks among `ids` (of least worth first); the segments of least mean rank
    first."""
    rank = {block_id: position for position, block_id in enumerate(ids)}
    halves = []
    for entry in segments.values():
        ranked = sorted((member for member in entry["blocks"] if member in rank), key=rank.__getitem__)
        if ranked:
            halves.append((sum(rank[member] for member in ranked) / len(ranked), ranked[: (len(ranked) + 1) // 2]))
    return [half for _, half in sorted(halves)]


def half_a_segment(blocks: dict[int, Block], segments: Entries) -> list[int]:
    """What to give up to make room on disk: half of the segment of least worth, among all but the newest quarter of the
    segments; nothing where there is but one."""
    files = list(segments)
    old = files[: len(files) - max(1, len(files) // 4)] or files[:-1]
    if not old:
        return []
    ids = by_worth([blocks[block_id] for file in old for block_id in segments[file]["blocks"]])
    return lesser_halves({file: segments[file] for file in old}, ids)[0]


class Eviction:
    """Gives up blocks of one `Store`."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def from_ram(self, need: int, slots: int = 0) -> int:
        """Give up blocks until `need` bytes of RAM and `slots` blocks are free, a sixteenth of the limit at a time.

        Gives up nothing, and returns 0, when there is not so much to give up."""
        store = self.store
        gone: list[int] = []
        target, freed = max(need, store.ram // 16) if need else 0, 0
        for block_id in order_to_give_up(store.blocks, {} if store.disk is None else store.disk.entries):
            if freed >= target and len(gone) >= slots:
                break
            freed += RECORD_BYTES + (store.in_ram[block_id].nbytes() if block_id in store.in_ram else 0)
            gone.append(block_id)
        if freed < need:
            return 0
        before = store.ram_bytes
        store.remove(gone)
        return before - store.ram_bytes

    def from_disk(self, need: int) -> None:
        """Coarsen, then give up blocks on disk until `need` bytes fit, and one more segment to rewrite others with.

        Raises NoRoom, and gives up nothing, when that cannot be.
        """
        store = self.store
        if store.disk is None or store.disk_limit is None:
            return
        spare = max([store.segment_size, need, *(entry["bytes"] for entry in store.disk.entries.values())])
        if store.disk.used + need + spare > store.disk_limit:
            store.disk.drop_aside()
        fixed = store.disk.used - store.disk.segment_bytes
        if fixed + need + spare > store.disk_limit:
            raise NoRoom(
                f"disk_limit={store.disk_limit:,} bytes cannot hold {need:,} more and room to rewrite a segment"
            )
        while store.disk.used + need + spare > store.disk_limit:
            if store.coarsening.for_disk():
                continue
            gone = half_a_segment(store.blocks, store.disk.entries)
            if not gone:
                raise NoRoom(
                    f"disk_limit={store.disk_limit:,} bytes is too small: it must hold a few segments of {spare:,} "
                    "bytes"
                )
            store.remove(gone)
