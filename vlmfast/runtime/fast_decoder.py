"""A decoder step without the model's modules: plain functions over its weights, KV written in place, one row.

A step of a few tokens through transformers spends as long in Python as in arithmetic on small models. `FastDecoder`
reads the model's parameters and runs the same arithmetic with a third of the operations: no modules, no masks built,
rotation of queries and keys together from a table of cos/sin, keys and values written in place, grouped queries packed.
It only takes decoders whose structure it knows; `why_not` gives the reason otherwise. Its first use on a model is
checked against the model itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from vlmfast.runtime import late_rope
from vlmfast.runtime.pruned_layer import AnnouncedColumns, PrunedLayer
from vlmfast.runtime.rewind import fixed_rotation
from vlmfast.runtime.stream_cache import WorkLayer

LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_emb"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
Layers = tuple[int, ...]  # decoder layers whose output is asked for, from 0
TABLE = 128  # positions rotated at once
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def why_not(text: Any, head: nn.Module, cache: Any, rows: int = 1) -> str | None:
    """None when `FastDecoder` can step this decoder over this cache; else one line saying what is in the way.

    rows: that the cache holds; `FastDecoder` takes one, `engine.Static` any number.
    """
    reason = unknown_decoder(text, head)
    if reason is not None:
        return reason
    layers = getattr(cache, "layers", None) or []
    if len(layers) < len(text.layers):
        return "the cache is not filled"
    for cache_layer in layers:
        if type(cache_layer) not in (DynamicLayer, PrunedLayer, WorkLayer) or cache_layer.keys.shape[0] != rows:
            return f"cache layers of type {type(cache_layer).__name__} are not dense rows"
    return None


def unknown_decoder(text: Any, head: Any) -> str | None:
    """The reason of `why_not` for the decoder alone, without a cache; None when it is known."""
    config = text.config
    if text.training:
        return "the model is in training mode"
    if config._attn_implementation not in ("sdpa", "eager", late_rope.NAME):
        return f"attention {config._attn_implementation!r} is not torch's own"
    if not fixed_rotation(text):
        return "the rotation depends on the sequence length"
    if type(head) is not nn.Linear or _foreign(head) or _foreign(text.rotary_emb) or _foreign(text.norm):
        return "the output head, norm or rotation is wrapped or hooked"
    for decoder_layer in text.layers:
        if _children(decoder_layer) != LAYER or not (
            _children(decoder_layer.self_attn) <= ATTENTION and _children(decoder_layer.mlp) <= MLP
        ):
            return f"{type(decoder_layer).__name__} is not a decoder layer known here"
        attention, mlp = decoder_layer.self_attn, decoder_layer.mlp
        if getattr(attention, "sliding_window", None):
            return "sliding-window attention"
        for module in decoder_layer.modules():
            if _foreign(module):
                return f"a hook or wrapper sits on a {type(module).__name__}"
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        if any(
            type(projection) is not nn.Linear
            for projection in (*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        ):
            return "projections are not plain linear layers (adapter or quantised)"
        if any(projection.bias is not None for projection in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
            return "the MLP has biases"
    return None


def difference(got: Tensor, expected: Tensor, dtype: torch.dtype) -> str | None:
    """How far logits are from those expected, relative to the largest; None where a step in `dtype` rounds so far."""
    error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    return None if error <= TOLERANCE.get(dtype, 1e-1) else f"{error:.1e}"


def _children(module: nn.Module) -> set[str]:
    return {child_name for child_name, _ in module.named_children()}


def _foreign(module: nn.Module) -> bool:
    """True when somebody else's hook or forward sits on the module (our hooks act at prefill only, our forwards compute
    the same)."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    replaced = vars(module).get("forward")
    changes = [*hooks] if replaced is None else [*hooks, getattr(replaced, "func", replaced)]
    return not all(str(getattr(change, "__module__", "")).startswith("vlmfast.runtime.") for change in changes)


@dataclass(frozen=True, eq=False)
class ExitPoint:
    """Where a step ends: after so many layers, None = all of them. norm: what then stands in place of the model's last
    norm, a linear map fitted to what the deeper layers would do; None = the norm itself.

    Tokens of a step that ended early must be taken back before a whole step: deeper layers do not hold them.
    """

    layers: int | None = None
    norm: nn.Linear | None = None


WHOLE = ExitPoint()


class SteppingDecoder:
    """What a `Stepper` asks of a decoder that steps without the model's modules: `FastDecoder`, `engine.Static`."""

    name: str
    n: int  # tokens stepped after the prefill
    hidden: dict[int, Tensor]  # (n, D) of each layer asked for, in the last step

    def rewind(self, n: int) -> None:
        """Forget the last n tokens stepped."""
        if n > self.n:
            raise ValueError(f"rewind({n}) after {self.n} tokens would reach into the prompt")
        self.n -= n


