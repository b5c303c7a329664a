"""Small operations of vision towers and decoders, each in one launch on CUDA: the specification, and the choice.

The plain versions round where transformers' modules round. On CUDA in half precision `vlmfast.kernels.triton_vision`
computes the same; everywhere else the plain version runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.kernels.parts import in_parts, parts

HALF = (torch.float16, torch.bfloat16)


def fused(tensor: Tensor) -> bool:
    """Do the fused kernels take this tensor: half precision on CUDA?"""
    return tensor.is_cuda and tensor.dtype in HALF


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """hidden (..., D) over the root of its mean square, rounded, times weight (D,)."""
    if fused(hidden):
        from vlmfast.kernels import triton_vision

        return triton_vision.rms_norm(hidden, weight, eps)
    if in_parts(hidden, hidden.numel()):
        normed = torch.empty(hidden.shape, dtype=torch.promote_types(hidden.dtype, weight.dtype))
        rows, normed_rows = hidden.flatten(0, -2), normed.view(-1, normed.shape[-1])
        for some in parts(len(rows), rows.shape[-1]):
            normed_rows[some] = _rms_norm(rows[some], weight, eps)
        return normed
    return _rms_norm(hidden, weight, eps)


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    float_hidden = hidden.float()
    return weight * (float_hidden * torch.rsqrt(float_hidden.pow(2).mean(-1, keepdim=True) + eps)).to(hidden.dtype)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, (..., I) each; rows may lie apart."""
    if fused(gate):
        from vlmfast.kernels import triton_vision

        return triton_vision.gated(gate, up)
    return F.silu(gate) * up


def gated_over(gate: Tensor, up: Tensor) -> Tensor:
    """`gated` of two tensors that nobody needs any more: on a CPU the result takes the place of `gate`."""
    if gate.device.type != "cpu" or torch.is_grad_enabled():
        return gated(gate, up)
    return F.silu(gate, inplace=True).mul_(up)  # not by parts: an exponential rounds otherwise at the end of a part


def rotated(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys (rotated in float32, together) and values (N, H, D) of qkv (N, 3, H, D); cos, sin (N, D).

    Fused, `qkv` itself is rotated and the results are views of it.
    """
    if fused(qkv):
        from vlmfast.kernels import triton_vision

        triton_vision.rotate(qkv, cos, sin)
        return qkv[:, 0], qkv[:, 1], qkv[:, 2]
    if qkv.device.type == "cpu":
        return _rotated_by_rows(qkv, cos.float()[:, None], sin.float()[:, None])
    queries_keys = qkv[:, :2].float()
    half_size = queries_keys.shape[-1] // 2
    swapped = torch.cat([-queries_keys[..., half_size:], queries_keys[..., :half_size]], -1)
    queries_keys = (queries_keys * cos.float()[:, None, None] + swapped * sin.float()[:, None, None]).to(qkv.dtype)
    return queries_keys[:, 0], queries_keys[:, 1], qkv[:, 2]


def _rotated_by_rows(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`rotated` on a CPU, some rows at a time; cos, sin (N, 1, D) float32."""
    turned, half_size = qkv.new_empty(2, len(qkv), *qkv.shape[2:]), qkv.shape[-1] // 2
    for some in parts(len(qkv), qkv[:1, 0].numel()):
        for part in (0, 1):
            numbers = qkv[some, part].float()
            products = numbers * cos[some]
            products[..., :half_size] -= numbers[..., half_size:] * sin[some, :, :half_size]
            products[..., half_size:] += numbers[..., :half_size] * sin[some, :, half_size:]
            turned[part, some] = products
    return turned[0], turned[1], qkv[:, 2]


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
