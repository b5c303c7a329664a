"""The data and the protocol of methods that drop columns between layers of the language model."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor


@dataclass
class CutInputs:
    """The columns that reached a cut, as a method sees them after the layer before the cut."""

    kinds: Tensor  # (B, P) int8, `Kind`
    hidden: Tensor  # (B, P, D), output of the layer before the cut
    before: Tensor  # (B, P, D), its input
    weights: Tensor | None  # (B, H, W, P) float32 attention of the last W columns in that layer; None if not asked for


class LayerMethod(Protocol):
    """What the runtime asks of a method that acts between layers."""

    name: ClassVar[str]

    @property
    def keep(self) -> float: ...

    def cuts(self, layers: int) -> tuple[tuple[int, float], ...]:
        """(layer, fraction of the entered visual columns that stay from this layer on), ascending; layer >= 1."""
        ...

    def window(self) -> int:
        """Number of last columns whose attention it needs (0 = attention-free)."""
        ...

    def rate(self, cut_inputs: CutInputs) -> Tensor:
        """(B, P) scores of the visual columns, higher is kept."""
        ...


@dataclass
class PrunedPrefill:
    """One prefill with new media on its way through the layers."""

    kinds: Tensor  # (B, P) int8 of the columns now running
    index: Tensor  # (B, P) int64 logical column of each
    entered: Tensor  # (B,) visual columns that entered, on the host
    visual: Tensor  # (B,) of them those now running, on the host
    others: Tensor  # (B,) columns that are neither visual nor padding, on the host
    prior: Tensor  # (B, past) bool, physical columns already in the uncut layers, not padding
    done: int = 0
    source: Tensor | None = None  # (B, P) which of the entered columns they are
    before: Tensor | None = None
    weights: Tensor | None = None
    tables: tuple[Tensor, Tensor] | None = None  # cos and sin of the columns now running
    valid: Tensor | None = None  # (B, past + P) bool of the cut layers
    padded: bool = False  # is any of those False?
    masks: dict[str, Any] = field(default_factory=dict)

    @property
    def ragged(self) -> bool:
        """Are some of the columns now running padding?"""
        return bool((self.visual + self.others < self.kinds.shape[1]).any())


def all_keys(module: Any, hidden: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """(B, Hk, P, Dh) rotated keys, recomputed where there is no cache to read them from."""
    layer_keys = module.k_proj(hidden).unflatten(-1, (-1, module.head_dim))
    if hasattr(module, "k_norm"):
        layer_keys = module.k_norm(layer_keys)
    layer_keys = layer_keys.transpose(1, 2)
    apply_rotation = sys.modules[type(module).__module__].apply_rotary_pos_emb  # the family's own
    return apply_rotation(layer_keys, layer_keys, *tables)[1]


def take_tables(tables: tuple[Tensor, Tensor], source: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (B or 1, P, Dh) of the columns `source` (B, S)."""
    batch_size, num_kept = source.shape
    cos, sin = (
        table.expand(batch_size, -1, -1).gather(1, source[..., None].expand(batch_size, num_kept, table.shape[-1]))
        for table in tables
    )  # fmt: skip
    return cos, sin
