"""Rows of keys and values in one flat, preallocated buffer; every (batch row, head) has its own length."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmfast.kernels import Ragged, dequantise, quantise
from vlmfast.runtime.packed_pieces import to_device

_BUFFERS = ("keys", "values", "positions", "key_scale", "value_scale", "bias")  # one slot each per column
Segment = tuple[int, Tensor, Tensor, Tensor]  # row, keys (n, D), values (n, Dv), positions (n,) logical columns


def _even(capacity: list[int], slack: int = 32) -> list[int]:
    """Raise ascending capacities to that of the largest neighbour within 1/slack."""
    out = list(capacity)
    for i in range(len(out) - 2, -1, -1):
        if (out[i + 1] - out[i]) * slack <= out[i + 1]:
            out[i] = out[i + 1]
    return out


@dataclass
class Store(Ragged):
    """A `Ragged` that can grow, shrink and be copied. Entries are ordered by length, so equal ones are neighbours.

    Each entry owns `room` slots more than its columns at the last allocation; when one runs out, all move to a larger
    buffer (amortised: at least 32 slots or 1/32 of the longest row are added). Rows of about equal length own equally
    many slots, so that they are read as one tensor; unused slots hold finite numbers and never count.
    """

    positions: Tensor = None  # type: ignore[assignment]  # (T,) int32 logical column of each slot
    capacity: list[int] = None  # type: ignore[assignment]  # slots owned by each entry
    cursor: Tensor = None  # type: ignore[assignment]  # (entries,) int64 next free slot of each entry
    _index: tuple[list[int], Tensor] | None = None

    @property
    def index(self) -> Tensor:
        """`rows` as a tensor (entries,) int64 on the storage's device."""
        if self._index is None or self._index[0] is not self.rows:
            self._index = self.rows, to_device(torch.tensor(self.rows), self.keys.device)
        return self._index[1]

    @classmethod
    def build(
        cls,
        segments: list[Segment],
        total: int,
        int8: bool = False,
        room: int = 0,
        mass: list[Tensor | None] | None = None,
        joined: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Store:
        """Copy segments into a new buffer with at least `room` free slots each. `total` = B * Hk of the layer.

        mass: per row of the layer, how many columns each column of its segment stands for (n,), None = one.
        joined: segments of one length as one tensor each: keys (R, n, D), values (R, n, Dv), positions (R, n).
        """
        segments = sorted(segments, key=lambda s: s[1].shape[0])
        lengths = [s[1].shape[0] for s in segments]
        room = max(room, 32, max(lengths) // 32)
        capacity = _even([n + room for n in lengths])
        ends = torch.tensor(capacity).cumsum(0).tolist()
        offsets = [end - c for end, c in zip(ends, capacity, strict=True)]
        _, k, v, _ = segments[0]
        dtype = torch.int8 if int8 else k.dtype
        new = cls(
            keys=k.new_zeros(ends[-1], k.shape[1], dtype=dtype),
            values=v.new_zeros(ends[-1], v.shape[1], dtype=dtype),
            rows=[s[0] for s in segments],
            offsets=offsets,
            lengths=lengths,
            total=total,
            key_scale=k.new_zeros(ends[-1], dtype=torch.float32) if int8 else None,
            value_scale=k.new_zeros(ends[-1], dtype=torch.float32) if int8 else None,
            positions=k.new_empty(ends[-1], dtype=torch.int32),
            finite=True,
            capacity=capacity,
            cursor=to_device(torch.tensor(offsets) + torch.tensor(lengths), k.device),
        )
        if joined is not None:
            new._write_joined(*joined)
        for at, (_, keys, values, positions) in zip(offsets, segments if joined is None else [], strict=joined is None):
            new._write(slice(at, at + keys.shape[0]), keys, values)
            new.positions[at : at + keys.shape[0]] = positions
        if mass is not None and any(mass[row] is not None for row in new.rows):
            new.bias = k.new_zeros(ends[-1], dtype=torch.float32)
            for row, at, n in zip(new.rows, offsets, lengths, strict=True):
                given = mass[row]
                if given is not None:
                    new.bias[at : at + n] = given.log()
        return new

    def _write_joined(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Into entries of one length: keys (R, n, D), values (R, n, Dv), positions (R, n)."""
        rows, n = positions.shape
        given = {"keys": keys, "values": values, "positions": positions}
        if self.key_scale is not None:
            given["keys"], given["key_scale"] = quantise(keys)
            given["values"], given["value_scale"] = quantise(values)
        for name, x in given.items():
            getattr(self, name).unflatten(0, (rows, -1))[:, :n] = x

    def _write(self, where: slice | Tensor, keys: Tensor, values: Tensor) -> None:
        if self.key_scale is not None and self.value_scale is not None:
            keys, self.key_scale[where] = quantise(keys)
            values, self.value_scale[where] = quantise(values)
        self.keys[where] = keys
        self.values[where] = values

    def segment(self, i: int, dtype: torch.dtype) -> Segment:
        """Entry i as (row, keys, values, positions), int8 entries dequantised to `dtype`."""
        at = slice(self.offsets[i], self.offsets[i] + self.lengths[i])
        keys, values = self.keys[at], self.values[at]
        if self.key_scale is not None and self.value_scale is not None:
            keys = dequantise(keys, self.key_scale[at], dtype)
            values = dequantise(values, self.value_scale[at], dtype)
        return self.rows[i], keys, values, self.positions[at]

    def append(self, keys: Tensor, values: Tensor, position: int) -> None:
        """Append q columns to every entry, in place: keys (total, q, D), values (total, q, Dv), from `position` on."""
        q = keys.shape[1]
        if min(c - n for c, n in zip(self.capacity, self.lengths, strict=True)) < q:
            self._grow(q)
        if self.rows != list(range(self.total)):
            keys, values = keys[self.index], values[self.index]
        if q == 1:
            where = self.cursor
            self.positions.index_fill_(0, where, position)
        else:
            steps = torch.arange(q, device=self.cursor.device)
            where = (self.cursor[:, None] + steps).reshape(-1)
            self.positions.index_copy_(0, where, (steps + position).to(torch.int32).repeat(len(self)))
        keys, values = keys.reshape(-1, keys.shape[-1]), values.reshape(-1, values.shape[-1])
        if self.key_scale is None:
            self.keys.index_copy_(0, where, keys)
            self.values.index_copy_(0, where, values)
        else:
            self._write(where, keys, values)
        if self.bias is not None:
            self.bias.index_fill_(0, where, 0.0)
        self.lengths = [n + q for n in self.lengths]
        self.cursor += q

    def _grow(self, q: int) -> None:
        self._copy_from([self._raw(i) for i in range(len(self))], room=q + 32)

    def _raw(self, i: int) -> tuple[int, slice | Tensor, int]:
        return self.rows[i], slice(self.offsets[i], self.offsets[i] + self.lengths[i]), self.lengths[i]

    def _copy_from(self, entries: list[tuple[int, slice | Tensor, int]], room: int) -> None:
        """Re-lay the given (row, slots, length) entries of this store in a new buffer, byte for byte."""
        entries = sorted(entries, key=lambda e: e[2])
        room = max(room, max(e[2] for e in entries) // 32) if room else 0
        capacity = _even([e[2] + room for e in entries]) if room else [e[2] for e in entries]
        ends = torch.tensor(capacity).cumsum(0).tolist()
        offsets = [end - c for end, c in zip(ends, capacity, strict=True)]
        for name in _BUFFERS:
            old = getattr(self, name)
            if old is None:
                continue
            new = old.new_zeros(ends[-1], *old.shape[1:])
            for at, (_, slots, n) in zip(offsets, entries, strict=True):
                new[at : at + n] = old[slots]
            setattr(self, name, new)
        self.rows, self.lengths = [e[0] for e in entries], [e[2] for e in entries]
        self.offsets, self.capacity = offsets, capacity
        ends = [o + n for o, n in zip(offsets, self.lengths, strict=True)]
        self.cursor = to_device(torch.tensor(ends), self.keys.device)

    def drop_last(self, n: int) -> None:
        """Forget the last n columns of every entry."""
        self.lengths = [x - n for x in self.lengths]
        self.cursor -= n

    def keep_before(self, position: int) -> None:
        """Forget columns at or after a logical position (positions ascend within an entry)."""
        cut = []
        for at, n in zip(self.offsets, self.lengths, strict=True):
            cut.append(int(torch.searchsorted(self.positions[at : at + n].contiguous(), position)))
        self.cursor -= torch.tensor([n - c for n, c in zip(self.lengths, cut, strict=True)], device=self.cursor.device)
        self.lengths = cut

    def drop_at(self, distance: int) -> None:
        """Forget the column `distance` before the end of every entry (1 = the last); those behind it move up."""
        steps = torch.arange(distance - 1, device=self.cursor.device)
        target = (self.cursor[:, None] - distance + steps).reshape(-1)
        for name in _BUFFERS:
            buffer = getattr(self, name)
            if buffer is not None:
                buffer.index_copy_(0, target, buffer[target + 1])
        self.drop_last(1)

    def keep(self, kept: dict[int, Tensor], room: int) -> None:
        """Keep only some columns of some rows: row -> ascending places within its entry (int64)."""
        entries: list[tuple[int, slice | Tensor, int]] = []
        for i, row in enumerate(self.rows):
            if row in kept:
                entries.append((row, self.offsets[i] + kept[row], len(kept[row])))
            else:
                entries.append(self._raw(i))
        self._copy_from(entries, room)

    def compact(self) -> Store:
        """A copy without free slots."""
        new = replace(self)
        new._copy_from([self._raw(i) for i in range(len(self))], room=0)
        return new

    def take(self, batch: list[int], heads: int) -> None:
        """Keep (and repeat) batch rows in the given order."""
        where = {row: i for i, row in enumerate(self.rows)}
        entries = []
        for new, old in enumerate(batch):
            for h in range(heads):
                if old * heads + h in where:
                    _, slots, n = self._raw(where[old * heads + h])
                    entries.append((new * heads + h, slots, n))
        self.total = len(batch) * heads
        self._copy_from(entries, room=32)

    def nbytes(self) -> tuple[int, int]:
        """(bytes of the columns held, bytes allocated), positions, scales, biases and the entry table included."""
        tensors = [self.keys, self.values, self.positions, self.key_scale, self.value_scale, self.bias]
        per_slot = sum(t[0].numel() * t.element_size() for t in tensors if t is not None)
        tables = [self.cursor] if self._index is None else [self.cursor, self._index[1]]
        table = sum(t.numel() * t.element_size() for t in tables)
        return per_slot * sum(self.lengths) + table, per_slot * self.keys.shape[0] + table
