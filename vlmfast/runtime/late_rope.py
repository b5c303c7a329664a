"""Late RoPE: keys are kept un-rotated with their positions, and rotated only when attention reads them.

A forward hook on the text model's `rotary_emb` hands the layers the identity rotation; the cache then receives
keys before RoPE (after k_norm), and our attention rotates queries and keys with whatever positions it wants: those
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

NAME = "vlmfast_stream"


def check(text: Any) -> None:
    """Raise Unsupported unless every layer of this text decoder reads the one config and is not sliding."""
    if not fixed_rotation(text):
        raise Unsupported(
            f"the {text.rotary_emb.rope_type} rotation depends on the length of the sequence, and a stream rotates "
            "keys anew: use a checkpoint without it"
        )
    for layer in text.layers:
        attention = layer.self_attn
        if attention.config is not text.config:
            raise Unsupported(f"{type(text).__name__}: layers with configs of their own cannot be streamed")
        if getattr(attention, "sliding_window", None):
            raise Unsupported("sliding-window attention layers cannot be streamed: the stream has a window of its own")


@contextmanager
def running(model: nn.Module, text: Any, late: bool) -> Iterator[None]:
    """For the time of a forward over one of our caches: our attention, and (late) the identity rotation."""
    with model_lock(model):
        patch = Patch()
        patch.set(text.config, "_attn_implementation_internal", NAME)
        if late:
            patch.hook(text.rotary_emb.register_forward_hook(_identity))
        try:
            yield
        finally:
            patch.remove()


def _identity(module: nn.Module, args: Any, out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.ones_like(out[0]), torch.zeros_like(out[1])


def cos_sin(text: Any, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The model's own rotation (n, Dh) each for positions (A, n) int64, in the dtype of `like`."""
    ids = positions[:, None] if positions.shape[0] > 1 else positions
    cos, sin = text.rotary_emb.forward(like, ids.to(like.device))
    return cos[0], sin[0]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x (..., n, Dh) by cos and sin (n, Dh)."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return torch.addcmul(x * cos, turned, sin)


_MASK: dict[tuple[int, int, int, torch.device], Tensor] = {}


def _mask(n: int, p: int, g: int, device: torch.device) -> Tensor:
    """(g * n, p) bool lower-right causal mask of packed queries; only the last one is kept."""
    key = (n, p, g, device)
    mask = _MASK.get(key)
    if mask is None:
        mask = torch.ones(n, p, dtype=torch.bool, device=device).tril(p - n).repeat(g, 1)
        _MASK.clear()
        _MASK[key] = mask
    return mask


def attend(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Causal attention of the last n columns: q (1, H, n, Dh), k and v (1, Hk, P, Dh), all rotated -> (1, H, n, Dh).

    Grouped queries are packed, never repeated; bf16 on CPU is a plain matmul (sdpa is 10-30x slower there).
    """
    b, h, n, d = q.shape
    hk, p = k.shape[1], k.shape[2]
    g = h // hk
    packed = q.reshape(b, hk, g * n, d)
    mask = None if n == 1 else _mask(n, p, g, q.device)
    if q.dtype == torch.float32 or q.is_cuda:
        out = F.scaled_dot_product_attention(packed, k, v, attn_mask=mask, scale=scaling)
    else:
        logits = (packed @ k.transpose(-1, -2)).float() * scaling
        if mask is not None:
            logits.masked_fill_(~mask, float("-inf"))
        out = logits.softmax(-1).to(q.dtype) @ v
    return out.reshape(b, h, n, d)  # kernels lay results out as they like


def stream_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kw: Any
) -> tuple[Tensor, None]:
    """The attention function registered as "vlmfast_stream": the layer rides on the key tensor."""
    layer = getattr(key, "vlmfast_stream", None)
    if layer is None:
        raise Unsupported("the stream's attention was reached without a stream cache: pass the session's own cache")
    scaling = kw.get("scaling") or query.shape[-1] ** -0.5
    return layer.attend(query, key, value, scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, stream_attention)


def mark(key: Tensor, layer: Any) -> Tensor:
    """The key tensor that takes its cache layer along to the attention function."""
    key.vlmfast_stream = layer  # type: ignore[attr-defined]
    return key
