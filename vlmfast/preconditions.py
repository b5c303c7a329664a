"""What a model, or a call of `generate`, cannot be asked for: said in one line before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from vlmfast import families
from vlmfast.core import Unsupported, UserError
from vlmfast.runtime.compat import cache_in
from vlmfast.runtime.prune_input import InputPruning

MARK = "_vlmfast"  # the attribute of an accelerated model that holds its handle


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper; refuses compiled wrappers."""
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise Unsupported("this model is compiled: hooks cannot follow a compiled graph; accelerate the plain model")
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # type: ignore[operator]
    if not isinstance(model, nn.Module) or not hasattr(model, "generate"):
        raise UserError(f"accelerate needs a transformers model with generate(), not {type(model).__name__}")
    return model


def decoder_sizes(model: nn.Module) -> tuple[int, int, int]:
    """What methods are checked against (`fields.check_methods`): decoder layers, key heads, axes of a position."""
    family = families.get(model)
    text_config: Any = family.text(model).config
    return len(family.layers(model)), text_config.num_key_value_heads, family.rope_axes


def refuse_copy(*_: Any) -> Any:
    raise Unsupported(
        "this model is accelerated, and its hooks would follow a copy back to the original: call .remove() on the "
        "handle, copy or save the model (save_pretrained works as it is), then accelerate each"
    )


def refuse_call(
    model: nn.Module, columns: InputPruning, option: Callable[[str], Any], reason: str | None, args: tuple,
    kwargs: dict[str, Any], *, prunes: bool, layer_pruner: str | None, kv: Any,
) -> None:  # fmt: skip
    """Raise Unsupported for a call of `generate` that the plan cannot honour.

    option: a generation option as `generate` would resolve it; reason: what in the call hooks cannot follow, or None.
    prunes: does the plan drop visual tokens? layer_pruner: the pruner's name where it acts between layers. kv: the
    plan's policy.
    """
    if prunes:
        columns.refuse_merged(kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds"))
        if option("assistant_model") is model:
            raise Unsupported(
                "assistant_model is the model itself: transformers hands an assistant no pixels, and there would "
                "be nothing to prune; use speculate=Speculate(SelfDraft(...))"
            )
    prompt = prompt_of(args, kwargs)
    compresses = not (kv is None or prompt is None or kv.fits(int(prompt.shape[1])))
    if reason is not None and (layer_pruner is not None or compresses):
        raise Unsupported(
            f"{reason}: {layer_pruner or 'kv='} lets layers differ in the columns they hold, "
            "which static caches and chunked prefill cannot: use the default dynamic cache in one prefill, or a "
            "pruner that acts before the language model"
        )
    if kv is not None:
        from vlmfast.prefill import preconditions

        preconditions.check(kv, option, prompt, cache_in(kwargs))


def prompt_of(args: tuple, kwargs: dict) -> Any:
    """Ids (B, L) or embeddings (B, L, D) of a `generate` call, under whatever name they came; None without any."""
    named = (kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds"))
    return next((candidate for candidate in (*args[:1], *named) if candidate is not None), None)
