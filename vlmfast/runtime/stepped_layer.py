"""What a compressed cache layer hands to a decoder that steps without the model's modules, and what it takes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass
class HostRow:
    """One (batch row, head) that chooses among C chunks in host memory; S of them lie in slots of its fast row."""

    pair: int  # batch row * Hk + head
    representatives: Tensor  # (C, Dh) or (C, 2, Dh), on the device: what stands for each chunk
    keys: Tensor  # (C, chunk * Dh), in host memory, pinned where the device is CUDA
    values: Tensor  # (C, chunk * Dh)
    first: int  # column of its fast row at which the slots begin
    held: Tensor  # (S,) int64 on the host: the chunk in each slot


@dataclass
class HostRows:
    """What a compressed layer reads from host memory, token by token."""

    rows: list[HostRow]
    refresh: int  # chunks are chosen anew every so many tokens after the prefill
    fed: int  # tokens after the prefill that the layer holds


@runtime_checkable
class PlainRows(Protocol):
    """A cache layer whose (batch row, head) pairs hold different columns, and that may hand them to the engine."""

    ragged: bool  # is it compressed?
    batch: int

    def tiers(self) -> tuple[str, ...]:
        """Where it holds columns: "exact", "int8", "low", "dynamic"."""
        ...

    def plain_rows(self) -> list[tuple[Tensor, ...]] | str:
        """Keys (n, Dh) and values (n, Dv) in fast memory of every pair, row by row, and where those are int8 their
        scales (n,) float32; or, in words, why that is not all that a step needs, `host_rows` apart."""
        ...

    def host_rows(self) -> HostRows | None:
        """What its pairs read from host memory; None = nothing."""
        ...

    def hold(self, fed: list[int], held: Tensor) -> None:
        """Hold the chunks that the engine chose, before the tokens' own columns are appended. fed: tokens fed before
        each choice; held (len(fed) + 1, pairs, m) int, on the host: chunks by slot after each, and in the end."""
        ...