class FastDecoder(SteppingDecoder):
    """One decoder with its keys and values in preallocated buffers (Hk, capacity, Dh) per layer.

    text: the text decoder; head: its output layer; cache: filled by a prefill of one row, its storage is taken over
    until `flush`; valid: (P,) bool, physical columns that are not padding, or None; position: the next position in the
    model's own layout, (..., 1, 1) int64; room: tokens to make room for (it grows when they do not suffice).
    """

    name = "functional"

    def __init__(
        self, text: Any, head: nn.Module, cache: Any, valid: Tensor | None, position: Tensor, room: int = 256
    ) -> None:
        self.text, self.head = text, head
        attention = text.layers[0].self_attn
        self.dh = int(attention.head_dim)
        self.hk = attention.k_proj.out_features // self.dh
        self.h = attention.q_proj.out_features // self.dh
        self.eps = float(getattr(text.norm, "variance_epsilon", None) or text.norm.eps)
        self.silu = text.config.hidden_act == "silu"
        self.scales = [float(block.self_attn.scaling) for block in text.layers]
        self.weights = [layer_weights(block) for block in text.layers]
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.prompt: list[int] = []  # columns per layer that the prefill left
        for cache_layer in cache.layers[: len(self.weights)]:
            prompt_keys, prompt_values = cache_layer.keys[0], cache_layer.values[0]
            if valid is not None:
                prompt_keys, prompt_values = prompt_keys[:, valid], prompt_values[:, valid]
            self.prompt.append(prompt_keys.shape[1])
            self.keys.append(_roomy(prompt_keys, room))
            self.values.append(_roomy(prompt_values, room))
            if valid is None:  # the prompt is held once
                cache_layer.keys, cache_layer.values = (
                    buffers[-1][None, :, : prompt_keys.shape[1]] for buffers in (self.keys, self.values)
                )
        self.n = 0  # tokens stepped after the prefill
        self.start = position if position.shape[0] != 4 or position.ndim == 2 else position[1:]
        self.cos = self.sin = torch.empty(0)
        self.hidden: dict[int, Tensor] = {}

    def _rotation(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """cos and signed sin of the next n positions, (n, 1, Dh) each."""
        if self.n + num_tokens > self.cos.shape[0]:
            table_size = (self.n + num_tokens + TABLE - 1) // TABLE * TABLE
            positions = torch.arange(table_size, device=self.start.device)
            cos, sin = self.text.rotary_emb(self.keys[0], self.start + positions)
            half_size = self.dh // 2
            self.cos = cos[0][:, None]
            self.sin = torch.cat([-sin[0][:, :half_size], sin[0][:, half_size:]], -1)[:, None]
        return self.cos[self.n : self.n + num_tokens], self.sin[self.n : self.n + num_tokens]

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        if hidden.dtype == torch.float32:
            return F.rms_norm(hidden, (hidden.shape[-1],), weight, self.eps)
        wide_hidden = hidden.float()
        return weight * (wide_hidden * torch.rsqrt(wide_hidden.pow(2).mean(-1, keepdim=True) + self.eps)).to(
            hidden.dtype
        )

    def step(self, tokens: Tensor, hidden_layers: Layers = (), exit_point: ExitPoint = WHOLE) -> Tensor:
        """tokens (n,) int64 -> logits (n, V) in the model's dtype; `.hidden` then holds those layers' outputs, (n, D).

        exit_point: where the step ends.
        """
        length, heads, key_heads, head_size = tokens.shape[0], self.h, self.hk, self.dh
        states, self.hidden = F.embedding(tokens, self.text.embed_tokens.weight), {}
        cos, sin = self._rotation(length)
        causal_mask: Tensor | None = None
        if length > 1:
            causal_mask = torch.full((length, length), float("-inf"), dtype=states.dtype, device=states.device).triu_(1)
        masks: dict[int, Tensor] = {}
        for layer_index, tensors in enumerate(self.weights[: exit_point.layers]):
            normed = self._norm(states, tensors[0])
            query_rows = F.linear(normed, tensors[1], tensors[2])
            key_rows = F.linear(normed, tensors[3], tensors[4])
            value_rows = F.linear(normed, tensors[5], tensors[6]).view(length, key_heads, head_size)
            if tensors[13] is not None:
                query_rows = self._norm(query_rows.view(length, heads, head_size), tensors[13]).view(
                    length, heads * head_size
                )
                key_rows = self._norm(key_rows.view(length, key_heads, head_size), tensors[14]).view(
                    length, key_heads * head_size
                )
            rotated = torch.cat([query_rows, key_rows], 1).view(length, heads + key_heads, head_size)
            rotated = torch.addcmul(rotated * cos, torch.roll(rotated, head_size // 2, -1), sin)
            first_column = self.prompt[layer_index] + self.n
            end = first_column + length
            if end > self.keys[layer_index].shape[1]:
                self.keys[layer_index] = _roomy(self.keys[layer_index], end - first_column + 256)
                self.values[layer_index] = _roomy(self.values[layer_index], end - first_column + 256)
            keys, values = self.keys[layer_index][:, :end], self.values[layer_index][:, :end]
            keys[:, first_column:] = rotated[:, heads:].transpose(0, 1)
            values[:, first_column:] = value_rows.transpose(0, 1)
            if causal_mask is None:
                packed = rotated[0, :heads].view(1, key_heads, heads // key_heads, head_size)
                attended = F.scaled_dot_product_attention(
                    packed, keys[None], values[None], scale=self.scales[layer_index]
                )
                attended = attended.reshape(1, heads * head_size)  # kernels lay results out as they like
            else:
                if end not in masks:
                    masks[end] = torch.cat([causal_mask.new_zeros(length, first_column), causal_mask], 1).repeat(
                        heads // key_heads, 1
                    )
                packed = (
                    rotated[:, :heads]
                    .view(length, key_heads, heads // key_heads, head_size)
                    .permute(1, 2, 0, 3)
                    .reshape(1, key_heads, -1, head_size)
                )
                attended = F.scaled_dot_product_attention(
                    packed,
                    keys[None],
                    values[None],
                    attn_mask=masks[end],
                    scale=self.scales[layer_index],
                )
                attended = (
                    attended.reshape(key_heads, heads // key_heads, length, head_size)
                    .permute(2, 0, 1, 3)
                    .reshape(length, heads * head_size)
                )
            states = states + F.linear(attended, tensors[7], tensors[8])
            normed = self._norm(states, tensors[9])
            gate_values = F.linear(normed, tensors[10])
            gate_values = F.silu(gate_values) if self.silu else self.text.layers[layer_index].mlp.act_fn(gate_values)
            states = states + F.linear(gate_values * F.linear(normed, tensors[11]), tensors[12])
            if layer_index in hidden_layers:
                self.hidden[layer_index] = states
        self.n += length
        head: Any = self.head
        if exit_point.norm is not None:
            return F.linear(exit_point.norm(states), head.weight, head.bias)
        return F.linear(self._norm(states, self.text.norm.weight), head.weight, head.bias)

    def flush(self, cache: Any) -> None:
        """Append everything stepped so far to the cache's own layers; the decoder must not be used afterwards."""
        if self.n:
            buffers = zip(self.keys, self.values, self.prompt, strict=True)
            stepped = ((keys, values, slice(start, start + self.n)) for keys, values, start in buffers)
            append(cache, [(keys[None, :, span], values[None, :, span]) for keys, values, span in stepped])
        self.n = 0

    def fork(self) -> FastDecoder:
        """An independent copy at the same place."""
        decoder_copy = object.__new__(FastDecoder)
        decoder_copy.__dict__.update(self.__dict__)
        decoder_copy.keys = [key_buffer.clone() for key_buffer in self.keys]
        decoder_copy.values = [value_buffer.clone() for value_buffer in self.values]
        return decoder_copy


def layer_weights(block: Any) -> tuple[Any, ...]:
    """A decoder layer's parameters in the order a step reads them: weight and bias of norm, q, k, v, out, then norm,
    gate, up, down, and the norms of q and k where there are any."""
    attn, mlp = block.self_attn, block.mlp
    q_norm, k_norm = getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)
    return (
        block.input_layernorm.weight,
        attn.q_proj.weight, attn.q_proj.bias, attn.k_proj.weight, attn.k_proj.bias,
        attn.v_proj.weight, attn.v_proj.bias, attn.o_proj.weight, attn.o_proj.bias,
        block.post_attention_layernorm.weight,
        mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight,
        None if q_norm is None else q_norm.weight, None if k_norm is None else k_norm.weight,
    )  # fmt: skip


def append(cache: Any, columns: list[tuple[Tensor, Tensor]]) -> None:
    """Append stepped keys and values, (B, Hk, n, Dh) per layer, to the layers of a cache."""
    for cache_layer, (keys, values) in zip(cache.layers, columns, strict=False):
        # only our own hooks may add to it
        if isinstance(cache_layer, AnnouncedColumns) and cache_layer.announced is not None:
            cache_layer.announce()
        cache_layer.update(keys, values)


def _roomy(columns: Tensor, extra_columns: int) -> Tensor:
    """The columns (Hk, P, Dh) at the head of a buffer with room for `extra_columns` more."""
    buffer = columns.new_empty(columns.shape[0], columns.shape[1] + extra_columns, columns.shape[2])
    buffer[:, : columns.shape[1]] = columns
    return buffer
