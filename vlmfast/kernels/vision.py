"""Small operations of vision towers and decoders, each in one launch on CUDA: the specification, and the choice.

The plain versions round where transformers' modules round. On CUDA in half precision `vlmfast.kernels.triton_vision`
computes the same; everywhere else the plain version runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def fused(tensor: Tensor) -> bool:
    """Do the fused kernels take this tensor: half precision on CUDA?"""
    return tensor.is_cuda and tensor.dtype in HALF


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """hidden (..., D) over the root of its mean square, rounded, times weight (D,)."""
    if fused(hidden):
        from vlmfast.kernels import triton_vision

        return triton_vision.rms_norm(hidden, weight, eps)
    float_hidden = hidden.float()
    return weight * (float_hidden * torch.rsqrt(float_hidden.pow(2).mean(-1, keepdim=True) + eps)).to(hidden.dtype)


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
    queries_keys = qkv[:, :2].float()
    half_size = queries_keys.shape[-1] // 2
    swapped = torch.cat([-queries_keys[..., half_size:], queries_keys[..., :half_size]], -1)
    queries_keys = (queries_keys * cos.float()[:, None, None] + swapped * sin.float()[:, None, None]).to(qkv.dtype)
    return queries_keys[:, 0], queries_keys[:, 1], qkv[:, 2]


def rotated_text(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (B, L, H, D) and keys (B, L, Hk, D) of a decoder, rotated in their own dtype; cos, sin (B or 1, L, D).

    Fused, q and k themselves are rotated.
    """
    if fused(q):
        from vlmfast.kernels import triton_vision

        triton_vision.rotate_text(q, k, cos, sin)
        return q, k
    half_size, head_cos, head_sin = q.shape[-1] // 2, cos[:, :, None], sin[:, :, None]
    swapped_halves = (torch.cat([-heads[..., half_size:], heads[..., :half_size]], -1) for heads in (q, k))
    pairs = zip((q, k), swapped_halves, strict=True)
    return tuple(heads * head_cos + swapped * head_sin for heads, swapped in pairs)  # type: ignore[return-value]


def ragged_pieces(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float) -> Tensor:
    """Attention inside each piece of a packed sequence, CUDA in half precision only (`has_ragged_pieces`).

    q, k, v (N, H, D); bounds (pieces + 1,) int32 on the device, where pieces begin; longest: an upper bound of their
    lengths. Returns (N, H, D).
    """
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v.contiguous(), bounds, bounds, longest, longest, scale=scale)  # type: ignore[return-value]


def has_ragged_pieces(tensor: Tensor) -> bool:
    """Can `ragged_pieces` run on tensors like this one (N, H, D)?"""
    size = tensor.shape[-1]
    if not fused(tensor) or size % 8 or size > 256 or torch.cuda.get_device_capability(tensor.device)[0] < 8:
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401  (torch 2.10 brought it)
    except ImportError:
        return False
    return True
