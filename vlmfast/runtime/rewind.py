"""What keeps a model and its cache from giving tokens back exactly: known before anything runs."""

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
    text: Any = family.text(model)
    if not fixed_rotation(text):
        config = text.config
        limit = (config.rope_parameters or {}).get("original_max_position_embeddings", config.max_position_embeddings)
        if family.rope_axes > 1 or longest > limit:  # positions of several axes may run ahead of the columns
            return (
                f"the {text.rotary_emb.rope_type} rotation depends on the length of the sequence "
                f"({longest} columns, fixed up to {limit}), which refused tokens change"
            )
    layers = getattr(cache, "layers", None) or DynamicCache(config=text.config).layers
    for layer in layers:
        kind = type(layer).__name__
        if getattr(layer, "is_sliding", False):
            window = getattr(layer, "sliding_window", 0)  # a static one wraps around
            if longest >= window:
                return f"a {kind} of {window} columns forgets what {longest} columns would need"
            if pruned:
                return f"a {kind} cannot hold pruned columns"
        elif not getattr(layer, "is_croppable", hasattr(layer, "crop")):
            return f"a {kind} has no way back"
    if policy is not None and not policy.fits(columns):
        layer = policy.cache_layer()
        if not layer.is_croppable:
            return f"a {type(layer).__name__} evicts while decoding"
    return None
