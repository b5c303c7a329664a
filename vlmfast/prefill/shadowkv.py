"""ShadowKV: low-rank keys in fast memory, values in host memory, chunks rebuilt as needed (arXiv 2410.21465)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

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
    stacks: ClassVar[bool] = True
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
        num_heads, num_columns, head_size = row.keys.shape
        if row.rotation.cos.shape[-1] != head_size:
            raise Unsupported(
                f"{self.name} undoes the rotation of whole keys, and this model rotates "
                f"{row.rotation.cos.shape[-1]} of {head_size} channels: use HybridKV, whose dynamic heads keep "
                "whole keys"
            )
        cosines, sines = row.rotation.cos.float(), row.rotation.sin.float()
        unrotated_keys = rotate(row.keys.float(), cosines, -sines) / (
            cosines.square() + sines.square()
        )  # keys before RoPE
        by_layer = unrotated_keys.view(row.stacked, -1, num_columns, head_size)
        left_vectors, singular_values, right_vectors = torch.linalg.svd(
            by_layer.transpose(1, 2).reshape(row.stacked, num_columns, -1), full_matrices=False
        )
        num_factors = min(self.rank, singular_values.shape[1])
        left_factors = left_vectors[:, :, :num_factors] * singular_values[:, None, :num_factors]
        right_factors = right_vectors[:, :num_factors].unflatten(2, (-1, head_size)).transpose(1, 2)
        factors: list[LowRank | None] = []
        for number, left, right in zip(row.numbers or (row.layer,), left_factors, right_factors, strict=True):
            own_left, own_right = own_copy(left, row.keys.dtype), own_copy(right, row.keys.dtype)
            is_owner = number == row.rotation.owner
            factors += [LowRank(own_left, head, row.rotation.cos, row.rotation.sin, is_owner) for head in own_right]
        head_budgets = torch.full((num_heads,), self.allowance(row))
        is_dynamic = torch.ones_like(head_budgets, dtype=torch.bool)
        all_columns = torch.arange(num_columns, device=row.keys.device)
        return Choice([all_columns] * num_heads, is_dynamic, head_budgets, low_rank=factors)


def own_copy(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A layer's factor in a storage of its own."""
    return torch.empty(factor.shape, dtype=dtype, device=factor.device).copy_(factor)
