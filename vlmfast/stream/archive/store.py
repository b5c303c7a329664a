"""The archive of a stream: blocks in RAM and on disk, within byte limits that hold at all times.

With a disk, every block goes into a segment soon after it arrives and RAM is a cache of the newest; without one, RAM is
all there is. When a tier is full blocks are coarsened, where a schedule allows it (`coarsening`), then those worth
least are given up (`eviction`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmfast.core import UserError, parse_bytes
from vlmfast.stream.archive.coarsening import Coarsening
from vlmfast.stream.archive.eviction import RECORD_BYTES, Eviction
from vlmfast.stream.archive.folder import StoreError
from vlmfast.stream.archive.representatives import RepresentativeTable
from vlmfast.stream.archive.segment_file import bytes_in_file
from vlmfast.stream.archive.segments import BlockLost, Segments
from vlmfast.stream.blocks import FORMATS, Block, BlockTensors, PackedBlock, PackedLayer, pack_all, unpack, unpack_keys
from vlmfast.stream.levels import ByAge, Level

SEGMENT_BYTES = 8 << 20


class Store:
    """Stores blocks. ram, disk_limit: bytes or text ("2GiB"). path: folder on disk, None for none. keep_as: "int8"
    (default), "bf16", "model". flush_seconds: a segment is written at the latest after so much stream. coarsen: ages at
    which blocks become coarser, None for never."""

    def __init__(
        self,
        ram: int | str = "2GiB",
        path: str | os.PathLike[str] | None = None,
        disk_limit: int | str | None = None,
        keep_as: str = "int8",
        flush_seconds: float = 30.0,
        head: dict[str, Any] | None = None,
        coarsen: ByAge | None = None,
    ) -> None:
        if keep_as not in FORMATS:
            raise UserError(f"kept as {keep_as!r} is not known; known: {', '.join(FORMATS)}")
        limit = parse_bytes("ram", ram)
        if limit is None:
            raise UserError('ram=None: the store needs a limit, e.g. ram="2GiB"')
        self.ram, self.keep_as, self.flush_seconds = limit, keep_as, flush_seconds
        self.blocks: dict[int, Block] = {}  # in stream order
        self.in_ram: dict[int, PackedBlock] = {}  # blocks in RAM
        self.unwritten: list[int] = []  # blocks not on disk yet, in order (with a disk)
        self.representatives = RepresentativeTable()
        self.packed_bytes = self.peak_ram = self.evicted = 0
        self.lost: list[str] = []  # what could not be read any more
        self.disk_limit = parse_bytes("disk_limit", disk_limit)
        self.disk = None if path is None else Segments(path, self.disk_limit, head or {})
        eighth = SEGMENT_BYTES if self.disk_limit is None else max(1, self.disk_limit // 8)
        self.segment_size = min(SEGMENT_BYTES, eighth)
        self.coarsening = Coarsening(self, coarsen)
        self.eviction = Eviction(self)

    def create(self) -> Store:
        """Make the disk folder, if there is to be one."""
        if self.disk is not None:
            self.disk.create()
            try:
                self.disk.commit()
                self.disk.beat(float("-inf"))
            except BaseException:
                self.disk.abandon()
                raise
        return self

    def open(self) -> Store:
        """Take up an existing folder; what was damaged is named in `lost`."""
        assert self.disk is not None
        blocks, representatives = self.disk.open()
        for block in blocks:
            self.blocks[block.id] = block
            self.representatives.add(block.id, *representatives.pop(block.id))
        self.lost += self.disk.skipped
        if self.ram_bytes > self.ram:
            self.close()
            raise StoreError(
                f"ram={self.ram:,} bytes cannot hold the representatives of {len(blocks):,} blocks, "
                f"{self.ram_bytes:,} bytes: raise ram="
            )
        self.peak_ram = self.ram_bytes
        return self

    # -- sizes ---------------------------------------------------------------------------------------------------------

    @property
    def ram_bytes(self) -> int:
        """Bytes in RAM: blocks, representatives and records."""
        return self.packed_bytes + self.representatives.nbytes() + RECORD_BYTES * len(self.blocks)

    @property
    def disk_bytes(self) -> int:
        return 0 if self.disk is None else self.disk.used

    @property
    def archive_bytes(self) -> int:
        """Bytes of keys, values, scales and representatives of all stored blocks, each counted once."""
        if self.disk is None:
            return self.packed_bytes + self.representatives.nbytes()
        unwritten = [self.in_ram.get(block_id) for block_id in list(self.unwritten)]  # another thread may be encoding
        return self.disk.segment_bytes + sum(packed.nbytes() for packed in unwritten if packed is not None)

    def levels(self) -> dict[str, dict[str, int]]:
        """Blocks at every level that has some, and their bytes, as `archive_bytes` counts them but for RAM's table."""
        return self.coarsening.levels()

    # -- in ------------------------------------------------------------------------------------------------------------

    def add(self, block: Block, tensors: BlockTensors) -> None:
        """Store a block. Raises StoreError (nothing stored is lost, this block is not taken) when there is no room."""
        self.insert(*self.packed([(block, tensors)])[0])

    def packed(self, blocks: Sequence[tuple[Block, BlockTensors]]) -> list[tuple[Block, PackedBlock]]:
        """Blocks as they are stored at first, with features where the schedule comes to need them."""
        schedule = self.coarsening.schedule
        return pack_all(blocks, self.keep_as, schedule is not None and schedule.keeps_features)

    def insert(self, block: Block, packed: PackedBlock) -> None:
        """`add` a packed block."""
        size = packed.nbytes() + RECORD_BYTES
        self._free_slot(size, packed)
        self._reserve(size + self.representatives.cost(packed.representative, packed.embedding))
        self.blocks[block.id] = block
        self.in_ram[block.id] = packed
        self.packed_bytes += packed.nbytes()
        self.representatives.add(block.id, packed.representative, packed.embedding)
        self.peak_ram = max(self.peak_ram, self.ram_bytes)
        if self.disk is not None:
            self.unwritten.append(block.id)

    def _free_slot(self, size: int, packed: PackedBlock) -> None:
        """Where the table of representatives must grow and may not, give up blocks for a free slot in it."""
        slab = self.representatives.cost(packed.representative, packed.embedding)
        if not slab or not self.blocks:
            return
        grown = self.representatives.nbytes() + slab + RECORD_BYTES * self.representatives.grown
        if self.disk is not None:
            full = grown > self.ram * 3 // 4
        else:
            over = self.ram_bytes + slab + size - self.ram
            full = over > self.coarsening.for_ram(over)
        if full:
            self.eviction.from_ram(0, 1 + len(self.blocks) // 16)

    def _reserve(self, need: int) -> None:
        """Make `need` bytes of RAM free: first copies that are on disk too, then (without a disk) blocks."""
        over = self.ram_bytes + need - self.ram
        if over <= 0:
            return
        if self.disk is not None:
            unwritten = set(self.unwritten)
            copies = [block_id for block_id in self.in_ram if block_id not in unwritten]
            if sum(self.in_ram[block_id].nbytes() for block_id in copies) < over and self.unwritten:
                self.flush()
                copies = list(self.in_ram)
            for block_id in copies:
                if over <= 0:
                    return
                over -= self.release(block_id)
        over -= self.coarsening.for_ram(over)
        if over > 0:
            over -= self.eviction.from_ram(over)
        if over > 0:
            raise StoreError(
                f"ram={self.ram:,} bytes cannot take a block of {need:,} beside {self.ram_bytes:,} in use "
                "(representatives of all blocks stay in RAM): raise ram="
            )

    def due(self) -> bool:
        """Is it time to write a segment, or (without a disk) to coarsen what has come of age?"""
        if self.disk is None:
            return self.coarsening.due(self.flush_seconds)
        if not self.unwritten:
            return False
        span = self.blocks[self.unwritten[-1]].end - self.blocks[self.unwritten[0]].start
        size = sum(self.in_ram[block_id].nbytes() for block_id in self.unwritten)
        return span >= self.flush_seconds or size >= self.segment_size

    def flush(self) -> None:
        """Write everything that is not on disk yet, then coarsen what has come of age. Raises StoreError; blocks that
        could not be written stay in RAM, the others as they were."""
        while self.disk is not None and self.unwritten:
            sizes = {
                block_id: bytes_in_file(self.blocks[block_id], self.in_ram[block_id]) for block_id in self.unwritten
            }
            batch: list[int] = []
            total = 0
            for block_id in self.unwritten:
                total += sizes[block_id]
                if batch and total > self.segment_size:
                    break
                batch.append(block_id)
            if self.disk_limit is not None:
                self.disk.drop_state()  # older than what comes now
            self.eviction.from_disk(sum(sizes[block_id] for block_id in batch) + 600 + 48 * len(batch))
            batch = [block_id for block_id in batch if block_id in self.blocks]
            if batch:
                self.disk.write([(self.blocks[block_id], self.in_ram[block_id]) for block_id in batch])
            self.unwritten = self.unwritten[len(batch) :]
        self.coarsening.by_age()

    # -- changes -------------------------------------------------------------------------------------------------------

    def release(self, block_id: int) -> int:
        """Forget the RAM copy of a block that is on disk; bytes freed."""
        freed = self.in_ram.pop(block_id).nbytes()
        self.packed_bytes -= freed
        return freed

    def replace(self, block: Block, packed: PackedBlock) -> None:
        """Put a coarser record, and its copy in RAM where there is one, in place of a block's own."""
        self.blocks[block.id] = block
        self.representatives.put(block.id, packed.representative)
        if block.id in self.in_ram:
            self.packed_bytes += packed.nbytes() - self.in_ram[block.id].nbytes()
            self.in_ram[block.id] = packed

    def take_back(self, first: int) -> None:
        """Remove the blocks from id `first` on, which do not count as given up. Raises StoreError."""
        evicted = self.evicted
        self.remove([block_id for block_id in self.blocks if block_id >= first])
        self.evicted = evicted

    def remove(self, ids: list[int]) -> None:
        """Give up blocks in every tier, segment by segment. After a StoreError those of the segments done are gone."""
        gone = set(ids) & self.blocks.keys()
        for file in (
            {}
            if self.disk is None
            else {self.disk.file_of[block_id]: None for block_id in gone if block_id in self.disk.file_of}
        ):
            self._thin(file, gone)
        self._drop(gone & self.blocks.keys())

    def _thin(self, file: str, gone: set[int]) -> None:
        """Rewrite a segment without the blocks in `gone`."""
        assert self.disk is not None
        present = [block_id for block_id in self.disk.entries[file]["blocks"] if block_id in self.blocks]
        try:
            stays = [(self.blocks[block_id], self.whole(block_id)) for block_id in present if block_id not in gone]
        except BlockLost:
            return  # the whole segment is, and `lost` says so
        self.disk.rewrite(file, stays)
        self._drop([block_id for block_id in present if block_id in gone])

    def _drop(self, ids: Iterable[int]) -> None:
        """Forget blocks that no tier holds on disk any more."""
        gone = set(ids)
        for block_id in gone:
            if block_id in self.in_ram:
                self.release(block_id)
            self.representatives.remove(block_id)
            del self.blocks[block_id]
        self.unwritten = [block_id for block_id in self.unwritten if block_id not in gone]
        self.evicted += len(gone)

    # -- out -----------------------------------------------------------------------------------------------------------

    def layer(self, block_id: int, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Un-rotated keys and values (Hk, n, Dh) of one layer of a block, in `dtype` on the CPU; see `packed_layer`."""
        return unpack(self.packed_layer(block_id, layer), dtype)

    def packed_layer(self, block_id: int, layer: int) -> PackedLayer:
        """One layer of a block as it is kept; BlockLost when the disk lost it: `lost` then names its segment."""
        if block_id in self.in_ram:
            return self.in_ram[block_id].layer(layer)
        representative = self.representatives.of_layer(block_id, layer)
        assert self.disk is not None
        file = self.disk.file_of[block_id]
        try:
            stored = self.disk.layer(block_id, layer)
        except BlockLost as e:
            self._forget(file, e)
            raise
        values = stored.get("v", stored["k"][..., :0])
        return PackedLayer(stored["k"], values, stored.get("ks"), stored.get("vs"), representative)

    def keys(self, block_id: int, layer: int) -> Tensor | None:
        """Un-rotated keys (Hk, n, Dh) float32 of a layer, on the CPU; None where none are kept. Raises BlockLost."""
        block = self.blocks[block_id]
        if block.level >= Level.FEATURES and layer not in block.searched:
            return None
        place = layer if block.level < Level.FEATURES else block.searched.index(layer)
        representative = self.representatives.of_layer(block_id, layer)
        return unpack_keys(self.packed_layer(block_id, place)._replace(representative=representative), torch.float32)

    def _forget(self, file: str, error: Exception) -> None:
        """Drop a damaged segment; its blocks that are in RAM too are written again."""
        assert self.disk is not None
        present = [block_id for block_id in self.disk.forget(file) if block_id in self.blocks]
        again = [block_id for block_id in present if block_id in self.in_ram]
        self.unwritten = sorted({*self.unwritten, *again})
        gone = [block_id for block_id in present if block_id not in self.in_ram]
        for block_id in gone:
            self.representatives.remove(block_id)
            del self.blocks[block_id]
        self.lost.append(f"{file} ({len(gone)} blocks): {error}")

    def whole(self, block_id: int) -> PackedBlock:
        """A block with all its layers, as it is kept. Raises BlockLost, as `layer`."""
        if block_id in self.in_ram:
            return self.in_ram[block_id]
        assert self.disk is not None
        file = self.disk.file_of[block_id]
        try:
            return self.disk.whole(self.blocks[block_id], *self.representatives.of_block(block_id))
        except BlockLost as e:
            self._forget(file, e)
            raise

    def read_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The session's state as it was saved; None when there is none or it is damaged (then `lost` says so)."""
        assert self.disk is not None
        known = len(self.disk.skipped)
        found = self.disk.read_state()
        self.lost += self.disk.skipped[known:]
        return found

    def close(self) -> None:
        if self.disk is not None:
            self.disk.close()
