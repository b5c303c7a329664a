"""A decoder's weights as the static step reads them: q, k, v as one product, gate and up as one.

The model's own parameters become views of the joined buffers, so that nothing is held twice: they stay the same
objects with the same bits, and saving works. `release` gives every one a storage of its own again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.runtime.fast_decoder import layer_weights


@dataclass
class Layer:
    """One decoder layer. Products (out, in), biases (out,) or None, norms (width,); scale of the attention."""

    norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    second_norm: Tensor
    gate_up: Tensor
    down: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    scale: float


def why_not(text: Any, head: Any) -> str | None:
    """Why the weights of a decoder that `fast_decoder.why_not` takes cannot be joined, in words; None = they can."""
    if text.config.hidden_act != "silu":
        return f"activation {text.config.hidden_act!r} is not silu"
    tensors = _tensors(text, head)
    if len({t.device for t in tensors}) > 1:
        return "the weights lie on several devices"
    if len({t.dtype for t in tensors}) > 1:
        return "the weights have several dtypes"
    held: Counter[int] = Counter(p.untyped_storage().data_ptr() for p in {id(p): p for p in text.parameters()}.values())
    for block in text.layers:
        for parts in _parts(layer_weights(block)):
            mine = Counter(p.untyped_storage().data_ptr() for p in parts)
            if any(held[at] != n for at, n in mine.items()) or len({p.data_ptr() for p in parts}) < len(parts):
                return "projections share their memory with other parameters"
    return None


class Weights:
    """Joined when built. text: the text decoder; head: its output layer, both left untouched but for `p.data`."""

    def __init__(self, text: Any, head: Any) -> None:
        attention = text.layers[0].self_attn
        self.head_size = int(attention.head_dim)
        self.kv_heads = attention.k_proj.out_features // self.head_size
        self.heads = attention.q_proj.out_features // self.head_size
        self.eps = float(getattr(text.norm, "variance_epsilon", None) or text.norm.eps)
        self.joined: list[tuple[Tensor, list[nn.Parameter]]] = []
        self.layers = [self._layer(block) for block in text.layers]
        self.embed, self.final = text.embed_tokens.weight, text.norm.weight
        self.head, self.head_bias = head.weight, head.bias
        self.seen = _addresses(text, head)

    def _layer(self, block: Any) -> Layer:
        w = layer_weights(block)
        qkv, bias, gate_up = (self._join(parts) for parts in _parts(w))
        assert qkv is not None and gate_up is not None
        return Layer(w[0], qkv, bias, w[7], w[8], w[9], gate_up, w[12], w[13], w[14], float(block.self_attn.scaling))

    def _join(self, parts: list[nn.Parameter]) -> Tensor | None:
        """One buffer of all rows; each parameter becomes a view of it and lets its own storage go. Twice is once."""
        if not parts:
            return None
        whole = _adjacent(parts)
        if whole is None:
            with torch.inference_mode(False), torch.no_grad():
                whole = torch.cat([p.data for p in parts])
                for p, view in zip(parts, whole.split([p.shape[0] for p in parts]), strict=True):
                    p.data = view
        self.joined.append((whole, parts))
        return whole

    def stale(self, text: Any, head: Any) -> bool:
        """Did somebody move, replace or reload a weight to another place (`model.to`, `p.data = ...`)?"""
        return self.seen != _addresses(text, head)

    def release(self) -> None:
        """Every parameter in a storage of its own again; the joined buffers live on with the rows that use them."""
        with torch.inference_mode(False), torch.no_grad():
            for whole, parts in self.joined:
                for p in parts:
                    if p.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
                        p.data = p.data.clone()
        self.joined, self.seen = [], []


def _parts(w: tuple[Any, ...]) -> list[list[nn.Parameter]]:
    """Weights of q, k, v; their biases; weights of gate and up. Empty where there is none."""
    return [
        [p for p in parts if p is not None]
        for parts in ((w[1], w[3], w[5]), (w[2], w[4], w[6]) if w[2] is not None else (), (w[10], w[11]))
    ]


def _adjacent(parts: list[nn.Parameter]) -> Tensor | None:
    """The one tensor whose rows these are, in order, where they lie one after the other in one storage."""
    first, at = parts[0].data, parts[0].storage_offset()
    for p in parts:
        same = p.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and p.dtype == first.dtype
        if not same or p.storage_offset() != at or not p.is_contiguous():
            return None
        at += p.numel()
    return first.as_strided((sum(p.shape[0] for p in parts), *first.shape[1:]), first.stride())


def _tensors(text: Any, head: Any) -> list[Tensor]:
    """Every weight that a step reads."""
    inside = [t for block in text.layers for t in layer_weights(block) if t is not None]
    ends = [text.embed_tokens.weight, text.norm.weight, head.weight, head.bias]
    return inside + [t for t in ends if t is not None]


def _addresses(text: Any, head: Any) -> list[tuple[int, torch.dtype, torch.device]]:
    return [(t.data_ptr(), t.dtype, t.device) for t in _tensors(text, head)]
