"""Base class of policies for which the host reads, in the middle of choosing, what the device found.

Their choice is begun at once and ended later: on a GPU while the next layers are computed (`runtime/two_parts.py`).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from vlmfast.core import CompressedLayer, LayerView
from vlmfast.prefill.base import Choice, KVPolicy, Row, real_columns, row_of
from vlmfast.runtime.two_parts import ended


@dataclass(frozen=True)
class InTwoParts(KVPolicy):
    """Subclasses implement `choosing` in place of `choose`."""

    def choosing(self, row: Row) -> Generator[None, None, Choice]:
        """`choose`: launches what does not depend on what the host has to read, yields once, waits for it, and ends."""
        raise NotImplementedError

    def choose(self, row: Row) -> Choice:
        """What a row keeps, in one go."""
        return ended(self.choosing(row))

    def compress(self, view: LayerView) -> CompressedLayer | None:
        """Choose what stays of every row, in one go. None when all rows fit."""
        return ended(self.compressing(view))

    def compressing(self, view: LayerView) -> Generator[None, None, CompressedLayer | None]:
        """`compress`: begins the choice of every row, yields once, and ends them."""
        columns_of_rows = real_columns(view)
        if all(self.fits(len(columns)) for columns in columns_of_rows):
            return None
        rows = [
            None if self.fits(len(columns)) else self.choosing(row_of(view, batch_index, columns))
            for batch_index, columns in enumerate(columns_of_rows)
        ]
        for choosing in rows:
            if choosing is not None:
                next(choosing)
        yield
        return self.gather(view, [None if choosing is None else ended(choosing) for choosing in rows])
