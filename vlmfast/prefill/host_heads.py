"""Dynamic heads: every column stays in host memory, in chunks; the chunks a query needs are swapped into fast slots.

One fast row is laid out as ``sinks | slots of one chunk each | recent | decoded tokens``. Attention does not care about
the order of the slots, so one step moves only the chunks that the step before did not hold (HybridKV, arXiv 2604.05887;
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

SLOTS = 4  # chunks a budget holds at least: chunks are cut shorter for a small one


class Group:
    """Dynamic rows of one prefill length and budget: dense host tensors, chunk representatives, slot tables."""

    def __init__(self, rows: list[int], keys: Tensor, values: Tensor, positions: Tensor, budget: int, how: Retrieval):
        """keys (R, n, D), values (R, n, Dv), positions (R, n) of the rows; budget = columns each holds fast."""
        self.rows, self.budget, self.how = rows, budget, how
        r, n, d = keys.shape
        self.n = n
        self.chunk = max(1, min(how.chunk, (budget - how.sinks - how.recent + 1) // SLOTS))
        self.chunks = max(0, (n - how.sinks - how.recent) // self.chunk)
        outside = n - self.chunks * self.chunk  # sinks, recent and what does not fill a chunk
        self.slots = min(self.chunks, max(1, (budget - outside) // self.chunk))
        self.host_keys, self.host_values = _to_host(keys), _to_host(values)
        self.host_positions = positions.to("cpu", torch.int32)
        middle = keys[:, how.sinks : how.sinks + self.chunks * self.chunk].view(r, self.chunks, self.chunk, d)
        if how.bound == "mean":
            self.representatives = middle.mean(2, dtype=torch.float32).to(keys.dtype)
        else:
            self.representatives = torch.stack([middle.amin(2), middle.amax(2)], 2)
        self.held = torch.arange(self.slots).expand(r, -1).clone()  # (R, slots) chunk in each slot, on the host
        self.history = [(-1, self.held.clone())]  # (position, held) at past refreshes, grows when refresh > 1
        self.moved = 0  # chunks copied into fast memory since the prefill

    def segments(self) -> list[Segment]:
        """The fast rows with the slots as they stand."""
        cut = self.how.sinks + self.chunks * self.chunk
        out: list[Segment] = []
        for i, row in enumerate(self.rows):
            at = self._columns(self.held[i])
            at = torch.cat([torch.arange(min(self.how.sinks, self.n)), at, torch.arange(min(cut, self.n), self.n)])
            device = self.representatives.device
            k, v, p = self.columns(i, at)
            out.append((row, k.to(device), v.to(device), p.to(device)))
        return out

    def columns(self, i: int, at: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions of row i at some columns, wherever they lie."""
        return self.host_keys[i][at], self.host_values[i][at], self.host_positions[i][at]

    def blocks(self, i: int, chunks: Tensor) -> Iterator[Tensor]:
        """Keys, values and positions of row i, some chunks (S,) of them: (S, chunk * D) each."""
        span = slice(self.how.sinks, self.how.sinks + self.chunks * self.chunk)
        for host in (self.host_keys, self.host_values, self.host_positions):
            yield host[i, span].view(self.chunks, -1)[chunks]

    def before(self, i: int, n: int) -> LowRank | None:
        """Factors of the first n columns of row i, for keys that are kept as such."""
        return None

    def pick(self, rows: list[int], index: Tensor) -> Group:
        """A group of some of these rows (int64, repeats allowed) under new names."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.rows = rows
        for name in ("host_keys", "host_values", "host_positions", "held"):
            setattr(new, name, getattr(self, name)[index])
        new.representatives = self.representatives[index.to(self.representatives.device)]
        new.history = [(position, held[index]) for position, held in self.history]
        return new

    def nbytes(self) -> tuple[int, int]:
        """Bytes beside the fast rows: in fast memory, in host memory (slot tables included)."""
        host = (self.host_keys, self.host_values, self.host_positions, self.held)
        return _bytes(self.representatives), sum(map(_bytes, host))

    def shared(self) -> list[Tensor]:
        """Further tensors in fast memory, which several rows or groups may share."""
        return []

    def _columns(self, chunks: Tensor) -> Tensor:
        """Host columns of some chunks (S,) -> (S * chunk,)."""
        return (self.how.sinks + chunks[:, None] * self.chunk + torch.arange(self.chunk)).reshape(-1)

    def choose(self, query: Tensor) -> Tensor:
        """(R, slots) chunks that score best for the queries (R, G, D), on the host."""
        scores = kernels.chunk_scores(query, self.representatives)
        return kernels.highest(scores, self.slots).cpu()

    def load(self, wanted: Tensor, store: Store) -> None:
        """Make the slots hold `wanted` (R, slots), copying only chunks that are not there yet."""
        for i, row in enumerate(self.rows):
            held, asked = self.held[i].tolist(), wanted[i].tolist()
            there, stays = set(held), set(asked)
            came = [chunk for chunk in asked if chunk not in there]  # as many as there are slots to free
            if not came:
                continue
            chunks = torch.tensor(came)
            slots = torch.tensor([slot for slot, chunk in enumerate(held) if chunk not in stays])
            at = store.offsets[store.rows.index(row)] + self.how.sinks
            target = slots.to(store.keys.device, non_blocking=True)
            for blocks, fast in zip(self.blocks(i, chunks), (store.keys, store.values, store.positions), strict=True):
                place = fast[at : at + self.slots * self.chunk].view(self.slots, -1)
                place.index_copy_(0, target, blocks.to(fast.device, non_blocking=True))
            self.held[i, slots] = chunks
            self.moved += len(chunks)


class LowRankGroup(Group):
    """Rows whose keys are factors in fast memory, multiplied and rotated when columns are read (ShadowKV)."""

    def __init__(self, *args: Any, factors: list[LowRank]) -> None:
        super().__init__(*args)
        self.factors = factors
        self.host_keys = self.host_keys[:, :0].clone()

    def columns(self, i: int, at: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        f = self.factors[i]
        here = at.to(f.left.device) if isinstance(at, Tensor) else at
        keys = rotate(f.left[here] @ f.right, f.cos[here], f.sin[here])
        return keys, self.host_values[i][at], self.host_positions[i][at]

    def blocks(self, i: int, chunks: Tensor) -> Iterator[Tensor]:
        for x in self.columns(i, self._columns(chunks)):
            yield x.reshape(len(chunks), -1)

    def before(self, i: int, n: int) -> LowRank:
        f = self.factors[i]
        return replace(f, left=f.left[:n], cos=f.cos[:n], sin=f.sin[:n])

    def pick(self, rows: list[int], index: Tensor) -> Group:
        new: Any = super().pick(rows, index)
        new.factors = [self.factors[i] for i in index.tolist()]
        return new

    def shared(self) -> list[Tensor]:
        return [x for f in self.factors for x in (f.left, f.right, *((f.cos, f.sin) if f.owner else ()))]


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
        alike: dict[tuple[int, int], list[Segment]] = {}
        for segment, budget in zip(segments, budgets, strict=True):
            alike.setdefault((segment[1].shape[0], budget), []).append(segment)
        self.groups: list[Group] = []
        for (_, budget), same in alike.items():
            keys, values, positions = (torch.stack([s[i] for s in same]).to(device) for i in (1, 2, 3))  # type: ignore[misc]
            rows = [s[0] for s in same]
            mine = [f for f in (factors[row] for row in rows) if f is not None] if factors is not None else []
            if mine:
                self.groups.append(LowRankGroup(rows, keys, values, positions, budget, how, factors=mine))
            else:
                self.groups.append(Group(rows, keys, values, positions, budget, how))
        self.store = Store.build([s for g in self.groups for s in g.segments()], total)

    def attend(self, query: Tensor, scaling: float, out: Tensor, length: int, turn: bool) -> None:
        """Attention of the last q tokens (already appended; logical length `length` with them) into `out`.

        turn: they are a new turn of the conversation. It reads every column, once, and its last token chooses what the
        answer starts from: what was chosen for the question before has little to do with it. Otherwise every token
        chooses its own chunks, so a verified draft reads exactly what one-by-one decoding would.
        """
        q = query.shape[2]
        packed = query.reshape(self.store.total, -1, q, query.shape[-1])
        if turn:
            kernels.ragged_attention(query, self._everything(), scaling, out)
            self._search(self.groups, packed[:, :, -1], length - 1)
            return
        for t in range(q):
            position = length - q + t
            self._search(list(self._due(position)), packed[:, :, t], position)
            left = q - 1 - t
            step = Ragged(
                self.store.keys, self.store.values, self.store.rows, self.store.offsets,
                [n - left for n in self.store.lengths], self.store.total, finite=True,
            )  # fmt: skip
            one = torch.empty_like(out[:, :, :1]) if q > 1 else out
            kernels.ragged_attention(query[:, :, t : t + 1], step, scaling, one)
            if q > 1:
                heads = out.view(self.store.total, -1, q, out.shape[-1])
                mine = one.view(self.store.total, -1, out.shape[-1])
                heads[self.store.rows, :, t] = mine[self.store.rows]

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
                entry = self.store.rows.index(row)
                _, k, v, p = self.store.segment(entry, self.store.keys.dtype)
                tail = slice(self._prefilled(group), None)
                host = [x.to(k.device) for x in group.columns(i, slice(None))]
                parts = [torch.cat([a, b]) for a, b in zip(host, (k[tail], v[tail], p[tail]), strict=True)]
                segments.append((row, parts[0], parts[1], parts[2]))
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
        budgets = []
        factors: list[LowRank | None] = [None] * self.store.total
        for g in self.groups:
            for i, row in enumerate(g.rows):
                n = int((g.host_positions[i] < length).sum())
                segments.append((row, *g.columns(i, slice(n))))
                budgets.append(g.budget)
                factors[row] = g.before(i, n)
        self.__init__(segments, budgets, self.how, self.store.total, length, self.store.keys.device, factors)  # type: ignore[misc]

    def take(self, batch: list[int], heads: int) -> None:
        """Keep (and repeat) batch rows in the given order."""
        groups = []
        for g in self.groups:
            where = {row: i for i, row in enumerate(g.rows)}
            pairs = [
                (new * heads + h, where[old * heads + h])
                for new, old in enumerate(batch)
                for h in range(heads)
                if old * heads + h in where
            ]
            if not pairs:
                continue
            groups.append(g.pick([row for row, _ in pairs], torch.tensor([i for _, i in pairs])))
        self.groups = groups
        if groups:
            self.store.take(batch, heads)

    def nbytes(self) -> dict[str, int]:
        """Bytes: fast used, fast allocated (representatives included), host (slot tables included)."""
        used, allocated = self.store.nbytes()
        sizes = [g.nbytes() for g in self.groups]
        extra, host = sum(fast for fast, _ in sizes), sum(host for _, host in sizes)
        storages = [x.untyped_storage() for g in self.groups for x in g.shared()]
        extra += sum({s.data_ptr(): s.nbytes() for s in storages}.values())
        return {"fast": used + extra, "fast_allocated": allocated + extra, "host": host}


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _to_host(x: Tensor) -> Tensor:
    """A contiguous copy in host memory, pinned when it comes from a GPU."""
    if x.is_cuda:
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)
    return x.clone(memory_format=torch.contiguous_format)
