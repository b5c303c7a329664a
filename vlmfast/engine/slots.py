"""Slots: fixed-size buffers for keys and values of rows being decoded, with their lengths on the device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from vlmfast.engine.graphs import Graphs
from vlmfast.engine.weights import Weights
from vlmfast.runtime.transfers import to_device

TABLE = 1024  # positions in the rotary tables
STOPS = 15  # ids that may end an answer
BEFORE = 64  # positions in them that lie before the first token: tokens may be taken back


def bucket(columns: int) -> int:
    """A capacity for `columns` columns: 256 at least, then 1, 1.25, 1.5, 1.75 times a power of two, in steps of 64."""
    power = 256
    while power < columns:
        power *= 2
    capacities = [power * eighths // 8 for eighths in (5, 6, 7, 8)] if power > 256 else [power]
    return next(capacity for capacity in capacities if capacity >= columns)


class Slots:
    """keys, values: per layer (rows, Hk, capacity, Dh); counters (N,) int64: `lengths`, per layer the columns that each
    head of a row holds (rows * Hk,), and `at` (rows,), the next row of the rotary tables; cos, sin (rows, TABLE, Dh),
    the first half of sin negated.

    int8: keys and values are int8, with `scales`: per layer those of keys and values (rows, Hk, capacity) float32;
    fed: per row the tokens after its prefill that the counters stand for, None = not known; splits: of the attention.
    """

    def __init__(
        self, weights: Weights, rows: int, capacity: int, splits: int, graphs: Graphs, int8: bool = False
    ) -> None:
        self.rows, self.capacity, self.splits, self.graphs, self.int8 = rows, capacity, splits, graphs, int8
        dtype, device = weights.embed.dtype, weights.embed.device
        stored = torch.int8 if int8 else dtype
        slot_shape = (rows, weights.kv_heads, capacity, weights.head_size)
        num_layers = len(weights.layers)
        with torch.inference_mode(False), torch.no_grad():  # ordinary tensors: they are changed in place for ever
            self.keys = [torch.zeros(slot_shape, dtype=stored, device=device) for _ in range(num_layers)]
            self.values = [torch.zeros(slot_shape, dtype=stored, device=device) for _ in range(num_layers)]
            self.scales: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
            if int8:
                self.scales = [
                    (torch.zeros(slot_shape[:3], device=device), torch.zeros(slot_shape[:3], device=device))
                    for _ in range(num_layers)
                ]
            num_pairs = rows * weights.kv_heads
            self.stride = num_pairs + num_pairs % 2  # a multiple of 16 bytes, for which kernels are specialised
            counter_pair = torch.zeros(2, num_layers * self.stride + rows, dtype=torch.long, device=device)
            self.counters, self.origin = counter_pair.unbind(0)  # origin: counters before the first token
            self.lengths = [self.counters[index * self.stride :][:num_pairs] for index in range(num_layers)]
            self.at = self.counters[num_layers * self.stride :]
            pair_rows = torch.arange(rows).repeat_interleave(weights.kv_heads)
            layer_rows = torch.cat([pair_rows, pair_rows.new_zeros(self.stride - num_pairs)]).repeat(num_layers)
            self.row_of = torch.cat([layer_rows, torch.arange(rows)]).to(device)  # the row of every counter
            self.cos = torch.zeros(rows, TABLE, weights.head_size, dtype=dtype, device=device)
            self.sin = torch.zeros_like(self.cos)
            self.done = torch.zeros(rows, 1, dtype=torch.bool, device=device)  # rows whose answer has ended
            # ids that end an answer, then the id that pads it
            self.stop = torch.full((1, STOPS + 1), -1, dtype=torch.long, device=device)
        self.inputs: dict[int, Tensor] = {}
        self.tables: dict[Any, Any] = {}  # of heads that read host memory: `choices.Tables` by their key
        self.fed: list[int] | None = None
        self.owner: weakref.ref[Any] | None = None

    @property
    def idle(self) -> bool:
        """True when no running call uses them."""
        return self.owner is None or self.owner() is None

    def tokens(self, num_tokens: int) -> Tensor:
        """The buffer (rows, num_tokens) int64 that a step of num_tokens tokens reads."""
        if num_tokens not in self.inputs:
            with torch.inference_mode(False):
                self.inputs[num_tokens] = self.counters.new_zeros(self.rows, num_tokens)
        return self.inputs[num_tokens]

    def buffers(self, layer: int) -> tuple[Tensor, ...]:
        """Keys and values of a layer, and their scales where they have some."""
        return self.keys[layer], self.values[layer], *(self.scales[layer] or ())

    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(tensor.nbytes for layer in range(len(self.keys)) for tensor in self.buffers(layer))

    def begin(self, columns: list[list[int]], table_starts: list[int]) -> None:
        """Set how many columns every head of each layer holds before the first token (rows * Hk per layer), and which
        token of each row its tables were made for."""
        counters: list[int] = []
        for layer_columns in columns:
            counters += [*layer_columns, *[0] * (self.stride - len(layer_columns))]
        self.origin.copy_(torch.tensor([*counters, *[BEFORE - start for start in table_starts]]))
        self.fed = None

    def stop_at(self, eos: frozenset[int], pad: int, ended: Tensor | None) -> None:
        """Set the ids that end a row, the id that pads it afterwards, and which rows (rows,) bool have ended."""
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

    def set_fed(self, num_tokens: list[int]) -> None:
        """Let the counters stand for so many tokens after the prefill, row by row."""
        if self.fed == num_tokens:
            return
        if len(set(num_tokens)) == 1:
            torch.add(self.origin, num_tokens[0], out=self.counters)
        else:
            of_rows = to_device(torch.tensor(num_tokens), self.counters.device)
            torch.add(self.origin, of_rows[self.row_of], out=self.counters)
        self.fed = num_tokens
