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


def why_not(text_model: Any, lm_head: Any) -> str | None:
    """Why the weights of a decoder cannot be joined, as a phrase; None = they can."""
    if text_model.config.hidden_act != "silu":
        return f"activation {text_model.config.hidden_act!r} is not silu"
    tensors = _tensors(text_model, lm_head)
    if len({tensor.device for tensor in tensors}) > 1:
        return "the weights lie on several devices"
    if len({tensor.dtype for tensor in tensors}) > 1:
        return "the weights have several dtypes"
    distinct = {id(parameter): parameter for parameter in text_model.parameters()}.values()
    storage_counts: Counter[int] = Counter(map(_storage, distinct))
    for decoder_layer in text_model.layers:
        for parameters in _parts(layer_weights(decoder_layer)):
            own_counts = Counter(map(_storage, parameters))
            shared = any(storage_counts[storage] != count for storage, count in own_counts.items())
            if shared or len({parameter.data_ptr() for parameter in parameters}) < len(parameters):
                return "projections share their memory with other parameters"
    return None


class Weights:
    """The joined weights. text_model: the text decoder; lm_head: its output layer; only their `p.data` change."""

    def __init__(self, text_model: Any, lm_head: Any) -> None:
        attention = text_model.layers[0].self_attn
        self.head_size = int(attention.head_dim)
        self.kv_heads = attention.k_proj.out_features // self.head_size
        self.heads = attention.q_proj.out_features // self.head_size
        self.eps = float(getattr(text_model.norm, "variance_epsilon", None) or text_model.norm.eps)
        self.joined: list[tuple[Tensor, list[nn.Parameter]]] = []
        self.layers = [self._layer(block) for block in text_model.layers]
        self.embed, self.final = text_model.embed_tokens.weight, text_model.norm.weight
        self.head, self.head_bias = lm_head.weight, lm_head.bias
        self.seen = _addresses(text_model, lm_head)

    def nbytes(self) -> int:
        """Bytes that a step reads: all but the embedding, of which it reads a row a token."""
        tensors = [tensor for layer in self.layers for tensor in vars(layer).values() if isinstance(tensor, Tensor)]
        tensors += [self.final, self.head, *([] if self.head_bias is None else [self.head_bias])]
        return sum(tensor.nbytes for tensor in tensors)

    def _layer(self, decoder_layer: Any) -> Layer:
        weights = layer_weights(decoder_layer)
        qkv, qkv_bias, gate_up = (self._join(parameters) for parameters in _parts(weights))
        assert qkv is not None and gate_up is not None
        norm, *_ = weights
        out, out_bias, second_norm, _, _, down, q_norm, k_norm = weights[7:]
        scaling = float(decoder_layer.self_attn.scaling)
        return Layer(norm, qkv, qkv_bias, out, out_bias, second_norm, gate_up, down, q_norm, k_norm, scaling)

    def _join(self, parameters: list[nn.Parameter]) -> Tensor | None:
        """One buffer of all rows; each parameter becomes a view of it and lets its own storage go. Twice is once."""
        if not parameters:
            return None
        joined = _adjacent(parameters)
        if joined is None:
            with torch.inference_mode(False), torch.no_grad():
                joined = torch.cat([parameter.data for parameter in parameters])
                views = joined.split([parameter.shape[0] for parameter in parameters])
                for parameter, view in zip(parameters, views, strict=True):
                    parameter.data = view
        self.joined.append((joined, parameters))
        return joined

    def stale(self, text_model: Any, lm_head: Any) -> bool:
        """Did somebody move, replace or reload a weight to another place (`model.to`, `p.data = ...`)?"""
        return self.seen != _addresses(text_model, lm_head)

    def release(self) -> None:
        """Every parameter in a storage of its own again; the joined buffers live on with the rows that use them."""
        with torch.inference_mode(False), torch.no_grad():
            for joined, parameters in self.joined:
                for parameter in parameters:
                    if _storage(parameter) == _storage(joined):
                        parameter.data = parameter.data.clone()
        self.joined, self.seen = [], []


def _storage(tensor: Tensor) -> int:
    """Address of the storage that a tensor lies in."""
    return tensor.untyped_storage().data_ptr()


def _parts(weights: tuple[Any, ...]) -> list[list[nn.Parameter]]:
    """Weights of q, k, v; their biases; weights of gate and up. Empty where there is none."""
    query, query_bias, key, key_bias, value, value_bias = weights[1:7]
    biases = () if query_bias is None else (query_bias, key_bias, value_bias)
    groups = ((query, key, value), biases, weights[10:12])
    return [[parameter for parameter in group if parameter is not None] for group in groups]


def _adjacent(parameters: list[nn.Parameter]) -> Tensor | None:
    """The one tensor whose rows these are, in order, where they lie one after the other in one storage."""
    first_data, offset = parameters[0].data, parameters[0].storage_offset()
    for parameter in parameters:
        same_storage = _storage(parameter) == _storage(first_data) and parameter.dtype == first_data.dtype
        if not same_storage or parameter.storage_offset() != offset or not parameter.is_contiguous():
            return None
        offset += parameter.numel()
    return first_data.as_strided(
        (sum(parameter.shape[0] for parameter in parameters), *first_data.shape[1:]), first_data.stride()
    )


def _tensors(text_model: Any, lm_head: Any) -> list[Tensor]:
    """Every weight that a step reads."""
    layer_tensors = [
        tensor for decoder_layer in text_model.layers for tensor in layer_weights(decoder_layer) if tensor is not None
    ]
    outer_tensors = [text_model.embed_tokens.weight, text_model.norm.weight, lm_head.weight, lm_head.bias]
    return layer_tensors + [tensor for tensor in outer_tensors if tensor is not None]


def _addresses(text_model: Any, lm_head: Any) -> list[tuple[int, torch.dtype, torch.device]]:
    return [(tensor.data_ptr(), tensor.dtype, tensor.device) for tensor in _tensors(text_model, lm_head)]
