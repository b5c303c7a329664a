"""A decoder step that costs its weights and not its Python: functional, KV in place, one row.

A step of a few tokens through transformers spends as long in Python as in arithmetic on small models. `FastDecoder`
reads the model's parameters and runs the same arithmetic with a third of the operations: no modules, no masks built,
rotation of queries and keys together from a table of cos/sin, keys and values written in place, grouped queries packed.
It only takes decoders it knows (`why_not` says why it does not), and its first use on a model is checked against the
model itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from vlmfast.runtime.pruned_layer import AnnouncedColumns, PrunedLayer
from vlmfast.runtime.rewind import fixed_rotation

LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_emb"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
TABLE = 128  # positions rotated at once


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
    for layer in layers:
        if type(layer) not in (DynamicLayer, PrunedLayer) or layer.keys.shape[0] != rows:
            return f"cache layers of type {type(layer).__name__} are not dense rows"
    return None


def unknown_decoder(text: Any, head: Any) -> str | None:
    """`why_not`, of the decoder alone, whatever its cache."""
    config = text.config
    if text.training:
        return "the model is in training mode"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"attention {config._attn_implementation!r} is not torch's own"
    if not fixed_rotation(text):
        return "the rotation depends on the sequence length"
    if type(head) is not nn.Linear or _foreign(head) or _foreign(text.rotary_emb) or _foreign(text.norm):
        return "the output head, norm or rotation is wrapped or hooked"
    for block in text.layers:
        if _children(block) != LAYER or not (_children(block.self_attn) <= ATTENTION and _children(block.mlp) <= MLP):
            return f"{type(block).__name__} is not a decoder layer known here"
        attention, mlp = block.self_attn, block.mlp
        if getattr(attention, "sliding_window", None):
            return "sliding-window attention"
        for module in block.modules():
            if _foreign(module):
                return f"a hook or wrapper sits on a {type(module).__name__}"
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        if any(type(m) is not nn.Linear for m in (*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
            return "projections are not plain linear layers (adapter or quantised)"
        if any(m.bias is not None for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
            return "the MLP has biases"
    return None


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _foreign(module: nn.Module) -> bool:
    """True when somebody else's hook or forward sits on the module (our hooks act at prefill only, our forwards compute
    the same)."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    replaced = vars(module).get("forward")
    changes = [*hooks] if replaced is None else [*hooks, getattr(replaced, "func", replaced)]
    return not all(str(getattr(c, "__module__", "")).startswith("vlmfast.runtime.") for c in changes)


