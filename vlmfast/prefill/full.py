"""The full cache under our own attention: the baseline that compressed caches are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmfast.core import CompressedLayer, Kind, LayerView
from vlmfast.prefill.base import KVPolicy


@dataclass(frozen=True)
class Full(KVPolicy):
    """Keeps every column (padding excepted), in the same storage and read by the same kernels."""

    name: ClassVar[str] = "full"
    keep: float = 1.0

    def fits(self, columns: int) -> bool:
        return False

    def compress(self, view: LayerView) -> CompressedLayer:
        hk = view.keys.shape[1]
        keep = [(kinds != Kind.PAD).nonzero()[:, 0] for kinds in view.kinds for _ in range(hk)]
        return CompressedLayer(keep)
