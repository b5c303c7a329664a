"""What the columns of one prefill are, read from the device once for all layers and policies."""

from __future__ import annotations

from torch import Tensor

from vlmfast.core import Held, Kind
from vlmfast.runtime.packed_pieces import to_device


class PromptFacts:
    """From kinds (B, L) int8: the one wait of a prefill under a policy.

    held: per row its columns that are not padding; longest: of them; right_padded: is the last column of a row padding?
    visible (B, L) bool on the device, None where nothing is padded.
    """

    def __init__(self, kinds: Tensor) -> None:
        self.device = kinds.device
        self.kinds = kinds.cpu()
        real = self.kinds != Kind.PAD
        self.right_padded = not bool(real[:, -1].all())
        self.longest = int(real.sum(1).max())
        self.held = [self._held(row) for row in real]
        self.visible = None if bool(real.all()) else kinds != Kind.PAD

    def _held(self, real: Tensor) -> Held:
        columns = real.nonzero()[:, 0]
        device, n = to_device(columns, self.device), len(columns)
        first, last = (int(columns[0]), int(columns[-1])) if n else (0, -1)
        return Held(device, slice(first, last + 1) if last - first == n - 1 else device)

    def queries(self, w: int) -> tuple[int, Tensor, list[Tensor]]:
        """`text_queries` of the last w columns, and per row the places (n,) int64 of those that count."""
        w, counted = text_queries(self.kinds, w)
        picked = [to_device(row.nonzero()[:, 0], self.device) for row in counted]
        return w, to_device(counted, self.device), picked


def text_queries(kinds: Tensor, w: int) -> tuple[int, Tensor]:
    """Which of the last w columns of kinds (B, L) are text after the media: how far back they reach, (B, that) bool."""
    recent = kinds[:, -w:]
    queries = recent == Kind.TEXT
    none = ~queries.any(1, keepdim=True)  # media at the very end: the last columns, whatever they are
    queries = queries | (none & (recent != Kind.PAD))
    w = min(w, int(queries.flip(1).long().cumsum(1).argmax(1).max()) + 1)  # columns back to the first that counts
    return w, queries[:, -w:]
