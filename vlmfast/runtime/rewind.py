"""Tells, before anything runs, whether tokens can be taken back exactly from a model and its cache."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.cache_utils import DynamicCache

from vlmfast import families
from vlmfast.core import Policy

FIXED = ("default", "linear", "llama3", "yarn")  # kinds of RoPE whose frequencies never change


def fixed_rotation(text: Any) -> bool:
    """Is the rotation of a position the same whatever the length of the sequence?"""
    return (getattr(text.rotary_emb, "rope_type", None) or "default") in FIXED


def cannot_rewind(
    model: nn.Module, cache: Any, columns: int, longest: int, policy: Policy | None = None, pruned: bool = False
) -> str | None:
    """Why tokens fed to `model` over `cache` cannot be taken back without a trace, in words; None = they can.

    cache: the one that will be filled; None or an empty one = the default dynamic cache. columns: of the prompt;
    longest: logical length the sequence may reach, drafts included. policy: the KV policy that will compress the cache.
    pruned: may columns be dropped on the way in?
    """
    family = families.get(model)
    text_model: Any = family.text(model)
    if not fixed_rotation(text_model):
        config = text_model.config
        fixed_length = (config.rope_parameters or {}).get(
            "original_max_position_embeddings", config.max_position_embeddings
        )
        if family.rope_axes > 1 or longest > fixed_length:  # positions of several axes may run ahead of the columns
            return (
                f"the {text_model.rotary_emb.rope_type} rotation depends on the length of the sequence "
                f"({longest} columns, fixed up to {fixed_length}), which refused tokens change"
            )
    cache_layers = getattr(cache, "layers", None) or DynamicCache(config=text_model.config).layers
    for held_layer in cache_layers:
        layer_kind = type(held_layer).__name__
        if getattr(held_layer, "is_sliding", False):
            window_length = getattr(held_layer, "sliding_window", 0)  # a static one wraps around
            if longest >= window_length:
                return f"a {layer_kind} of {window_length} columns forgets what {longest} columns would need"
            if pruned:
                return f"a {layer_kind} cannot hold pruned columns"
        elif not getattr(held_layer, "is_croppable", hasattr(held_layer, "crop")):
            return f"a {layer_kind} has no way back"
    if policy is not None and not policy.fits(columns):
        held_layer = policy.cache_layer()
        if not held_layer.is_croppable:
            return f"a {type(held_layer).__name__} evicts while decoding"
    return None
