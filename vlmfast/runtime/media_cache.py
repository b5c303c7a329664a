"""Several questions about the same image or video encode it once: features and the visual prefix's KV are kept.

Entries are found by everything that decides them: the model as it is (weights, adapters, dtype, config), and all
arguments that the encoder reads (features), or all that the model reads up to the last visual column (KV). What differs
in any of these is a miss. Least recently used entries go first when the byte limit is reached.
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
# calls that bring a cache of their own kind, or return what the prefix went through: their KV is their own
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

    def _key_of(self, lookup: MediaLookup, kind: str, arguments: dict[str, Any]) -> str:
        """The key of what these arguments give on the model as it is."""
        lookup.model = lookup.model or model_digest(self.model)
        parts = [f"{name}={_digest(lookup, arguments[name])}" for name in sorted(arguments)]
        return f"{kind}-{lookup.model}-{';'.join(parts)}"

    # -- features ------------------------------------------------------------------------------------------------------

    def features(self, lookup: MediaLookup, kind: str, call: dict[str, Any]) -> tuple[str, tuple[Any, Any] | None]:
        """(key, what `keep_features` was given for the same content, or None)."""
        key = self._key_of(lookup, kind, call)
        found = self._get(key)
        if found is None:
            return key, None
        lookup.notes.append(f"reuse: {kind} features found, tower skipped")
        return key, (_own_lists(found[0]), found[1])

    def keep_features(self, lookup: MediaLookup, key: str, output: Any, kept: list[Tensor] | None) -> None:
        """output: what the encoder returned; kept: the rows that survived inside the tower, per item, or None."""
        size = sum_bytes(dict(output) if hasattr(output, "keys") else output)
        self._put(lookup, key, size, (_own_lists(output), kept))

    # -- the visual prefix's KV ----------------------------------------------------------------------------------------

    def find(self, request: RequestState, kwargs: dict[str, Any], option: Callable[[str], Any], kv: Any = None) -> bool:
        """Look the request up; on a hit, rewrite kwargs to continue behind the stored prefix. One row only.

        option: a generation option as `generate` would resolve it. A pruner that reads the question keeps other tokens
        for every question, so does a KV policy, and a recurrent state knows no prefix of its past: then only features
        are reused.
        """
        lookup, pruner = request.lookup, request.pruner
        ids = kwargs.get("input_ids")
        pixels = [name for name in PIXELS if isinstance(kwargs.get(name), Tensor)]
        if ids is None or ids.shape[0] != 1 or not pixels:
            return False
        why = self._why_not(kwargs, option, pruner, kv)
        if why is not None:
            lookup.notes.append(f"reuse: {why}, so only features are kept, not their KV")
            return False
        visual = torch.zeros_like(ids[0], dtype=torch.bool)
        for token in self.family.visual_ids(self.model).values():
            visual |= ids[0] == token
        if not bool(visual.any()):
            return False
        lookup.visual_end = end = int(visual.nonzero()[-1]) + 1
        read = {k: v for k, v in kwargs.items() if v is not None and k not in OUTSIDE}
        width = ids.shape[1]
        of_prefix = {k: v[..., :end] for k, v in read.items() if isinstance(v, Tensor) and _columns(k, v, width)}
        lookup.key = self._key_of(lookup, "kv", read | of_prefix)
        cache = self._get(lookup.key)
        if cache is None or end >= width:
            return False
        if kwargs.get("position_ids") is None:
            # true positions of the whole prompt, from the model itself, before the pixels leave the call
            kwargs["position_ids"] = self.model._prepare_position_ids_for_generation(ids, dict(kwargs))  # type: ignore[operator]
        for name in PIXELS:
            kwargs.pop(name, None)
        put_cache(kwargs, copy.deepcopy(cache))
        lookup.notes.append(f"reuse: KV of {end} prompt columns found, media neither encoded nor prefilled")
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
        for name in OWN_CACHE:
            value = option(name)
            if not (value is None or value is False or value == "dynamic" or (name == "guidance_scale" and value == 1)):
                return f"{name}= was asked for"
        if option("use_cache") is False:
            return "use_cache=False"
        for name in ("num_beams", "num_return_sequences"):
            if (option(name) or 1) > 1:
                return f"{name}={option(name)}"
        return None

    def store(self, request: RequestState) -> None:
        """After a call: keep its cache, cut behind the last visual column."""
        cache, key, end = request.cache, request.lookup.key, request.lookup.visual_end
        if key is None or key in self.entries or cache is None:
            return
        length = cache.get_seq_length()
        if length < end:
            return
        kept = copy.deepcopy(cache)
        for layer in kept.layers:
            if length > end:
                layer.crop(end - length)
        columns = cache_state(kept).columns
        if columns is not None:
            columns.grow(end)
        size = sum(layer_bytes(layer) for layer in kept.layers)
        self._put(request.lookup, key, size, kept)

    # -- the store -----------------------------------------------------------------------------------------------------

    def _get(self, key: str) -> Any:
        if key not in self.entries:
            return None
        self.entries.move_to_end(key)
        return self.entries[key][1]

    def _put(self, lookup: MediaLookup, key: str, nbytes: int, value: Any) -> None:
        if nbytes > self.limit:
            lookup.notes.append(f"reuse: {nbytes:,} bytes do not fit the limit of {self.limit:,}, nothing kept")
            return
        while self.held + nbytes > self.limit:
            _, (size, _) = self.entries.popitem(last=False)
            self.held -= size
        self.entries[key] = (nbytes, value)
        self.held += nbytes


def _digest(lookup: MediaLookup, value: Any) -> str:
    if not isinstance(value, Tensor):
        return value_digest(value)
    for known, digest in lookup.digests:
        if known is value:
            return digest
    digest = tensor_digest(value)
    lookup.digests.append((value, digest))
    return digest


def _own_lists(output: Any) -> Any:
    """An encoder's output whose containers are its own, since transformers takes entries off what it gets."""
    own = copy.copy(output)
    if hasattr(own, "keys"):
        for name in list(own.keys()):
            if isinstance(own[name], list):
                own[name] = list(own[name])
    return own


def _columns(name: str, value: Tensor, width: int) -> bool:
    """Has this argument one entry per prompt column?"""
    return name not in PIXELS and value.ndim in (2, 3) and value.shape[-1] == width and not value.is_floating_point()


def sum_bytes(value: Any) -> int:
    """Bytes of all tensors inside nested containers."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(sum_bytes(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return sum(sum_bytes(v) for v in value)
    return 0


def layer_bytes(layer: Any) -> int:
    """Bytes a cache layer holds, all tiers."""
    if isinstance(layer, RaggedLayer):
        return int(layer.nbytes()["resident"])
    return sum_bytes([layer.keys, layer.values])
