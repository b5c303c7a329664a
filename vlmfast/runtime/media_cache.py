"""Keeps the features and the KV of media between calls, so that several questions about them encode them once.

The key of an entry holds the state of the model (weights, adapters, dtype, config), and all arguments that the encoder
reads (features) or that the model reads up to the last visual column (KV). A difference in any of these is a miss. The
least recently used entries are dropped first when the byte limit is reached.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.families import Family
from vlmfast.runtime.cache_state import cache_state
from vlmfast.runtime.compat import cache_in, put_cache
from vlmfast.runtime.digest import model_digest, tensor_digest, value_digest
from vlmfast.runtime.pruned_layer import RaggedLayer
from vlmfast.runtime.request_state import MediaLookup, RequestState
from vlmfast.runtime.rewind import fixed_rotation

PIXELS = ("pixel_values", "pixel_values_videos")
# options of calls that use another kind of cache, or that return states of the prefix: their KV is not kept
OWN_CACHE = (
    "cache_implementation", "prefill_chunk_size", "assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens",
    "custom_generate", "output_attentions", "output_hidden_states", "penalty_alpha", "dola_layers", "guidance_scale",
)  # fmt: skip
# arguments of `generate` that no layer reads
OUTSIDE = (
    "max_new_tokens", "max_length", "min_new_tokens", "min_length", "do_sample", "temperature", "top_k", "top_p",
    "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size", "streamer", "logits_processor",
    "stopping_criteria", "stop_strings", "tokenizer", "prefix_allowed_tokens_fn", "generation_config",
    "return_dict_in_generate", "output_scores", "output_logits", "eos_token_id", "pad_token_id", "bos_token_id",
    "use_cache", "max_time", "suppress_tokens", "bad_words_ids", "synced_gpus", "logits_to_keep",
)  # fmt: skip


class MediaCache:
    """A byte-limited store of encoded media for one accelerated model."""

    def __init__(self, model: nn.Module, family: Family, limit: int) -> None:
        self.model, self.family, self.limit = model, family, limit
        self.entries: OrderedDict[str, Any] = OrderedDict()  # digest -> (nbytes, value)
        self.held = 0

    # -- keys ----------------------------------------------------------------------------------------------------------

    def _key_of(self, media_lookup: MediaLookup, kind: str, arguments: dict[str, Any]) -> str:
        """The key of what these arguments give on the model as it is."""
        media_lookup.model = media_lookup.model or model_digest(self.model)
        digested_arguments = [f"{name}={_digest(media_lookup, arguments[name])}" for name in sorted(arguments)]
        return f"{kind}-{media_lookup.model}-{';'.join(digested_arguments)}"

    # -- features ------------------------------------------------------------------------------------------------------

    def features(self, lookup: MediaLookup, kind: str, call: dict[str, Any]) -> tuple[str, tuple[Any, Any] | None]:
        """(key, what `keep_features` was given for the same content, or None)."""
        key = self._key_of(lookup, kind, call)
        stored_features = self._get(key)
        if stored_features is None:
            return key, None
        lookup.notes.append(f"reuse: {kind} features found, tower skipped")
        return key, (_own_lists(stored_features[0]), stored_features[1])

    def keep_features(self, lookup: MediaLookup, key: str, output: Any, kept: list[Tensor] | None) -> None:
        """output: what the encoder returned; kept: the rows that survived inside the tower, per item, or None."""
        num_bytes = sum_bytes(dict(output) if hasattr(output, "keys") else output)
        self._put(lookup, key, num_bytes, (_own_lists(output), kept))

    # -- the visual prefix's KV ----------------------------------------------------------------------------------------

    def find(self, request: RequestState, kwargs: dict[str, Any], option: Callable[[str], Any], kv: Any = None) -> bool:
        """Look the request up; on a hit, rewrite kwargs to continue behind the stored prefix. One row only.

        option: a generation option as `generate` would resolve it. A pruner that reads the question keeps other tokens
        for every question, so does a KV policy, and a recurrent state knows no prefix of its past: then only features
        are reused.
        """
        media_lookup, pruner = request.lookup, request.pruner
        input_ids = kwargs.get("input_ids")
        pixel_names = [name for name in PIXELS if isinstance(kwargs.get(name), Tensor)]
        if input_ids is None or input_ids.shape[0] != 1 or not pixel_names:
            return False
        reason = self._why_not(kwargs, option, pruner, kv)
        if reason is not None:
            media_lookup.notes.append(f"reuse: {reason}, so only features are kept, not their KV")
            return False
        visual_mask = torch.zeros_like(input_ids[0], dtype=torch.bool)
        for visual_id in self.family.visual_ids(self.model).values():
            visual_mask |= input_ids[0] == visual_id
        if not bool(visual_mask.any()):
            return False
        media_lookup.visual_end = prefix_length = int(visual_mask.nonzero()[-1]) + 1
        read_arguments = {
            argument_name: argument
            for argument_name, argument in kwargs.items()
            if argument is not None and argument_name not in OUTSIDE
        }
        prompt_length = input_ids.shape[1]
        prefix_arguments = {
            argument_name: argument[..., :prefix_length]
            for argument_name, argument in read_arguments.items()
            if isinstance(argument, Tensor) and _columns(argument_name, argument, prompt_length)
        }
        media_lookup.key = self._key_of(media_lookup, "kv", read_arguments | prefix_arguments)
        stored_cache = self._get(media_lookup.key)
        if stored_cache is None or prefix_length >= prompt_length:
            return False
        if kwargs.get("position_ids") is None:
            # true positions of the whole prompt, from the model itself, before the pixels leave the call
            kwargs["position_ids"] = self.model._prepare_position_ids_for_generation(input_ids, dict(kwargs))  # type: ignore[operator]
        for name in PIXELS:
            kwargs.pop(name, None)
        put_cache(kwargs, copy.deepcopy(stored_cache))
        media_lookup.notes.append(
            f"reuse: KV of {prefix_length} prompt columns found, media neither encoded nor prefilled"
        )
        return True

    def _why_not(self, kwargs: dict[str, Any], option: Callable[[str], Any], pruner: Any, kv: Any) -> str | None:
        """Why the KV of this call can neither be taken from an entry nor become one; None when it can."""
        if pruner is not None and "question" in pruner.needs:
            return f"{pruner.name} reads the question"
        if kv is not None:
            return "a KV policy keeps other columns for every question"
        if self.family.recurrent:
            return "a recurrent state cannot be cut behind the media"
        if not fixed_rotation(self.family.text(self.model)):
            return "the rotation depends on the length of the sequence"
        if cache_in(kwargs) is not None:
            return "the call brings a cache of its own"
        for option_name in OWN_CACHE:
            option_value = option(option_name)
            if not (
                option_value is None
                or option_value is False
                or option_value == "dynamic"
                or (option_name == "guidance_scale" and option_value == 1)
            ):
                return f"{option_name}= was asked for"
        if option("use_cache") is False:
            return "use_cache=False"
        for option_name in ("num_beams", "num_return_sequences"):
            if (option(option_name) or 1) > 1:
                return f"{option_name}={option(option_name)}"
        return None

    def store(self, request: RequestState) -> None:
        """After a call: keep its cache, cut behind the last visual column."""
        call_cache, key, prefix_length = request.cache, request.lookup.key, request.lookup.visual_end
        if key is None or key in self.entries or call_cache is None:
            return
        cache_length = call_cache.get_seq_length()
        if cache_length < prefix_length:
            return
        prefix_cache = copy.deepcopy(call_cache)
        for cache_layer in prefix_cache.layers:
            if cache_length > prefix_length:
                cache_layer.crop(prefix_length - cache_length)
        columns = cache_state(prefix_cache).columns
        if columns is not None:
            columns.grow(prefix_length)
        num_bytes = sum(layer_bytes(cache_layer) for cache_layer in prefix_cache.layers)
        self._put(request.lookup, key, num_bytes, prefix_cache)

    # -- the store -----------------------------------------------------------------------------------------------------

    def _get(self, key: str) -> Any:
        if key not in self.entries:
            return None
        self.entries.move_to_end(key)
        return self.entries[key][1]

    def _put(self, media_lookup: MediaLookup, key: str, num_bytes: int, value: Any) -> None:
        if num_bytes > self.limit:
            media_lookup.notes.append(
                f"reuse: {num_bytes:,} bytes do not fit the limit of {self.limit:,}, nothing kept"
            )
            return
        while self.held + num_bytes > self.limit:
            _, (oldest_bytes, _) = self.entries.popitem(last=False)
            self.held -= oldest_bytes
        self.entries[key] = (num_bytes, value)
        self.held += num_bytes


def _digest(media_lookup: MediaLookup, value: Any) -> str:
    if not isinstance(value, Tensor):
        return value_digest(value)
    for known_tensor, digest in media_lookup.digests:
        if known_tensor is value:
            return digest
    digest = tensor_digest(value)
    media_lookup.digests.append((value, digest))
    return digest


def _own_lists(output: Any) -> Any:
    """An encoder's output whose containers are its own, since transformers takes entries off what it gets."""
    output_copy = copy.copy(output)
    if hasattr(output_copy, "keys"):
        for name in list(output_copy.keys()):
            if isinstance(output_copy[name], list):
                output_copy[name] = list(output_copy[name])
    return output_copy


def _columns(name: str, value: Tensor, prompt_length: int) -> bool:
    """Has this argument one entry per prompt column?"""
    return (
        name not in PIXELS
        and value.ndim in (2, 3)
        and value.shape[-1] == prompt_length
        and not value.is_floating_point()
    )


def sum_bytes(value: Any) -> int:
    """Bytes of all tensors inside nested containers."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(sum_bytes(element) for element in value.values())
    if isinstance(value, (list, tuple)):
        return sum(sum_bytes(element) for element in value)
    return 0


def layer_bytes(layer: Any) -> int:
    """Bytes a cache layer holds, all tiers."""
    if isinstance(layer, RaggedLayer):
        return int(layer.nbytes()["resident"])
    return sum_bytes([layer.keys, layer.values])
