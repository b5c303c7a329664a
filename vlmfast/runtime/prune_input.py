"""Which columns enter the language model: finds the visual ones, lets a pruner drop some, keeps masks right.

Three taps on an unmodified model: `get_*_features` (layout of the media), the base model's forward (where the
placeholders are), the text model's forward (where columns are dropped). What was dropped is remembered on the cache
object itself, so several conversations may interleave.
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
from vlmfast.runtime.media_cache import MediaCache
from vlmfast.runtime.model_lock import model_lock
from vlmfast.runtime.patch import Patch
from vlmfast.runtime.pruned_layer import count_skipped
from vlmfast.runtime.request_state import Requests, RequestState
from vlmfast.runtime.selection import Selection, drop, left_padded
from vlmfast.runtime.tower_attention import TowerAttention


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

    def install(self, patch: Patch) -> None:
        base, text = self.family.base(self.model), self.family.text(self.model)
        for kind in self.ids:
            self._tap_features(patch, base, kind)
        patch.hook(self.model.register_forward_pre_hook(self._refuse, with_kwargs=True))
        patch.hook(base.register_forward_pre_hook(self._see, with_kwargs=True))
        patch.hook(text.register_forward_pre_hook(self._enter, with_kwargs=True))
        if self.family.rope_axes == 1:  # FlashAttention reads packing from the positions the layers get
            for layer in self.family.layers(self.model):
                patch.hook(layer.register_forward_pre_hook(contiguous_positions, with_kwargs=True), stays=True)

    # -- tap 1: media layout ---------------------------------------------------------------------------------------

    def _tap_features(self, patch: Patch, base: nn.Module, kind: str) -> None:
        name = f"get_{kind}_features"
        inner = getattr(base, name)
        signature = inspect.signature(inner)

        @functools.wraps(inner)
        def tapped(*args: Any, **kwargs: Any) -> Any:
            with model_lock(self.model):
                return tap(*args, **kwargs)

        def tap(*args: Any, **kwargs: Any) -> Any:
            request = self.requests.current
            if request.kind is not None:  # Qwen3-VL encodes video by calling the image function
                return inner(*args, **kwargs)
            given = signature.bind(*args, **kwargs)
            bound, grid = given.arguments, f"{kind}_grid_thw"
            if self.host_grids and bound.get(grid) is not None:  # read before the tower runs: nothing waits for it
                bound[grid] = bound[grid].cpu()
                args, kwargs = given.args, given.kwargs
            call = {**bound, **bound.get("kwargs", {})}
            start = request.encoding.now()
            out = self._encode(request, kind, call, functools.partial(inner, *args, **kwargs))
            request.encoding.add(start)
            request.media[kind] = self.family.items(self.model, kind, call, feature_list(out))
            if self.attention is not None:
                again = request.selecting.now()
                self.attention.collect(kind, functools.partial(inner, *args, **kwargs), call, request.media[kind])
                request.selecting.add(again)
            return out

        patch.set(base, name, tapped)

    def _encode(self, request: RequestState, kind: str, call: dict[str, Any], encode: Callable[[], Any]) -> Any:
        """Run the tower on one kind of media, or find what it said of the same pixels before."""
        key, found = "", None
        reuse = self.reuse if self.attention is None else None  # tower attention exists only while the tower runs
        if reuse is not None:
            key, found = reuse.features(request.lookup, kind, call | {"pruner": repr(request.pruner)})
        if found is not None:
            if found[1] is not None:
                request.tower_kept = (request.tower_kept or {}) | {kind: found[1]}
            return found[0]
        request.kind = kind
        try:
            out = encode()
        finally:
            request.kind = None
        if reuse is not None:
            reuse.keep_features(request.lookup, key, out, (request.tower_kept or {}).get(kind))
        return out

    def _refuse(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if is_compiled(self.family.text(self.model)):
            refuse_compiled(self.model)
        if kwargs.get("labels") is not None and self.requests.current.active:
            raise Unsupported("labels were given to a model with a pruner: remove() the acceleration to train")

    def refuse_merged(self, ids: Tensor | None, embeds: Tensor | None) -> None:
        """Raise Unsupported for embeddings (B, L, D) that hold features where the ids (B, L) have placeholders."""
        if ids is None or embeds is None or ids.shape != embeds.shape[:2]:
            return
        for kind, where in self._placeholders(embeds).items():
            known = (ids == self.ids[kind]).to(where.device)
            if bool((known & ~where).any()):
                raise Unsupported(
                    f"inputs_embeds came in with the {kind} features already in them, whose layout is not known: "
                    "pass input_ids and the pixels to prune them"
                )

    # -- tap 2: where the placeholders are -------------------------------------------------------------------------

    def _see(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        request, ids = self.requests.current, kwargs.get("input_ids", args[0] if args else None)
        request.seen = {}
        if ids is None:
            embeds = kwargs.get("inputs_embeds")
            if embeds is None or embeds.shape[1] == 1:
                return
            request.seen = self._placeholders(embeds)
        elif ids.shape[1] > 1:
            request.seen = {kind: ids == token for kind, token in self.ids.items()}
        self.lay_out(kwargs)

    def _placeholders(self, embeds: Tensor) -> dict[str, Tensor]:
        """Per kind of media (B, L) bool, where embeddings (B, L, D) are a placeholder's."""
        table: Any = self.family.base(self.model).get_input_embeddings()  # type: ignore[operator]
        tokens = {kind: torch.tensor(token, device=table.weight.device) for kind, token in self.ids.items()}
        return {kind: (embeds == table(token).to(embeds)).all(-1) for kind, token in tokens.items()}

    def lay_out(self, call: dict[str, Any]) -> None:
        """Note the layout of media that came already encoded (mm_encoder_outputs), where `call` gives it."""
        request, outputs = self.requests.current, call.get("mm_encoder_outputs") or {}
        request.given |= {kind for kind in self.ids if outputs.get(kind) is not None}
        for kind in request.given & outputs.keys() - request.media.keys():
            features = feature_list(outputs[kind])
            try:
                items = self.family.items(self.model, kind, call, features)
            except (KeyError, TypeError, AttributeError):  # no grids came with them
                continue
            if sum(item.n for item in items) == sum(map(len, features)):
                request.media[kind] = items

    # -- tap 3: columns enter the text model -----------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        request, embeds, cache = self.requests.current, kwargs["inputs_embeds"], cache_in(kwargs)
        columns = cache_state(cache).columns
        past = cache.get_seq_length() if cache is not None else 0
        seen, request.seen = request.seen, {}
        has_media = any(bool(m.any()) for m in seen.values())
        _note_cache(request, cache)
        request.entered, request.has_media = None, has_media
        if past and not has_media:  # decode, verification, or a turn without new media
            if columns is not None and columns.padded:
                columns.announce(cache)
                kwargs["attention_mask"] = columns.mask(kwargs.get("attention_mask"), past + embeds.shape[1])
            return args, kwargs
        request.prefills += 1
        self._prefill(request, kwargs, seen, has_media, past, columns)
        return args, kwargs

    def _prefill(
        self, request: RequestState, kw: dict, seen: dict[str, Tensor], has_media: bool, past: int,
        columns: Columns | None,
    ) -> None:  # fmt: skip
        embeds, mask = kw["inputs_embeds"], kw.get("attention_mask")
        b, q, _ = embeds.shape
        if mask is not None and (isinstance(mask, dict) or mask.ndim != 2):
            if not request.active:
                _bypass(request, seen)
                return
            raise Unsupported(
                "a prebuilt attention mask cannot follow pruned columns: pass a 2-D mask and a dynamic cache, "
                "or call generate(), which rewrites its inputs for a static one"
            )
        valid = torch.ones(b, q, dtype=torch.bool, device=embeds.device)
        if mask is not None:
            valid = mask[:, -q:].bool()
        padded = mask is not None and not bool(valid.all())
        if past and columns is None:  # the cache was filled before we saw it: nothing was dropped from it
            before = valid.new_ones(b, past) if mask is None else mask[:, :past].bool()
            columns = Columns(
                column_kinds(torch.zeros_like(before), before, False),
                torch.arange(past, device=before.device).expand(b, past).masked_fill(~before, -1),
                past,
                not bool(before.all()),
            )
        elif columns is not None:
            columns.grow(past)
        visual = functools.reduce(torch.logical_or, seen.values(), torch.zeros_like(valid))
        kinds = column_kinds(visual, valid, past > 0)
        index = torch.arange(past, past + q, device=embeds.device).expand(b, q)
        index = index.masked_fill(~valid, -1)
        rows = self.rows(kw, seen, visual, valid) if has_media else None
        if not request.running:  # a forward by itself: what it encoded says nothing about the next one's media
            request.media, request.tower_kept = {}, None
        if rows is not None:
            source, filled = left_padded(rows, embeds.device)
            padded = len({len(r) for r in rows}) > 1
            drop(kw, source, filled, rows, past)
            kinds = kinds.gather(1, source).masked_fill(~filled, Kind.PAD)
            index = index.gather(1, source).masked_fill(~filled, -1)
        if columns is not None:
            kinds = torch.cat([columns.kinds, kinds], 1)
            index = torch.cat([columns.index, index], 1)
            padded = padded or columns.padded
        state = Columns(kinds, index, past + q, padded)
        request.entered = state if has_media else None
        cache = cache_in(kw)
        if cache is None and kw.get("use_cache") and rows is not None:
            cache = put_cache(kw, DynamicCache(config=self.family.text(self.model).config))
        if cache is not None:
            if rows is not None:
                count_skipped(cache, q - rows_width(rows), len(self.family.layers(self.model)))
            put_cache_state(cache, columns=state)
            state.announce(cache)
            _note_cache(request, cache)
        if rows is not None or (columns is not None and columns.padded):
            mask = entry_mask(state)
            if mask is None and cache_in(kw) is None:  # gaps in positions would read as packing
                mask = torch.ones(b, kw["inputs_embeds"].shape[1], dtype=torch.long, device=embeds.device)
            elif mask is not None and cache_in(kw) is None:
                mask = mask[:, -kw["inputs_embeds"].shape[1] :]
            kw["attention_mask"] = mask

    def rows(self, kw: dict, seen: dict[str, Tensor], visual: Tensor, valid: Tensor) -> list[Tensor] | None:
        """Kept column indices of every row, ascending; None when nothing is dropped."""
        request = self.requests.current
        if not request.active:
            _bypass(request, seen)
            return None
        total = sum(int(m.sum()) for m in seen.values())
        request.visual_tokens += total
        start = request.selecting.now()
        selection = Selection(self.model, self.family, request, self.attention, kw, visual, valid)
        kept_total = sum(selection.select(kind, where) for kind, where in seen.items())
        request.kept_tokens += kept_total
        rows = [k.nonzero()[:, 0] for k in selection.keep]
        request.selecting.add(start)
        return None if kept_total == total else rows


def _note_cache(request: RequestState, cache: Any) -> None:
    """Remember the cache of the call: the first one, since streamers and processors may bring others meanwhile."""
    if request.running and request.cache is None:
        request.cache = cache


def _bypass(request: RequestState, seen: dict[str, Tensor]) -> None:
    total = sum(int(m.sum()) for m in seen.values())
    request.visual_tokens += total
    request.kept_tokens += total
    if request.pruner is not None and total:
        request.notes.append("prune: keep=1 keeps every visual token, bypassed")
