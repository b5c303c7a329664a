"""Heads that read host memory inside the static step: what they chose when, and the tables that a step reads.

Every `refresh` tokens each of them chooses among the chunks of its columns, in the step itself: such a step is a graph
of its own. Which heads choose, among how many chunks, and where those lie in host memory, stands in tables on the
device at places that stay the same; so one graph serves all prompts of about one length.
"""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vlmfast.core import Unsupported
from vlmfast.engine.slots import Slots
from vlmfast.kernels.chunks import ADDRESSES, Chunks, HostPair
from vlmfast.runtime.stepped_layer import HostRow, HostRows

MOST = 16384  # chunks of one head, for which there are kernels


class Tables:
    """Tables for up to `most` chunks a head, of all layers. key: what a graph that reads them is known by."""

    def __init__(self, slots: Slots, most: int, minmax: bool, ops: ModuleType) -> None:
        self.key, self.ops = (most, minmax), ops
        self.num_layers, device = len(slots.keys), slots.keys[0].device
        self.pairs, self.head_size = slots.rows * slots.keys[0].shape[1], slots.keys[0].shape[3]
        num_pairs = self.num_layers * self.pairs
        with torch.inference_mode(False), torch.no_grad():
            self.all = Chunks(
                sizes=torch.zeros(num_pairs, 4, dtype=torch.int32, device=device),
                addresses=torch.zeros(num_pairs, ADDRESSES, dtype=torch.long, device=device),
                held=torch.zeros(num_pairs, most, dtype=torch.int32, device=device),
                slot_of=torch.zeros(num_pairs, most, dtype=torch.int32, device=device),
                moves=torch.zeros(num_pairs, 2, most, dtype=torch.int32, device=device),
                scores=torch.zeros(num_pairs, most, device=device),
                minmax=minmax,
            )
        self.layers: list[Chunks] = []

    def fill(self, pairs: list[HostPair | None]) -> None:
        """Set what every (layer, row, head) reads."""
        sizes, addresses = [[0] * 4 for _ in pairs], [[0] * ADDRESSES for _ in pairs]
        for number, pair in enumerate(pairs):
            if pair is not None:
                words = pair.keys.shape[1] * pair.keys.element_size() // 4
                sizes[number][:3] = len(pair.keys), len(pair.fast_keys), words
                addresses[number][:5] = [tensor.data_ptr() for tensor in pair.tensors()]
        self.all.sizes.copy_(torch.tensor(sizes, dtype=torch.int32))
        self.all.addresses.copy_(torch.tensor(addresses))
        self.all.pairs = pairs
        names = ("sizes", "addresses", "held", "slot_of", "moves", "scores")
        for index in range(self.num_layers):
            own = slice(index * self.pairs, (index + 1) * self.pairs)
            views = {name: getattr(self.all, name)[own] for name in names}
            self.layers[index:] = [Chunks(**views, minmax=self.all.minmax, pairs=pairs[own])]

    def read(self, layer: int, queries: Tensor, num_tokens: int) -> None:
        """Queries (B * n, H * Dh) of a layer, after their rotation: those of each row's first token choose."""
        self.ops.choose(queries, num_tokens, self.head_size, self.layers[layer])
        self.ops.fetch(self.layers[layer])


