"""Makes archived blocks coarser: by age as a schedule says, and earlier where a limit is reached, the oldest first.

On disk a segment is coarsened as a whole: read, written anew, and then named by the manifest in place of the old one
(`Segments.rewrite`), so that a crash at any moment leaves every block once, at one of the two levels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from vlmfast.stream import quantized
from vlmfast.stream.archive.segments import BlockLost
from vlmfast.stream.blocks import Block, PackedBlock, pack_features, unpack, unpack_features
from vlmfast.stream.levels import ByAge, Level


def coarsened(
    block: Block, packed: PackedBlock, level: Level, searched: tuple[int, ...] = ()
) -> tuple[Block, PackedBlock]:
    """A block and what is stored of it at a coarser level; both as they are where it is not finer than that.

    Its representative is `quantized.rounded`. From level FEATURES on it needs features. searched: layers whose keys
    stay beside those, in 4 bits.
    """
    if level <= block.level:
        return block, packed
    record = dataclasses.replace(block, level=level)
    representative = packed.representative if block.level else quantized.rounded(packed.representative)
    if level == Level.FOUR_BIT:
        return record, _four_bit(packed, representative)
    empty: dict[str, Any] = dict.fromkeys(("keys", "values", "key_scale", "value_scale"))
    if level == Level.FEATURES and searched:
        four_bit = packed if block.level == Level.FOUR_BIT else _four_bit(packed, representative)
        assert four_bit.keys is not None and four_bit.key_scale is not None
        of_layers = list(searched)
        empty |= {"keys": four_bit.keys[of_layers], "key_scale": four_bit.key_scale[of_layers]}
        record.searched = searched
    packed = dataclasses.replace(packed, **empty, representative=representative)
    if level == Level.REPRESENTATIVE:
        record.searched = ()
        return _mean_feature(record, packed)
    return record, packed


def _four_bit(packed: PackedBlock, representative: torch.Tensor) -> PackedBlock:
    """Keys, as their difference to the representative, and values in 4 bits."""
    assert packed.keys is not None
    layers = [unpack(packed.layer(layer_index), torch.float32) for layer_index in range(len(packed.keys))]
    keys, key_scale = quantized.packed(
        torch.stack([layer_keys for layer_keys, _ in layers]) - representative[:, :, None].float(), 4
    )
    values, value_scale = quantized.packed(torch.stack([layer_values for _, layer_values in layers]), 4)
    return dataclasses.replace(
        packed, keys=keys, values=values, key_scale=key_scale, value_scale=value_scale, representative=representative
    )


def _mean_feature(block: Block, packed: PackedBlock) -> tuple[Block, PackedBlock]:
    """The block with one visual token: the mean of its features, at the mean of their positions."""
    assert block.visual is not None and packed.features is not None
    keep_as = "int8" if packed.feature_scale is not None else "model"
    given = unpack_features(block, packed, torch.empty(0) if keep_as == "int8" else packed.features)
    first, last = block.visual

    def one(rows: torch.Tensor) -> torch.Tensor:
        return rows.float().mean(0, keepdim=True).to(rows)

    around_visual = given.embeddings[:first], given.embeddings[last:]
    given.embeddings = torch.cat([around_visual[0], one(given.embeddings[first:last]), around_visual[1]])
    given.deepstack = [one(level) for level in given.deepstack]
    positions = block.relative_positions
    mean_position = positions[:, first:last].float().mean(1, keepdim=True).round().to(positions)
    positions = torch.cat([positions[:, :first], mean_position, positions[:, last:]], 1)
    features, feature_scale = pack_features(given, keep_as)
    record = dataclasses.replace(block, relative_positions=positions, visual=(first, first + 1))
    return record, dataclasses.replace(packed, features=features, feature_scale=feature_scale)


class Coarsening:
    """Coarsens the blocks of one `Store` by a schedule; None leaves them as they are."""

    def __init__(self, store: Any, schedule: ByAge | None) -> None:
        self.store, self.schedule = store, schedule
        self._looked = float("-inf")  # second of the stream at which ages were looked at last

    def due(self, seconds: float) -> bool:
        """Is it so long that ages were looked at?"""
        if self.schedule is None or not self.store.blocks:
            return False
        return self._now() >= self._looked + seconds

    def _now(self) -> float:
        """Second of the stream at which its newest block ends."""
        return next(reversed(self.store.blocks.values())).end  # type: ignore[no-any-return]

    def levels(self) -> dict[str, dict[str, int]]:
        """See `Store.levels`. A segment's bytes count for the level of its newest block."""
        store = self.store
        by_level: dict[str, dict[str, int]] = {}

        def add(level: Level, blocks: int, size: int) -> None:
            of_level = by_level.setdefault(level.name.lower(), {"blocks": 0, "bytes": 0})
            of_level["blocks"] += blocks
            of_level["bytes"] += size

        blocks, in_ram = dict(store.blocks), dict(store.in_ram)  # another thread may be encoding
        for block in blocks.values():
            add(block.level, 1, 0)
        if store.disk is None:
            for block_id in blocks.keys() & in_ram.keys():
                add(blocks[block_id].level, 0, in_ram[block_id].nbytes())
            return by_level
        for entry in list(store.disk.entries.values()):
            present = [blocks[block_id] for block_id in entry["blocks"] if block_id in blocks]
            if present:
                add(present[-1].level, 0, entry["bytes"])
        for block_id in list(store.unwritten):
            if block_id in blocks and block_id in in_ram:
                add(blocks[block_id].level, 0, in_ram[block_id].nbytes())
        return by_level

    def _coarser(self, block: Block, level: Level) -> Level:
        """The level of a block that should be at `level`: never a finer one than it has, nor one that the schedule
        leaves out or that needs features where none are stored."""
        assert self.schedule is not None
        usable = [
            candidate
            for candidate, _ in self.schedule.ages
            if candidate <= level and (candidate < Level.FEATURES or block.visual is not None)
        ]
        return max([block.level, *usable])

    def _coarsened(self, block: Block, packed: PackedBlock, level: Level) -> tuple[Block, PackedBlock]:
        """`coarsened`, with the keys that the schedule keeps beside features."""
        assert self.schedule is not None
        return coarsened(block, packed, level, self.schedule.searched(len(packed.representative)))

    def by_age(self) -> None:
        """Coarsen what has come of age. Raises StoreError; a block is then at its old level or the new one."""
        store = self.store
        if self.schedule is None or not store.blocks:
            return
        now = self._looked = self._now()
        if store.disk is None:
            for block in list(store.blocks.values()):
                level = self.schedule.level(now - block.end)
                if level == Level.FULL:
                    break  # those that come are younger
                self._in_ram([block], level)
            return
        for file, entry in list(store.disk.entries.items()):
            present = [store.blocks[block_id] for block_id in entry["blocks"] if block_id in store.blocks]
            level = self.schedule.level(now - present[-1].end) if present else Level.FULL
            if level == Level.FULL and present:
                break
            self._segment(file, level)

    def _segment(self, file: str, level: Level) -> bool:
        """Write a segment anew, its blocks at this level or a coarser one; False where they are already."""
        store = self.store
        assert store.disk is not None
        present = [
            store.blocks[block_id] for block_id in store.disk.entries[file]["blocks"] if block_id in store.blocks
        ]
        levels = [self._coarser(block, level) for block in present]
        if all(new_level == block.level for new_level, block in zip(levels, present, strict=True)):
            return False
        try:
            coarser = [
                self._coarsened(old_block, store.whole(old_block.id), new_level)
                for old_block, new_level in zip(present, levels, strict=True)
            ]
        except BlockLost:
            return False  # the whole segment is, and `lost` says so
        store.disk.rewrite(file, coarser)
        for block, packed in coarser:
            store.replace(block, packed)
        return True

    def _in_ram(self, blocks: list[Block], level: Level) -> int:
        """Coarsen blocks of a store without a disk; returns the bytes that became free."""
        store, before = self.store, self.store.packed_bytes
        for block in blocks:
            new_level = self._coarser(block, level)
            if new_level > block.level:
                store.replace(*self._coarsened(block, store.in_ram[block.id], new_level))
        return before - store.packed_bytes

    def for_ram(self, need: int) -> int:
        """Coarsen the oldest blocks of a store without a disk until `need` bytes are free, a sixteenth of the limit at
        a time, never the newest quarter, all to one level before any to the next; returns the bytes freed."""
        store = self.store
        if self.schedule is None or store.disk is not None or need <= 0:
            return 0
        target, freed = max(need, store.ram // 16), 0
        blocks = list(store.blocks)
        for level, _ in self.schedule.ages:
            for block_id in blocks[: len(blocks) - max(1, len(blocks) // 4)]:
                freed += self._in_ram([store.blocks[block_id]], level)
                if freed >= target:
                    return freed
        return freed

    def for_disk(self) -> bool:
        """Coarsen the oldest segment that is not at the next level yet, among all but the newest quarter; False where
        none is left. Raises StoreError."""
        disk = self.store.disk
        if self.schedule is None or disk is None:
            return False
        files = list(disk.entries)
        old = files[: len(files) - max(1, len(files) // 4)]
        return any(
            self._segment(file, level) for level, _ in self.schedule.ages for file in old if file in disk.entries
        )
