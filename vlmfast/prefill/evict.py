"""A cache layer that goes on evicting while tokens are decoded, and therefore cannot give tokens back.

Speculation with a draft needs that and refuses it; `Speculate()` without a draft and ordinary `generate` do not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmfast.core import CompressedLayer, Unsupported
from vlmfast.prefill.ragged_layer import KVLayer


class EvictingLayer(KVLayer):
    """Base: `evict` runs before new columns are appended. rule: the numbers a subclass goes by, kept for `reset`."""

    is_croppable = False

    def __init__(self, **rule: Any) -> None:
        super().__init__()
        self.rule = rule
        self.decoded = 0  # columns appended since the prefill
        self.cut: list[bool] = []  # per row (batch row, head): did the prefill exceed its budget?

    def reset(self) -> None:
        self.__init__(**self.rule)  # type: ignore[misc]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.is_initialized:
            self.check_announced()
            if self.keys is not None:
                self.compress(None)
            q = key_states.shape[2]
            self.evict(q)
            self.decoded += q
        return super().update(key_states, value_states, *args, **kwargs)

    def compress(self, kept: CompressedLayer | None, positions: Tensor | None = None) -> None:
        assert self.keys is not None
        b, hk, n, _ = self.keys.shape
        real = [n] * b if positions is None else (positions >= 0).sum(1).tolist()
        self.cut = [kept is not None and len(kept.keep[r]) < real[r // hk] for r in range(b * hk)]
        super().compress(kept, positions)

    def rows_of(self, indices: Tensor) -> list[int]:
        """The rows that belong to some batch rows (int64, or a bool mask), in order."""
        indices = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        return [int(i) * self.heads + h for i in indices for h in range(self.heads)]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.cut = [self.cut[row] for row in self.rows_of(indices)] if self.cut else []
        super().batch_select_indices(indices)

    def evict(self, q: int) -> None:
        """Drop columns of every store before q new ones come."""
        raise NotImplementedError

    def crop(self, tokens_to_remove: int) -> None:
        """Only before anything was decoded: what a decoded token drove out is gone. Raises Unsupported later."""
        remove = -tokens_to_remove if tokens_to_remove <= 0 else self.get_seq_length() - tokens_to_remove
        if remove > 0 and self.decoded:
            raise Unsupported(
                f"a {type(self).__name__} evicts while decoding and cannot take {remove} tokens back: "
                "use a policy without decode-time eviction"
            )
        super().crop(tokens_to_remove)
