"""Hooks that compress the KV cache during a prefill: each layer is compressed after its attention.

A policy that shares one budget among the layers (`spans`) rates each layer after its attention; all layers are
compressed after the last one. Only the first prefill of an empty cache is compressed; decoded tokens, verified drafts
and later turns are appended. Where the whole context fits the budget, the cache gets its own layers back, unchanged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    StaticLayer,
)

from vlmfast import kernels
from vlmfast.core import CompressedLayer, LayerView, Policy, Rotation, StageDidNotFire, Unsupported
from vlmfast.families.base import attentions
from vlmfast.runtime import stacked_layers
from vlmfast.runtime.attention import AttentionSwitch
from vlmfast.runtime.cache_state import cache_state
from vlmfast.runtime.clock import Stopwatch
from vlmfast.runtime.compat import QuantizedLayerBase, cache_in, put_cache
from vlmfast.runtime.patch import Patch
from vlmfast.runtime.prompt_facts import PromptFacts
from vlmfast.runtime.pruned_layer import AnnouncedColumns, RaggedLayer, counting
from vlmfast.runtime.two_parts import BegunChoices, TwoParts
from vlmfast.runtime.window_queries import projected_queries, rotated_queries

FITS = "kv: the context fits the budget, bypassed"
NO_WEIGHTS = (
    "output_attentions with kv=: attention over a compressed cache makes no weights to return; "
    "drop output_attentions or kv="
)


class KVHooks:
    """Installs a policy on one text model.

    report_sink receives, once per prefill, a dict with the stopwatches `compress_ms` and `window_ms` (of it, recomputed
    attention), `kv_layers` (what the policy says of each layer) and `notes`.
    """

    def __init__(
        self, text_model: nn.Module, text_config: Any, policy: Policy, report_sink: Callable[[dict], None]
    ) -> None:
        self.text_model, self.config, self.policy, self.sink = text_model, text_config, policy, report_sink
        self.switch = AttentionSwitch(text_model, text_config)
        self._reset()

    def _reset(self) -> None:
        self.cache: Any = None  # the cache being prefilled right now
        self.originals: dict[int, Any] = {}
        self.fits: bool | None = None
        self.compressed = 0
        self.notes: list[str] = []
        self.stats: list[dict[str, Any]] = []
        self.rotation: Rotation | None = None
        self.rated: list[tuple[list[LayerView], Any]] = []  # layers that wait for the last one
        self.waiting: list[tuple[LayerView, Tensor | None]] = []  # with their window's queries, before the rotation
        self.begun = BegunChoices()
        self.position_embeddings: tuple[Tensor, Tensor] | None = None
        self.facts: PromptFacts | None = None
        self.queries: tuple[int, Tensor, list[Tensor]] | None = None  # those of the window, see `PromptFacts`
        self.choosing, self.window = Stopwatch(self.text_model), Stopwatch(self.text_model)

    def install(self, patch: Patch) -> None:
        decoder = self.text_model
        patch.call(self._reset)
        for attention in attentions(decoder):
            patch.hook(attention.register_forward_hook(self._after_attention, with_kwargs=True))
        self.switch.install(patch)
        patch.hook(decoder.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True))
        patch.hook(decoder.register_forward_hook(self._leave, with_kwargs=True, always_call=True))

    def abandon(self) -> None:
        """Forget a forward that was interrupted."""
        self._reset()
        self.switch.restore()

    def prefills(self, cache: Any) -> bool:
        """Is every layer of this cache the policy's own, and still empty?"""
        whole = self.cache is cache and len(self.originals) == len(cache.layers)
        return whole and not any(layer.is_initialized for layer in cache.layers)

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Inside, layers that run are none of the prefill under way."""
        cache, self.cache = self.cache, None
        try:
            yield
        finally:
            self.cache = cache

    # -- around the text model -------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        self._reset()
        cache = cache_in(kwargs)
        use_cache = kwargs.get("use_cache")
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = put_cache(kwargs, DynamicCache(config=self.config))
        if cache is None:
            return args, kwargs
        is_empty = cache.get_seq_length() == 0
        if is_empty and self.policy.fits(kwargs["inputs_embeds"].shape[1]):
            self.notes.append(FITS)
            self._report()
            return args, kwargs
        cache_layers = self._layers(cache)
        is_compressed = any(isinstance(layer, RaggedLayer) and layer.ragged for layer in cache_layers)
        if (is_empty or is_compressed) and torch.is_autocast_enabled(kwargs["inputs_embeds"].device.type):
            raise Unsupported(
                "torch.autocast with kv=: it leaves keys and values in two dtypes, which one storage cannot hold; load "
                "the model in the dtype you want (dtype=torch.bfloat16) and drop autocast"
            )
        if is_empty:
            self._replace(cache, cache_layers)
        elif is_compressed:
            wants_weights = kwargs.get("output_attentions")
            if self.config.output_attentions if wants_weights is None else wants_weights:
                raise Unsupported(NO_WEIGHTS)
            self._continue(kwargs)
        return args, kwargs

    def _report(self) -> None:
        self.sink({
            "compress_ms": self.choosing, "window_ms": self.window, "kv_layers": self.stats, "notes": self.notes,
        })  # fmt: skip

    def _layers(self, cache: Any) -> list[Any]:
        if not isinstance(cache, Cache) or not hasattr(cache, "layers") or getattr(cache, "offloading", False):
            raise Unsupported(
                f"a {'offloaded ' if getattr(cache, 'offloading', False) else ''}{type(cache).__name__} cannot hold "
                "compressed keys and values: use the default dynamic cache (kv policies have their own host tier)"
            )
        if not cache.layers:
            cache.layers.extend(DynamicLayer() for _ in self.text_model.layers)  # type: ignore[union-attr]
        return cache.layers

    def _replace(self, cache: Any, cache_layers: list[Any]) -> None:
        """Swap the empty layers of a dynamic cache for the policy's; sliding and linear ones are left alone."""
        untouched = []
        for layer_index, original in enumerate(cache_layers):
            if isinstance(original, (StaticLayer, QuantizedLayerBase)):
                raise Unsupported(
                    f"a {type(original).__name__} has a fixed layout that a kv policy cannot shrink: "
                    "use the default dynamic cache (cache_implementation unset)"
                )
            replaceable = type(original) is DynamicLayer or isinstance(original, AnnouncedColumns)
            if replaceable and not getattr(original, "is_sliding", False):
                self.originals[layer_index] = original
            else:
                untouched.append(layer_index)
        if not self.originals:
            raise Unsupported(
                f"every layer is a {type(cache_layers[0]).__name__}: kv policies compress full-attention layers only; "
                "drop kv= for this model"
            )
        for layer_index in self.originals:
            cache_layers[layer_index] = self.policy.cache_layer()
            cache_layers[layer_index].announce(begun=False)
        if untouched:
            layer_kind = type(cache_layers[untouched[0]]).__name__
            names = f"layers {stacked_layers.ranges(untouched)} ({layer_kind})"
            self.notes.append(f"kv: {names} were left alone, full attention only is compressed")
        self.cache = cache

    def _continue(self, kwargs: dict) -> None:
        """A forward over a compressed cache: decode, verification or a later turn."""
        num_columns, attention_mask = kwargs["inputs_embeds"].shape[1], kwargs.get("attention_mask")
        if (
            num_columns > 1
            and isinstance(attention_mask, Tensor)
            and attention_mask.ndim == 2
            and not bool(attention_mask[:, -num_columns:].all())
        ):
            raise Unsupported(
                "a later turn whose rows differ in length was padded: on a compressed cache give every row the same "
                "number of new tokens, or run the rows one by one"
            )
        if num_columns > 16:
            note = f"kv: {num_columns} columns of a later turn were appended whole, only the first is compressed"
            self.sink({"notes": [note]})

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self.cache is None:
            return
        try:
            if self.compressed == 0:
                for layer_index, original in self.originals.items():
                    policy_layer = self.cache.layers[layer_index]
                    self.cache.layers[layer_index] = original
                    if policy_layer.skipped:  # a pruner dropped columns on the way in: the layer must count them
                        original = counting(self.cache, layer_index)
                        original.skip(policy_layer.skipped)
                    if policy_layer.keys is not None:
                        original.update(policy_layer.keys, policy_layer.values)
                if output is not None:
                    self.notes.append(FITS)
            if output is not None:
                self._report()
        finally:
            self._reset()

    # -- after each layer's attention ------------------------------------------------------------------------------

    def _after_attention(self, module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        if self.cache is not None and module.layer_idx in self.originals:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            self.attended(module, hidden, kwargs["position_embeddings"])

    def attended(self, module: Any, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> None:
        """A layer's attention has filled its cache layer. hidden: what the attention received, (B, at least the
        policy's window, D), its last columns last."""
        cache_layer = self.cache.layers[module.layer_idx]
        columns = cache_state(self.cache).columns
        num_held = cache_layer.keys.shape[2]
        if columns is None or columns.kinds.shape[1] != num_held:
            known_kinds = "no column kinds" if columns is None else f"kinds of {columns.kinds.shape[1]} columns"
            raise StageDidNotFire(
                f"layer {module.layer_idx} holds {num_held} columns but the runtime has {known_kinds} for them"
            )
        start_mark = self.choosing.now()
        if self.facts is None:
            self.facts = PromptFacts(columns.kinds, columns.host)
            if self.facts.right_padded:
                raise Unsupported("padding on the right of a prompt: pad on the left (padding_side='left') to generate")
            self.fits = self.policy.fits(self.facts.longest)
        if not self.fits:
            layer_indices = sorted(self.originals)
            rotation = self._rotation(position_embeddings, num_held)
            layer_view = LayerView(
                cache_layer.keys, cache_layer.values, columns.kinds, None, module.layer_idx, len(layer_indices),
                columns.index, None, rotation, layer_indices.index(module.layer_idx), self.facts.held,
            )  # fmt: skip
            self.position_embeddings = position_embeddings
            self.waiting.append((layer_view, self._queries(module, hidden, num_held)))
            is_last = module.layer_idx == layer_indices[-1]
            if is_last or not self.policy.stacks or stacked_layers.is_full(layer_view, len(self.waiting)):
                self._compress(module, is_last)
        self.choosing.add(start_mark)

    def _compress(self, module: Any, is_last: bool) -> None:
        """Compress the layers that wait; those of a policy that decides for all layers at once after the last one."""
        views, layer_queries = [list(column) for column in zip(*self.waiting, strict=True)]
        self.waiting = []
        view = stacked_layers.side_by_side(views)
        self._look(module, view, layer_queries)
        if self.policy.spans:
            self.rated.append((views, self.policy.rate(view)))
            for layer_view in (view, *views):
                layer_view.window = None
            if is_last:
                groups, ratings = [list(column) for column in zip(*self.rated, strict=True)]
                rated_views = [stacked_layers.side_by_side(group) for group in groups]
                compressed = self.policy.compress_all(rated_views, ratings)
                for group, rated_view, kept_columns in zip(groups, rated_views, compressed, strict=True):
                    self._store(group, rated_view, kept_columns)
                self.rated = []
            return
        if isinstance(self.policy, TwoParts):
            self.begun.begin(self.policy, views, view)
            for group, group_view, found in self.begun.due(is_last):
                if found is not None:
                    self._store(group, group_view, found)
            return
        found = self.policy.compress(view)
        if found is not None:
            self._store(views, view, found)

    def _rotation(self, tables: tuple[Tensor, Tensor], num_held: int) -> Rotation | None:
        """The rotation this layer's attention was given, where it covers all columns."""
        if self.rotation is None and tables[0].ndim == 3 and tables[0].shape[1] == num_held:
            self.rotation = Rotation(tables[0], tables[1], min(self.originals))
        return self.rotation

    def _store(self, views: list[LayerView], view: LayerView, kept_columns: CompressedLayer) -> None:
        """Store what is kept of some layers; view: the same side by side."""
        assert view.positions is not None
        positions = view.positions.to(torch.int32)
        rows = stacked_layers.gathered(kept_columns, view.keys, view.values, positions)
        each = (len(views), len(view.keys))
        kept_by_layer = stacked_layers.by_layer(kept_columns, *each)
        rows_by_layer = stacked_layers.gathered_by_layer(rows, *each)
        for layer_view, kept_layer, layer_rows in zip(views, kept_by_layer, rows_by_layer, strict=True):
            self.cache.layers[layer_view.layer].compress(kept_layer, positions, layer_rows)
            self.compressed += 1
            self.stats.append({"layer": layer_view.layer, **kept_layer.stats})

    def _queries(self, module: Any, hidden: Tensor, num_held: int) -> Tensor | None:
        """Queries (B, H, W, Dh) of the last text columns before their rotation, None where none are asked for."""
        num_queries = min(self.policy.window(), num_held)
        if num_queries == 0:
            return None
        start_mark = self.window.now()
        if self.queries is None:
            assert self.facts is not None
            self.queries = self.facts.queries(num_queries)
        found = projected_queries(module, hidden[:, -self.queries[0] :])
        self.window.add(start_mark)
        return found

    def _look(self, module: Any, view: LayerView, layer_queries: list[Tensor | None]) -> None:
        """Put the attention of the last text queries into a view: weights (B, H, W, L) float32, and which count."""
        if self.queries is None or self.position_embeddings is None or self.facts is None:
            return
        start_mark = self.window.now()
        _, counted_queries, picked_queries = self.queries
        stacked_queries = torch.cat([layer for layer in layer_queries if layer is not None], 1)
        window_query = rotated_queries(module, stacked_queries, self.position_embeddings)
        if self.policy.per_query:
            view.window = kernels.window_attention(window_query, view.keys, module.scaling, self.facts.visible)
            view.window.masked_fill_(~counted_queries[:, None, :, None], 0.0)
        else:
            view.window = kernels.window_mean(
                window_query, view.keys, module.scaling, self.facts.visible, counted_queries, picked_queries
            )
            counted_queries = counted_queries[:, -1:] | True
        view.queries, view.picked = counted_queries, picked_queries
        self.window.add(start_mark)
