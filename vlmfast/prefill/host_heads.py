"""Dynamic heads: all columns are in host memory, in chunks; the chunks that a query needs are copied to fast memory.

One fast row is laid out as ``sinks | slots of one chunk each | recent | decoded tokens``. Attention is independent of
the order of the slots, so a step copies only chunks that the previous step did not hold (HybridKV, arXiv 2604.05887;
chunk bounds as in Quest, arXiv 2406.10774).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlmfast import kernels
from vlmfast.core import LowRank, Retrieval
from vlmfast.kernels import Ragged
from vlmfast.prefill.ragged_store import Segment, Store
from vlmfast.runtime.late_rope import rotate

SLOTS = 4  # least number of chunks in a budget: a small budget gets shorter chunks


class Group:
    """Dynamic rows of one prefill length and budget: dense host tensors, chunk representatives, slot tables."""

    def __init__(self, rows: list[int], keys: Tensor, values: Tensor, positions: Tensor, budget: int, how: Retrieval):
        """keys (R, n, D), values (R, n, Dv), positions (R, n) of the rows; budget = columns each holds fast."""
        self.rows, self.budget, self.how = rows, budget, how
        num_rows, num_columns, head_size = keys.shape
        self.n = num_columns
        self.chunk = max(1, min(how.chunk, (budget - how.sinks - how.recent + 1) // SLOTS))
        self.chunks = max(0, (num_columns - how.sinks - how.recent) // self.chunk)
        num_unchunked = num_columns - self.chunks * self.chunk  # sinks, recent and what does not fill a chunk
        self.slots = min(self.chunks, max(1, (budget - num_unchunked) // self.chunk))
        self.host_keys, self.host_values = _to_host(keys), _to_host(values)
        self.host_positions = positions.to("cpu", torch.int32)
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

    def segments(self) -> list[Segment]:
        """The fast rows with the slots as they stand."""
        chunks_end = self.how.sinks + self.chunks * self.chunk
        row_segments: list[Segment] = []
        for index, row in enumerate(self.rows):
            places = self._columns(self.held[index])
            places = torch.cat(
                [torch.arange(min(self.how.sinks, self.n)), places, torch.arange(min(chunks_end, self.n), self.n)]
            )
            device = self.representatives.device
            row_keys, row_values, row_positions = self.columns(index, places)
            row_segments.append((row, row_keys.to(device), row_values.to(device), row_positions.to(device)))
        return row_segments

    def columns(self, i: int, at: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions of row i at some columns, on the device that stores them."""
        return self.host_keys[i][at], self.host_values[i][at], self.host_positions[i][at]

    def blocks(self, i: int, chunks: Tensor) -> Iterator[Tensor]:
        """Keys, values and positions of row i, some chunks (S,) of them: (S, chunk * D) each."""
        chunk_range = slice(self.how.sinks, self.how.sinks + self.chunks * self.chunk)
        for host_tensor in (self.host_keys, self.host_values, self.host_positions):
            yield host_tensor[i, chunk_range].view(self.chunks, -1)[chunks]

    def before(self, i: int, n: int) -> LowRank | None:
        """Factors of the first n columns of row i, for keys that are kept as such."""
        return None

    def pick(self, rows: list[int], index: Tensor) -> Group:
        """A group of some of these rows: index (int64, repeats allowed) selects them, `rows` are their new numbers."""
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
        return _bytes(self.representatives), sum(map(_bytes, host_tensors))

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
        super().__init__(*args)
        self.factors = factors
        self.host_keys = self.host_keys[:, :0].clone()

    def columns(self, i: int, at: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
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


class HostHeads:
    """All dynamic rows of one layer: a fast `Store` and the host groups behind it."""

    def __init__(
        self,
        segments: list[Segment],
        budgets: list[int],
        how: Retrieval,
        total: int,
        base: int,
        device: torch.device,
        factors: list[LowRank | None] | None = None,
    ) -> None:
        """segments: whole rows, anywhere; base: logical length of the sequence at the end of the prefill.

        factors: per row of the layer, what stands for its keys; None = the keys themselves, in host memory.
        """
        self.how, self.base = how, base
        by_size: dict[tuple[int, int], list[Segment]] = {}
        for segment, budget in zip(segments, budgets, strict=True):
            by_size.setdefault((segment[1].shape[0], budget), []).append(segment)
        self.groups: list[Group] = []
        for (_, budget), members in by_size.items():
            keys, values, positions = (torch.stack([entry[i] for entry in members]).to(device) for i in (1, 2, 3))  # type: ignore[misc]
            row_numbers = [member[0] for member in members]
            row_factors = [] if factors is None else [factors[number] for number in row_numbers]
            own_factors = [factor for factor in row_factors if factor is not None]
            if own_factors:
                self.groups.append(LowRankGroup(row_numbers, keys, values, positions, budget, how, factors=own_factors))
            else:
                self.groups.append(Group(row_numbers, keys, values, positions, budget, how))
        self.store = Store.build([member for group in self.groups for member in group.segments()], total)

    def attend(self, query: Tensor, scaling: float, out: Tensor, length: int, turn: bool) -> None:
        """Attention of the last q tokens (already appended; logical length `length` with them) into `out`.

        turn: they are a new turn of the conversation. It reads every column, once, and its last token chooses what the
        answer starts from: what was chosen for the question before has little to do with it. Otherwise every token
        chooses its own chunks, so a verified draft reads exactly what one-by-one decoding would.
        """
        num_tokens = query.shape[2]
        row_queries = query.reshape(self.store.total, -1, num_tokens, query.shape[-1])
        if turn:
            kernels.ragged_attention(query, self._everything(), scaling, out)
            self._search(self.groups, row_queries[:, :, -1], length - 1)
            return
        for index in range(num_tokens):
            position = length - num_tokens + index
            self._search(list(self._due(position)), row_queries[:, :, index], position)
            num_later = num_tokens - 1 - index
            visible = Ragged(
                self.store.keys, self.store.values, self.store.rows, self.store.offsets,
                [row_length - num_later for row_length in self.store.lengths], self.store.total, finite=True,
            )  # fmt: skip
            token_output = torch.empty_like(out[:, :, :1]) if num_tokens > 1 else out
            kernels.ragged_attention(query[:, :, index : index + 1], visible, scaling, token_output)
            if num_tokens > 1:
                output_rows = out.view(self.store.total, -1, num_tokens, out.shape[-1])
                token_rows = token_output.view(self.store.total, -1, out.shape[-1])
                output_rows[self.store.rows, :, index] = token_rows[self.store.rows]

    def _search(self, groups: list[Group], query: Tensor, position: int) -> None:
        """Swap in the chunks that the token at a logical position asks for; query (rows of the layer, G, D)."""
        for group in groups:
            if 0 < group.slots < group.chunks:
                group.load(group.choose(query[group.rows]), self.store)
                if group.how.refresh > 1:
                    group.history.append((position, group.held.clone()))

    def _due(self, position: int) -> Iterator[Group]:
        for group in self.groups:
            if (position - self.base) % group.how.refresh == 0:
                yield group

    def _everything(self) -> Ragged:
        """Whole rows, host columns and decoded ones, gathered in fast memory for one call."""
        segments: list[Segment] = []
        for group in self.groups:
            for i, row in enumerate(group.rows):
                place = self.store.rows.index(row)
                _, row_keys, row_values, row_positions = self.store.segment(place, self.store.keys.dtype)
                decoded = slice(self._prefilled(group), None)
                prefilled = [part.to(row_keys.device) for part in group.columns(i, slice(None))]
                joined = [
                    torch.cat([first, second])
                    for first, second in zip(
                        prefilled, (row_keys[decoded], row_values[decoded], row_positions[decoded]), strict=True
                    )
                ]
                segments.append((row, joined[0], joined[1], joined[2]))
        return Store.build(segments, self.store.total)

    def _prefilled(self, group: Group) -> int:
        """Fast columns of a row of this group that come from the prefill."""
        return group.n - (group.chunks - group.slots) * group.chunk

    def crop(self, length: int, removed: int) -> None:
        """Go back to logical `length`, removing `removed` columns; columns of the prefill may go too."""
        if length >= self.base:
            self.store.drop_last(removed)
            for group in self.groups:
                while group.history[-1][0] >= length:
                    group.history.pop()
                if self.how.refresh > 1:
                    group.load(group.history[-1][1], self.store)
            return
        segments: list[Segment] = []
        row_budgets = []
        row_factors: list[LowRank | None] = [None] * self.store.total
        for old_group in self.groups:
            for index, row in enumerate(old_group.rows):
                num_columns = int((old_group.host_positions[index] < length).sum())
                segments.append((row, *old_group.columns(index, slice(num_columns))))
                row_budgets.append(old_group.budget)
                row_factors[row] = old_group.before(index, num_columns)
        self.__init__(segments, row_budgets, self.how, self.store.total, length, self.store.keys.device, row_factors)  # type: ignore[misc]

    def take(self, batch: list[int], heads: int) -> None:
        """Keep (and repeat) batch rows in the given order."""
        groups = []
        for old_group in self.groups:
            places = {row: index for index, row in enumerate(old_group.rows)}
            row_pairs = [
                (new_row * heads + h, places[old_row * heads + h])
                for new_row, old_row in enumerate(batch)
                for h in range(heads)
                if old_row * heads + h in places
            ]
            if not row_pairs:
                continue
            groups.append(
                old_group.pick([row for row, _ in row_pairs], torch.tensor([index for _, index in row_pairs]))
            )
        self.groups = groups
        if groups:
            self.store.take(batch, heads)

    def nbytes(self) -> dict[str, int]:
        """Bytes: fast used, fast allocated (representatives included), host (slot tables included)."""
        used_bytes, allocated_bytes = self.store.nbytes()
        group_bytes = [group.nbytes() for group in self.groups]
        beside, host_bytes = sum(fast for fast, _ in group_bytes), sum(host for _, host in group_bytes)
        storages = [tensor.untyped_storage() for group in self.groups for tensor in group.shared()]
        beside += sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        return {"fast": used_bytes + beside, "fast_allocated": allocated_bytes + beside, "host": host_bytes}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _to_host(tensor: Tensor) -> Tensor:
    """A contiguous copy in host memory, pinned when it comes from a GPU."""
    if tensor.is_cuda:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    return tensor.clone(memory_format=torch.contiguous_format)
