"""Decoder attention whose queries and keys are rotated in one kernel launch; the rest is as in the module.

Keys and values go through the cache that was given, attention through the interface that the model has: KV policies,
hooks and streams work as they do without it.
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
    child_names = {child_name for child_name, _ in module.named_children()}
    if not (PARTS <= child_names <= {*PARTS, "q_norm", "k_norm", "rotary_emb"}):
        return None
    if getattr(module, "sliding_window", None) or not all(
        hasattr(module, attribute_name) for attribute_name in ("layer_idx", "scaling", "config")
    ):
        return None
    if not isinstance(getattr(module, "head_dim", None), int) or module.head_dim % 2:
        return None
    eager_attention = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return functools.partial(_attend, module, eager_attention, type(module).forward)


def _attend(
    module: Any,
    eager_attention: Any,
    stock: Callable[..., Any],
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    head_size, implementation = module.head_dim, module.config._attn_implementation
    takes_fused = position_embeddings is not None and position_embeddings[0].ndim == 3 and implementation in OWN
    if not takes_fused or not kernels.fused(hidden_states) or position_embeddings[0].shape[-1] != head_size:  # type: ignore[index]
        return stock(
            module, hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask, **kwargs
        )
    batch_size, num_columns, _ = hidden_states.shape
    queries = module.q_proj(hidden_states).view(batch_size, num_columns, -1, head_size)
    keys = module.k_proj(hidden_states).view(batch_size, num_columns, -1, head_size)
    values = module.v_proj(hidden_states).view(batch_size, num_columns, -1, head_size).transpose(1, 2)
    if hasattr(module, "q_norm"):
        queries, keys = module.q_norm(queries), module.k_norm(keys)
    queries, keys = (rotated.transpose(1, 2) for rotated in kernels.rotated_text(queries, keys, *position_embeddings))  # type: ignore[misc]
    if cache is not None:
        keys, values = cache.update(keys, values, module.layer_idx)
    attention_function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
    attended, weights = attention_function(
        module, queries, keys, values, attention_mask, dropout=0.0, scaling=module.scaling,
        **{key: argument for key, argument in kwargs.items() if key not in ("cache", "past_key_values")},
    )  # fmt: skip
    return module.o_proj(attended.reshape(batch_size, num_columns, -1)), weights


def agrees(module: Any, forward: Callable[..., Any]) -> bool:
    """Does the fused forward give what the module gives, up to rounding, on a few numbers?"""
    weight: Tensor = module.q_proj.weight
    hidden_size, head_size = weight.shape[1], module.head_dim

    def numbers(*shape: int) -> Tensor:
        num_values = functools.reduce(int.__mul__, shape)
        return torch.linspace(-3, 3, num_values, device=weight.device).mul(7).sin().to(weight.dtype).view(shape)

    shared_arguments = {
        "position_embeddings": (numbers(1, 3, head_size), numbers(1, 3, head_size).neg()),
        "attention_mask": None,
    }
    try:
        expected = type(module).forward(module, hidden_states=numbers(1, 3, hidden_size), **shared_arguments)[0]
        fused_output = forward(hidden_states=numbers(1, 3, hidden_size), **shared_arguments)[0]
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, RuntimeError):  # a module that wants other arguments
        return False
    if expected.shape != fused_output.shape:
        return False
    error = (fused_output.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12)
    return bool(error <= 2e-2)
