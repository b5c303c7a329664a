"""How a block's keys and values are kept: as they are, bf16, or int8 with scales (a quarter of fp32, half of bf16)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FORMATS = ("int8", "bf16", "model")


@dataclass
class Packed:
    """keys, values (L, Hk, n, Dh) as stored; scales float16, broadcastable, or None; rep (L, Hk, Dh) float16."""

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None
    rep: Tensor
    embedding: Tensor | None = None

    def nbytes(self) -> int:
        """Bytes of keys, values and scales (the representative is counted where it is kept)."""
        held = (self.keys, self.values, self.key_scale, self.value_scale)
        return sum(x.numel() * x.element_size() for x in held if x is not None)

    def tensors(self) -> dict[str, Tensor]:
        """By their names in a segment file."""
        named = {
            "k": self.keys, "v": self.values, "ks": self.key_scale, "vs": self.value_scale,
            "rep": self.rep, "emb": self.embedding,
        }  # fmt: skip
        return {name: x.contiguous() for name, x in named.items() if x is not None}


def pack(keys: Tensor, values: Tensor, rep: Tensor, fmt: str, embedding: Tensor | None = None) -> Packed:
    """keys, values (L, Hk, n, Dh), rep (L, Hk, Dh): to CPU (pinned, if they come from a GPU) in a format of `FORMATS`.

    int8: symmetric, one scale per channel or per token of every (layer, head), whichever needs fewer of them. Keys are
    quantised as their difference to the block's representative, so that large constant channels (key biases, KIVI
    arXiv 2402.02750) cost no precision under either.
    """
    pinned = keys.is_cuda
    rep = rep.half().cpu()
    small = None if embedding is None else embedding.half().cpu()
    if fmt == "int8":
        k, ks = _int8(keys.float().cpu() - rep[:, :, None].float())
        v, vs = _int8(values.float().cpu())
        if pinned:
            k, v, ks, vs = (x.pin_memory() for x in (k, v, ks, vs))
        return Packed(k, v, ks, vs, rep, small)
    dtype = torch.bfloat16 if fmt == "bf16" else keys.dtype
    k, v = _own(keys, dtype), _own(values, dtype)
    return Packed(k.pin_memory() if pinned else k, v.pin_memory() if pinned else v, None, None, rep, small)


def _own(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to("cpu", dtype, copy=True).contiguous()


def _int8(x: Tensor) -> tuple[Tensor, Tensor]:
    axis = 2 if x.shape[2] > x.shape[3] else 3
    scale = (x.abs().amax(axis, keepdim=True) / 127).clamp(min=1e-8, max=6e4).half().clamp(min=6e-8)
    return (x / scale.float()).round_().clamp_(-127, 127).to(torch.int8), scale


def unpack(
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    rep: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """One layer's keys and values (Hk, n, Dh) in `dtype`; scales and rep (Hk, Dh) of that layer."""
    if key_scale is None or value_scale is None:
        return keys.to(dtype), values.to(dtype)
    k = torch.addcmul(rep[:, None].float(), keys.float(), key_scale.float())
    return k.to(dtype), (values.float() * value_scale.float()).to(dtype)
