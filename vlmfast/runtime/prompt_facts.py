"""Facts about the columns of one prefill, read from the device once for all layers and policies."""

from __future__ import annotations

from torch import Tensor

from vlmfast.core import Held, Kind
from vlmfast.runtime.transfers import on_host, to_device


class PromptFacts:
    """Facts computed from kinds (B, L) int8; a prefill under a policy waits for the device here only.

    held: per row its columns that are not padding; longest: of them; right_padded: is the last column of a row padding?
    visible (B, L) bool on the device, None where nothing is padded.
    """

    def __init__(self, kinds: Tensor, known: Tensor | None = None) -> None:
        """known: `kinds` on the host, where they are there already."""
        self.device = kinds.device
        self.kinds = on_host(kinds, known)
        real_mask = self.kinds != Kind.PAD
        self.right_padded = not bool(real_mask[:, -1].all())
        self.longest = int(real_mask.sum(1).max())
        self.held = [self._held(row_mask) for row_mask in real_mask]
        self.visible = None if bool(real_mask.all()) else kinds != Kind.PAD

    def _held(self, real_mask: Tensor) -> Held:
        columns = real_mask.nonzero()[:, 0]
        device_columns, num_columns = to_device(columns, self.device), len(columns)
        first_column, last_column = (int(columns[0]), int(columns[-1])) if num_columns else (0, -1)
        return Held(
            device_columns,
            slice(first_column, last_column + 1) if last_column - first_column == num_columns - 1 else device_columns,
        )

    def queries(self, w: int) -> tuple[int, Tensor, list[Tensor]]:
        """`text_queries` of the last w columns, and per row the places (n,) int64 of those that count."""
        w, counted = text_queries(self.kinds, w)
        counted_places = [to_device(row_counted.nonzero()[:, 0], self.device) for row_counted in counted]
        return w, to_device(counted, self.device), counted_places


def text_queries(kinds: Tensor, w: int) -> tuple[int, Tensor]:
    """Which of the last w columns of kinds (B, L) are text after the media: how far back they reach, (B, that) bool."""
    recent_kinds = kinds[:, -w:]
    is_query = recent_kinds == Kind.TEXT
    no_text = ~is_query.any(1, keepdim=True)  # media at the very end: the last columns, whatever they are
    is_query = is_query | (no_text & (recent_kinds != Kind.PAD))
    w = min(w, int(is_query.flip(1).long().cumsum(1).argmax(1).max()) + 1)  # columns back to the first that counts
    return w, is_query[:, -w:]
