"""Prunes by rewriting the inputs of a `generate` call before it starts.

Static caches, chunked prefill and the compiled decoding that goes with them cannot drop columns during the prefill:
they need a prompt that is short from the start. So the media is encoded once through the hook of `InputPruning`, whose
selection says which columns stay. transformers' own `generate` then runs without our hooks over shorter ids and mask,
`mm_encoder_outputs` of the kept rows, and the original positions. Sequences, streamers, stopping criteria and logits
processors see the whole prompt.
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
    implementation = option("cache_implementation")
    return None if implementation in (None, "dynamic") else f"cache_implementation={implementation!r}"


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
        call_arguments = arguments(inner, args, kwargs)
        cache = cache_in(call_arguments)
        past_length = int(cache.get_seq_length()) if cache is not None else 0
        has_media = self._media(call_arguments, past_length)
        self._refuse(call_arguments, option, why, cache, past_length, has_media)
        short_prompt = None
        if has_media:
            with torch.no_grad():
                short_prompt = self._shorten(call_arguments, option)
            call_arguments = short_prompt.call
            self.requests.current.notes.append(f"prune: inputs rewritten for {why}")
        wants_dict = option("return_dict_in_generate")
        put(call_arguments, "return_dict_in_generate", True)
        generated = self._generate(inner, call_arguments, short_prompt)
        self.requests.current.cache = cache = cache_of(generated)
        if short_prompt is not None:
            generated.sequences = torch.cat([short_prompt.ids, generated.sequences[:, short_prompt.width :]], 1)
            self._settle(cache, short_prompt)
        return generated if wants_dict else generated.sequences

    def _generate(
        self, generate: Callable[..., Any], call_arguments: dict[str, Any], short_prompt: ShortPrompt | None
    ) -> Any:
        """transformers' own generate on the bare model, timed at its first choice of a token."""
        own_model, call_patch = self.model, Patch()
        full_prompt = FullPromptView(short_prompt.ids, short_prompt.width) if short_prompt is not None else None
        if full_prompt is not None:
            full_prompt.show(call_arguments)
        start_seconds = clock(own_model)

        def processors(*args: Any, **kwargs: Any) -> Any:
            processor_list = list(own_processors(*args, **kwargs))
            if full_prompt is not None:
                processor_list = full_prompt.shown_to(processor_list, kwargs.get("logits_processor"))
            return LogitsProcessorList([self.meter.first_token(start_seconds), *processor_list])

        def criteria(*args: Any, **kwargs: Any) -> Any:
            criteria_list = list(own_criteria(*args, **kwargs))
            if full_prompt is not None:
                criteria_list = full_prompt.shown_to(criteria_list, kwargs.get("stopping_criteria"))
            return StoppingCriteriaList(criteria_list)

        own_processors: Any = own_model._get_logits_processor
        own_criteria: Any = own_model._get_stopping_criteria
        try:
            call_patch.set(own_model, "_get_logits_processor", processors)
            call_patch.set(own_model, "_get_stopping_criteria", criteria)
            call_patch.set(own_model, "_previous_max_cache_length", self.longest)
            with self.patch.lifted(), without_lock(own_model):
                generated = generate(**call_arguments)
            self.longest = own_model._previous_max_cache_length  # type: ignore[assignment]
        finally:
            call_patch.remove()
        return generated

    def _settle(self, cache: Any, short_prompt: ShortPrompt) -> None:
        """Leave on the cache what a later turn must know: a dynamic one goes on as if hooks had dropped the columns."""
        if cache is None:
            return
        put_cache_state(cache, columns=short_prompt.columns)
        num_dropped = short_prompt.columns.logical - short_prompt.width
        if not _static(cache):
            count_skipped(cache, num_dropped, len(self.family.layers(self.model)))
            short_prompt.columns.announce(cache, begun=False)

    # -- what is refused -----------------------------------------------------------------------------------------------

    def _media(self, call_arguments: dict[str, Any], past_length: int) -> bool:
        input_ids = call_arguments.get("input_ids")
        if input_ids is None:
            return call_arguments.get("inputs_embeds") is not None
        new_ids = input_ids[:, past_length:] if input_ids.shape[1] > past_length else input_ids
        return any(bool((new_ids == visual_id).any()) for visual_id in self.columns.ids.values())

    def _refuse(
        self,
        call_arguments: dict,
        option: Callable[[str], Any],
        reason: str,
        cache: Any,
        past_length: int,
        has_media: bool,
    ) -> None:
        """Raise Unsupported, in one line, for whatever rewritten inputs cannot honour; called before anything runs."""
        implementation, says = option("cache_implementation"), f"{reason} with prune="
        if cache is None and implementation not in (None, "dynamic", "static"):
            raise Unsupported(f"{says}: the caches that go with it are the dynamic and the static one; use one of them")
        if past_length and (has_media or cache_state(cache).columns is not None):
            raise Unsupported(
                f"{says} came for a cache that already holds {past_length} columns: it serves the first turn only; "
                "start a new cache, or use the default dynamic cache in one prefill"
            )
        if not has_media:
            return
        if self.family.recurrent:
            raise Unsupported(
                f"{says}: this model's layers with a recurrent state are served over the default dynamic cache in one "
                "prefill only; use that"
            )
        if call_arguments.get("input_ids") is None:
            raise Unsupported(f"{says} needs input_ids: inputs_embeds are pruned over the default dynamic cache only")
        for replaced_option in REPLACED:
            if option(replaced_option) is not None:
                raise Unsupported(f"{says} keeps transformers' ordinary decoding loop: drop {replaced_option}")
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

    def _shorten(self, inputs: dict[str, Any], option: Callable[[str], Any]) -> ShortPrompt:
        input_ids, embedding_table = inputs["input_ids"], self.model.get_input_embeddings()  # type: ignore[operator]
        device = embedding_table.weight.device
        attention_mask = inputs.get("attention_mask")
        if attention_mask is None:
            attention_mask = implied_mask(input_ids, option("pad_token_id"), option("eos_token_id"))
        positions = inputs.get("position_ids")
        if positions is None:
            inputs_with_mask = {**inputs, "attention_mask": attention_mask}
            positions = self.model._prepare_position_ids_for_generation(input_ids, inputs_with_mask)  # type: ignore[operator]
        masks = {kind: (input_ids == visual_id).to(device) for kind, visual_id in self.columns.ids.items()}
        visual_mask, valid_mask = torch.stack(list(masks.values())).any(0), attention_mask.bool().to(device)
        embeddings = embedding_table(input_ids.to(device))
        text_inputs: dict[str, Any] = {"inputs_embeds": embeddings, "position_ids": positions.to(device)}
        encoded_media = {kind: output for kind in masks if (output := self._encode(kind, inputs)) is not None}
        self._merge(text_inputs, encoded_media, masks, visual_mask)
        host_masks = {kind: where_mask.cpu() for kind, where_mask in masks.items()}
        kept_rows = self.columns.rows(text_inputs, host_masks, visual_mask.cpu(), valid_mask.cpu())
        if kept_rows is None:  # the pruner kept everything there is
            kept_rows = [row_valid.nonzero()[:, 0] for row_valid in valid_mask]
        source, filled = left_padded(kept_rows, device)
        drop(text_inputs, source, filled, kept_rows, 0)

        # without sampling transformers itself refuses several sequences
        repeats = (option("num_return_sequences") or 1) if option("do_sample") else 1
        host_source, host_filled = source.to(input_ids.device), filled.to(input_ids.device)
        short_ids = input_ids.gather(1, host_source).masked_fill(~host_filled, self._filler(option("pad_token_id")))
        inputs = {name: value for name, value in inputs.items() if name not in self._raw(inputs)}
        inputs["input_ids"] = short_ids.repeat_interleave(repeats, 0)
        inputs["attention_mask"] = host_filled.to(attention_mask.dtype).repeat_interleave(repeats, 0)
        inputs["position_ids"] = text_inputs["position_ids"].repeat_interleave(repeats, -2)
        if inputs.get("mm_token_type_ids") is not None:
            token_types = inputs["mm_token_type_ids"].gather(1, host_source).masked_fill(~host_filled, 0)
            inputs["mm_token_type_ids"] = token_types.repeat_interleave(repeats, 0)
        inputs["mm_encoder_outputs"] = self._outputs(text_inputs, encoded_media, short_ids.to(device), repeats)
        if repeats > 1:
            put(inputs, "num_return_sequences", 1)
            self.requests.current.visual_tokens *= repeats
            self.requests.current.kept_tokens *= repeats
        prompt_length, short_length = input_ids.shape[1], source.shape[1]
        for option_name in ("max_length", "min_length"):  # they count the prompt
            length_limit = option(option_name)
            if length_limit and not (option_name == "max_length" and option("max_new_tokens")):
                put(inputs, option_name, max(0, length_limit - (prompt_length - short_length)))
        kind_codes = column_kinds(visual_mask, valid_mask, False).gather(1, source).masked_fill(~filled, 0)
        logical_index = source.masked_fill(~filled, -1)
        is_padded = not bool(filled.all())
        kind_codes, logical_index = (columns.repeat_interleave(repeats, 0) for columns in (kind_codes, logical_index))
        columns_state = Columns(kind_codes, logical_index, prompt_length, is_padded)
        return ShortPrompt(inputs, input_ids.repeat_interleave(repeats, 0), short_length, columns_state)

    def _encode(self, kind: str, inputs: dict[str, Any]) -> Any:
        """What the model's own feature function says of one kind of media; None when none came."""
        feature_function = getattr(self.family.base(self.model), f"get_{kind}_features")
        given_names = [
            name
            for name in inspect.signature(feature_function).parameters
            if name != "kwargs" and inputs.get(name) is not None
        ]
        if not any(name.startswith("pixel_values") for name in given_names):
            return None
        return feature_function(**{name: inputs[name] for name in given_names}, return_dict=True)

    def _raw(self, inputs: dict[str, Any]) -> set[str]:
        """Arguments that only the encoders read."""
        base_model = self.family.base(self.model)
        parameter_names: set[str] = set()
        for kind in self.columns.ids:
            parameter_names |= set(inspect.signature(getattr(base_model, f"get_{kind}_features")).parameters)
        return parameter_names & set(inputs)

    def _merge(
        self, text_inputs: dict, encoded: dict[str, Any], placeholder_masks: dict[str, Tensor], visual_mask: Tensor
    ) -> None:
        """Put features where their placeholders are, in (row, column) order, as the model itself does."""
        deep_features: list[Tensor] = []
        for kind, outputs in encoded.items():
            where_mask, row_features = placeholder_masks[kind], torch.cat(feature_list(outputs))
            if len(row_features) != int(where_mask.sum()):
                raise UserError(
                    f"{int(where_mask.sum())} {kind} placeholder tokens came in for {len(row_features)} features: "
                    "the prompt and the media do not match"
                )
            text_inputs["inputs_embeds"][where_mask] = row_features.to(text_inputs["inputs_embeds"])
            for layer_index, features in enumerate(getattr(outputs, "deepstack_features", None) or []):
                features = torch.cat(list(features))
                if layer_index == len(deep_features):
                    deep_features.append(features.new_zeros(int(visual_mask.sum()), features.shape[1]))
                deep_features[layer_index][where_mask[visual_mask]] = features
        if deep_features:
            text_inputs["visual_pos_masks"], text_inputs["deepstack_visual_embeds"] = visual_mask, deep_features

    def _outputs(self, kwargs: dict, encoded: dict[str, Any], short_ids: Tensor, repeats: int) -> dict[str, Any]:
        """`mm_encoder_outputs` of the columns that stay, each row's media n times."""
        encoder_outputs = {}
        for kind, output in encoded.items():
            placed = short_ids == self.columns.ids[kind]
            deep_features = None
            if kwargs.get("visual_pos_masks") is not None:
                deep_features = [
                    features[placed[kwargs["visual_pos_masks"]]] for features in kwargs["deepstack_visual_embeds"]
                ]
            counts = placed.sum(1).tolist()
            encoder_outputs[kind] = repack(output, kwargs["inputs_embeds"][placed], deep_features, counts, repeats)
        return encoder_outputs

    def _filler(self, pad_token_id: Any) -> int:
        """An id for padding that is no placeholder."""
        taken_ids = self.columns.ids.values()
        return next(
            int(number)
            for number in (pad_token_id, *range(len(taken_ids) + 1))
            if number is not None and number not in taken_ids
        )


def implied_mask(ids: Tensor, pad: Any, eos: Any) -> Tensor:
    """(B, P) int64 mask as transformers reads it off the ids: pads are known by their id, unless it ends a text too."""
    eos_token_ids = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
    return torch.ones_like(ids) if pad is None or pad in eos_token_ids else (ids != pad).long()


def _static(cache: Any) -> bool:
    return type(cache) is not DynamicCache or any(not isinstance(layer, DynamicLayer) for layer in cache.layers)


def arguments(inner: Callable[..., Any], args: tuple, kwargs: dict) -> dict[str, Any]:
    """All arguments of a `generate` call by name, ids under `input_ids`."""
    bound = inspect.signature(inner).bind(*args, **kwargs).arguments
    named = {name: value for name, value in bound.items() if name != "kwargs"} | bound.get("kwargs", {})
    inputs = named.pop("inputs", None)
    return named if inputs is None else named | {"input_ids": inputs}
