"""Checks a `generate` call for options that a KV policy does not support, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlmfast.core import Policy, Unsupported
from vlmfast.prefill.ragged_layer import KVLayer
from vlmfast.runtime.kv_hooks import NO_WEIGHTS

ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
FIRST_DRAFT = 20  # tokens that transformers' assistants draft first, unless told otherwise


def check(policy: Policy, option: Callable[[str], Any], prompt: Any, cache: Any) -> None:
    """Raise Unsupported for what a compressed cache does not support; a prompt that fits the budget is not compressed.

    option: a generation option by name, as `generate` would resolve it; prompt: ids or embeddings (B, L, ...), or None.
    """
    prompt_length = 0 if prompt is None else int(prompt.shape[1])
    is_ragged = any(
        isinstance(cache_layer, KVLayer) and cache_layer.ragged for cache_layer in getattr(cache, "layers", None) or ()
    )
    fits_budget = policy.fits(prompt_length) and not is_ragged
    if (option("num_beams") or 1) > 1 and not fits_budget:
        raise Unsupported(f"num_beams={option('num_beams')} with kv=: beams share no ragged cache; use num_beams=1")
    draft_option = next((option_name for option_name in ASSISTED if option(option_name)), None)
    if draft_option is not None:
        first_draft = getattr(
            getattr(option("assistant_model"), "generation_config", None), "num_assistant_tokens", None
        )
        first_draft = option("prompt_lookup_num_tokens") or first_draft or FIRST_DRAFT
        if is_ragged or not policy.fits(prompt_length + int(first_draft)):
            raise Unsupported(
                f"{draft_option} with kv=: transformers feeds its first draft together with the prompt, and both "
                "would be compressed; use speculate=, or drop kv="
            )
    if option("output_attentions") and not fits_budget:
        raise Unsupported(NO_WEIGHTS)
