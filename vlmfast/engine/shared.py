"""Slots that rows of several requests share: a row joins after its own prefill and leaves, while others go on.

A scheduler stands on this: one batch runs for ever, requests come and go. A row says the same tokens whatever runs
beside it (in float32; in narrower dtypes as far as products of several rows round alike).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vlmfast.core import Unsupported, UserError
from vlmfast.engine.pool import Pool
from vlmfast.engine.step import Static
from vlmfast.runtime.stepper import Stepper


class SharedSlots:
    """Made by `engine.open_slots`. rows: that may run at once; columns: that each may hold, prompt and answer together.

    `join` a row, `step` all rows, `rewind` those that were fed too much, `leave` a row that has ended.
    """

    def __init__(self, pool: Pool, text_model: Any, rows: int, columns: int, rope_axes: int) -> None:
        self.columns, self._taken = columns, [False] * rows
        weights = pool.weights
        empty = weights.embed.new_zeros(rows, weights.kv_heads, 0, weights.head_size)
        cache = SimpleNamespace(layers=[SimpleNamespace(keys=empty, values=empty) for _ in weights.layers])
        shape = (rows, 1) if rope_axes == 1 else (rope_axes, rows, 1)
        with torch.inference_mode(False):
            position = torch.zeros(shape, dtype=torch.long, device=empty.device)
        self._static = Static(pool, text_model, cache, None, position, columns)

    @property
    def rows(self) -> int:
        """Rows that may run at once."""
        return len(self._taken)

    @property
    def free(self) -> list[int]:
        """Rows that nobody has taken."""
        return [row for row, taken in enumerate(self._taken) if not taken]

    def held(self, row: int) -> int:
        """Columns that a row holds: of the head that holds most."""
        static = self._static
        num_heads = static.pool.weights.kv_heads
        heads = slice(row * num_heads, (row + 1) * num_heads)
        return max(max(layer[heads]) for layer in static.prompt) + static.fed[row]

    def nbytes(self) -> int:
        """Bytes of keys and values, for all rows together, free ones included."""
        return self._static.slots.nbytes()

    def join(self, prefilled: Stepper) -> int:
        """Take over one row after its prefill, or after some steps; returns its number.

        prefilled: of `Stepper.prefill` with `static=engine.open_static`, and `engine="static"` on a CPU. It is spent:
        its cache is empty afterwards. `prefilled.logits` (1, V) say the row's first token. Raises Unsupported where no
        row is free, where it does not fit, or where it has no static step of the same weights.
        """
        prefilled.open()
        source, static = prefilled.decoder, self._static
        if not isinstance(source, Static) or source.rows != 1:
            came = f"{source.rows} rows" if isinstance(source, Static) else f"the {prefilled.engine} step"
            raise Unsupported(
                f"{came} came in ({prefilled.reason or 'no reason known'}): a row joins by itself, prefilled with the "
                "static step"
            )
        if source.choices is not None or source.int8:
            what = "its heads read host memory" if source.choices is not None else "it is stored as int8"
            raise Unsupported(f"a row came in that shares no slots: {what}; prefill it with another kv policy")
        if source.pool is not static.pool:
            raise Unsupported("a row of another model came in, or the weights have changed since: open new slots")
        if not self.free:
            raise Unsupported(f"all {self.rows} rows are taken: wait until one leaves, or open slots for more rows")
        held = [[columns + source.fed[0] for columns in layer] for layer in source.prompt]
        longest, row, num_heads = max(map(max, held)), self.free[0], static.pool.weights.kv_heads
        if longest >= self.columns:
            column_bytes = self.nbytes() // (self.rows * static.slots.capacity)
            raise Unsupported(
                f"a row of {longest:,} columns came in, {longest * column_bytes:,} bytes: these slots hold "
                f"{self.columns:,} columns a row, {self.columns * column_bytes:,} bytes; open slots with more columns"
            )
        buffers = zip(
            (*static.slots.keys, *static.slots.values), (*source.slots.keys, *source.slots.values), strict=True
        )
        for own, theirs in buffers:
            own[row].zero_()  # nothing of the row before it, be it infinite
            own[row, :, :longest] = theirs[0, :, :longest]
        for own_columns, columns in zip(static.prompt, held, strict=True):
            own_columns[row * num_heads : (row + 1) * num_heads] = columns
        static.start[..., row : row + 1, :] = source.start + source.fed[0]
        self._taken[row] = True
        self._restart(row)
        source.slots.owner = prefilled.decoder = None
        prefilled.reason = "joined"
        prefilled.cache.layers.clear()
        return row

    def leave(self, row: int) -> None:
        """Free a row: the next one may join in its place."""
        self._known(row)
        num_heads = self._static.pool.weights.kv_heads
        for columns in self._static.prompt:
            columns[row * num_heads : (row + 1) * num_heads] = [0] * num_heads
        self._taken[row] = False
        self._restart(row)

    def step(self, tokens: Tensor) -> Tensor:
        """Feed tokens (rows, n) int64 -> logits (rows, n, V) in the model's dtype, valid until the next step.

        Every taken row holds n columns more; rows to be fed less are rewound. What stands in free rows does not matter.
        Raises Unsupported, before anything runs, where a row would hold more columns than there are.
        """
        if tokens.shape[0] != self.rows:
            raise UserError(
                f"tokens of {tokens.shape[0]} rows came in: these slots have {self.rows}, free ones included"
            )
        num_tokens, static = tokens.shape[1], self._static
        for row, taken in enumerate(self._taken):
            if taken and self.held(row) + num_tokens > self.columns:
                raise Unsupported(
                    f"row {row} holds {self.held(row):,} columns and {num_tokens} more came in: these slots hold "
                    f"{self.columns:,} a row; let it leave"
                )
        with torch.inference_mode():
            logits = static.step_rows(tokens)
        static.rewind([0 if taken else fed for taken, fed in zip(self._taken, static.fed, strict=True)])
        return logits

    def rewind(self, counts: list[int]) -> None:
        """Forget the last counts[i] tokens of row i; never reaches into what it joined with."""
        self._static.rewind([count if taken else 0 for count, taken in zip(counts, self._taken, strict=True)])

    def close(self) -> None:
        """Give the slots back to the model's other calls."""
        self._taken = [False] * self.rows
        self._static.slots.owner = None

    def _known(self, row: int) -> None:
        if not (0 <= row < self.rows and self._taken[row]):
            taken = [other for other, on in enumerate(self._taken) if on]
            raise UserError(f"row {row} is not taken; taken are {taken}")

    def _restart(self, row: int) -> None:
        """Let a row's counters begin anew."""
        static = self._static
        static.fed = [0 if other == row else fed for other, fed in enumerate(static.fed)]
        static.longest = max(map(max, static.prompt))
        with torch.inference_mode():
            static._turn()
