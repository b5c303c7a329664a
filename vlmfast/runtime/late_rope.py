"""Late RoPE: keys are stored un-rotated with their positions, and rotated when attention reads them.

A forward hook on the text model's `rotary_emb` hands the layers the identity rotation; the cache then receives
keys before RoPE (after k_norm), and our attention rotates queries and keys by the positions it chooses: those
of the stream, re-based ones of a sliding window, or new ones of retrieved blocks. M-RoPE, interleaved M-RoPE and
1-D RoPE alike, because cos and sin always come from the model's own `rotary_emb`.

Nothing of this stays installed: `running` switches one model's text config for one forward, under that model's lock,
and restores it. Shapes: one row; H query heads, Hk key/value heads, A position axes (1 or 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from vlmfast.core import Unsupported
from vlmfast.runtime.model_lock import model_lock
from vlmfast.runtime.patch import Patch
from vlmfast.runtime.rewind import fixed_rotation
from vlmfast.runtime.transfers import to_device

NAME = "vlmfast_stream"


def check(text: Any) -> None:
    """Raise Unsupported unless every layer of this text decoder reads the one config and is not sliding."""
    if not fixed_rotation(text):
        raise Unsupported(
            f"the {text.rotary_emb.rope_type} rotation depends on the length of the sequence, and a stream rotates "
            "keys anew: use a checkpoint without it"
        )
    for decoder_layer in text.layers:
        attention = decoder_layer.self_attn
        if attention.config is not text.config:
            raise Unsupported(f"{type(text).__name__}: layers with configs of their own cannot be streamed")
        if getattr(attention, "sliding_window", None):
            raise Unsupported("sliding-window attention layers cannot be streamed: the stream has a window of its own")


@contextmanager
def running(model: nn.Module, text: Any, cache: Any = None) -> Iterator[None]:
    """For the time of a forward over one of our caches: our attention. cache: one of un-rotated keys; its layers are
    handed the identity rotation, and its `rotation` becomes the model's own of this forward, cos and sin (n, Dh)."""

    waiting = True  # for the rotation of this forward; one within it, over another cache, has its own

    def identity(module: nn.Module, args: Any, cos_and_sin: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal waiting
        cos, sin = cos_and_sin
        if waiting:
            cache.rotation, waiting = (cos[0], sin[0]), False
        return torch.ones_like(cos), torch.zeros_like(sin)

    with model_lock(model):
        attention_patch = Patch()
        attention_patch.set(text.config, "_attn_implementation_internal", NAME)
        if cache is not None:
            attention_patch.hook(text.rotary_emb.register_forward_hook(identity, prepend=True))
        try:
            yield
        finally:
            attention_patch.remove()


def cos_sin(text: Any, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The model's own rotation (n, Dh) each for positions (A, n) int64, in the dtype of `like`."""
    position_ids = positions[:, None] if positions.shape[0] > 1 else positions
    cos, sin = text.rotary_emb.forward(like, to_device(position_ids, like.device))
    return cos[0], sin[0]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x (..., n, Dh) by cos and sin (n, Dh)."""
    half_size = x.shape[-1] // 2
    rotated_half = torch.cat([-x[..., half_size:], x[..., :half_size]], -1)
    return torch.addcmul(x * cos, rotated_half, sin)


_MASK: dict[tuple[int, int, int, torch.device], Tensor] = {}


def _mask(num_queries: int, num_columns: int, group_size: int, device: torch.device) -> Tensor:
    """(group_size * num_queries, num_columns) bool causal mask of packed queries; only the latest one is cached."""
    mask_key = (num_queries, num_columns, group_size, device)
    causal_mask = _MASK.get(mask_key)
    if causal_mask is None:
        causal_mask = (
            torch.ones(num_queries, num_columns, dtype=torch.bool, device=device)
            .tril(num_columns - num_queries)
            .repeat(group_size, 1)
        )
        _MASK.clear()
        _MASK[mask_key] = causal_mask
    return causal_mask


def attend(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Causal attention of the last n columns: q (1, H, n, Dh), k and v (1, Hk, P, Dh), all rotated -> (1, H, n, Dh).

    Grouped queries are packed, never repeated; bf16 on CPU is a plain matmul (sdpa is 10-30x slower there).
    """
    batch_size, num_heads, num_queries, head_size = q.shape
    num_key_heads, num_columns = k.shape[1], k.shape[2]
    group_size = num_heads // num_key_heads
    packed_queries = q.reshape(batch_size, num_key_heads, group_size * num_queries, head_size)
    causal_mask = None if num_queries == 1 else _mask(num_queries, num_columns, group_size, q.device)
    if q.dtype == torch.float32 or q.is_cuda:
        attended = F.scaled_dot_product_attention(packed_queries, k, v, attn_mask=causal_mask, scale=scaling)
    else:
        logits = (packed_queries @ k.transpose(-1, -2)).float() * scaling
        if causal_mask is not None:
            logits.masked_fill_(~causal_mask, float("-inf"))
        attended = logits.softmax(-1).to(q.dtype) @ v
    return attended.reshape(batch_size, num_heads, num_queries, head_size)  # kernels lay results out as they like


def stream_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kw: Any
) -> tuple[Tensor, None]:
    """The attention function registered as "vlmfast_stream": the key tensor carries the cache layer."""
    cache_layer = getattr(key, "vlmfast_stream", None)
    if cache_layer is None:
        raise Unsupported("the stream's attention was reached without a stream cache: pass the session's own cache")
    scaling = kw.get("scaling") or query.shape[-1] ** -0.5
    return cache_layer.attend(query, key, value, scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, stream_attention)


def mark(key: Tensor, layer: Any) -> Tensor:
    """The key tensor, with its cache layer as an attribute for the attention function."""
    key.vlmfast_stream = layer  # type: ignore[attr-defined]
    return key
