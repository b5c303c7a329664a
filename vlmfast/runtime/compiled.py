"""Finds compiled parts of a model, which hooks cannot follow, when hooks are installed and when a call begins."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from vlmfast.core import Unsupported
from vlmfast.runtime.patch import Patch


def is_compiled(module: nn.Module) -> bool:
    """Was this module compiled: in place, as a wrapper, or by its `forward`?"""
    fields = vars(module)  # a module is slow to say that it lacks an attribute
    own_forward = fields.get("forward")
    return (
        getattr(module, "_compiled_call_impl", None) is not None
        or "_orig_mod" in fields
        or "_orig_mod" in module._modules
        or hasattr(own_forward, "_torchdynamo_orig_callable")
    )


def is_hooked(module: nn.Module) -> bool:
    """Does one of our hooks sit on this module?"""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(str(getattr(hook, "__module__", "")).startswith("vlmfast.") for hook in hooks)


def refuse_compiled(model: nn.Module) -> None:
    """Raise Unsupported when a compiled part of the model holds one of our hooks."""
    if not any(map(is_compiled, model.modules())):
        return
    for name, module in model.named_modules():
        if is_compiled(module) and any(is_hooked(submodule) for submodule in module.modules()):
            raise Unsupported(
                f"{name or 'the model'} is compiled, and hooks cannot follow a compiled graph: accelerate the model "
                "without it, or drop the acceleration (nothing asked works)"
            )


def checked(model: nn.Module, inner: Callable[..., Any]) -> Callable[..., Any]:
    """`inner`, which raises Unsupported once a part of the model was compiled after hooks were installed."""

    @functools.wraps(inner)
    def call(*args: Any, **kwargs: Any) -> Any:
        refuse_compiled(model)
        return inner(*args, **kwargs)

    return call


def observed(
    model: nn.Module, inner: Callable[..., Any], hooked: Callable[[Patch], None], bare: Callable[[Patch], None]
) -> Callable[..., Any]:
    """`inner` with the report's hooks installed during a call.

    hooked: installs them; bare: what to do instead where a part of the model is compiled.
    """

    @functools.wraps(inner)
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_hooked(model):  # a call inside a call
            return inner(*args, **kwargs)
        call_patch = Patch()
        try:
            (bare if any(map(is_compiled, model.modules())) else hooked)(call_patch)
            return inner(*args, **kwargs)
        finally:
            call_patch.remove()

    return call
