"""Stores rows of keys and values in one flat, preallocated buffer; every (batch row, head) has its own length."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from vlmfast.kernels import Ragged, dequantise, quantise
from vlmfast.runtime.stacked_layers import EvenRows, room
from vlmfast.runtime.transfers import to_device

_BUFFERS = ("keys", "values", "positions", "key_scale", "value_scale", "bias")  # one slot each per column
Segment = tuple[int, Tensor, Tensor, Tensor]  # row, keys (n, D), values (n, Dv), positions (n,) logical columns


def _even(capacity: list[int], slack: int = 32) -> list[int]:
    """Raise ascending capacities to that of the largest neighbour within 1/slack."""
    evened = list(capacity)
    for entry_index in range(len(evened) - 2, -1, -1):
        if (evened[entry_index + 1] - evened[entry_index]) * slack <= evened[entry_index + 1]:
            evened[entry_index] = evened[entry_index + 1]
    return evened


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
        grows: bool = True,
        mass: list[Tensor | None] | None = None,
    ) -> Store:
        """Copy segments into a new buffer, with free slots where it grows. `total` = B * Hk of the layer.

        mass: per row of the layer, how many columns each column of its segment stands for (n,), None = one.
        """
        segments = sorted(segments, key=lambda segment: segment[1].shape[0])
        lengths = [segment[1].shape[0] for segment in segments]
        capacity = _even([entry_length + room(max(lengths)) for entry_length in lengths]) if grows else lengths
        entry_ends = list(accumulate(capacity))
        offsets = [entry_end - entry_capacity for entry_end, entry_capacity in zip(entry_ends, capacity, strict=True)]
        _, first_keys, first_values, _ = segments[0]
        stored_dtype = torch.int8 if int8 else first_keys.dtype
        next_slots = [entry_start + length for entry_start, length in zip(offsets, lengths, strict=True)]
        new_store = cls(
            keys=first_keys.new_zeros(entry_ends[-1], first_keys.shape[1], dtype=stored_dtype),
            values=first_values.new_zeros(entry_ends[-1], first_values.shape[1], dtype=stored_dtype),
            rows=[segment[0] for segment in segments],
            offsets=offsets,
            lengths=lengths,
            total=total,
            key_scale=first_keys.new_zeros(entry_ends[-1], dtype=torch.float32) if int8 else None,
            value_scale=first_keys.new_zeros(entry_ends[-1], dtype=torch.float32) if int8 else None,
            positions=first_keys.new_empty(entry_ends[-1], dtype=torch.int32),
            finite=True,
            capacity=list(capacity),
            cursor=to_device(torch.tensor(next_slots), first_keys.device),
        )
        for entry_start, (_, keys, values, positions) in zip(offsets, segments, strict=True):
            new_store._write(slice(entry_start, entry_start + keys.shape[0]), keys, values)
            new_store.positions[entry_start : entry_start + keys.shape[0]] = positions
        new_store._weigh(mass)
        return new_store

    @classmethod
    def even(cls, even_rows: EvenRows, rows: list[int], total: int, mass: list[Tensor | None] | None = None) -> Store:
        """Rows of one length, which these are of a layer; their memory becomes the storage. The rest as in `build`."""
        num_rows, capacity = even_rows.parts[2].shape
        keys, values, positions, *scales = (part.flatten(0, 1) for part in even_rows.parts)
        offsets = [entry_index * capacity for entry_index in range(num_rows)]
        next_slots = torch.tensor([entry_start + even_rows.length for entry_start in offsets])
        new_store = cls(
            keys=keys,
            values=values,
            rows=rows,
            offsets=offsets,
            lengths=[even_rows.length] * num_rows,
            total=total,
            key_scale=scales[0] if scales else None,
            value_scale=scales[1] if scales else None,
            positions=positions,
            finite=True,
            capacity=[capacity] * num_rows,
            cursor=to_device(next_slots, keys.device),
        )
        new_store._weigh(mass)
        return new_store

    def _weigh(self, mass: list[Tensor | None] | None) -> None:
        """Give columns that stand for several their bias; mass: as in `build`."""
        if mass is None or all(mass[row_number] is None for row_number in self.rows):
            return
        self.bias = self.keys.new_zeros(len(self.keys), dtype=torch.float32)
        written: Tensor | None = None
        for row_number, entry_start, entry_length in zip(self.rows, self.offsets, self.lengths, strict=True):
            row_mass = mass[row_number]
            if row_mass is None:
                continue
            if row_mass is not written:  # rows often share one
                written, log_mass = row_mass, row_mass.log()
            self.bias[entry_start : entry_start + entry_length] = log_mass

    def _write(self, slot_index: slice | Tensor, keys: Tensor, values: Tensor) -> None:
        if self.key_scale is not None and self.value_scale is not None:
            keys, self.key_scale[slot_index] = quantise(keys)
            values, self.value_scale[slot_index] = quantise(values)
        self.keys[slot_index] = keys
        self.values[slot_index] = values

    def segment(self, i: int, dtype: torch.dtype) -> Segment:
        """Entry i as (row, keys, values, positions), int8 entries dequantised to `dtype`."""
        slot_range = slice(self.offsets[i], self.offsets[i] + self.lengths[i])
        keys, values = self.keys[slot_range], self.values[slot_range]
        if self.key_scale is not None and self.value_scale is not None:
            keys = dequantise(keys, self.key_scale[slot_range], dtype)
            values = dequantise(values, self.value_scale[slot_range], dtype)
        return self.rows[i], keys, values, self.positions[slot_range]

    def append(self, keys: Tensor, values: Tensor, position: int) -> None:
        """Append q columns to every entry, in place: keys (total, q, D), values (total, q, Dv), from `position` on."""
        num_tokens = keys.shape[1]
        if (
            min(
                entry_capacity - entry_length
                for entry_capacity, entry_length in zip(self.capacity, self.lengths, strict=True)
            )
            < num_tokens
        ):
            self._grow(num_tokens)
        if self.rows != list(range(self.total)):
            keys, values = keys[self.index], values[self.index]
        if num_tokens == 1:
            target_slots = self.cursor
            self.positions.index_fill_(0, target_slots, position)
        else:
            token_offsets = torch.arange(num_tokens, device=self.cursor.device)
            target_slots = (self.cursor[:, None] + token_offsets).reshape(-1)
            self.positions.index_copy_(0, target_slots, (token_offsets + position).to(torch.int32).repeat(len(self)))
        keys, values = keys.reshape(-1, keys.shape[-1]), values.reshape(-1, values.shape[-1])
        if self.key_scale is None:
            self.keys.index_copy_(0, target_slots, keys)
            self.values.index_copy_(0, target_slots, values)
        else:
            self._write(target_slots, keys, values)
        if self.bias is not None:
            self.bias.index_fill_(0, target_slots, 0.0)
        self.lengths = [entry_length + num_tokens for entry_length in self.lengths]
        self.cursor += num_tokens

    def _grow(self, num_tokens: int) -> None:
        self._copy_from([self._raw(i) for i in range(len(self))], room=num_tokens + 32)

    def _raw(self, entry_index: int) -> tuple[int, slice | Tensor, int]:
        return (
            self.rows[entry_index],
            slice(self.offsets[entry_index], self.offsets[entry_index] + self.lengths[entry_index]),
            self.lengths[entry_index],
        )

    def _copy_from(self, entries: list[tuple[int, slice | Tensor, int]], room: int) -> None:
        """Re-lay the given (row, slots, length) entries of this store in a new buffer, byte for byte."""
        entries = sorted(entries, key=lambda entry: entry[2])
        room = max(room, max(entry[2] for entry in entries) // 32) if room else 0
        capacity = _even([entry[2] + room for entry in entries]) if room else [entry[2] for entry in entries]
        entry_ends = torch.tensor(capacity).cumsum(0).tolist()
        offsets = [entry_end - entry_capacity for entry_end, entry_capacity in zip(entry_ends, capacity, strict=True)]
        for buffer_name in _BUFFERS:
            old_buffer = getattr(self, buffer_name)
            if old_buffer is None:
                continue
            new_buffer = old_buffer.new_zeros(entry_ends[-1], *old_buffer.shape[1:])
            for entry_start, (_, slots, entry_length) in zip(offsets, entries, strict=True):
                new_buffer[entry_start : entry_start + entry_length] = old_buffer[slots]
            setattr(self, buffer_name, new_buffer)
        self.rows, self.lengths = [entry[0] for entry in entries], [entry[2] for entry in entries]
        self.offsets, self.capacity = offsets, capacity
        entry_ends = [
            entry_offset + entry_length for entry_offset, entry_length in zip(offsets, self.lengths, strict=True)
        ]
        self.cursor = to_device(torch.tensor(entry_ends), self.keys.device)

    def drop_last(self, n: int) -> None:
        """Forget the last n columns of every entry."""
        self.lengths = [entry_length - n for entry_length in self.lengths]
        self.cursor -= n

    def keep_before(self, position: int) -> None:
        """Forget columns at or after a logical position (positions ascend within an entry)."""
        new_lengths = []
        for entry_start, entry_length in zip(self.offsets, self.lengths, strict=True):
            new_lengths.append(
                int(torch.searchsorted(self.positions[entry_start : entry_start + entry_length].contiguous(), position))
            )
        self.cursor -= torch.tensor(
            [entry_length - new_length for entry_length, new_length in zip(self.lengths, new_lengths, strict=True)],
            device=self.cursor.device,
        )
        self.lengths = new_lengths

    def drop_at(self, distance: int) -> None:
        """Forget the column `distance` before the end of every entry (1 = the last); those behind it move up."""
        moved_offsets = torch.arange(distance - 1, device=self.cursor.device)
        target_slots = (self.cursor[:, None] - distance + moved_offsets).reshape(-1)
        for buffer_name in _BUFFERS:
            buffer = getattr(self, buffer_name)
            if buffer is not None:
                buffer.index_copy_(0, target_slots, buffer[target_slots + 1])
        self.drop_last(1)

    def keep(self, kept: dict[int, Tensor], room: int) -> None:
        """Keep only some columns of some rows: row -> ascending places within its entry (int64)."""
        entries: list[tuple[int, slice | Tensor, int]] = []
        for entry_index, row in enumerate(self.rows):
            if row in kept:
                entries.append((row, self.offsets[entry_index] + kept[row], len(kept[row])))
            else:
                entries.append(self._raw(entry_index))
        self._copy_from(entries, room)

    def compact(self) -> Store:
        """A copy without free slots."""
        new_store = replace(self)
        new_store._copy_from([self._raw(entry_index) for entry_index in range(len(self))], room=0)
        return new_store

    def take(self, batch: list[int], heads: int) -> None:
        """Keep (and repeat) batch rows in the given order."""
        entry_indices = {row: entry_index for entry_index, row in enumerate(self.rows)}
        entries = []
        for new_batch_row, old_batch_row in enumerate(batch):
            for head_index in range(heads):
                if old_batch_row * heads + head_index in entry_indices:
                    _, slots, entry_length = self._raw(entry_indices[old_batch_row * heads + head_index])
                    entries.append((new_batch_row * heads + head_index, slots, entry_length))
        self.total = len(batch) * heads
        self._copy_from(entries, room=32)

    def nbytes(self) -> tuple[int, int]:
        """(bytes of the columns held, bytes allocated), positions, scales, biases and the entry table included."""
        tensors = [self.keys, self.values, self.positions, self.key_scale, self.value_scale, self.bias]
        bytes_per_slot = sum(tensor[0].numel() * tensor.element_size() for tensor in tensors if tensor is not None)
        tables = [self.cursor] if self._index is None else [self.cursor, self._index[1]]
        table_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tables)
        return bytes_per_slot * sum(self.lengths) + table_bytes, bytes_per_slot * self.keys.shape[0] + table_bytes
