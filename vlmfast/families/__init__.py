"""Model families. `get(model)` finds the one of a model by its config's `model_type`."""

from __future__ import annotations

from torch import nn

from vlmfast.core import Unsupported
from vlmfast.families.base import Family, Item
from vlmfast.families.idefics import Idefics
from vlmfast.families.internvl import InternVL
from vlmfast.families.llava import Llava
from vlmfast.families.qwen import Qwen, Qwen35

FAMILIES: tuple[Family, ...] = (Qwen(), Qwen35(), Llava(), InternVL(), Idefics())


def supported() -> list[str]:
    """The supported `model_type`s."""
    return [model_type for family in FAMILIES for model_type in family.model_types]


def get(model: nn.Module) -> Family:
    """The family of a model. Raises Unsupported, naming what is supported, for any other model_type."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    raise Unsupported(
        f"model_type {model_type!r} ({type(model).__name__}) is not supported; supported: {', '.join(supported())}. "
        "A further family is one file in vlmfast/families"
    )


__all__ = ["FAMILIES", "Family", "Item", "get", "supported"]
