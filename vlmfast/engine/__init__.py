"""Engine: the decoder with static shapes. Slots hold the rows, a step advances them, on CUDA as a captured graph.

`open_static` is handed to `runtime.stepper.Stepper.prefill`, which steps through it where it applies.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast import families
from vlmfast.core import Unsupported, UserError
from vlmfast.engine import pool, weights
from vlmfast.engine.prefill_graphs import PrefillGraphs
from vlmfast.engine.shared import SharedSlots
from vlmfast.engine.slots import STOPS
from vlmfast.engine.step import Static, forward
from vlmfast.runtime.fast_decoder import unknown_decoder

__all__ = [
    "STOPS",
    "PrefillGraphs",
    "SharedSlots",
    "Static",
    "automatic",
    "decoder",
    "forward",
    "open_everywhere",
    "open_slots",
    "open_static",
    "prepare",
    "release",
    "why_not",
]


def automatic(text_model: Any) -> bool:
    """Is the static step what this decoder gets where nothing else was asked: on CUDA?"""
    return text_model.embed_tokens.weight.is_cuda


def why_not(text_model: Any, lm_head: Any) -> str | None:
    """Why a decoder has no static step, in words; None = it has one over a cache of dense rows."""
    if torch.is_autocast_enabled(text_model.embed_tokens.weight.device.type):
        return "torch.autocast is on"
    reason = unknown_decoder(text_model, lm_head)
    if reason is not None or pool.current(text_model, lm_head) is not None:
        return reason
    weight = text_model.embed_tokens.weight
    if weight.is_cuda:
        if weight.device.index != torch.cuda.current_device():
            current = f"cuda:{torch.cuda.current_device()}"
            return f"the model is on {weight.device} and the current device is {current}: call torch.cuda.set_device"
        if weight.dtype not in pool.TAKEN:
            return f"the kernels of the static step take float16, bfloat16 and float32, not {str(weight.dtype)[6:]}"
        major, minor = torch.cuda.get_device_capability(weight.device)
        if major < 8:
            return f"the kernels of the static step need a card of compute capability 8.0, this one has {major}.{minor}"
        if importlib.util.find_spec("triton") is None:
            return "the kernels of the static step need Triton: pip install triton"
        if text_model.layers[0].self_attn.head_dim > 256:
            return f"heads of {text_model.layers[0].self_attn.head_dim}, the kernels of the static step take 256"
    return weights.why_not(text_model, lm_head)


def open_static(
    text_model: Any,
    lm_head: Any,
    cache: Any,
    valid: Tensor | None,
    position: Tensor,
    room: int,
    forced: bool,
) -> Static | str | None:
    """A static step over a cache that `fast_decoder.why_not` takes, or why there is none; None where none is asked for.

    forced: asked for by name; otherwise on CUDA alone. The others as of `Static`.
    """
    if not forced and not automatic(text_model):
        return None
    reason = why_not(text_model, lm_head)
    if reason is not None:
        return reason
    try:
        return Static(pool.pool_of(text_model, lm_head), text_model, cache, valid, position, room)
    except Unsupported as error:
        return str(error)


def open_everywhere(
    text_model: Any, lm_head: Any, cache: Any, valid: Tensor | None, position: Tensor, room: int, _: bool
) -> Static | str | None:
    """`open_static` on a CPU too, as several drafted rows need it."""
    return open_static(text_model, lm_head, cache, valid, position, room, True)


def open_slots(model: nn.Module, rows: int, columns: int) -> SharedSlots:
    """Slots for `rows` rows of `columns` columns each, prompt and answer together, which rows join and leave.

    Raises Unsupported where the model has no static step, or no memory for them: before anything is allocated, with the
    bytes needed and what fits.
    """
    if rows < 1 or columns < 1:
        raise UserError(f"rows={rows}, columns={columns}: both are at least 1")
    text_model, lm_head = decoder(model)
    reason = "it has no decoder layers" if text_model is None else why_not(text_model, lm_head)
    if reason is not None:
        raise Unsupported(f"this {type(model).__name__} has no static step: {reason}")
    axes = families.get(model).rope_axes
    return SharedSlots(pool.pool_of(text_model, lm_head), text_model, rows, columns, axes)


def prepare(model: nn.Module) -> None:
    """Join a model's weights before anything runs, where its decoder will step statically by itself."""
    text_model, lm_head = decoder(model)
    if text_model is not None and automatic(text_model) and why_not(text_model, lm_head) is None:
        pool.pool_of(text_model, lm_head)


def release(model: nn.Module) -> None:
    """Give every parameter a storage of its own again, and slots and graphs back."""
    text_model, _ = decoder(model)
    if text_model is not None:
        pool.release(text_model)


def decoder(model: Any) -> tuple[Any, Any]:
    """The text decoder and its output layer; None where the model has no such thing."""
    text_model: Any = families.get(model).text(model)
    return (
        text_model if hasattr(text_model, "embed_tokens") and hasattr(text_model, "layers") else None
    ), model.get_output_embeddings()
