"""Dynamic heads: all columns are in host memory, in chunks; the chunks that a query needs are copied to fast memory.

One fast row is laid out as ``sinks | slots of one chunk each | recent | decoded tokens``. Attention is independent of
the order of the slots, so a step copies only chunks that the previous step did not hold (HybridKV, arXiv 2604.05887;
chunk bounds as in Quest, arXiv 2406.10774).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vlmfast import kernels
from vlmfast.core import LowRank, Retrieval
from vlmfast.kernels import Ragged
from vlmfast.prefill.host_groups import Group, LowRankGroup
from vlmfast.prefill.ragged_store import Segment, Store
from vlmfast.runtime.stacked_layers import spaced


class HostHeads:
    """All dynamic rows of one layer: a fast `Store` and the host groups behind it."""

    pending: tuple[list[int], Tensor] | None = None  # see `hold`

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
        fast_rows: list[tuple[Tensor, Tensor, Tensor]] = []
        for (_, budget), members in by_size.items():
            keys, values, positions = (_stacked([entry[i] for entry in members]).to(device) for i in (1, 2, 3))  # type: ignore[misc]
            row_numbers = [member[0] for member in members]
            row_factors = [] if factors is None else [factors[number] for number in row_numbers]
            own_factors = [factor for factor in row_factors if factor is not None]
            if own_factors:
                self.groups.append(LowRankGroup(row_numbers, keys, values, positions, budget, how, factors=own_factors))
            else:
                self.groups.append(Group(row_numbers, keys, values, positions, budget, how))
            fast_rows.append(self.groups[-1].first_rows(keys, values, positions))
        if len(fast_rows) == 1:
            (even_rows,) = spaced(fast_rows[0], 1, 1, True)
            self.store = Store.even(even_rows, list(self.groups[0].rows), total)
            return
        fast_segments = [
            (row, *parts)
            for group, group_rows in zip(self.groups, fast_rows, strict=True)
            for row, *parts in zip(group.rows, *group_rows, strict=True)
        ]
        self.store = Store.build(fast_segments, total)

    def hold(self, at: list[int], held: Tensor) -> None:
        """What the engine chose at logical positions `at`, and what it held in the end: held (len(at) + 1, rows of the
        layer, m) int chunks by slot, on the host. Loaded when the rows are next used."""
        self.settle()
        self.pending = at, held

    def settle(self) -> None:
        """Load what `hold` was told, once the host tensors are there."""
        for group in self.groups:
            group.arrived()
        if self.pending is None:
            return
        (at, held), self.pending = self.pending, None
        for group in self.groups:
            if 0 < group.slots < group.chunks:
                own = held[:, group.rows, : group.slots].long()
                group.history += zip(at, own, strict=False)
                group.load(own[-1], self.store)

    def attend(self, query: Tensor, scaling: float, out: Tensor, length: int, turn: bool) -> None:
        """Attention of the last q tokens (already appended; logical length `length` with them) into `out`.

        turn: they are a new turn of the conversation. It reads every column, once, and its last token chooses what the
        answer starts from: what was chosen for the question before has little to do with it. Otherwise every token
        chooses its own chunks, so a verified draft reads exactly what one-by-one decoding would.
        """
        self.settle()
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
        self.settle()
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
                num_columns = int((old_group.arrived().host_positions[index] < length).sum())
                segments.append((row, *old_group.columns(index, slice(num_columns))))
                row_budgets.append(old_group.budget)
                row_factors[row] = old_group.before(index, num_columns)
        self.__init__(segments, row_budgets, self.how, self.store.total, length, self.store.keys.device, row_factors)  # type: ignore[misc]

    def take(self, batch: list[int], heads: int) -> None:
        """Keep (and repeat) batch rows in the given order."""
        self.settle()
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


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)
