"""Drops visual columns before the language model: finds them, asks the pruner which to keep, adapts the masks.

Three hooks on an unmodified model: on `get_*_features` (layout of the media), on the base model's forward (where the
placeholders are), and on the text model's forward (where columns are dropped). The cache object itself holds what was
dropped, so several conversations may interleave.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from vlmfast.core import Kind, Unsupported
from vlmfast.families import Family
from vlmfast.families.base import feature_list
from vlmfast.runtime import unneeded_waits
from vlmfast.runtime.cache_state import (
    Columns,
    cache_state,
    column_kinds,
    contiguous_positions,
    entry_mask,
    put_cache_state,
    rows_width,
)
from vlmfast.runtime.compat import cache_in, put_cache
from vlmfast.runtime.compiled import is_compiled, refuse_compiled
from vlmfast.runtime.early_features import VideoPieces
from vlmfast.runtime.media_cache import MediaCache
from vlmfast.runtime.model_lock import model_lock
from vlmfast.runtime.patch import Patch
from vlmfast.runtime.pruned_layer import count_skipped
from vlmfast.runtime.request_state import Requests, RequestState
from vlmfast.runtime.selection import Selection, drop, left_padded
from vlmfast.runtime.tower_attention import TowerAttention
from vlmfast.runtime.transfers import on_host, to_device


class InputPruning:
    """Installs the three taps, which act for the running call of `requests`, under its pruner.

    Without a pruner they observe only (column kinds for KV policies and speculation).
    """

    def __init__(self, model: nn.Module, family: Family, requests: Requests) -> None:
        self.model, self.family, self.requests = model, family, requests
        self.host_grids = False  # may grids come to the tower on the host?
        self.ids = family.visual_ids(model)
        self.attention: TowerAttention | None = None  # where tower attention comes from, when a pruner needs it
        self.reuse: MediaCache | None = None  # encoded media kept between calls, when asked for
        self.pieces: VideoPieces | None = None  # what was encoded while a video was read

    def install(self, patch: Patch) -> None:
        base_model, text_model = self.family.base(self.model), self.family.text(self.model)
        for media_kind in self.ids:
            self._tap_features(patch, base_model, media_kind)
        unneeded_waits.install(patch, self.model, base_model, self.requests)
        patch.hook(self.model.register_forward_pre_hook(self._refuse, with_kwargs=True))
        patch.hook(base_model.register_forward_pre_hook(self._see, with_kwargs=True))
        patch.hook(text_model.register_forward_pre_hook(self._enter, with_kwargs=True))
        if self.family.rope_axes == 1:  # FlashAttention reads packing from the positions the layers get
            for decoder_layer in self.family.layers(self.model):
                patch.hook(decoder_layer.register_forward_pre_hook(contiguous_positions, with_kwargs=True), stays=True)

    # -- tap 1: media layout ---------------------------------------------------------------------------------------

    def _tap_features(self, patch: Patch, base_model: nn.Module, media_kind: str) -> None:
        function_name = f"get_{media_kind}_features"
        own_function = getattr(base_model, function_name)
        signature = inspect.signature(own_function)

        @functools.wraps(own_function)
        def tapped(*args: Any, **kwargs: Any) -> Any:
            with model_lock(self.model):
                return tap(*args, **kwargs)

        def tap(*args: Any, **kwargs: Any) -> Any:
            request = self.requests.current
            if request.kind is not None:  # Qwen3-VL encodes video by calling the image function
                return own_function(*args, **kwargs)
            bound_call = signature.bind(*args, **kwargs)
            bound_arguments, grid_name = bound_call.arguments, f"{media_kind}_grid_thw"
            # read before the tower runs, so that nothing waits for it
            if self.host_grids and bound_arguments.get(grid_name) is not None:
                bound_arguments[grid_name] = bound_arguments[grid_name].cpu()
                args, kwargs = bound_call.args, bound_call.kwargs
            call_arguments = {**bound_arguments, **bound_arguments.get("kwargs", {})}
            start_mark = request.encoding.now()
            features = self._encode(
                request, media_kind, call_arguments, functools.partial(own_function, *args, **kwargs)
            )
            request.encoding.add(start_mark)
            request.media[media_kind] = self.family.items(
                self.model, media_kind, call_arguments, feature_list(features)
            )
            if self.attention is not None:
                second_mark = request.selecting.now()
                self.attention.collect(
                    media_kind,
                    functools.partial(own_function, *args, **kwargs),
                    call_arguments,
                    request.media[media_kind],
                )
                request.selecting.add(second_mark)
            return features

        patch.set(base_model, function_name, tapped)

    def _encode(self, request: RequestState, media_kind: str, inputs: dict[str, Any], encode: Callable[[], Any]) -> Any:
        """Run the tower on one kind of media, or take what it gave for the same pixels before."""
        early = None if self.pieces is None else self.pieces.take(request, inputs)
        if early is not None:
            return early
        key, stored_features = "", None
        media_cache = self.reuse if self.attention is None else None  # tower attention exists only while the tower runs
        if media_cache is not None:
            key, stored_features = media_cache.features(
                request.lookup, media_kind, inputs | {"pruner": repr(request.pruner)}
            )
        if stored_features is not None:
            if stored_features[1] is not None:
                request.tower_kept = (request.tower_kept or {}) | {media_kind: stored_features[1]}
            return stored_features[0]
        request.kind = media_kind
        try:
            encoded = encode()
        finally:
            request.kind = None
        if media_cache is not None:
            media_cache.keep_features(request.lookup, key, encoded, (request.tower_kept or {}).get(media_kind))
        return encoded

    def _refuse(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if is_compiled(self.family.text(self.model)):
            refuse_compiled(self.model)
        if kwargs.get("labels") is not None and self.requests.current.active:
            raise Unsupported("labels were given to a model with a pruner: remove() the acceleration to train")

    def refuse_merged(self, ids: Tensor | None, embeds: Tensor | None) -> None:
        """Raise Unsupported for embeddings (B, L, D) that hold features where the ids (B, L) have placeholders."""
        if ids is None or embeds is None or ids.shape != embeds.shape[:2]:
            return
        for media_kind, placeholder_mask in self._placeholders(embeds).items():
            id_mask = (ids == self.ids[media_kind]).cpu()
            if bool((id_mask & ~placeholder_mask).any()):
                raise Unsupported(
                    f"inputs_embeds came in with the {media_kind} features already in them, whose layout is not known: "
                    "pass input_ids and the pixels to prune them"
                )

    # -- tap 2: where the placeholders are -------------------------------------------------------------------------

    def _see(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        request, input_ids = self.requests.current, kwargs.get("input_ids", args[0] if args else None)
        request.seen = {}
        if input_ids is None:
            embeddings = kwargs.get("inputs_embeds")
            if embeddings is None or embeddings.shape[1] == 1:
                return
            request.seen = self._placeholders(embeddings)
        elif input_ids.shape[1] > 1:
            host_ids = on_host(input_ids, request.prompt_ids)
            request.seen = {media_kind: host_ids == visual_id for media_kind, visual_id in self.ids.items()}
        self.lay_out(kwargs)

    def _placeholders(self, embeddings: Tensor) -> dict[str, Tensor]:
        """Per kind of media (B, L) bool on the host, where embeddings (B, L, D) are a placeholder's."""
        embedding_table: Any = self.family.base(self.model).get_input_embeddings()  # type: ignore[operator]
        id_tensors = {
            kind: torch.tensor(visual_id, device=embedding_table.weight.device) for kind, visual_id in self.ids.items()
        }
        return {
            kind: (embeddings == embedding_table(visual_id).to(embeddings)).all(-1).cpu()
            for kind, visual_id in id_tensors.items()
        }

    def lay_out(self, call: dict[str, Any]) -> None:
        """Note the layout of media that came already encoded (mm_encoder_outputs), where `call` gives it."""
        request, outputs = self.requests.current, call.get("mm_encoder_outputs") or {}
        request.given |= {media_kind for media_kind in self.ids if outputs.get(media_kind) is not None}
        for media_kind in request.given & outputs.keys() - request.media.keys():
            features = feature_list(outputs[media_kind])
            try:
                items = self.family.items(self.model, media_kind, call, features)
            except (KeyError, TypeError, AttributeError):  # no grids came with them
                continue
            if sum(item.n for item in items) == sum(map(len, features)):
                request.media[media_kind] = items

    # -- tap 3: columns enter the text model -----------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        request, embeddings, cache = self.requests.current, kwargs["inputs_embeds"], cache_in(kwargs)
        columns = cache_state(cache).columns
        past_length = cache.get_seq_length() if cache is not None else 0
        placeholder_masks, request.seen = request.seen, {}
        has_media = any(bool(placeholder_mask.any()) for placeholder_mask in placeholder_masks.values())
        _note_cache(request, cache)
        request.entered, request.has_media = None, has_media
        if past_length and not has_media:  # decode, verification, or a turn without new media
            if columns is not None and columns.padded:
                columns.announce(cache)
                kwargs["attention_mask"] = columns.mask(kwargs.get("attention_mask"), past_length + embeddings.shape[1])
            return args, kwargs
        request.prefills += 1
        prompt_mask, request.prompt_ids, request.prompt_mask = request.prompt_mask, None, None
        self._prefill(request, kwargs, placeholder_masks, prompt_mask, past_length, columns)
        return args, kwargs

    def _prefill(
        self, request: RequestState, kwargs: dict, seen_masks: dict[str, Tensor], prompt_mask: Tensor | None,
        past_length: int, columns: Columns | None,
    ) -> None:  # fmt: skip
        embeddings, attention_mask, has_media = kwargs["inputs_embeds"], kwargs.get("attention_mask"), request.has_media
        batch_size, num_columns, _ = embeddings.shape
        if attention_mask is not None and (isinstance(attention_mask, dict) or attention_mask.ndim != 2):
            if not request.active:
                _bypass(request, seen_masks)
                return
            raise Unsupported(
                "a prebuilt attention mask cannot follow pruned columns: pass a 2-D mask and a dynamic cache, "
                "or call generate(), which rewrites its inputs for a static one"
            )
        valid_mask = torch.ones(batch_size, past_length + num_columns, dtype=torch.bool)  # on the host
        if attention_mask is not None:
            valid_mask = on_host(attention_mask, prompt_mask).bool()
        valid_before, valid_mask = valid_mask[:, :past_length], valid_mask[:, -num_columns:]
        is_padded = attention_mask is not None and not bool(valid_mask.all())
        if past_length and columns is None:  # the cache was filled before we saw it: nothing was dropped from it
            columns = Columns(
                to_device(column_kinds(torch.zeros_like(valid_before), valid_before, False), embeddings.device),
                to_device(
                    torch.arange(past_length).expand(batch_size, past_length).masked_fill(~valid_before, -1),
                    embeddings.device,
                ),
                past_length,
                not bool(valid_before.all()),
            )
        elif columns is not None:
            columns.grow(past_length)
        visual_mask = functools.reduce(torch.logical_or, seen_masks.values(), torch.zeros_like(valid_mask))
        host_kinds = column_kinds(visual_mask, valid_mask, past_length > 0)
        logical_index = torch.arange(past_length, past_length + num_columns).expand(batch_size, num_columns)
        logical_index = to_device(logical_index.masked_fill(~valid_mask, -1), embeddings.device)
        kind_codes = to_device(host_kinds, embeddings.device)
        kept_rows = self.rows(kwargs, seen_masks, visual_mask, valid_mask) if has_media else None
        if not request.running:  # a forward by itself: what it encoded says nothing about the next one's media
            request.media, request.tower_kept = {}, None
        if kept_rows is not None:
            source_columns, filled_mask = left_padded(kept_rows, embeddings.device)
            is_padded = len({len(row_indices) for row_indices in kept_rows}) > 1
            drop(kwargs, source_columns, filled_mask, kept_rows, past_length)
            kind_codes = kind_codes.gather(1, source_columns).masked_fill(~filled_mask, Kind.PAD)
            logical_index = logical_index.gather(1, source_columns).masked_fill(~filled_mask, -1)
        if columns is not None:
            kind_codes = torch.cat([columns.kinds, kind_codes], 1)
            logical_index = torch.cat([columns.index, logical_index], 1)
            is_padded = is_padded or columns.padded
        entered_columns = Columns(kind_codes, logical_index, past_length + num_columns, is_padded)
        entered_columns.host = host_kinds if kept_rows is None and columns is None else None
        request.entered = entered_columns if has_media else None
        num_others = (valid_mask & ~visual_mask).sum(1)
        row_lengths = valid_mask.sum(1) if kept_rows is None else torch.tensor([len(columns) for columns in kept_rows])
        request.entered_counts = row_lengths - num_others, num_others
        cache = cache_in(kwargs)
        if cache is None and kwargs.get("use_cache") and kept_rows is not None:
            cache = put_cache(kwargs, DynamicCache(config=self.family.text(self.model).config))
        if cache is not None:
            if kept_rows is not None:
                count_skipped(cache, num_columns - rows_width(kept_rows), len(self.family.layers(self.model)))
            put_cache_state(cache, columns=entered_columns)
            entered_columns.announce(cache)
            _note_cache(request, cache)
        if kept_rows is not None or (columns is not None and columns.padded):
            attention_mask = entry_mask(entered_columns)
            if attention_mask is None and cache_in(kwargs) is None:  # gaps in positions would read as packing
                attention_mask = torch.ones(
                    batch_size, kwargs["inputs_embeds"].shape[1], dtype=torch.long, device=embeddings.device
                )
            elif attention_mask is not None and cache_in(kwargs) is None:
                attention_mask = attention_mask[:, -kwargs["inputs_embeds"].shape[1] :]
            kwargs["attention_mask"] = attention_mask

    def rows(self, kw: dict, seen: dict[str, Tensor], visual: Tensor, valid: Tensor) -> list[Tensor] | None:
        """Kept column indices of every row, ascending; None when nothing is dropped. The masks are on the host."""
        request = self.requests.current
        if not request.active:
            _bypass(request, seen)
            return None
        num_visual = sum(int(placeholder_mask.sum()) for placeholder_mask in seen.values())
        request.visual_tokens += num_visual
        start_mark = request.selecting.now()
        selection = Selection(self.model, self.family, request, self.attention, kw, visual, valid)
        num_kept = sum(selection.select(media_kind, where_mask) for media_kind, where_mask in seen.items())
        request.kept_tokens += num_kept
        kept_rows = selection.rows()
        request.selecting.add(start_mark)
        return None if num_kept == num_visual else kept_rows


def _note_cache(request: RequestState, cache: Any) -> None:
    """Remember the cache of the call: the first one, since streamers and processors may bring others meanwhile."""
    if request.running and request.cache is None:
        request.cache = cache


def _bypass(request: RequestState, placeholder_masks: dict[str, Tensor]) -> None:
    num_visual = sum(int(placeholder_mask.sum()) for placeholder_mask in placeholder_masks.values())
    request.visual_tokens += num_visual
    request.kept_tokens += num_visual
    if request.pruner is not None and num_visual:
        request.notes.append("prune: keep=1 keeps every visual token, bypassed")
