"""Groups of dynamic rows: whole columns in host memory, what stands for their chunks, and which chunks lie in slots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from vlmfast import kernels
from vlmfast.core import LowRank, Retrieval
from vlmfast.prefill.ragged_store import Store
from vlmfast.runtime import transfers
from vlmfast.runtime.late_rope import rotate

SLOTS = 4  # least number of chunks in a budget: a small budget gets shorter chunks


class Group:
    """Dynamic rows of one prefill length and budget: dense host tensors, chunk representatives, slot tables."""

    arrival: transfers.Arrival | None = None  # of the host tensors

    def __init__(self, rows: list[int], keys: Tensor, values: Tensor, positions: Tensor, budget: int, how: Retrieval):
        """keys (R, n, D), values (R, n, Dv), positions (R, n) int32 of the rows; budget = columns each holds fast.

        The host tensors may be on their way here: `arrived` waits for them.
        """
        self.rows, self.budget, self.how = rows, budget, how
        num_rows, num_columns, head_size = keys.shape
        self.n = num_columns
        self.chunk = max(1, min(how.chunk, (budget - how.sinks - how.recent + 1) // SLOTS))
        self.chunks = max(0, (num_columns - how.sinks - how.recent) // self.chunk)
        num_unchunked = num_columns - self.chunks * self.chunk  # sinks, recent and what does not fill a chunk
        self.slots = min(self.chunks, max(1, (budget - num_unchunked) // self.chunk))
        host_tensors, self.arrival = transfers.send_back([self._host_part(keys), values, positions], beside=True)
        self.host_keys, self.host_values, self.host_positions = host_tensors
        chunked_keys = keys[:, how.sinks : how.sinks + self.chunks * self.chunk].view(
            num_rows, self.chunks, self.chunk, head_size
        )
        if how.bound == "mean":
            self.representatives = chunked_keys.mean(2, dtype=torch.float32).to(keys.dtype)
        else:
            self.representatives = torch.stack([chunked_keys.amin(2), chunked_keys.amax(2)], 2)
        self.held = torch.arange(self.slots).expand(num_rows, -1).clone()  # (R, slots) chunk in each slot, on the host
        self.history = [(-1, self.held.clone())]  # (position, held) at past refreshes, grows when refresh > 1
        self.moved = 0  # chunks copied into fast memory since the prefill

    def first_rows(self, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The fast rows (R, m, ...) with the first chunks in their slots, from what `__init__` was given."""
        return self._first_keys(keys), self._first(values), self._first(positions)

    def _first(self, whole: Tensor, dim: int = 1) -> Tensor:
        """Of all columns those that are in fast memory at first."""
        slots_end = min(self.how.sinks + self.slots * self.chunk, self.n)
        chunks_end = min(self.how.sinks + self.chunks * self.chunk, self.n)
        return torch.cat([whole.narrow(dim, 0, slots_end), whole.narrow(dim, chunks_end, self.n - chunks_end)], dim)

    def _first_keys(self, keys: Tensor) -> Tensor:
        return self._first(keys)

    def _host_part(self, keys: Tensor) -> Tensor:
        """What of the keys is held in host memory."""
        return keys

    def arrived(self) -> Group:
        """Itself, once the host may read its tensors."""
        if self.arrival is not None:
            self.arrival.wait()
            self.arrival = None
        return self

    def columns(self, i: int, at: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions of row i at some columns, on the device that stores them."""
        self.arrived()
        return self.host_keys[i][at], self.host_values[i][at], self.host_positions[i][at]

    def blocks(self, i: int, chunks: Tensor) -> Iterator[Tensor]:
        """Keys, values and positions of row i, some chunks (S,) of them: (S, chunk * D) each."""
        for host_tensor in self.chunked(i):
            yield host_tensor[chunks]

    def chunked(self, i: int) -> list[Tensor]:
        """Keys (C, chunk * D), values and positions of every chunk of row i: views of host memory."""
        self.arrived()
        chunk_range = slice(self.how.sinks, self.how.sinks + self.chunks * self.chunk)
        host_tensors = (self.host_keys, self.host_values, self.host_positions)
        return [host_tensor[i, chunk_range].view(self.chunks, -1) for host_tensor in host_tensors]

    def before(self, i: int, n: int) -> LowRank | None:
        """Factors of the first n columns of row i, for keys that are kept as such."""
        return None

    def pick(self, rows: list[int], index: Tensor) -> Group:
        """A group of some of these rows: index (int64, repeats allowed) selects them, `rows` are their new numbers."""
        self.arrived()
        picked_group = object.__new__(type(self))
        picked_group.__dict__.update(self.__dict__)
        picked_group.rows = rows
        for attribute in ("host_keys", "host_values", "host_positions", "held"):
            setattr(picked_group, attribute, getattr(self, attribute)[index])
        picked_group.representatives = self.representatives[index.to(self.representatives.device)]
        picked_group.history = [(position, held_chunks[index]) for position, held_chunks in self.history]
        return picked_group

    def nbytes(self) -> tuple[int, int]:
        """Bytes apart from the fast rows: in fast memory, in host memory (slot tables included)."""
        host_tensors = (self.host_keys, self.host_values, self.host_positions, self.held)
        return num_bytes(self.representatives), sum(map(num_bytes, host_tensors))

    def shared(self) -> list[Tensor]:
        """Further tensors in fast memory, which several rows or groups may share."""
        return []

    def _columns(self, chunks: Tensor) -> Tensor:
        """Host columns of some chunks (S,) -> (S * chunk,)."""
        return (self.how.sinks + chunks[:, None] * self.chunk + torch.arange(self.chunk)).reshape(-1)

    def choose(self, query: Tensor) -> Tensor:
        """(R, slots) chunks that score best for the queries (R, G, D), on the host."""
        bound_scores = kernels.chunk_scores(query, self.representatives)
        return kernels.highest(bound_scores, self.slots).cpu()

    def load(self, wanted: Tensor, store: Store) -> None:
        """Make the slots hold `wanted` (R, slots), copying only chunks that are not there yet."""
        for i, row in enumerate(self.rows):
            loaded, wanted_row = self.held[i].tolist(), wanted[i].tolist()
            present, needed = set(loaded), set(wanted_row)
            missing = [chunk for chunk in wanted_row if chunk not in present]  # as many as there are slots to free
            if not missing:
                continue
            new_chunks = torch.tensor(missing)
            free_slots = torch.tensor([slot for slot, chunk in enumerate(loaded) if chunk not in needed])
            start = store.offsets[store.rows.index(row)] + self.how.sinks
            device_slots = free_slots.to(store.keys.device, non_blocking=True)
            for blocks, fast_buffer in zip(
                self.blocks(i, new_chunks), (store.keys, store.values, store.positions), strict=True
            ):
                slot_view = fast_buffer[start : start + self.slots * self.chunk].view(self.slots, -1)
                slot_view.index_copy_(0, device_slots, blocks.to(fast_buffer.device, non_blocking=True))
            self.held[i, free_slots] = new_chunks
            self.moved += len(new_chunks)


class LowRankGroup(Group):
    """Rows whose keys are factors in fast memory, multiplied and rotated when columns are read (ShadowKV)."""

    def __init__(self, *args: Any, factors: list[LowRank]) -> None:
        self.factors = factors
        super().__init__(*args)

    def _host_part(self, keys: Tensor) -> Tensor:
        return keys[:, :0]

    def _first_keys(self, keys: Tensor) -> Tensor:
        out: list[Tensor] = []
        for factors in (list(same) for _, same in groupby(self.factors, lambda factor: id(factor.left))):
            left, cos, sin = (self._first(table, 0) for table in (factors[0].left, factors[0].cos, factors[0].sin))
            out.append(rotate(torch.stack([left @ factor.right for factor in factors]), cos, sin))
        return torch.cat(out) if len(out) > 1 else out[0]

    def columns(self, i: int, at: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        self.arrived()
        factor = self.factors[i]
        device_columns = at.to(factor.left.device) if isinstance(at, Tensor) else at
        row_keys = rotate(
            factor.left[device_columns] @ factor.right, factor.cos[device_columns], factor.sin[device_columns]
        )
        return row_keys, self.host_values[i][at], self.host_positions[i][at]

    def blocks(self, i: int, chunks: Tensor) -> Iterator[Tensor]:
        for column_data in self.columns(i, self._columns(chunks)):
            yield column_data.reshape(len(chunks), -1)

    def before(self, i: int, n: int) -> LowRank:
        factor = self.factors[i]
        return replace(factor, left=factor.left[:n], cos=factor.cos[:n], sin=factor.sin[:n])

    def pick(self, rows: list[int], index: Tensor) -> Group:
        picked_group: Any = super().pick(rows, index)
        picked_group.factors = [self.factors[row_index] for row_index in index.tolist()]
        return picked_group

    def shared(self) -> list[Tensor]:
        return [
            tensor
            for factor in self.factors
            for tensor in (factor.left, factor.right, *((factor.cos, factor.sin) if factor.owner else ()))
        ]


def num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
