"""Representatives of all stored blocks, per layer in one table, so that scoring an hour is one product per layer."""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor

SLOTS = 64  # of the first slab
MOST = 512  # of any slab


class RepresentativeTable:
    """Slabs of slots: rep (L, slots, Hk * Dh) float16, their norms (L, slots) float32, optional embeddings (slots, E)
    float16 for an external encoder. A freed slot is used again before a slab is added, and each new slab is as large
    as all before it (up to `MOST`): an hour is scored in a few products, and little is reserved for nothing."""

    def __init__(self) -> None:
        self.slabs: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.embeddings: list[Tensor] = []
        self.slot: dict[int, int] = {}  # block id -> slot
        self.free: list[int] = []
        self.heads = 0
        self.total = 0  # slots in all slabs
        self.starts: list[int] = []  # first slot of each

    def _at(self, slot: int) -> tuple[int, int]:
        """Slab and row of a slot."""
        slab = bisect_right(self.starts, slot) - 1
        return slab, slot - self.starts[slab]

    def cost(self, rep: Tensor, embedding: Tensor | None) -> int:
        """Bytes that adding one more block takes (0 while a slot is free)."""
        if self.free:
            return 0
        return self._next * (2 * rep.numel() + 4 * rep.shape[0] + (0 if embedding is None else 2 * embedding.numel()))

    @property
    def _next(self) -> int:
        """Slots of the next slab."""
        return min(MOST, max(SLOTS, self.total))

    @property
    def grown(self) -> int:
        """Slots when there is one more slab."""
        return self.total + self._next

    def add(self, block: int, rep: Tensor, embedding: Tensor | None) -> None:
        """rep (L, Hk, Dh)."""
        layers, self.heads, width = rep.shape
        if not self.free:
            first, many = self.total, self._next
            self.slabs.append(torch.zeros(layers, many, self.heads * width, dtype=torch.float16))
            self.norms.append(torch.zeros(layers, many))
            if embedding is not None:
                self.embeddings.append(torch.zeros(many, embedding.numel(), dtype=torch.float16))
            self.starts.append(first)
            self.total = first + many
            self.free = list(range(self.total - 1, first - 1, -1))
        slot = self.free.pop()
        slab, row = self._at(slot)
        self.slabs[slab][:, row] = rep.reshape(layers, -1)
        self.norms[slab][:, row] = rep.float().reshape(layers, -1).norm(dim=-1)
        if embedding is not None:
            self.embeddings[slab][row] = embedding
        self.slot[block] = slot

    def remove(self, block: int) -> None:
        slot = self.slot.pop(block, None)
        if slot is not None:
            self.free.append(slot)

    def rep(self, block: int, layer: int) -> Tensor:
        """(Hk, Dh) float16."""
        slab, row = self._at(self.slot[block])
        return self.slabs[slab][layer, row].view(self.heads, -1)

    def of(self, block: int) -> tuple[Tensor, Tensor | None]:
        """The representative (L, Hk, Dh) of all layers and the embedding (E,), both float16."""
        slab, row = self._at(self.slot[block])
        rep = self.slabs[slab][:, row].reshape(self.slabs[slab].shape[0], self.heads, -1).clone()
        return rep, self.embeddings[slab][row].clone() if self.embeddings else None

    def slots(self, ids: list[int]) -> Tensor:
        """(N,) int64 rows of blocks in the table, for `products` and the like."""
        return torch.tensor([self.slot[i] for i in ids], dtype=torch.long)

    def products(self, layer: int, queries: Tensor, slots: Tensor, centred: bool = False) -> Tensor:
        """Inner products (q, N) of queries (q, Hk, Dh) with the representatives in `slots` (N,); centred: less the
        product with their mean."""
        flat = queries.detach().float().flatten(1).cpu().T
        scores = torch.cat([slab[layer].float() @ flat for slab in self.slabs])[slots].T
        return scores - scores.mean(1, keepdim=True) if centred else scores

    def norms_of(self, layer: int, slots: Tensor, centred: bool = False) -> Tensor:
        """(N,) norms of the representatives in `slots`; centred: of their difference to their mean."""
        if not centred:
            return torch.cat([n[layer] for n in self.norms])[slots]
        held = torch.cat([slab[layer] for slab in self.slabs])[slots].float()
        return (held - held.mean(0)).norm(dim=1)

    def embedding(self, slots: Tensor) -> Tensor | None:
        """(N, E) float32, or None when nothing was embedded."""
        return torch.cat(self.embeddings)[slots].float() if self.embeddings else None

    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for group in (self.slabs, self.norms, self.embeddings) for x in group)
