"""The archive of a stream: blocks in RAM, spilled to disk, within byte limits that hold at all times.

With a disk, every block goes into a segment soon after it arrives and RAM is a cache of the newest; without one, RAM is
all there is. When a tier is full the blocks worth least are given up: those that bring little new and whose values are
small (temporal redundancy and value norm, InfiniPot-V arXiv 2506.15745), never the newest quarter.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vlmfast.core import UserError, parse_bytes
from vlmfast.stream.blocks import Block, Payload
from vlmfast.stream.pack import FORMATS, Packed, pack, unpack
from vlmfast.stream.reps import RepTable
from vlmfast.stream.segments import BlockLost, Segments, StoreError

META = 600  # bytes that a block's own record takes in RAM, about
SEGMENT = 8 << 20


class Store:
    """ram, disk_limit: bytes or text ("2GiB"). path: folder of the disk tier, None for none. fmt: "int8" (default),
    "bf16", "model". flush_seconds: a segment is written at the latest after so much stream."""

    def __init__(
        self,
        ram: int | str = "2GiB",
        path: str | os.PathLike[str] | None = None,
        disk_limit: int | str | None = None,
        fmt: str = "int8",
        flush_seconds: float = 30.0,
        head: dict[str, Any] | None = None,
    ) -> None:
        if fmt not in FORMATS:
            raise UserError(f"kept as {fmt!r} is not known; known: {', '.join(FORMATS)}")
        limit = parse_bytes("ram", ram)
        if limit is None:
            raise UserError('ram=None: the store needs a limit, e.g. ram="2GiB"')
        self.ram, self.fmt, self.flush_seconds = limit, fmt, flush_seconds
        self.blocks: dict[int, Block] = {}  # in stream order
        self.held: dict[int, Packed] = {}  # blocks in RAM
        self.dirty: list[int] = []  # blocks not on disk yet, in order (with a disk)
        self.reps = RepTable()
        self.held_bytes = 0
        self.peak_ram = 0
        self.evicted = 0
        self.lost: list[str] = []  # what could not be read any more
        self.disk_limit = parse_bytes("disk_limit", disk_limit)
        self.disk = None if path is None else Segments(path, self.disk_limit, head or {})
        self.segment = SEGMENT if self.disk_limit is None else min(SEGMENT, max(1, self.disk_limit // 8))

    def create(self) -> Store:
        """Make the disk folder, if there is to be one."""
        if self.disk is not None:
            self.disk.create()
        return self

    def open(self) -> Store:
        """Take up an existing folder; what was damaged is named in `lost`."""
        assert self.disk is not None
        blocks, reps = self.disk.open()
        for block in blocks:
            rep, embedding = reps[block.id]
            self._reserve(self.reps.cost(rep, embedding) + META)
            self.blocks[block.id] = block
            self.reps.add(block.id, rep, embedding)
        self.lost += self.disk.skipped
        return self

    # -- sizes ---------------------------------------------------------------------------------------------------------

    @property
    def ram_bytes(self) -> int:
        """Bytes in RAM: blocks, representatives and records."""
        return self.held_bytes + self.reps.nbytes() + META * len(self.blocks)

    @property
    def disk_bytes(self) -> int:
        return 0 if self.disk is None else self.disk.used

    @property
    def archive_bytes(self) -> int:
        """Bytes of keys, values, scales and representatives of all stored blocks, each counted once."""
        if self.disk is None:
            return self.held_bytes + self.reps.nbytes()
        waiting = [self.held.get(i) for i in list(self.dirty)]  # a status line may ask while another thread encodes
        return self.disk.segment_bytes + sum(p.nbytes() for p in waiting if p is not None)

    # -- in ------------------------------------------------------------------------------------------------------------

    def add(self, block: Block, payload: Payload) -> None:
        """Store a block. Raises StoreError (nothing stored is lost, this block is not taken) when there is no room."""
        packed = pack(payload.keys, payload.values, payload.rep, self.fmt, payload.embedding)
        cost = self.reps.cost(packed.rep, packed.embedding)
        self._reserve(packed.nbytes() + cost + META)
        self.blocks[block.id] = block
        self.held[block.id] = packed
        self.held_bytes += packed.nbytes()
        self.reps.add(block.id, packed.rep, packed.embedding)
        self.peak_ram = max(self.peak_ram, self.ram_bytes)
        if self.disk is not None:
            self.dirty.append(block.id)

    def due(self) -> bool:
        """Is it time to write a segment?"""
        if self.disk is None or not self.dirty:
            return False
        span = self.blocks[self.dirty[-1]].end - self.blocks[self.dirty[0]].start
        return span >= self.flush_seconds or self._dirty_bytes() >= self.segment

    def _dirty_bytes(self) -> int:
        return sum(self.held[i].nbytes() for i in self.dirty)

    def flush(self) -> None:
        """Write everything that is not on disk yet. Raises StoreError; the blocks then stay in RAM."""
        while self.disk is not None and self.dirty:
            batch: list[int] = []
            size = 0
            for i in self.dirty:
                size += self._file_bytes(i)
                if batch and size > self.segment:
                    break
                batch.append(i)
            self._disk_room(sum(self._file_bytes(i) for i in batch) + 256 + 16 * len(batch))
            batch = [i for i in batch if i in self.blocks]
            if batch:
                self.disk.write([(self.blocks[i], self.held[i]) for i in batch])
            self.dirty = self.dirty[len(batch) :]

    def _file_bytes(self, i: int) -> int:
        """Bytes of a block in a segment, its share of the header included (an upper bound)."""
        packed, block = self.held[i], self.blocks[i]
        rep = packed.rep.numel() * 2 + (0 if packed.embedding is None else packed.embedding.numel() * 2)
        return packed.nbytes() + rep + 900 + 8 * block.rel.numel()

    # -- room ----------------------------------------------------------------------------------------------------------

    def _reserve(self, need: int) -> None:
        """Make `need` bytes of RAM free: first copies that are on disk too, then (without a disk) whole blocks."""
        over = self.ram_bytes + need - self.ram
        if over <= 0:
            return
        dirty = set(self.dirty)
        if self.disk is not None:
            clean = [i for i in self.held if i not in dirty]
            if sum(self.held[i].nbytes() for i in clean) < over and self.dirty:
                self.flush()
                clean = list(self.held)
            for i in clean:
                if over <= 0:
                    return
                over -= self._release(i)
        if over > 0:
            over -= self._evict(over)
        if over > 0:
            raise StoreError(
                f"ram={self.ram:,} bytes cannot take a block of {need:,} beside {self.ram_bytes:,} in use "
                "(representatives of all blocks stay in RAM): raise ram="
            )

    def _release(self, i: int) -> int:
        """Forget the RAM copy of a block that is on disk; bytes freed."""
        freed = self.held.pop(i).nbytes()
        self.held_bytes -= freed
        return freed

    def _evict(self, need: int) -> int:
        """Give up blocks until `need` bytes of RAM are free; a sixteenth of the limit at a time."""
        target, freed, gone = max(need, self.ram // 16), 0, []
        for i in self.ranked():
            if freed >= target:
                break
            freed += META + (self.held[i].nbytes() if i in self.held else 0)
            gone.append(i)
        if freed < need:
            return 0
        before = self.ram_bytes
        self.remove(gone)
        return before - self.ram_bytes

    def ranked(self, ids: Iterable[int] | None = None) -> list[int]:
        """Blocks by what they are worth, least first; the newest quarter is not among them."""
        order = sorted(self.blocks if ids is None else ids)
        if ids is None:
            order = order[: len(order) - max(1, len(order) // 4)]
        if not order:
            return []
        norm = sum(self.blocks[i].norm for i in order) / len(order) or 1.0
        new = sum(self.blocks[i].novelty for i in order) / len(order) or 1.0
        worth = {i: self.blocks[i].novelty / new + self.blocks[i].norm / norm for i in order}
        return sorted(order, key=lambda i: (worth[i], i))

    def remove(self, ids: list[int]) -> None:
        """Give up blocks in every tier."""
        gone = set(ids) & self.blocks.keys()
        files = {} if self.disk is None else {self.disk.where[i]: None for i in gone if i in self.disk.where}
        for file in files:
            assert self.disk is not None
            keep = [i for i in self.disk.entries[file]["blocks"] if i not in gone and i in self.blocks]
            self._rewrite(file, keep)
        for i in gone:
            if i in self.held:
                self._release(i)
            self.reps.remove(i)
            del self.blocks[i]
        self.dirty = [i for i in self.dirty if i not in gone]
        self.evicted += len(gone)

    def _rewrite(self, file: str, keep: list[int]) -> None:
        assert self.disk is not None
        try:
            self.disk.rewrite(file, [(self.blocks[i], self.disk.whole(i)) for i in keep])
        except BlockLost as e:
            self._forget(file, e)

    def _disk_room(self, need: int, segment: bool = True) -> None:
        """Give up blocks on disk until `need` bytes fit, and one more segment to rewrite others with.

        Raises StoreError, and gives up nothing, when that cannot be.
        """
        if self.disk is None or self.disk_limit is None:
            return
        spare = max([self.segment, need * segment, *(e["bytes"] for e in self.disk.entries.values())])
        fixed = self.disk.used - self.disk.segment_bytes
        if fixed + need + spare > self.disk_limit:
            raise StoreError(
                f"disk_limit={self.disk_limit:,} bytes cannot hold {need:,} more and room to rewrite a segment"
            )
        while self.disk.used + need + spare > self.disk_limit:
            files = list(self.disk.entries)
            old = files[: len(files) - max(1, len(files) // 4)] or files[:-1]
            if not old:
                raise StoreError(
                    f"disk_limit={self.disk_limit:,} bytes is too small: it must hold a few segments of {spare:,} bytes"
                )
            worth = {i: n for n, i in enumerate(self.ranked([i for f in old for i in self.disk.entries[f]["blocks"]]))}
            file = min(old, key=lambda f: _mean([worth[i] for i in self.disk.entries[f]["blocks"]]))  # type: ignore[union-attr]
            held = sorted(self.disk.entries[file]["blocks"], key=lambda i: worth[i])
            self.remove(held[: (len(held) + 1) // 2])

    # -- out -----------------------------------------------------------------------------------------------------------

    def layer(self, i: int, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Un-rotated keys and values (Hk, n, Dh) of one layer of a block, in `dtype` on the CPU.

        Raises BlockLost when the disk no longer has it: its segment is then forgotten and named in `lost`.
        """
        rep = self.reps.rep(i, layer)
        packed = self.held.get(i)
        if packed is not None:
            ks = None if packed.key_scale is None else packed.key_scale[layer]
            vs = None if packed.value_scale is None else packed.value_scale[layer]
            return unpack(packed.keys[layer], packed.values[layer], ks, vs, rep, dtype)
        assert self.disk is not None
        file = self.disk.where[i]
        try:
            got = self.disk.layer(i, layer)
        except BlockLost as e:
            self._forget(file, e)
            raise
        return unpack(got["k"], got["v"], got.get("ks"), got.get("vs"), rep, dtype)

    def _forget(self, file: str, error: Exception) -> None:
        assert self.disk is not None
        held = [i for i in self.disk.forget(file) if i in self.blocks]
        self.dirty = sorted({*self.dirty, *(i for i in held if i in self.held)})  # still in RAM: written again
        gone = [i for i in held if i not in self.held]
        for i in gone:
            self.reps.remove(i)
            del self.blocks[i]
        self.lost.append(f"{file} ({len(gone)} blocks): {error}")

    def whole(self, i: int) -> Packed:
        """A block with all its layers, as it is kept."""
        if i in self.held:
            return self.held[i]
        assert self.disk is not None
        return self.disk.whole(i)

    def save_state(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Flush, then write the session's state beside the segments. Raises StoreError."""
        assert self.disk is not None
        self.flush()
        self._disk_room(sum(x.numel() * x.element_size() for x in tensors.values()) + 100_000, segment=False)
        self.disk.write_state(tensors, meta)

    def close(self) -> None:
        if self.disk is not None:
            self.disk.close()


def _mean(xs: list[int]) -> float:
    return sum(xs) / max(1, len(xs))
