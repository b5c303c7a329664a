"""Small operations of vision towers and decoders, each in one launch on CUDA: the specification, and the choice.

The plain versions round where transformers' modules round. On CUDA in half precision `vlmfast.kernels.triton_vision`
computes the same; everywhere else the plain version runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def fused(x: Tensor) -> bool:
    """Do the fused kernels take this tensor: half precision on CUDA?"""
    return x.is_cuda and x.dtype in HALF


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D) over the root of its mean square, rounded, times weight (D,)."""
    if fused(x):
        from vlmfast.kernels import triton_vision

        return triton_vision.rms_norm(x, weight, eps)
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, (..., I) each; rows may lie apart."""
    if fused(gate):
        from vlmfast.kernels import triton_vision

        return triton_vision.gated(gate, up)
    return F.silu(gate) * up


def rotated(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys (rotated in float32, together) and values (N, H, D) of qkv (N, 3, H, D); cos, sin (N, D).

    Fused, `qkv` itself is rotated and the results are views of it.
    """
    if fused(qkv):
        from vlmfast.kernels import triton_vision

        triton_vision.rotate(qkv, cos, sin)
        return qkv[:, 0], qkv[:, 1], qkv[:, 2]
    both = qkv[:, :2].float()
    half = both.shape[-1] // 2
    turned = torch.cat([-both[..., half:], both[..., :half]], -1)
    both = (both * cos.float()[:, None, None] + turned * sin.float()[:, None, None]).to(qkv.dtype)
    return both[:, 0], both[:, 1], qkv[:, 2]


def rotated_text(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (B, L, H, D) and keys (B, L, Hk, D) of a decoder, rotated in their own dtype; cos, sin (B or 1, L, D).

    Fused, q and k themselves are rotated.
    """
    if fused(q):
        from vlmfast.kernels import triton_vision

        triton_vision.rotate_text(q, k, cos, sin)
        return q, k
    half, c, s = q.shape[-1] // 2, cos[:, :, None], sin[:, :, None]
    turned = (torch.cat([-x[..., half:], x[..., :half]], -1) for x in (q, k))
    return tuple(x * c + y * s for x, y in zip((q, k), turned, strict=True))  # type: ignore[return-value]


def ragged_pieces(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float) -> Tensor:
    """Attention inside each piece of a packed sequence, CUDA in half precision only (`has_ragged_pieces`).

    q, k, v (N, H, D); bounds (pieces + 1,) int32 on the device, where pieces begin; longest: an upper bound of their
    lengths. Returns (N, H, D).
    """
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v.contiguous(), bounds, bounds, longest, longest, scale=scale)  # type: ignore[return-value]


def has_ragged_pieces(x: Tensor) -> bool:
    """Can `ragged_pieces` run on tensors like x (N, H, D)?"""
    if not fused(x) or x.shape[-1] % 8 or x.shape[-1] > 256 or torch.cuda.get_device_capability(x.device)[0] < 8:
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401  (torch 2.10 brought it)
    except ImportError:
        return False
    return True
