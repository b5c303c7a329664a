"""Representatives: the mean key by which retrieval finds a block. How one is made, and the table of all of them.

ReKV's representative of a block is the mean of its keys. Once redundant tokens are dropped, the mean of the few that
are left describes what changed, and of a still scene it describes noise: the block is no longer found by what it shows.
So the last stored key of every image position supplies the keys of dropped tokens, as EfficientReKV's comparison does
for features.
"""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor

from vlmfast.runtime.transfers import columns

FIRST_SLAB = 64  # slots of the first slab
LARGEST_SLAB = 512  # slots of any slab


class LastKeys:
    """Last stored key per image position; supplies keys for dropped tokens.

    keys (L, Hk, P, Dh) un-rotated, of the P positions of an image; known (P,) bool, on the host: those that had a key.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.known = torch.zeros(0, dtype=torch.bool)

    def forget(self) -> None:
        """Start anew: the size of the frames changed."""
        self.keys = None

    def copy(self) -> LastKeys:
        """One that does not follow this one's changes."""
        copied = LastKeys()
        copied.keys, copied.known = None if self.keys is None else self.keys.clone(), self.known
        return copied

    def representative(self, keys: Tensor, kept: Tensor) -> Tensor:
        """Take in a block's visual keys (L, Hk, n, Dh), of the n image positions where kept (P,) bool, on the host, is
        True.

        Returns its representative (L, Hk, Dh) float32: the mean of the last keys of all positions seen so far.
        """
        if self.keys is None or len(self.known) != len(kept):
            layers, heads, _, width = keys.shape
            self.keys = keys.new_zeros(layers, heads, len(kept), width)
            self.known = torch.zeros_like(kept)
        self.keys[:, :, columns(kept, keys.device)] = keys
        self.known = self.known | kept
        return self.keys[:, :, columns(self.known, keys.device)].float().mean(2)

    def snapshot(self) -> dict[str, Tensor]:
        """Tensors for a saved session."""
        if self.keys is None:
            return {}
        return {"standing": self.keys.cpu().contiguous(), "standing.known": self.known}

    def restore(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        """Take up a saved state; one of an older version has none."""
        if "standing" in tensors:
            self.keys, self.known = tensors["standing"].to(device), tensors["standing.known"]

    def nbytes(self) -> int:
        return 0 if self.keys is None else self.keys.numel() * self.keys.element_size()


class RepresentativeTable:
    """The representatives of all stored blocks in a few large tensors, so that scoring an hour is one product per slab.

    slabs (L, slots, Hk * Dh) float16, their norms (L, slots) float32, optional embeddings (slots, E) float16 of an
    external encoder. A freed slot is used again before a slab is added, and each new slab is as large as all before it
    (up to `LARGEST_SLAB`), so that little is reserved for nothing.
    """

    def __init__(self) -> None:
        self.slabs: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.embeddings: list[Tensor] = []
        self.slot: dict[int, int] = {}  # block id -> slot
        self.free: list[int] = []
        self.heads = 0
        self.total = 0  # slots in all slabs
        self.starts: list[int] = []  # first slot of each

    def _place(self, slot: int) -> tuple[int, int]:
        """Number of the slab that holds a slot, and the slot's index in it."""
        slab = bisect_right(self.starts, slot) - 1
        return slab, slot - self.starts[slab]

    def cost(self, representative: Tensor, embedding: Tensor | None) -> int:
        """Bytes that adding one more block takes (0 while a slot is free)."""
        if self.free:
            return 0
        embedded = 0 if embedding is None else 2 * embedding.numel()
        return self._next * (2 * representative.numel() + 4 * representative.shape[0] + embedded)

    @property
    def _next(self) -> int:
        """Slots of the next slab."""
        return min(LARGEST_SLAB, max(FIRST_SLAB, self.total))

    @property
    def grown(self) -> int:
        """Slots when there is one more slab."""
        return self.total + self._next

    def add(self, block: int, representative: Tensor, embedding: Tensor | None) -> None:
        """Put a block's representative (L, Hk, Dh) and embedding (E,) into a free slot."""
        layers, self.heads, width = representative.shape
        if not self.free:
            first, count = self.total, self._next
            self.slabs.append(torch.zeros(layers, count, self.heads * width, dtype=torch.float16))
            self.norms.append(torch.zeros(layers, count))
            if embedding is not None:
                self.embeddings.append(torch.zeros(count, embedding.numel(), dtype=torch.float16))
            self.starts.append(first)
            self.total = first + count
            self.free = list(range(self.total - 1, first - 1, -1))
        slot = self.slot[block] = self.free.pop()
        if embedding is not None:
            slab, index = self._place(slot)
            self.embeddings[slab][index] = embedding
        self.put(block, representative)

    def put(self, block: int, representative: Tensor) -> None:
        """Write a block's representative (L, Hk, Dh) into the slot that it has."""
        slab, index = self._place(self.slot[block])
        slot_rows = representative.reshape(representative.shape[0], -1)
        self.slabs[slab][:, index], self.norms[slab][:, index] = slot_rows, slot_rows.float().norm(dim=-1)

    def remove(self, block: int) -> None:
        slot = self.slot.pop(block, None)
        if slot is not None:
            self.free.append(slot)

    def of_layer(self, block: int, layer: int) -> Tensor:
        """The representative (Hk, Dh) float16 of a block at one layer."""
        slab, index = self._place(self.slot[block])
        return self.slabs[slab][layer, index].view(self.heads, -1)

    def of_block(self, block: int) -> tuple[Tensor, Tensor | None]:
        """The representative (L, Hk, Dh) of all layers and the embedding (E,), both float16."""
        slab, index = self._place(self.slot[block])
        representative = self.slabs[slab][:, index].reshape(self.slabs[slab].shape[0], self.heads, -1).clone()
        return representative, self.embeddings[slab][index].clone() if self.embeddings else None

    def slots(self, ids: list[int]) -> Tensor:
        """(N,) int64 slots of blocks, for `products` and the like."""
        return torch.tensor([self.slot[block_id] for block_id in ids], dtype=torch.long)

    def products(self, layer: int, queries: Tensor, slots: Tensor, centred: bool = False) -> Tensor:
        """Inner products (q, N) of queries (q, Hk, Dh) with the representatives in `slots` (N,); centred: less the
        product with their mean."""
        flat = queries.detach().float().flatten(1).cpu().T
        scores = torch.cat([slab[layer].float() @ flat for slab in self.slabs])[slots].T
        return scores - scores.mean(1, keepdim=True) if centred else scores

    def norms_of(self, layer: int, slots: Tensor, centred: bool = False) -> Tensor:
        """(N,) norms of the representatives in `slots`; centred: of their difference to their mean."""
        if not centred:
            return torch.cat([slab_norms[layer] for slab_norms in self.norms])[slots]
        chosen = torch.cat([slab[layer] for slab in self.slabs])[slots].float()
        return (chosen - chosen.mean(0)).norm(dim=1)

    def embedding(self, slots: Tensor) -> Tensor | None:
        """(N, E) float32, or None when nothing was embedded."""
        return torch.cat(self.embeddings)[slots].float() if self.embeddings else None

    def nbytes(self) -> int:
        return sum(
            tensor.numel() * tensor.element_size()
            for group in (self.slabs, self.norms, self.embeddings)
            for tensor in group
        )
