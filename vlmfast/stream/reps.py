"""Representatives of all stored blocks, per layer in one table, so that scoring an hour is one product per layer."""

from __future__ import annotations

import torch
from torch import Tensor

SLOTS = 64


class RepTable:
    """Slabs of `SLOTS` slots: rep (L, SLOTS, Hk * Dh) float16, their norms (L, SLOTS) float32, optional embeddings
    (SLOTS, E) float16 for an external encoder. A freed slot is used again before a slab is added."""

    def __init__(self) -> None:
        self.slabs: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.embeddings: list[Tensor] = []
        self.slot: dict[int, int] = {}  # block id -> slot
        self.free: list[int] = []
        self.heads = 0

    def cost(self, rep: Tensor, embedding: Tensor | None) -> int:
        """Bytes that adding one more block takes (0 while a slot is free)."""
        return 0 if self.free else self._slab_bytes(rep, embedding)

    @staticmethod
    def _slab_bytes(rep: Tensor, embedding: Tensor | None) -> int:
        layers = rep.shape[0]
        return SLOTS * (2 * rep.numel() + 4 * layers + (0 if embedding is None else 2 * embedding.numel()))

    def add(self, block: int, rep: Tensor, embedding: Tensor | None) -> None:
        """rep (L, Hk, Dh)."""
        layers, self.heads, width = rep.shape
        if not self.free:
            first = len(self.slabs) * SLOTS
            self.slabs.append(torch.zeros(layers, SLOTS, self.heads * width, dtype=torch.float16))
            self.norms.append(torch.zeros(layers, SLOTS))
            if embedding is not None:
                self.embeddings.append(torch.zeros(SLOTS, embedding.numel(), dtype=torch.float16))
            self.free = list(range(first + SLOTS - 1, first - 1, -1))
        slot = self.free.pop()
        slab, row = divmod(slot, SLOTS)
        self.slabs[slab][:, row] = rep.reshape(layers, -1)
        self.norms[slab][:, row] = rep.float().reshape(layers, -1).norm(dim=-1)
        if embedding is not None:
            self.embeddings[slab][row] = embedding
        self.slot[block] = slot

    def remove(self, block: int) -> None:
        self.free.append(self.slot.pop(block))

    def rep(self, block: int, layer: int) -> Tensor:
        """(Hk, Dh) float16."""
        slab, row = divmod(self.slot[block], SLOTS)
        return self.slabs[slab][layer, row].view(self.heads, -1)

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
