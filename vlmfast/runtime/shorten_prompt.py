"""The second pruning backend: the inputs of a `generate` call are rewritten before it starts.

Static caches, chunked prefill and the compiled decoding that goes with them have no place for columns dropped on the
way: they want a prompt that is short from the start. So the media is encoded once through the tap of `InputPruning`,
the plan (which columns stay) comes from its selection, and transformers' own `generate` runs on the bare model, every
hook of ours lifted, over shorter ids and mask, `mm_encoder_outputs` of the kept rows, and the original positions.
Whatever is shown outside the model (sequences, streamer, stopping criteria, logits processors) has the whole prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation import utils as generation

from vlmfast.core import Unsupported, UserError
from vlmfast.families import Family
from vlmfast.families.base import feature_list
from vlmfast.runtime.cache_state import Columns, cache_state, column_kinds, put_cache_state
from vlmfast.runtime.clock import clock
from vlmfast.runtime.compat import cache_in, cache_of
from vlmfast.runtime.full_prompt import FullPromptView, put
from vlmfast.runtime.model_lock import without_lock
from vlmfast.runtime.patch import Patch
from vlmfast.runtime.prune_input import InputPruning
from vlmfast.runtime.pruned_layer import count_skipped
from vlmfast.runtime.selection import drop, left_padded, repack
from vlmfast.runtime.stage_timer import StageTimer

REPLACED = ("custom_generate", "assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


def needs(option: Callable[[str], Any], cache: Any) -> str | None:
    """What in a call hooks on the model cannot follow, in words ("prefill_chunk_size=512"); None = nothing."""
    if option("prefill_chunk_size"):
        return f"prefill_chunk_size={option('prefill_chunk_size')}"
    if option("use_cache") is False:
        return None
    if cache is not None:
        return type(cache).__name__ if getattr(cache, "is_compileable", False) and _static(cache) else None
    name = option("cache_implementation")
    return None if name in (None, "dynamic") else f"cache_implementation={name!r}"


def can_chunk() -> bool:
    """Does this transformers hand every chunk its own rows of pre-encoded media?"""
    return hasattr(generation, "_slice_mm_encoder_output")


@dataclass
class ShortPrompt:
    """A prompt whose dropped columns are gone, as arguments of `generate`."""

    call: dict[str, Any]
    ids: Tensor  # (B, P) the prompt as it came, rows repeated for num_return_sequences
    width: int  # columns left of P
    columns: Columns


class PromptShortening:
    """Runs `generate` calls on rewritten inputs. patch: holds every hook that must be lifted meanwhile."""

    def __init__(
        self, model: nn.Module, family: Family, columns: InputPruning, patch: Patch, meter: StageTimer
    ) -> None:
        self.model, self.family, self.columns = model, family, columns
        self.requests, self.patch, self.meter = columns.requests, patch, meter
        self.longest = -1  # the longest static cache so far: transformers never makes a shorter one again

    def run(self, inner: Callable[..., Any], args: tuple, kwargs: dict, option: Callable[[str], Any], why: str) -> Any:
        """`inner(*args, **kwargs)` with short inputs. why: what `needs` said of this call."""
        call = arguments(inner, args, kwargs)
        cache = cache_in(call)
        past = int(cache.get_seq_length()) if cache is not None else 0
        media = self._media(call, past)
        self._refuse(call, option, why, cache, past, media)
        short = None
        if media:
            with torch.no_grad():
                short = self._shorten(call, option)
            call = short.call
            self.requests.current.notes.append(f"prune: inputs rewritten for {why}")
        wants_dict = option("return_dict_in_generate")
        put(call, "return_dict_in_generate", True)
        out = self._generate(inner, call, short)
        self.requests.current.cache = cache = cache_of(out)
        if short is not None:
            out.sequences = torch.cat([short.ids, out.sequences[:, short.width :]], 1)
            self._settle(cache, short)
        return out if wants_dict else out.sequences

    def _generate(self, inner: Callable[..., Any], call: dict[str, Any], short: ShortPrompt | None) -> Any:
        """transformers' own generate on the bare model, timed at its first choice of a token."""
        model, scope = self.model, Patch()
        prompt = FullPromptView(short.ids, short.width) if short is not None else None
        if prompt is not None:
            prompt.show(call)
        entered = clock(model)

        def processors(*args: Any, **kwargs: Any) -> Any:
            made = own_processors(*args, **kwargs)
            made = prompt.shown_to(made, kwargs.get("logits_processor")) if prompt is not None else list(made)
            return LogitsProcessorList([self.meter.first_token(entered), *made])

        def criteria(*args: Any, **kwargs: Any) -> Any:
            made = own_criteria(*args, **kwargs)
            made = prompt.shown_to(made, kwargs.get("stopping_criteria")) if prompt is not None else list(made)
            return StoppingCriteriaList(made)

        own_processors: Any = model._get_logits_processor
        own_criteria: Any = model._get_stopping_criteria
        try:
            scope.set(model, "_get_logits_processor", processors)
            scope.set(model, "_get_stopping_criteria", criteria)
            scope.set(model, "_previous_max_cache_length", self.longest)
            with self.patch.lifted(), without_lock(model):
                out = inner(**call)
            self.longest = model._previous_max_cache_length  # type: ignore[assignment]
        finally:
            scope.remove()
        return out

    def _settle(self, cache: Any, short: ShortPrompt) -> None:
        """Leave on the cache what a later turn must know: a dynamic one goes on as if hooks had dropped the columns."""
        if cache is None:
            return
        put_cache_state(cache, columns=short.columns)
        dropped = short.columns.logical - short.width
        if not _static(cache):
            count_skipped(cache, dropped, len(self.family.layers(self.model)))
            short.columns.announce(cache, begun=False)

    # -- what is refused -----------------------------------------------------------------------------------------------

    def _media(self, call: dict[str, Any], past: int) -> bool:
        ids = call.get("input_ids")
        if ids is None:
            return call.get("inputs_embeds") is not None
        new = ids[:, past:] if ids.shape[1] > past else ids
        return any(bool((new == token).any()) for token in self.columns.ids.values())

    def _refuse(self, call: dict, option: Callable[[str], Any], why: str, cache: Any, past: int, media: bool) -> None:
        """Raise Unsupported, in one line, for whatever rewritten inputs cannot honour; called before anything runs."""
        name, says = option("cache_implementation"), f"{why} with prune="
        if cache is None and name not in (None, "dynamic", "static"):
            raise Unsupported(f"{says}: the caches that go with it are the dynamic and the static one; use one of them")
        if past and (media or cache_state(cache).columns is not None):
            raise Unsupported(
                f"{says} came for a cache that already holds {past} columns: it serves the first turn only; "
                "start a new cache, or use the default dynamic cache in one prefill"
            )
        if not media:
            return
        if self.family.recurrent:
            raise Unsupported(
                f"{says}: this model's layers with a recurrent state are served over the default dynamic cache in one "
                "prefill only; use that"
            )
        if call.get("input_ids") is None:
            raise Unsupported(f"{says} needs input_ids: inputs_embeds are pruned over the default dynamic cache only")
        for other in REPLACED:
            if option(other) is not None:
                raise Unsupported(f"{says} keeps transformers' ordinary decoding loop: drop {other}")
        if (option("num_beams") or 1) > 1:
            raise Unsupported(f"{says} and num_beams={option('num_beams')}: use num_beams=1")
        if option("prefill_chunk_size") and not can_chunk():
            raise Unsupported(f"{says}: this transformers cannot cut encoded media into chunks; unset it, or update")
        if "sliding_attention" in (getattr(self.family.text(self.model).config, "layer_types", None) or ()):
            raise Unsupported(f"{says}: a sliding window would count the kept columns only; it needs full attention")
        supports: Any = self.model._supports_mm_encoder_outputs
        if not supports() or not self.family.takes_any_rows(self.model):
            raise Unsupported(
                f"{says} needs a model that takes encoded media in part (mm_encoder_outputs), and this "
                f"{type(self.model).__name__} does not: update transformers, or use the default dynamic cache"
            )

    # -- short inputs --------------------------------------------------------------------------------------------------

    def _shorten(self, call: dict[str, Any], option: Callable[[str], Any]) -> ShortPrompt:
        ids, table = call["input_ids"], self.model.get_input_embeddings()  # type: ignore[operator]
        device = table.weight.device
        mask = call.get("attention_mask")
        if mask is None:
            mask = implied_mask(ids, option("pad_token_id"), option("eos_token_id"))
        positions = call.get("position_ids")
        if positions is None:
            known = {**call, "attention_mask": mask}
            positions = self.model._prepare_position_ids_for_generation(ids, known)  # type: ignore[operator]
        seen = {kind: (ids == token).to(device) for kind, token in self.columns.ids.items()}
        visual, valid = torch.stack(list(seen.values())).any(0), mask.bool().to(device)
        kw: dict[str, Any] = {"inputs_embeds": table(ids.to(device)), "position_ids": positions.to(device)}
        encoded = {kind: out for kind in seen if (out := self._encode(kind, call)) is not None}
        self._merge(kw, encoded, seen, visual)
        rows = self.columns.rows(kw, seen, visual, valid)
        if rows is None:  # the pruner kept everything there is
            rows = [row.nonzero()[:, 0] for row in valid]
        source, filled = left_padded(rows, device)
        drop(kw, source, filled, rows, 0)

        n = (option("num_return_sequences") or 1) if option("do_sample") else 1  # else transformers refuses it itself
        here, there = source.to(ids.device), filled.to(ids.device)
        short_ids = ids.gather(1, here).masked_fill(~there, self._filler(option("pad_token_id")))
        call = {k: v for k, v in call.items() if k not in self._raw(call)}
        call["input_ids"] = short_ids.repeat_interleave(n, 0)
        call["attention_mask"] = there.to(mask.dtype).repeat_interleave(n, 0)
        call["position_ids"] = kw["position_ids"].repeat_interleave(n, -2)
        if call.get("mm_token_type_ids") is not None:
            call["mm_token_type_ids"] = call["mm_token_type_ids"].gather(1, here).masked_fill(~there, 0)
            call["mm_token_type_ids"] = call["mm_token_type_ids"].repeat_interleave(n, 0)
        call["mm_encoder_outputs"] = self._outputs(kw, encoded, short_ids.to(device), n)
        if n > 1:
            put(call, "num_return_sequences", 1)
            self.requests.current.visual_tokens *= n
            self.requests.current.kept_tokens *= n
        length, width = ids.shape[1], source.shape[1]
        for name in ("max_length", "min_length"):  # they count the prompt
            limit = option(name)
            if limit and not (name == "max_length" and option("max_new_tokens")):
                put(call, name, max(0, limit - (length - width)))
        kinds = column_kinds(visual, valid, False).gather(1, source).masked_fill(~filled, 0)
        index = source.masked_fill(~filled, -1)
        padded = not bool(filled.all())
        state = Columns(kinds.repeat_interleave(n, 0), index.repeat_interleave(n, 0), length, padded)
        return ShortPrompt(call, ids.repeat_interleave(n, 0), width, state)

    def _encode(self, kind: str, call: dict[str, Any]) -> Any:
        """What the model's own feature function says of one kind of media; None when none came."""
        encode = getattr(self.family.base(self.model), f"get_{kind}_features")
        known = [k for k in inspect.signature(encode).parameters if k != "kwargs" and call.get(k) is not None]
        if not any(k.startswith("pixel_values") for k in known):
            return None
        return encode(**{k: call[k] for k in known}, return_dict=True)

    def _raw(self, call: dict[str, Any]) -> set[str]:
        """Arguments that only the encoders read."""
        base = self.family.base(self.model)
        names: set[str] = set()
        for kind in self.columns.ids:
            names |= set(inspect.signature(getattr(base, f"get_{kind}_features")).parameters)
        return names & set(call)

    def _merge(self, kw: dict, encoded: dict[str, Any], seen: dict[str, Tensor], visual: Tensor) -> None:
        """Put features where their placeholders are, in (row, column) order, as the model itself does."""
        deep: list[Tensor] = []
        for kind, out in encoded.items():
            where, rows = seen[kind], torch.cat(feature_list(out))
            if len(rows) != int(where.sum()):
                raise UserError(
                    f"{int(where.sum())} {kind} placeholder tokens came in for {len(rows)} features: "
                    "the prompt and the media do not match"
                )
            kw["inputs_embeds"][where] = rows.to(kw["inputs_embeds"])
            for i, features in enumerate(getattr(out, "deepstack_features", None) or []):
                features = torch.cat(list(features))
                if i == len(deep):
                    deep.append(features.new_zeros(int(visual.sum()), features.shape[1]))
                deep[i][where[visual]] = features
        if deep:
            kw["visual_pos_masks"], kw["deepstack_visual_embeds"] = visual, deep

    def _outputs(self, kw: dict, encoded: dict[str, Any], ids: Tensor, n: int) -> dict[str, Any]:
        """`mm_encoder_outputs` of the columns that stay, each row's media n times."""
        outputs = {}
        for kind, out in encoded.items():
            where = ids == self.columns.ids[kind]
            deep = None
            if kw.get("visual_pos_masks") is not None:
                deep = [features[where[kw["visual_pos_masks"]]] for features in kw["deepstack_visual_embeds"]]
            outputs[kind] = repack(out, kw["inputs_embeds"][where], deep, where.sum(1).tolist(), n)
        return outputs

    def _filler(self, pad: Any) -> int:
        """An id for padding that is no placeholder."""
        taken = self.columns.ids.values()
        return next(int(i) for i in (pad, *range(len(taken) + 1)) if i is not None and i not in taken)


def implied_mask(ids: Tensor, pad: Any, eos: Any) -> Tensor:
    """(B, P) int64 mask as transformers reads it off the ids: pads are known by their id, unless it ends a text too."""
    ends = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
    return torch.ones_like(ids) if pad is None or pad in ends else (ids != pad).long()


def _static(cache: Any) -> bool:
    return type(cache) is not DynamicCache or any(not isinstance(layer, DynamicLayer) for layer in cache.layers)


def arguments(inner: Callable[..., Any], args: tuple, kwargs: dict) -> dict[str, Any]:
    """All arguments of a `generate` call by name, ids under `input_ids`."""
    bound = inspect.signature(inner).bind(*args, **kwargs).arguments
    call = {k: v for k, v in bound.items() if k != "kwargs"} | bound.get("kwargs", {})
    inputs = call.pop("inputs", None)
    return call if inputs is None else call | {"input_ids": inputs}
