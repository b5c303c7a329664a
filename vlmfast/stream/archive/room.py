"""Makes room in RAM and on disk: copies are dropped, then blocks coarsened, then those worth least given up.

The representatives of all blocks stay in RAM, so with a disk too RAM limits how many blocks there are: the table of
representatives grows to three quarters of it, then blocks are given up for the ones that come.
"""

from __future__ import annotations

from typing import Any

from vlmfast.stream.archive.eviction import half_a_segment, order_to_give_up
from vlmfast.stream.archive.folder import NoRoom, StoreError
from vlmfast.stream.blocks import PackedBlock

RECORD_BYTES = 600  # bytes that a block's own record takes in RAM, about


class Room:
    """Makes room in one `Store`."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def free_slot(self, size: int, packed: PackedBlock) -> None:
        """Where the table of representatives must grow and may not, give up blocks for a free slot in it."""
        store = self.store
        slab = store.representatives.cost(packed.representative, packed.embedding)
        if not slab or not store.blocks:
            return
        grown = store.representatives.nbytes() + slab + RECORD_BYTES * store.representatives.grown
        if store.disk is not None:
            full = grown > store.ram * 3 // 4
        else:
            over = store.ram_bytes + slab + size - store.ram
            full = over > store.coarsening.for_ram(over)
        if full:
            self.evict(0, 1 + len(store.blocks) // 16)

    def reserve(self, need: int) -> None:
        """Make `need` bytes of RAM free: first copies that are on disk too, then (without a disk) blocks."""
        store = self.store
        over = store.ram_bytes + need - store.ram
        if over <= 0:
            return
        if store.disk is not None:
            unwritten = set(store.unwritten)
            copies = [i for i in store.in_ram if i not in unwritten]
            if sum(store.in_ram[i].nbytes() for i in copies) < over and store.unwritten:
                store.flush()
                copies = list(store.in_ram)
            for i in copies:
                if over <= 0:
                    return
                over -= store.release(i)
        over -= store.coarsening.for_ram(over)
        if over > 0:
            over -= self.evict(over)
        if over > 0:
            raise StoreError(
                f"ram={store.ram:,} bytes cannot take a block of {need:,} beside {store.ram_bytes:,} in use "
                "(representatives of all blocks stay in RAM): raise ram="
            )

    def evict(self, need: int, slots: int = 0) -> int:
        """Give up blocks until `need` bytes of RAM and `slots` blocks are free, a sixteenth of the limit at a time.

        Gives up nothing, and returns 0, when there is not so much to give up."""
        store = self.store
        gone: list[int] = []
        target, freed = max(need, store.ram // 16) if need else 0, 0
        for i in order_to_give_up(store.blocks, {} if store.disk is None else store.disk.entries):
            if freed >= target and len(gone) >= slots:
                break
            freed += RECORD_BYTES + (store.in_ram[i].nbytes() if i in store.in_ram else 0)
            gone.append(i)
        if freed < need:
            return 0
        before = store.ram_bytes
        store.remove(gone)
        return before - store.ram_bytes

    def on_disk(self, need: int) -> None:
        """Coarsen, then give up blocks on disk until `need` bytes fit, and one more segment to rewrite others with.

        Raises NoRoom, and gives up nothing, when that cannot be.
        """
        store = self.store
        if store.disk is None or store.disk_limit is None:
            return
        spare = max([store.segment_size, need, *(e["bytes"] for e in store.disk.entries.values())])
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
