"""Keeps the full cache, read by our own attention kernels: the baseline of compressed caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmfast.core import CompressedLayer, LayerView, UserError
from vlmfast.fields import Fraction
from vlmfast.prefill.base import KVPolicy


@dataclass(frozen=True)
class Full(KVPolicy):
    """Keeps every column (padding excepted), in the same storage and read by the same kernels; int8 as elsewhere."""

    name: ClassVar[str] = "full"
    keep: Fraction = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep != 1 or self.budget is not None:
            raise UserError(
                f"keep={self.keep} and budget={self.budget} in full: it keeps every column; use snapkv to drop some"
            )

    def fits(self, columns: int) -> bool:
        return False

    def compress(self, view: LayerView) -> CompressedLayer:
        return self.gather(view, [None] * len(view.kinds))
