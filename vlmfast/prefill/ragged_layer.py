"""A transformers cache layer whose heads may store different columns, in exact, int8 and host memory.

States of a layer: empty -> the whole prefill, dense (B, Hk, L, Dh) -> ragged. A ragged layer hands itself to
the attention function on the key tensor (`runtime.attention`), which calls `attend`; nothing is ever padded or masked.
It reports the *logical* length (columns of the user's sequence) and holds the *physical* ones.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from vlmfast import kernels
from vlmfast.core import CompressedLayer, Unsupported
from vlmfast.prefill import engine_rows
from vlmfast.prefill.host_heads import HostHeads
from vlmfast.prefill.ragged_store import Segment, Store
from vlmfast.runtime.attention import tag
from vlmfast.runtime.pruned_layer import RaggedLayer
from vlmfast.runtime.stacked_layers import LayerRows, gathered, gathered_by_layer
from vlmfast.runtime.stepped_layer import HostRows


class KVLayer(RaggedLayer, CacheLayerMixin):
    """One layer's keys and values: ragged, tiered, croppable. Uncompressed it is the full cache under our attention.

    Once a model's hooks have filled it, only their attention can read it: what was not announced is refused.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.keys: Tensor | None = None  # (B, Hk, L, Dh) while the prefill is held as it came
        self.values: Tensor | None = None
        self.exact: Store | None = None  # fast memory, the model's dtype
        self.int8: Store | None = None  # fast memory, int8 with a scale per vector
        self.low: Store | None = None  # fast memory, int8: prefill columns of rows whose other columns are in `exact`
        self.dynamic: HostHeads | None = None  # host memory, with fast slots
        self.entered = 0  # columns that came in
        self.skipped = 0  # logical columns that never entered
        self.base = 0  # logical length at the end of the prefill
        self.heads = self.batch = 0
        self.stats: dict[str, Any] = {}
        self.backend: kernels.Backend | None = None
        self.verifying = False  # several tokens at once are drafted ones under verification, and not a new turn

    # -- what transformers asks ------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch, self.heads = key_states.shape[:2]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add q columns. The first call returns them as they came; later ones return them tagged with this layer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            self.entered = key_states.shape[2]
            return key_states, value_states
        self.check_announced()
        if self.keys is not None:
            self.compress(None)
        position = self.get_seq_length()
        flat_states = key_states.flatten(0, 1), value_states.flatten(0, 1)
        for store in self.stores():
            store.append(*flat_states, position)
        self.entered += key_states.shape[2]
        return tag(key_states, self), value_states

    def get_seq_length(self) -> int:
        """Logical length: what entered plus what was pruned before it could."""
        return self.entered + self.skipped

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.entered + query_length, self.skipped

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]

    def offload(self) -> None:
        raise Unsupported("an offloaded cache moves whole layers; this one has its own host tier: use offloading=False")

    def prefetch(self) -> None:
        self.offload()

    def crop(self, tokens_to_remove: int) -> None:
        """Go back -n columns (n <= 0), or to n logical columns (n > 0, as before transformers 5.20).

        Exact for columns that came after the compression. Columns of the prefill can be taken back too: every head
        then holds what it kept among the columns that remain (a merged one keeps what was merged into it).
        """
        logical_length = self.get_seq_length()
        num_removed = -tokens_to_remove if tokens_to_remove <= 0 else logical_length - tokens_to_remove
        if num_removed <= 0 or not self.is_initialized:
            return
        logical_length -= num_removed
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:, :, :-num_removed], self.values[:, :, :-num_removed]
        for store in (self.exact, self.int8):
            if store is not None and logical_length >= self.base:
                store.drop_last(num_removed)
            elif store is not None:
                store.keep_before(logical_length)
        if self.low is not None and logical_length < self.base:
            self.low.keep_before(logical_length)
        if self.dynamic is not None:
            self.dynamic.crop(logical_length, num_removed)
        self.entered -= num_removed
        self.base = min(self.base, logical_length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep batch rows `indices` (int64, repeats allowed, or a bool mask), in that order."""
        indices = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        batch_rows = [int(index) for index in indices]
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[batch_rows], self.values[batch_rows]
        kept_rows = {old_row * self.heads + head for old_row in batch_rows for head in range(self.heads)}
        for store_name in ("exact", "int8", "low"):
            store = getattr(self, store_name)
            if store is not None and kept_rows.isdisjoint(store.rows):
                setattr(self, store_name, None)
            elif store is not None:
                store.take(batch_rows, self.heads)
        if self.dynamic is not None:
            self.dynamic.take(batch_rows, self.heads)
            self.dynamic = self.dynamic if self.dynamic.groups else None
        self.batch = len(batch_rows)

    # -- compression and attention ---------------------------------------------------------------------------------

    @property
    def ragged(self) -> bool:
        """True once attention has to go through `attend`."""
        return self.is_initialized

    def stores(self) -> list[Store]:
        """The fast-memory stores that exist and grow."""
        all_stores = (self.exact, self.int8, self.dynamic.store if self.dynamic else None)
        return [s for s in all_stores if s is not None]

    def compress(
        self, kept: CompressedLayer | None, positions: Tensor | None = None, rows: LayerRows | None = None
    ) -> None:
        """Turn the held prefill into ragged storage: what `kept` names, or every column when None.

        positions (B, L): logical column of each held one, -1 on padding (then dropped); None = in order, no padding.
        rows: what `kept` names, where it was gathered before: becomes the storage.
        """
        all_keys, all_values = self.keys, self.values
        assert all_keys is not None and all_values is not None, "compress() needs the prefill that update() was given"
        batch_size, num_heads, num_columns, _ = all_keys.shape
        self.base = self.get_seq_length()
        if positions is None:
            positions = torch.arange(self.skipped, self.skipped + num_columns, device=all_keys.device).expand(
                batch_size, num_columns
            )
        if kept is None:
            real_columns = [(row_places >= 0).nonzero()[:, 0] for row_places in positions]
            kept = CompressedLayer(keep=[real_columns[row // num_heads] for row in range(batch_size * num_heads)])
        assert kept.dynamic is None or kept.mass is None or not kept.dynamic.any(), "dynamic heads hold plain columns"
        is_dynamic = kept.dynamic.tolist() if kept.dynamic is not None else [False] * (batch_size * num_heads)
        is_int8 = kept.int8.tolist() if kept.int8 is not None else [False] * (batch_size * num_heads)
        tiers: dict[str, list] = {"exact": [], "int8": [], "dynamic": []}
        positions = positions.to(torch.int32)
        whole_layer = (kept, all_keys, all_values, positions)
        all_rows = (list(range(batch_size * num_heads)), batch_size * num_heads)
        if rows is None or rows.kept is None:  # heads of other lengths in other layers: it gathers its own
            (rows,) = gathered_by_layer(gathered(*whole_layer), 1, batch_size)
        if rows.kept is not None:
            setattr(self, "int8" if is_int8[0] else "exact", Store.even(rows.kept, *all_rows, kept.mass))
        for row, columns in enumerate(kept.keep if rows.kept is None else []):
            batch_row, head = divmod(row, num_heads)
            places = slice(None) if len(columns) == num_columns else columns
            merged_pair = kept.merged[row] if kept.merged is not None else None
            row_keys, row_values = (
                merged_pair
                if merged_pair is not None
                else (all_keys[batch_row, head][places], all_values[batch_row, head][places])
            )
            segment = (row, row_keys, row_values, positions[batch_row][places])
            tiers["dynamic" if is_dynamic[row] else "int8" if is_int8[row] else "exact"].append(segment)
        if tiers["exact"]:
            self.exact = Store.build(tiers["exact"], batch_size * num_heads, mass=kept.mass)
        if tiers["int8"]:
            self.int8 = Store.build(tiers["int8"], batch_size * num_heads, int8=True, mass=kept.mass)
        if tiers["dynamic"]:
            assert kept.budget is not None and kept.retrieval is not None, "dynamic heads need a budget and a Retrieval"
            head_budgets = [int(kept.budget[entry[0]]) for entry in tiers["dynamic"]]
            self.dynamic = HostHeads(
                tiers["dynamic"],
                head_budgets,
                kept.retrieval,
                batch_size * num_heads,
                self.base,
                all_keys.device,
                kept.low_rank,
            )
        if kept.low is not None:
            assert self.dynamic is None, "dynamic heads hold whole columns"
            low_segments: list[Segment] = []
            for row, columns in enumerate(kept.low if rows.low is None else []):
                if len(columns):
                    batch_row, head = divmod(row, num_heads)
                    low_vectors = (all_keys[batch_row, head][columns], all_values[batch_row, head][columns])
                    low_segments.append((row, *low_vectors, positions[batch_row][columns]))
            self.low = (
                Store.build(low_segments, batch_size * num_heads, int8=True, grows=False)
                if rows.low is None
                else Store.even(rows.low, *all_rows)
            )
        self.keys = self.values = None
        self.stats = kept.stats

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """Attention of the last q columns (already in the layer), causal: (B, H, q, Dh) -> (B, H, q, Dv)."""
        attention_output = query.new_empty(*query.shape[:3], self.stores()[0].values.shape[-1])
        if self.low is not None:
            return self._joined(query, scaling, attention_output, self.low)
        for store in (self.exact, self.int8):
            if store is not None:
                kernels.ragged_attention(query, store, scaling, attention_output, self.backend)
        if self.dynamic is not None:
            is_new_turn = query.shape[2] > 1 and not self.verifying
            self.dynamic.attend(query, scaling, attention_output, self.get_seq_length(), is_new_turn)
        return attention_output

    def _joined(self, query: Tensor, scaling: float, output: Tensor, low_store: Store) -> Tensor:
        """Attention over rows that lie in two stores: each by itself, joined by their sums of exponentials."""
        low_output = torch.zeros_like(output)
        sums, low_sums = (query.new_full(query.shape[:3], float("-inf"), dtype=torch.float32) for _ in range(2))
        for store in self.stores():
            kernels.ragged_attention(query, store, scaling, output, self.backend, sums)
        kernels.ragged_attention(query, low_store, scaling, low_output, self.backend, low_sums, causal=False)
        low_share = torch.sigmoid(low_sums - sums)[..., None]
        return torch.lerp(output.float(), low_output.float(), low_share).to(output.dtype)

    # -- the engine, see `runtime.stepped_layer` --------------------------------------------------------------------

    def tiers(self) -> tuple[str, ...]:
        return tuple(tier for tier in ("exact", "int8", "low", "dynamic") if getattr(self, tier) is not None)

    def plain_rows(self) -> list[tuple[Tensor, ...]] | str:
        if type(self) is not KVLayer:
            return f"a {type(self).__name__} acts on every token"
        return engine_rows.plain_rows(self)

    def host_rows(self) -> HostRows | None:
        return engine_rows.host_rows(self)

    def hold(self, fed: list[int], held: Tensor) -> None:
        if self.dynamic is not None:
            self.dynamic.hold([self.get_seq_length() + number for number in fed], held)

    # -- accounts --------------------------------------------------------------------------------------------------

    def lengths(self) -> Tensor:
        """(B, Hk) int64 columns each head holds in fast memory."""
        if self.keys is not None:
            return torch.full((self.batch, self.heads), self.entered)
        out = torch.zeros(self.batch * self.heads, dtype=torch.int64)
        for store in [*self.stores(), *([self.low] if self.low is not None else [])]:
            out[store.rows] += torch.tensor(store.lengths)
        return out.view(self.batch, self.heads)

    def cached_tokens(self) -> float:
        """Mean columns per head in fast memory."""
        return float(self.lengths().double().mean()) if self.is_initialized else 0.0

    def nbytes(self) -> dict[str, int]:
        """Bytes by tier: `fast` (held; of it `int8`), `fast_allocated` (with free slots), `host`, `resident` (all).

        Keys, values, scales, positions, chunk representatives and tables are counted. On CPU `fast` and `host` are the
        same memory.
        """
        if self.keys is not None and self.values is not None:
            n = sum(t.numel() * t.element_size() for t in (self.keys, self.values))
            return {"fast": n, "int8": 0, "fast_allocated": n, "host": 0, "resident": n}
        tiers = {"fast": 0, "int8": 0, "fast_allocated": 0, "host": 0}
        for store in (self.exact, self.int8, self.low):
            if store is not None:
                used, allocated = store.nbytes()
                tiers["fast"] += used
                tiers["fast_allocated"] += allocated
                tiers["int8"] += used if store is not self.exact else 0
        if self.dynamic is not None:
            for tier, size in self.dynamic.nbytes().items():
                tiers[tier] += size
        return tiers | {"resident": tiers["fast_allocated"] + tiers["host"]}

    def fork(self) -> KVLayer:
        """An independent copy."""
        return copy.deepcopy(self)
