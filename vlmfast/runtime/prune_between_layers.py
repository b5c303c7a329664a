"""Drops visual columns between layers of the language model: layers from a cut on run on fewer columns.

A pre-hook on the layer after a cut gathers the hidden states of the columns that stay (shorter rows are padded on the
left); every later layer gets shortened rotary tables and a mask of its own. Cache layers count what never entered them,
so the logical length stays one number; what each cut kept is remembered on the cache, and decode, verification and
later turns read it from there. Layer 0 is never cut: transformers sizes everything by it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmfast import kernels
from vlmfast.core import Kind, StageDidNotFire, Unsupported
from vlmfast.families import Family
from vlmfast.runtime.cache_state import CutColumns, cache_state, put_cache_state
from vlmfast.runtime.clock import Stopwatch
from vlmfast.runtime.compat import cache_in
from vlmfast.runtime.layer_cuts import (
    CutInputs,
    LayerMethod,
    PrunedPrefill,
    all_keys,
    take_tables,
)
from vlmfast.runtime.patch import Patch
from vlmfast.runtime.pruned_layer import prunable
from vlmfast.runtime.request_state import Requests
from vlmfast.runtime.transfers import to_device
from vlmfast.runtime.window_queries import window_queries


def deep_layers(model: nn.Module) -> int:
    """First layers of the language model that DeepStack adds visual features after: none of them may be cut."""
    vision_config = getattr(model.config, "vision_config", None)
    return len(getattr(vision_config, "deepstack_visual_indexes", None) or ())


class BetweenLayerPruning:
    """Hooks of one method on one text model; the running request says which columns are visual."""

    def __init__(self, model: nn.Module, family: Family, requests: Requests, method: LayerMethod) -> None:
        self.model, self.family, self.requests, self.method = model, family, requests, method
        self.layers = family.layers(model)
        self.cuts = dict(method.cuts(len(self.layers)))
        self.run: PrunedPrefill | None = None
        self.watch = Stopwatch(model)
        self.tail: Tensor | None = None
        self.masks: dict[tuple, Tensor | None] = {}
        self._check()

    def _check(self) -> None:
        if self.family.recurrent:
            raise Unsupported(
                f"{self.method.name} drops columns between layers, and layers of this model keep a recurrent state "
                "that takes a mask of its own: use a pruner of the tower's output (vidcom2, maxmin)"
            )
        num_deep = deep_layers(self.model)
        for cut_layer in self.cuts:
            if not 1 <= cut_layer < len(self.layers):
                raise Unsupported(
                    f"{self.method.name} before layer {cut_layer}, but this language model has layers 0 to "
                    f"{len(self.layers) - 1} and layer 0 stays whole: choose a layer from 1 to {len(self.layers) - 1}"
                )
            if cut_layer < num_deep:
                raise Unsupported(
                    f"{self.method.name} before layer {cut_layer}, but DeepStack adds visual features after the first "
                    f"{num_deep} layers of this model: cut before layer {num_deep} or later"
                )

    def install(self, patch: Patch) -> None:
        text_model = self.family.text(self.model)
        patch.hook(self.model.register_forward_pre_hook(self._refuse_labels, with_kwargs=True))
        patch.hook(text_model.register_forward_pre_hook(self._enter, with_kwargs=True))
        patch.hook(text_model.register_forward_hook(self._leave, always_call=True))
        first_cut = min(self.cuts)
        for layer_index, layer in enumerate(self.layers):
            # runs before our own hook on this layer, so that the method has its input before the cut
            if layer_index + 1 in self.cuts:
                patch.hook(layer.self_attn.register_forward_hook(self._attended, with_kwargs=True))  # type: ignore
            if layer_index + 1 >= first_cut:
                patch.hook(layer.register_forward_pre_hook(self._layer(layer_index), with_kwargs=True))

    def _refuse_labels(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if kwargs.get("labels") is not None and self.method.keep < 1:
            raise Unsupported("labels were given to a model with a pruner: remove() the acceleration to train")

    # -- around the text model -------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.run, self.masks, self.watch = None, {}, Stopwatch(self.model)
        request, cache = self.requests.current, cache_in(kwargs)
        entered_columns = request.entered
        attention_mask = kwargs.get("attention_mask")
        plain_mask = attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2)
        if not plain_mask and (request.has_media or cache_state(cache).cuts):
            raise Unsupported(
                f"a prebuilt attention mask cannot follow columns that {self.method.name} drops between layers: "
                "use the default dynamic cache and a 2-D mask"
            )
        self.tail = attention_mask if plain_mask else None
        if entered_columns is not None and self.method.keep >= 1:
            request.notes.append("prune: keep=1 keeps every visual token, bypassed")
        elif entered_columns is not None:
            embeddings = kwargs["inputs_embeds"]
            num_columns, newline = embeddings.shape[1], getattr(self.family.base(self.model), "image_newline", None)
            column_kinds = entered_columns.kinds[:, -num_columns:]
            assert request.entered_counts is not None
            num_visual, num_others = request.entered_counts
            if newline is not None:  # separators survive like text
                column_kinds = column_kinds.masked_fill((embeddings == newline.to(embeddings)).all(-1), Kind.SYSTEM)
                num_all, num_visual = num_visual + num_others, (column_kinds == Kind.VISUAL).sum(1).cpu()
                num_others = num_all - num_visual
            self.run = PrunedPrefill(
                column_kinds,
                entered_columns.index[:, -num_columns:],
                num_visual,
                num_visual,
                num_others,
                entered_columns.kinds[:, :-num_columns] != Kind.PAD,
            )

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        pruned_prefill, self.run = self.run, None
        if pruned_prefill is not None and output is not None:
            if pruned_prefill.done < len(self.cuts):
                raise StageDidNotFire(f"{self.method.name} made {pruned_prefill.done} of its {len(self.cuts)} cuts")
            request = self.requests.current
            request.selecting.spans += self.watch.spans
            request.kept_tokens += int((pruned_prefill.visual - pruned_prefill.entered).sum())

    # -- the layer before a cut: what the method looks at ------------------------------------------------------------

    def _attended(self, module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        num_queries = self.method.window()
        if self.run is None or num_queries == 0:
            return
        start_mark = self.watch.now()
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        tables, num_columns = kwargs["position_embeddings"], hidden.shape[1]
        cache = cache_in(kwargs)
        keys = (
            cache.layers[module.layer_idx].keys[:, :, -num_columns:]
            if cache is not None
            else all_keys(module, hidden, tables)
        )
        window_query = window_queries(module, hidden[:, -num_queries:], tables)
        visible = self.run.kinds != Kind.PAD if self.run.ragged else None
        self.run.weights = kernels.window_attention(window_query, keys, module.scaling, visible)
        self.watch.add(start_mark)

    # -- every layer from the one before the first cut ---------------------------------------------------------------

    def _layer(self, layer_index: int) -> Any:
        def pre(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if self.run is None:
                self._continue(layer_index, hidden, kwargs)
                return args, kwargs
            if layer_index in self.cuts:
                start_mark = self.watch.now()
                hidden = self._cut(layer_index, hidden, kwargs)
                self.watch.add(start_mark)
            if layer_index + 1 in self.cuts:
                self.run.before = hidden
            if self.run.source is None:
                return None
            kwargs["position_embeddings"] = self.run.tables
            positions = kwargs.get("position_ids")
            if positions is not None:  # only FlashAttention's packing detector reads them: contiguous
                steps = torch.arange(hidden.shape[1], device=hidden.device)
                kwargs["position_ids"] = positions[..., :1] + steps
            kwargs["attention_mask"] = self._mask(self.run, hidden)
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        return pre

    def _cut(self, cut_layer: int, hidden: Tensor, kwargs: dict) -> Tensor:
        """Score, choose and gather: returns the hidden states (B, S, D) of the kept columns.

        How many columns every row keeps is known on the host, so that nothing waits for the device.
        """
        prefill, cache = self.run, cache_in(kwargs)
        assert prefill is not None and prefill.before is not None
        scores = self.method.rate(CutInputs(prefill.kinds, hidden, prefill.before, prefill.weights)).float()
        row_budget = (prefill.entered * self.cuts[cut_layer]).round().long().clamp(min=1)
        kept_mask = self._stays(scores, prefill, to_device(row_budget, scores.device))
        prefill.visual = torch.minimum(prefill.visual, row_budget)
        num_columns, num_kept = hidden.shape[1], int((prefill.visual + prefill.others).max())
        dropped_first = kept_mask.to(torch.int8).argsort(
            dim=1, stable=True
        )  # dropped columns, then kept: each ascending
        source_columns = dropped_first[:, num_columns - num_kept :]
        filled_mask = kept_mask.gather(1, source_columns)
        padding_mask = ~filled_mask
        prefill.kinds = prefill.kinds.gather(1, source_columns).masked_fill_(padding_mask, Kind.PAD)
        prefill.index = prefill.index.gather(1, source_columns).masked_fill_(padding_mask, -1)
        prefill.source = source_columns if prefill.source is None else prefill.source.gather(1, source_columns)
        prefill.tables = take_tables(kwargs["position_embeddings"], prefill.source)
        prefill.done += 1
        self.masks.clear()
        prior_valid, prior_index = self._prior(cut_layer, cache, prefill)
        prefill.valid = torch.cat([prior_valid, filled_mask], 1)
        prefill.padded = prefill.ragged or (prior_valid.shape[1] > 0 and not bool(prior_valid.all()))
        if cache is not None:
            for layer_index in range(cut_layer, len(self.layers)):
                layer = prunable(cache, layer_index, len(self.layers))
                layer.skip(num_columns - num_kept)
                layer.announce()
            uncut_columns = cache.layers[0].keys.shape[2]
            cut_columns = CutColumns(
                prefill.valid, torch.cat([prior_index, prefill.index], 1), uncut_columns, prefill.padded
            )
            put_cache_state(cache, cuts={**cache_state(cache).cuts, cut_layer: cut_columns})
        return hidden.gather(1, source_columns[..., None].expand(-1, -1, hidden.shape[-1]))

    def _stays(self, scores: Tensor, prefill: PrunedPrefill, row_budget: Tensor) -> Tensor:
        """(B, P) bool: text, and each row's best visual columns, at most `row_budget` (B,)."""
        visual_mask = prefill.kinds == Kind.VISUAL
        score_rank = kernels.ranking(scores.masked_fill(~visual_mask, float("-inf"))).argsort(dim=1)
        return (visual_mask & (score_rank < row_budget[:, None])) | (~visual_mask & (prefill.kinds != Kind.PAD))

    def _prior(self, cut_layer: int, cache: Any, prefill: PrunedPrefill) -> tuple[Tensor, Tensor]:
        """Valid and logical columns (B, past) that the layers from cut i on held before this prefill."""
        past_length = prefill.prior.shape[1]
        if past_length == 0:
            return prefill.prior, prefill.index[:, :0]
        state = cache_state(cache)
        assert state.columns is not None
        logical_columns, cut_columns = state.columns.index[:, :past_length], state.cuts.get(cut_layer)
        if cut_columns is None:
            return prefill.prior, logical_columns
        num_new = past_length - cut_columns.uncut  # columns that came after that prefill entered every layer
        valid_before = cut_columns.valid[:, : cut_columns.valid.shape[1] + min(0, num_new)]
        index_before = cut_columns.index[:, : valid_before.shape[1]]
        new_columns = slice(past_length - max(0, num_new), past_length)
        valid = torch.cat([valid_before, prefill.prior[:, new_columns]], 1)
        return valid, torch.cat([index_before, logical_columns[:, new_columns]], 1)

    def _continue(self, layer_index: int, hidden: Tensor, kwargs: dict) -> None:
        """Decode, verification or a turn without new media, over layers that were cut before."""
        cache = cache_in(kwargs)
        cuts_by_layer = cache_state(cache).cuts
        nearest_cut = max((cut_layer for cut_layer in cuts_by_layer if cut_layer <= layer_index), default=None)
        if nearest_cut is None or cache is None:
            return
        cache.layers[layer_index].announce()
        num_columns, past_length = hidden.shape[1], cache.layers[layer_index].physical
        if num_columns == 1 and not cuts_by_layer[nearest_cut].padded and self.tail is None:
            kwargs["attention_mask"] = None
            return
        mask_key = (nearest_cut, past_length)
        if mask_key not in self.masks:
            valid = cuts_by_layer[nearest_cut].grown(past_length + num_columns, self.tail)
            self.masks[mask_key] = self._build(valid, hidden, bool(valid.all()))
        kwargs["attention_mask"] = self.masks[mask_key]

    # -- masks -----------------------------------------------------------------------------------------------------

    def _mask(self, prefill: PrunedPrefill, hidden: Tensor) -> Tensor | None:
        assert prefill.valid is not None
        mask_key = ("run", prefill.valid.shape[1])
        if mask_key not in self.masks:
            self.masks[mask_key] = self._build(prefill.valid, hidden, not prefill.padded)
        return self.masks[mask_key]

    def _build(self, valid: Tensor, hidden: Tensor, all_valid: bool) -> Tensor | None:
        """The mask that the model's own attention wants for q new columns over `valid` (B, kv); None when none."""
        config: Any = self.family.text(self.model).config
        attention = str(config._attn_implementation)
        num_queries, num_keys = hidden.shape[1], valid.shape[1]
        if all_valid and (num_queries == 1 or num_queries == num_keys):
            return None
        if "flash" in attention:
            return None if all_valid else valid.long()
        if attention not in ("sdpa", "eager"):
            raise Unsupported(
                f"attention {attention!r} with columns dropped between layers: use sdpa, eager or flash attention"
            )
        num_past, device = num_keys - num_queries, valid.device
        causal_mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_past)
        own_column = torch.eye(num_queries, num_keys, dtype=torch.bool, device=device).roll(num_past, 1)  # no empty row
        allowed_mask = ((valid[:, None] & causal_mask) | own_column)[:, None]
        if attention == "sdpa":
            return allowed_mask
        lowest = torch.finfo(hidden.dtype).min
        return torch.zeros(allowed_mask.shape, dtype=hidden.dtype, device=valid.device).masked_fill(
            ~allowed_mask, lowest
        )
