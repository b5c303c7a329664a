"""Checks of the arguments of a session, and of those of `generate` that an answer takes.

An answer takes everything that leaves one row over one dynamic cache.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from vlmfast.core import Unsupported, UserError
from vlmfast.fields import NonNegativeFloat, PositiveFloat, PositiveInt, Range, checked
from vlmfast.runtime.compat import option

INPUTS = ("input_ids", "inputs", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "cache")
REFUSED = {
    "num_beams": "beams share no working set",
    "num_return_sequences": "an answer is one text: ask again for another",
    "use_cache": "an answer is read over the stream's cache",
    "cache_implementation": "an answer is read over the stream's own cache",
    "prefill_chunk_size": "the question is prefilled before generate starts",
    "assistant_model": "a draft would need the frames; use plan=Plan(speculate=Speculate(PromptLookup()))",
    "assistant_early_exit": "it is not built for a stream's cache; use plan=Plan(speculate=Speculate(PromptLookup()))",
    "prompt_lookup_num_tokens": "use plan=Plan(speculate=Speculate(PromptLookup()))",
    "custom_generate": "the decoding loop is the stream's",
    "penalty_alpha": "contrastive search keeps a cache of its own",
    "guidance_scale": "classifier-free guidance needs the prompt, which is not in the cache twice",
    "return_dict_in_generate": "an answer is a text with a report",
    "output_attentions": "an answer is a text with a report",
    "output_hidden_states": "an answer is a text with a report",
}


def check_session(config: dict[str, Any]) -> None:
    """Raise UserError, in one line, for an argument of a session of the wrong type or out of range."""
    for name, hint in (
        ("window", PositiveInt), ("queue", int), ("fps", PositiveFloat), ("flush_seconds", float), ("keep_as", str),
        ("redundancy", Annotated[float, Range(0, 2, "most")] | None), ("positions", Literal["contiguous", "own"]),
        ("text_after", Literal["model", "max"]), ("recent", NonNegativeFloat | None),
    ):  # fmt: skip
        checked(name, config[name], hint, "a stream session")


def check_generate(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments for `generate`. Raises Unsupported, in one line, for what a stream cannot honour."""
    for name in options:
        if name in INPUTS or name.startswith("pixel_values"):
            raise UserError(f"{name}= was given to ask(): the prompt is made of the question and the stream; drop it")
    for name, reason in REFUSED.items():
        value = option(model, options, name)
        is_allowed = value is None or value is (name == "use_cache") or value == "dynamic"
        if is_allowed or (name in ("num_beams", "num_return_sequences", "guidance_scale") and value == 1):
            continue
        if name not in options and name.startswith(("return_", "output_")):  # the model's own config: not asked here
            continue
        shown = value if isinstance(value, (bool, int, float, str)) else type(value).__name__
        raise Unsupported(f"{name}={shown} in a stream: {reason}; drop it, or set it off for this question")
    max_tokens = options.get("max_new_tokens")
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise UserError(f"max_new_tokens={max_tokens!r} must be a whole number of at least 1")
    turned_off = dict.fromkeys(("return_dict_in_generate", "output_attentions", "output_hidden_states"), False)
    return turned_off | options
