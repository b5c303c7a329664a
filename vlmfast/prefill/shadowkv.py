"""ShadowKV: low-rank keys in fast memory, values in host memory, chunks rebuilt as needed (arXiv 2410.21465)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmfast.core import LowRank, Retrieval, Unsupported, UserError
from vlmfast.fields import PositiveInt
from vlmfast.prefill.base import Choice, KVPolicy, Row
from vlmfast.runtime.late_rope import rotate


@dataclass(frozen=True)
class ShadowKV(KVPolicy):
    """Keys before RoPE, all heads of a layer side by side, are cut to a low rank; every head is dynamic.

    A query chooses chunks by their mean key; the chosen values come from host memory and the chosen keys are multiplied
    from the factors and rotated. The budget counts what a head reads per step. The paper also keeps outlier chunks
    (those their mean stands for badly) exactly, left out here; sinks and recent columns always are in fast memory, with
    rebuilt keys. Rotation tables are shared by all layers and counted in the first.

    rank: of the keys of a layer (paper 160, for 8 key heads of 128)
    chunk: columns per chunk (paper 8); fewer where the budget cannot hold two of them
    """

    name: ClassVar[str] = "shadowkv"
    rank: PositiveInt = 160
    chunk: PositiveInt = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.int8:
            raise UserError(f"int8=True in {self.name}: its keys are factors and its values in host memory, lower rank")

    def least(self) -> int:
        """Sinks, recent columns, and one chosen column."""
        return self.sinks + self.recent + 1

    def retrieval(self) -> Retrieval:
        return Retrieval(self.chunk, "mean", 1, self.sinks, self.recent)

    def choose(self, row: Row) -> Choice:
        if row.rotation is None:
            raise Unsupported(
                f"{self.name} needs the rotation of every column, which this prefill does not have (a stream's working "
                "set, say): use HybridKV, whose dynamic heads keep whole keys"
            )
        hk, n, d = row.keys.shape
        if row.rotation.cos.shape[-1] != d:
            raise Unsupported(
                f"{self.name} undoes the rotation of whole keys, and this model rotates "
                f"{row.rotation.cos.shape[-1]} of {d} channels: use HybridKV, whose dynamic heads keep whole keys"
            )
        cos, sin = row.rotation.cos.float(), row.rotation.sin.float()
        flat = rotate(row.keys.float(), cos, -sin) / (cos.square() + sin.square())  # keys before RoPE
        u, s, vh = torch.linalg.svd(flat.transpose(0, 1).reshape(n, hk * d), full_matrices=False)
        r = min(self.rank, len(s))
        left = (u[:, :r] * s[:r]).to(row.keys.dtype)
        right = vh[:r].view(r, hk, d).to(row.keys.dtype)
        owner = row.rotation.owner == row.layer
        factors = [
            LowRank(
                left,
                right[:, h].clone(memory_format=torch.contiguous_format),
                row.rotation.cos,
                row.rotation.sin,
                owner,
            )
            for h in range(hk)
        ]
        everything = torch.arange(n, device=row.keys.device)
        budget = torch.full((hk,), self.allowance(row), device=row.keys.device)
        return Choice([everything] * hk, torch.ones_like(budget, dtype=torch.bool), budget, low_rank=[*factors])
