"""What a KV policy cannot honour in a `generate` call, said in one line before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlmfast.core import Policy, Unsupported
from vlmfast.prefill.ragged_layer import KVLayer
from vlmfast.runtime.kv_hooks import NO_WEIGHTS

ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
FIRST_DRAFT = 20  # tokens that transformers' assistants draft first, unless told otherwise


def check(policy: Policy, option: Callable[[str], Any], prompt: Any, cache: Any) -> None:
    """Raise Unsupported for what a compressed cache cannot give; a prompt that fits the budget is not compressed.

    option: a generation option by name, as `generate` would resolve it; prompt: ids or embeddings (B, L, ...), or None.
    """
    columns = 0 if prompt is None else int(prompt.shape[1])
    ragged = any(isinstance(layer, KVLayer) and layer.ragged for layer in getattr(cache, "layers", None) or ())
    fits = policy.fits(columns) and not ragged
    if (option("num_beams") or 1) > 1 and not fits:
        raise Unsupported(f"num_beams={option('num_beams')} with kv=: beams share no ragged cache; use num_beams=1")
    drafted = next((name for name in ASSISTED if option(name)), None)
    if drafted is not None:
        first = getattr(getattr(option("assistant_model"), "generation_config", None), "num_assistant_tokens", None)
        first = option("prompt_lookup_num_tokens") or first or FIRST_DRAFT
        if ragged or not policy.fits(columns + int(first)):
            raise Unsupported(
                f"{drafted} with kv=: transformers feeds its first draft together with the prompt, and both would be "
                "compressed; use speculate=, or drop kv="
            )
    if option("output_attentions") and not fits:
        raise Unsupported(NO_WEIGHTS)
