"""The attention of a decoder whose queries and keys are rotated in one launch; everything else is the module's own way.

Keys and values go through the cache that was given, attention through the interface that the model has: KV policies,
hooks and streams find what they find without it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmfast import kernels

PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
OWN = ("sdpa", "eager", "vlmfast", "vlmfast+sdpa", "vlmfast+eager")  # attention that reads nothing else


def fused_attention(module: Any) -> Callable[..., Any] | None:
    """The forward of a decoder's attention module, None for kinds that are not known here."""
    names = {name for name, _ in module.named_children()}
    if not (PARTS <= names <= {*PARTS, "q_norm", "k_norm", "rotary_emb"}):
        return None
    if getattr(module, "sliding_window", None) or not all(
        hasattr(module, n) for n in ("layer_idx", "scaling", "config")
    ):
        return None
    if not isinstance(getattr(module, "head_dim", None), int) or module.head_dim % 2:
        return None
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return functools.partial(_attend, module, eager, type(module).forward)


def _attend(
    module: Any,
    eager: Any,
    stock: Callable[..., Any],
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    size, name = module.head_dim, module.config._attn_implementation
    known = position_embeddings is not None and position_embeddings[0].ndim == 3 and name in OWN
    if not known or not kernels.fused(hidden_states) or position_embeddings[0].shape[-1] != size:  # type: ignore[index]
        return stock(
            module, hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask, **kwargs
        )
    b, n, _ = hidden_states.shape
    q = module.q_proj(hidden_states).view(b, n, -1, size)
    k = module.k_proj(hidden_states).view(b, n, -1, size)
    v = module.v_proj(hidden_states).view(b, n, -1, size).transpose(1, 2)
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    q, k = (x.transpose(1, 2) for x in kernels.rotated_text(q, k, *position_embeddings))  # type: ignore[misc]
    if cache is not None:
        k, v = cache.update(k, v, module.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    out, weights = attend(
        module, q, k, v, attention_mask, dropout=0.0, scaling=module.scaling,
        **{key: x for key, x in kwargs.items() if key not in ("cache", "past_key_values")},
    )  # fmt: skip
    return module.o_proj(out.reshape(b, n, -1)), weights


def agrees(module: Any, forward: Callable[..., Any]) -> bool:
    """Does the fused forward give what the module gives, up to rounding, on a few numbers?"""
    weight: Tensor = module.q_proj.weight
    width, size = weight.shape[1], module.head_dim

    def numbers(*shape: int) -> Tensor:
        count = functools.reduce(int.__mul__, shape)
        return torch.linspace(-3, 3, count, device=weight.device).mul(7).sin().to(weight.dtype).view(shape)

    given = {"position_embeddings": (numbers(1, 3, size), numbers(1, 3, size).neg()), "attention_mask": None}
    try:
        expected = type(module).forward(module, hidden_states=numbers(1, 3, width), **given)[0]
        got = forward(hidden_states=numbers(1, 3, width), **given)[0]
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, RuntimeError):  # a module that wants other arguments
        return False
    if expected.shape != got.shape:
        return False
    error = (got.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12)
    return bool(error <= 2e-2)
