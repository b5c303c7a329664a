"""Where rows live while they are decoded: keys and values of one size; how much is filled lies on the device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from vlmfast.engine.graphs import Graphs
from vlmfast.engine.weights import Weights

TABLE = 1024  # positions whose rotation is held at once
STOPS = 15  # ids that may end an answer
BEFORE = 64  # of them, that many before the place where the table was made: tokens may be taken back


def bucket(columns: int) -> int:
    """A capacity for so many columns: 256 at least, then 1, 1.25, 1.5, 1.75 times a power of two, in steps of 64."""
    size = 256
    while size < columns:
        size *= 2
    steps = [size * part // 8 for part in (5, 6, 7, 8)] if size > 256 else [size]
    return next(step for step in steps if step >= columns)


class Slots:
    """keys, values: per layer (rows, Hk, capacity, Dh); counters (N,) int64: `lengths`, per layer the columns that each
    head of a row holds (rows * Hk,), and `at` (rows,), the next row of the rotary tables; cos, sin (rows, TABLE, Dh),
    the first half of sin negated.

    fed: tokens after the prefill that the counters stand for, None = not known; splits: of the attention.
    """

    def __init__(self, weights: Weights, rows: int, capacity: int, splits: int, graphs: Graphs) -> None:
        self.rows, self.capacity, self.splits, self.graphs = rows, capacity, splits, graphs
        like = weights.embed
        shape = (rows, weights.kv_heads, capacity, weights.head_size)
        layers = len(weights.layers)
        with torch.inference_mode(False), torch.no_grad():  # ordinary tensors: they are changed in place for ever
            self.keys = [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(layers)]
            self.values = [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(layers)]
            pairs = rows * weights.kv_heads
            self.stride = pairs + pairs % 2  # every layer's at a multiple of 16 bytes: kernels are specialised for that
            both = torch.zeros(2, layers * self.stride + rows, dtype=torch.long, device=like.device)
            self.counters, self.origin = both.unbind(0)  # origin: counters before the first token
            self.lengths = [self.counters[i * self.stride :][:pairs] for i in range(layers)]
            self.at = self.counters[layers * self.stride :]
            self.cos = torch.zeros(rows, TABLE, weights.head_size, dtype=like.dtype, device=like.device)
            self.sin = torch.zeros_like(self.cos)
            self.done = torch.zeros(rows, 1, dtype=torch.bool, device=like.device)  # rows whose answer has ended
            self.stop = torch.full(
                (1, STOPS + 1), -1, dtype=torch.long, device=like.device
            )  # what ends one, and pads it
        self.inputs: dict[int, Tensor] = {}
        self.fed: int | None = None
        self.owner: weakref.ref[Any] | None = None

    @property
    def idle(self) -> bool:
        """True when no running call uses them."""
        return self.owner is None or self.owner() is None

    def tokens(self, n: int) -> Tensor:
        """The buffer (rows, n) int64 that a step of n tokens reads."""
        if n not in self.inputs:
            with torch.inference_mode(False):
                self.inputs[n] = torch.zeros(self.rows, n, dtype=torch.long, device=self.counters.device)
        return self.inputs[n]

    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def begin(self, columns: list[list[int]], base: int) -> None:
        """Say how many columns every head of each layer holds before the first token (rows * Hk a layer), and which
        token the tables were made for."""
        numbers = [n for layer in columns for n in (*layer, *[0] * (self.stride - len(layer)))]
        self.origin.copy_(torch.tensor([*numbers, *[BEFORE - base] * self.rows]))
        self.fed = None

    def stop_at(self, eos: frozenset[int], pad: int, ended: Tensor | None) -> None:
        """Say what ends a row, what follows the end, and which rows (rows,) bool have ended."""
        if ended is None:
            self.done.fill_(False)
        else:
            self.done.copy_(ended[:, None])
        self.stop.copy_(torch.tensor([[*sorted(eos), *[-1] * (STOPS - len(eos)), pad]]))

    def ended(self, chosen: Tensor) -> Tensor:
        """chosen (rows, 1) -> the same, padding in rows that have ended; remembers those that end now."""
        chosen = torch.where(self.done, self.stop[:, STOPS:], chosen)
        self.done.logical_or_((chosen == self.stop[:, :STOPS]).any(1, keepdim=True))
        return chosen

    def set_fed(self, n: int) -> None:
        """Let the counters stand for n tokens after the prefill."""
        if self.fed != n:
            torch.add(self.origin, n, out=self.counters)
            self.fed = n