class Choices:
    """Of one running call. history: (tokens fed before the choice, chunks held since then (L * P, m) int32)."""

    def __init__(self, hosts: list[HostRows | None], slots: Slots, ops: ModuleType) -> None:
        """Per layer what its heads read; the slots hold the fast rows already."""
        present = [host for host in hosts if host is not None]
        if len({(host.refresh, host.fed % host.refresh, host.rows[0].representatives.ndim) for host in present}) > 1:
            raise Unsupported("dynamic heads of several layers choose at different tokens, or by different bounds")
        self.hosts, self.ops = hosts, ops
        self.refresh, self.fed = present[0].refresh, present[0].fed
        self.minmax = present[0].rows[0].representatives.ndim == 3
        most = max(len(row.keys) for host in present for row in host.rows)
        if most > MOST:
            raise Unsupported(f"dynamic heads choose among {most:,} chunks, the static step takes {MOST:,}")
        self.most = max(16, 1 << (most - 1).bit_length())
        pairs = slots.rows * slots.keys[0].shape[1]
        held = torch.zeros(len(hosts) * pairs, max(len(row.held) for host in present for row in host.rows))
        for index, host in enumerate(hosts):
            for row in [] if host is None else host.rows:
                held[index * pairs + row.pair, : len(row.held)] = row.held
        self.history = [(-1, held.to(torch.int32).to(slots.keys[0].device))]
        self.moved = False  # may the slots hold something else than the last of the history?
        self._begin(slots, self.history[0][1])

    @classmethod
    def of(cls, layers: list[Any], slots: Slots, ops: ModuleType) -> Choices | None:
        """What the layers of a compressed cache choose; None where they do not."""
        hosts = [layer.host_rows() for layer in layers]
        return cls(hosts, slots, ops) if any(host is not None for host in hosts) else None

    def _begin(self, slots: Slots, held: Tensor) -> None:
        """Tables of these slots, which hold these chunks."""
        key = (self.most, self.minmax)
        if key not in slots.tables:
            slots.tables[key] = Tables(slots, *key, self.ops)
        self.tables: Tables = slots.tables[key]
        pairs: list[HostPair | None] = [None] * (len(self.hosts) * self.tables.pairs)
        for index, host in enumerate(self.hosts):
            for row in [] if host is None else host.rows:
                pairs[index * self.tables.pairs + row.pair] = _pair(row, slots, index)
        self.tables.fill(pairs)
        self.ops.hold(self.tables.all, held)

    def move(self, slots: Slots) -> None:
        """Go on in slots that hold the same columns."""
        self._begin(slots, self._held())

    def fork(self, slots: Slots) -> Choices:
        """An independent copy, in slots that hold the same columns."""
        copied = copy.copy(self)
        copied.history = list(self.history)
        copied.move(slots)
        return copied

    def _held(self) -> Tensor:
        """(L * P, m) int32: the chunk in each slot now; where that is not sure, what is known to have been there."""
        if self.moved or self.refresh > 1:
            return self.history[-1][1]
        return self.tables.all.held[:, : self.history[0][1].shape[1]]

    def left(self, fed: int) -> int:
        """How many tokens after `fed` may be stepped together: up to the next that chooses."""
        return self.refresh - (self.fed + fed) % self.refresh

    def prepare(self, fed: int) -> Tables | None:
        """Before a step of which the first token is number `fed`: the tables to choose by, None where none is due."""
        if self.moved:
            self.ops.hold(self.tables.all, self.history[-1][1])
            self.ops.fetch(self.tables.all)
            self.moved = False
        if (self.fed + fed) % self.refresh:
            return None
        self.moved = True  # until the step is done
        return self.tables

    def chosen(self, fed: int) -> None:
        """The step whose first token is number `fed` has chosen."""
        if self.refresh > 1:
            self.history.append((fed, self.tables.all.held[:, : self.history[0][1].shape[1]].clone()))
        self.moved = False

    def rewind(self, fed: int) -> None:
        """Only `fed` tokens are left."""
        while self.history[-1][0] >= fed:
            self.history.pop()
            self.moved = True

    def give(self, layers: list[Any]) -> None:
        """Let the layers of the cache hold what was chosen since they were read; the host waits once."""
        held = torch.stack([*(held for _, held in self.history[1:]), self._held()]).cpu()
        for index, (layer, host) in enumerate(zip(layers, self.hosts, strict=False)):
            if host is not None:
                own = held[:, index * self.tables.pairs : (index + 1) * self.tables.pairs]
                layer.hold([fed for fed, _ in self.history[1:]], own)


def _pair(row: HostRow, slots: Slots, layer: int) -> HostPair:
    """What a row reads, and its slots among the columns of these buffers."""
    batch_row, head = divmod(row.pair, slots.keys[0].shape[1])
    columns = slice(row.first, row.first + len(row.held) * row.keys.shape[1] // slots.keys[0].shape[3])
    fast = [buffers[layer][batch_row, head, columns].view(len(row.held), -1) for buffers in (slots.keys, slots.values)]
    return HostPair(row.representatives, row.keys, row.values, fast[0], fast[1])
