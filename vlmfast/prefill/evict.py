"""A cache layer that evicts columns during decoding, and therefore cannot remove tokens again.

Speculation with a draft removes refused tokens, so it rejects such a layer. `Speculate()` without a draft and plain
`generate` accept it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmfast.core import CompressedLayer, Unsupported
from vlmfast.prefill.ragged_layer import KVLayer
from vlmfast.runtime.stacked_layers import LayerRows


class EvictingLayer(KVLayer):
    """Base: `evict` runs before new columns are appended. rule: the settings of the subclass, stored for `reset`."""

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
            num_tokens = key_states.shape[2]
            self.evict(num_tokens)
            self.decoded += num_tokens
        return super().update(key_states, value_states, *args, **kwargs)

    def compress(
        self, kept: CompressedLayer | None, positions: Tensor | None = None, rows: LayerRows | None = None
    ) -> None:
        assert self.keys is not None
        batch_size, num_heads, num_columns, _ = self.keys.shape
        real_lengths = [num_columns] * batch_size
        if kept is not None and kept.columns is not None:
            real_lengths = kept.columns
        elif positions is not None:
            real_lengths = (positions >= 0).sum(1).tolist()
        self.cut = [
            kept is not None and len(kept.keep[row_index]) < real_lengths[row_index // num_heads]
            for row_index in range(batch_size * num_heads)
        ]
        super().compress(kept, positions, rows)

    def rows_of(self, indices: Tensor) -> list[int]:
        """The rows that belong to some batch rows (int64, or a bool mask), in order."""
        indices = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        return [
            int(batch_index) * self.heads + head_index for batch_index in indices for head_index in range(self.heads)
        ]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.cut = [self.cut[row_index] for row_index in self.rows_of(indices)] if self.cut else []
        super().batch_select_indices(indices)

    def evict(self, q: int) -> None:
        """Drop columns of every store before q new ones come."""
        raise NotImplementedError

    def crop(self, tokens_to_remove: int) -> None:
        """Allowed before the first decoded token only, since evicted columns are lost. Raises Unsupported later."""
        num_removed = -tokens_to_remove if tokens_to_remove <= 0 else self.get_seq_length() - tokens_to_remove
        if num_removed > 0 and self.decoded:
            raise Unsupported(
                f"a {type(self).__name__} evicts while decoding and cannot take {num_removed} tokens back: "
                "use a policy without decode-time eviction"
            )
        super().crop(tokens_to_remove)
