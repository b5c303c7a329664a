"""Visual columns dropped between layers of the language model: layers before the cut hold all, later ones run short.

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
from vlmfast.runtime.kv_hooks import window_queries
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


def deep_layers(model: nn.Module) -> int:
    """First layers of the language model that DeepStack adds visual features after: none of them may be cut."""
    vision = getattr(model.config, "vision_config", None)
    return len(getattr(vision, "deepstack_visual_indexes", None) or ())


class BetweenLayerPruning:
    """Installs one method on one text model; the running request says which columns are visual."""

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
        deep = deep_layers(self.model)
        for at in self.cuts:
            if not 1 <= at < len(self.layers):
                raise Unsupported(
                    f"{self.method.name} before layer {at}, but this language model has layers 0 to "
                    f"{len(self.layers) - 1} and layer 0 stays whole: choose a layer from 1 to {len(self.layers) - 1}"
                )
            if at < deep:
                raise Unsupported(
                    f"{self.method.name} before layer {at}, but DeepStack adds visual features after the first {deep} "
                    f"layers of this model: cut before layer {deep} or later"
                )

    def install(self, patch: Patch) -> None:
        text = self.family.text(self.model)
        patch.hook(self.model.register_forward_pre_hook(self._refuse_labels, with_kwargs=True))
        patch.hook(text.register_forward_pre_hook(self._enter, with_kwargs=True))
        patch.hook(text.register_forward_hook(self._leave, always_call=True))
        first = min(self.cuts)
        for i, layer in enumerate(self.layers):
            if i + 1 in self.cuts:  # seen by the method before the cut: runs before our own hook on this layer
                patch.hook(layer.self_attn.register_forward_hook(self._attended, with_kwargs=True))  # type: ignore
            if i + 1 >= first:
                patch.hook(layer.register_forward_pre_hook(self._layer(i), with_kwargs=True))

    def _refuse_labels(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if kwargs.get("labels") is not None and self.method.keep < 1:
            raise Unsupported("labels were given to a model with a pruner: remove() the acceleration to train")

    # -- around the text model -------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.run, self.masks, self.watch = None, {}, Stopwatch(self.model)
        request, cache = self.requests.current, cache_in(kwargs)
        entered = request.entered
        mask = kwargs.get("attention_mask")
        plain = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
        if not plain and (request.has_media or cache_state(cache).cuts):
            raise Unsupported(
                f"a prebuilt attention mask cannot follow columns that {self.method.name} drops between layers: "
                "use the default dynamic cache and a 2-D mask"
            )
        self.tail = mask if plain else None
        if entered is not None and self.method.keep >= 1:
            request.notes.append("prune: keep=1 keeps every visual token, bypassed")
        elif entered is not None:
            embeds = kwargs["inputs_embeds"]
            q, newline = embeds.shape[1], getattr(self.family.base(self.model), "image_newline", None)
            kinds = entered.kinds[:, -q:]
            if newline is not None:  # separators survive like text
                kinds = kinds.masked_fill((embeds == newline.to(embeds)).all(-1), Kind.SYSTEM)
            visual = (kinds == Kind.VISUAL).sum(1)
            self.run = PrunedPrefill(kinds, entered.index[:, -q:], visual, entered.kinds[:, :-q] != Kind.PAD)

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        run, self.run = self.run, None
        if run is not None and output is not None:
            if run.done < len(self.cuts):
                raise StageDidNotFire(f"{self.method.name} made {run.done} of its {len(self.cuts)} cuts")
            request = self.requests.current
            request.cut_ms += self.watch.seconds() * 1e3
            request.kept_tokens += int((run.kinds == Kind.VISUAL).sum()) - int(run.entered.sum())

    # -- the layer before a cut: what the method looks at ------------------------------------------------------------

    def _attended(self, module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        w = self.method.window()
        if self.run is None or w == 0:
            return
        start = self.watch.now()
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        tables, n = kwargs["position_embeddings"], hidden.shape[1]
        cache = cache_in(kwargs)
        keys = cache.layers[module.layer_idx].keys[:, :, -n:] if cache is not None else all_keys(module, hidden, tables)
        query = window_queries(module, hidden[:, -w:], tables)
        self.run.weights = kernels.window_attention(query, keys, module.scaling, self.run.kinds != Kind.PAD)
        self.watch.add(start)

    # -- every layer from the one before the first cut ---------------------------------------------------------------

    def _layer(self, i: int) -> Any:
        def pre(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if self.run is None:
                self._continue(i, hidden, kwargs)
                return args, kwargs
            if i in self.cuts:
                start = self.watch.now()
                hidden = self._cut(i, hidden, kwargs)
                self.watch.add(start)
            if i + 1 in self.cuts:
                self.run.before = hidden
            if self.run.source is None:
                return None
            kwargs["position_embeddings"] = self.run.tables
            positions = kwargs.get("position_ids")
            if positions is not None:  # only FlashAttention's packing detector reads them: contiguous
                steps = torch.arange(hidden.shape[1], device=hidden.device)
                kwargs["position_ids"] = positions[..., :1] + steps
            kwargs["attention_mask"] = self._mask(self.run.valid, hidden)
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        return pre

    def _cut(self, i: int, hidden: Tensor, kwargs: dict) -> Tensor:
        """Rate, choose, gather: the hidden states (B, S, D) of the columns that stay."""
        run, cache = self.run, cache_in(kwargs)
        assert run is not None and run.before is not None
        scores = self.method.rate(CutInputs(run.kinds, hidden, run.before, run.weights)).float()
        keep = self._stays(scores, run, self.cuts[i])
        width = hidden.shape[1]
        s = int(keep.sum(1).max())
        source = keep.to(torch.int8).argsort(dim=1, stable=True)[:, width - s :]  # what goes first, both ascending
        filled = keep.gather(1, source)
        empty = ~filled
        run.kinds = run.kinds.gather(1, source).masked_fill_(empty, Kind.PAD)
        run.index = run.index.gather(1, source).masked_fill_(empty, -1)
        run.source = source if run.source is None else run.source.gather(1, source)
        run.tables = take_tables(kwargs["position_embeddings"], run.source)
        run.done += 1
        self.masks.clear()
        prior, index = self._prior(i, cache, run)
        run.valid = torch.cat([prior, filled], 1)
        if cache is not None:
            for j in range(i, len(self.layers)):
                layer = prunable(cache, j, len(self.layers))
                layer.skip(width - s)
                layer.announce()
            uncut = cache.layers[0].keys.shape[2]
            held = CutColumns(run.valid, torch.cat([index, run.index], 1), uncut, not bool(run.valid.all()))
            put_cache_state(cache, cuts={**cache_state(cache).cuts, i: held})
        return hidden.gather(1, source[..., None].expand(-1, -1, hidden.shape[-1]))

    def _stays(self, scores: Tensor, run: PrunedPrefill, fraction: float) -> Tensor:
        """(B, P) bool: text, and each row's best visual columns, a fraction of those that entered."""
        visual = run.kinds == Kind.VISUAL
        budget = (run.entered * fraction).round().long().clamp(min=1)
        rank = kernels.ranking(scores.masked_fill(~visual, float("-inf"))).argsort(dim=1)
        return (visual & (rank < budget[:, None])) | (~visual & (run.kinds != Kind.PAD))

    def _prior(self, i: int, cache: Any, run: PrunedPrefill) -> tuple[Tensor, Tensor]:
        """Valid and logical columns (B, past) that the layers from cut i on held before this prefill."""
        past = run.prior.shape[1]
        if past == 0:
            return run.prior, run.index[:, :0]
        state = cache_state(cache)
        assert state.columns is not None
        index, held = state.columns.index[:, :past], state.cuts.get(i)
        if held is None:
            return run.prior, index
        new = past - held.uncut  # columns that came after that cut's prefill entered every layer alike
        valid, before = held.valid[:, : held.valid.shape[1] + min(0, new)], held.index
        tail = slice(past - max(0, new), past)
        return torch.cat([valid, run.prior[:, tail]], 1), torch.cat([before[:, : valid.shape[1]], index[:, tail]], 1)

    def _continue(self, i: int, hidden: Tensor, kwargs: dict) -> None:
        """Decode, verification or a turn without new media, over layers that were cut before."""
        cache = cache_in(kwargs)
        cuts = cache_state(cache).cuts
        at = max((c for c in cuts if c <= i), default=None)
        if at is None or cache is None:
            return
        cache.layers[i].announce()
        q, past = hidden.shape[1], cache.layers[i].physical
        if q == 1 and not cuts[at].padded and self.tail is None:
            kwargs["attention_mask"] = None
            return
        key = (at, past)
        if key not in self.masks:
            valid = cuts[at].grown(past + q, self.tail)
            self.masks[key] = self._build(valid, hidden)
        kwargs["attention_mask"] = self.masks[key]

    # -- masks -----------------------------------------------------------------------------------------------------

    def _mask(self, valid: Tensor | None, hidden: Tensor) -> Tensor | None:
        assert valid is not None
        key = ("run", valid.shape[1])
        if key not in self.masks:
            self.masks[key] = self._build(valid, hidden)
        return self.masks[key]

    def _build(self, valid: Tensor, hidden: Tensor) -> Tensor | None:
        """The mask that the model's own attention wants for q new columns over `valid` (B, kv); None when none."""
        config: Any = self.family.text(self.model).config
        attention = str(config._attn_implementation)
        q, kv = hidden.shape[1], valid.shape[1]
        whole = bool(valid.all())
        if whole and (q == 1 or q == kv):
            return None
        if "flash" in attention:
            return None if whole else valid.long()
        if attention not in ("sdpa", "eager"):
            raise Unsupported(
                f"attention {attention!r} with columns dropped between layers: use sdpa, eager or flash attention"
            )
        allowed = valid[:, None] & torch.ones(q, kv, dtype=torch.bool, device=valid.device).tril(kv - q)
        allowed = allowed | torch.eye(q, kv, dtype=torch.bool, device=valid.device).roll(kv - q, 1)  # no empty row
        allowed = allowed[:, None]
        if attention == "sdpa":
            return allowed
        low = torch.finfo(hidden.dtype).min
        return torch.zeros(allowed.shape, dtype=hidden.dtype, device=valid.device).masked_fill(~allowed, low)