class SteppingDecoder:
    """What a `Stepper` asks of a decoder that steps without the model's modules: `FastDecoder`, `engine.Static`."""

    name: str
    n: int  # tokens stepped after the prefill
    hidden: Tensor | None  # (n, D) of the layer asked for, in the last step

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
        self.scales = [float(b.self_attn.scaling) for b in text.layers]
        self.weights = [layer_weights(b) for b in text.layers]
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.prompt: list[int] = []  # columns per layer that the prefill left
        for layer in cache.layers[: len(self.weights)]:
            k, v = layer.keys[0], layer.values[0]
            if valid is not None:
                k, v = k[:, valid], v[:, valid]
            self.prompt.append(k.shape[1])
            self.keys.append(_roomy(k, room))
            self.values.append(_roomy(v, room))
            if valid is None:  # the prompt is held once
                layer.keys, layer.values = (b[-1][None, :, : k.shape[1]] for b in (self.keys, self.values))
        self.n = 0  # tokens stepped after the prefill
        self.start = position if position.shape[0] != 4 or position.ndim == 2 else position[1:]
        self.cos = self.sin = torch.empty(0)
        self.hidden: Tensor | None = None

    def _rotation(self, n: int) -> tuple[Tensor, Tensor]:
        """cos and signed sin of the next n positions, (n, 1, Dh) each."""
        if self.n + n > self.cos.shape[0]:
            size = (self.n + n + TABLE - 1) // TABLE * TABLE
            steps = torch.arange(size, device=self.start.device)
            cos, sin = self.text.rotary_emb(self.keys[0], self.start + steps)
            half = self.dh // 2
            self.cos = cos[0][:, None]
            self.sin = torch.cat([-sin[0][:, :half], sin[0][:, half:]], -1)[:, None]
        return self.cos[self.n : self.n + n], self.sin[self.n : self.n + n]

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, (x.shape[-1],), weight, self.eps)
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def step(self, tokens: Tensor, hidden_layer: int | None = None) -> Tensor:
        """tokens (n,) int64 -> logits (n, V) in the model's dtype; `.hidden` is then that layer's output (n, D)."""
        n, h, hk, dh = tokens.shape[0], self.h, self.hk, self.dh
        x = F.embedding(tokens, self.text.embed_tokens.weight)
        cos, sin = self._rotation(n)
        tri: Tensor | None = None
        if n > 1:
            tri = torch.full((n, n), float("-inf"), dtype=x.dtype, device=x.device).triu_(1)
        masks: dict[int, Tensor] = {}
        for i, w in enumerate(self.weights):
            y = self._norm(x, w[0])
            q, k = F.linear(y, w[1], w[2]), F.linear(y, w[3], w[4])
            v = F.linear(y, w[5], w[6]).view(n, hk, dh)
            if w[13] is not None:
                q = self._norm(q.view(n, h, dh), w[13]).view(n, h * dh)
                k = self._norm(k.view(n, hk, dh), w[14]).view(n, hk * dh)
            qk = torch.cat([q, k], 1).view(n, h + hk, dh)
            qk = torch.addcmul(qk * cos, torch.roll(qk, dh // 2, -1), sin)
            begin = self.prompt[i] + self.n
            end = begin + n
            if end > self.keys[i].shape[1]:
                self.keys[i] = _roomy(self.keys[i], end - begin + 256)
                self.values[i] = _roomy(self.values[i], end - begin + 256)
            keys, values = self.keys[i][:, :end], self.values[i][:, :end]
            keys[:, begin:] = qk[:, h:].transpose(0, 1)
            values[:, begin:] = v.transpose(0, 1)
            if tri is None:
                packed = qk[0, :h].view(1, hk, h // hk, dh)
                out = F.scaled_dot_product_attention(packed, keys[None], values[None], scale=self.scales[i])
                out = out.reshape(1, h * dh)  # kernels lay results out as they like
            else:
                if end not in masks:
                    masks[end] = torch.cat([tri.new_zeros(n, begin), tri], 1).repeat(h // hk, 1)
                packed = qk[:, :h].view(n, hk, h // hk, dh).permute(1, 2, 0, 3).reshape(1, hk, -1, dh)
                out = F.scaled_dot_product_attention(
                    packed, keys[None], values[None], attn_mask=masks[end], scale=self.scales[i]
                )
                out = out.reshape(hk, h // hk, n, dh).permute(2, 0, 1, 3).reshape(n, h * dh)
            x = x + F.linear(out, w[7], w[8])
            y = self._norm(x, w[9])
            gate = F.linear(y, w[10])
            gate = F.silu(gate) if self.silu else self.text.layers[i].mlp.act_fn(gate)
            x = x + F.linear(gate * F.linear(y, w[11]), w[12])
            if i == hidden_layer:
                self.hidden = x
        self.n += n
        head: Any = self.head
        return F.linear(self._norm(x, self.text.norm.weight), head.weight, head.bias)

    def flush(self, cache: Any) -> None:
        """Append everything stepped so far to the cache's own layers; the decoder is spent afterwards."""
        if self.n:
            held = zip(self.keys, self.values, self.prompt, strict=True)
            append(cache, [(k[None, :, p : p + self.n], v[None, :, p : p + self.n]) for k, v, p in held])
        self.n = 0

    def fork(self) -> FastDecoder:
        """An independent copy at the same place."""
        twin = object.__new__(FastDecoder)
        twin.__dict__.update(self.__dict__)
        twin.keys, twin.values = [k.clone() for k in self.keys], [v.clone() for v in self.values]
        return twin


def layer_weights(block: Any) -> tuple[Any, ...]:
    """A decoder layer's parameters in the order a step reads them: weight and bias of norm, q, k, v, out, then norm,
    gate, up, down, and the norms of q and k where there are any."""
    a, m = block.self_attn, block.mlp
    q_norm, k_norm = getattr(a, "q_norm", None), getattr(a, "k_norm", None)
    return (
        block.input_layernorm.weight,
        a.q_proj.weight, a.q_proj.bias, a.k_proj.weight, a.k_proj.bias, a.v_proj.weight, a.v_proj.bias,
        a.o_proj.weight, a.o_proj.bias,
        block.post_attention_layernorm.weight,
        m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight,
        None if q_norm is None else q_norm.weight, None if k_norm is None else k_norm.weight,
    )  # fmt: skip


def append(cache: Any, columns: list[tuple[Tensor, Tensor]]) -> None:
    """Append stepped keys and values, (B, Hk, n, Dh) per layer, to the layers of a cache."""
    for layer, (keys, values) in zip(cache.layers, columns, strict=False):
        if isinstance(layer, AnnouncedColumns) and layer.announced is not None:  # only our own hooks may add to it
            layer.announce()
        layer.update(keys, values)


def _roomy(x: Tensor, least: int) -> Tensor:
    """The columns of x (Hk, P, Dh) at the head of a buffer with room for at least `least` more."""
    buffer = x.new_empty(x.shape[0], x.shape[1] + least, x.shape[2])
    buffer[:, : x.shape[1]] = x
    return buffer
