"""Triton versions of `vlmfast.kernels.vision`: bandwidth-bound, one launch each, no shape in the compiled code but D.

Products and sums are not fused (`enable_fp_fusion=False`), so that every rounding is the one that transformers makes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm(x_ptr, weight_ptr, out_ptr, eps, D: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program a row."""
    columns = tl.arange(0, BLOCK)
    offsets = tl.program_id(0).to(tl.int64) * D + columns
    values = tl.load(x_ptr + offsets, mask=columns < D, other=0.0).to(tl.float32)
    values = (values * tl.rsqrt(tl.sum(values * values, 0) / D + eps)).to(out_ptr.dtype.element_ty).to(tl.float32)
    weights = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, values * weights, mask=columns < D)


@triton.jit
def _gated(gate_ptr, up_ptr, out_ptr, gate_row, up_row, WIDTH, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program a (row, BLOCK columns)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + row * gate_row + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    gate = tl.div_rn(gate, 1.0 + tl.exp(-gate)).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + columns, gate * up, mask=columns < WIDTH)


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    qkv_ptr, cos_ptr, sin_ptr, row_stride, HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program a row: its first HEADS heads (queries, then keys), in two halves."""
    half: tl.constexpr = D // 2
    row = tl.program_id(0).to(tl.int64)
    head, columns = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    in_range = (head < HEADS) & (columns < half)
    pointers = qkv_ptr + row * row_stride + head * D + columns
    table_cells = row * D + columns
    first = tl.load(pointers, mask=in_range, other=0.0).to(tl.float32)
    second = tl.load(pointers + half, mask=in_range, other=0.0).to(tl.float32)
    first_cos = tl.load(cos_ptr + table_cells, mask=columns < half, other=0.0).to(tl.float32)
    first_sin = tl.load(sin_ptr + table_cells, mask=columns < half, other=0.0).to(tl.float32)
    second_cos = tl.load(cos_ptr + table_cells + half, mask=columns < half, other=0.0).to(tl.float32)
    second_sin = tl.load(sin_ptr + table_cells + half, mask=columns < half, other=0.0).to(tl.float32)
    tl.store(pointers, first * first_cos - second * first_sin, mask=in_range)
    tl.store(pointers + half, second * second_cos + first * second_sin, mask=in_range)


@triton.jit
def _rotate_heads(  # type: ignore[no-untyped-def]
    x_ptr, first_cos, first_sin, second_cos, second_sin, HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The heads of one row, in two halves; products and sums rounded as those of tensors of the dtype are."""
    half: tl.constexpr = D // 2
    dtype = x_ptr.dtype.element_ty
    head, columns = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    in_range = (head < HEADS) & (columns < half)
    pointers = x_ptr + head * D + columns
    first_half = tl.load(pointers, mask=in_range, other=0.0).to(tl.float32)
    second_half = tl.load(pointers + half, mask=in_range, other=0.0).to(tl.float32)
    kept_first, turned_first = (first_half * first_cos).to(dtype), (second_half * first_sin).to(dtype)
    kept_second, turned_second = (second_half * second_cos).to(dtype), (first_half * second_sin).to(dtype)
    tl.store(pointers, kept_first.to(tl.float32) - turned_first.to(tl.float32), mask=in_range)
    tl.store(pointers + half, kept_second.to(tl.float32) + turned_second.to(tl.float32), mask=in_range)


@triton.jit(do_not_specialize=["LENGTH"])
def _rotate_text(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, cos_ptr, sin_ptr, LENGTH, SHARED: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program a token: its queries and keys."""
    half: tl.constexpr = D // 2
    row = tl.program_id(0).to(tl.int64)
    table_row = row
    if SHARED:
        table_row = row % LENGTH
    columns = tl.arange(0, BLOCK_D)[None, :]
    offsets = table_row * D + columns
    first_cos = tl.load(cos_ptr + offsets, mask=columns < half, other=0.0).to(tl.float32)
    first_sin = tl.load(sin_ptr + offsets, mask=columns < half, other=0.0).to(tl.float32)
    second_cos = tl.load(cos_ptr + offsets + half, mask=columns < half, other=0.0).to(tl.float32)
    second_sin = tl.load(sin_ptr + offsets + half, mask=columns < half, other=0.0).to(tl.float32)
    _rotate_heads(q_ptr + row * HEADS * D, first_cos, first_sin, second_cos, second_sin, HEADS, D, BLOCK_H, BLOCK_D)
    _rotate_heads(
        k_ptr + row * KV_HEADS * D, first_cos, first_sin, second_cos, second_sin, KV_HEADS, D, BLOCK_K, BLOCK_D
    )


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `vision.rms_norm`."""
    hidden = hidden.contiguous()
    width = hidden.shape[-1]
    normed = torch.empty_like(hidden)
    _rms_norm[(hidden.numel() // width,)](
        hidden, weight, normed, eps, D=width, BLOCK=triton.next_power_of_2(width), num_warps=4 if width <= 2048 else 8,
        enable_fp_fusion=False,
    )  # fmt: skip
    return normed


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """See `vision.gated`."""
    width = gate.shape[-1]
    flat_gate, flat_up = gate.reshape(-1, width), up.reshape(-1, width)
    output = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _gated[(len(flat_gate), triton.cdiv(width, 1024))](
        flat_gate, flat_up, output, flat_gate.stride(0), flat_up.stride(0), width, BLOCK=1024, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return output


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate queries and keys of qkv (N, 3, H, D) in place; see `vision.rotated`."""
    num_rows, _, num_heads, head_size = qkv.shape
    assert qkv.is_contiguous()
    _rotate[(num_rows,)](
        qkv, cos.contiguous(), sin.contiguous(), qkv.stride(0), HEADS=2 * num_heads, D=head_size,
        BLOCK_H=triton.next_power_of_2(2 * num_heads), BLOCK_D=triton.next_power_of_2(head_size // 2), num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip


def rotate_text(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate q (B, L, H, D) and k (B, L, Hk, D) in place; see `vision.rotated_text`."""
    batch, length, num_heads, head_size = q.shape
    assert q.is_contiguous() and k.is_contiguous()
    next_power = triton.next_power_of_2
    _rotate_text[(batch * length,)](
        q, k, cos.contiguous(), sin.contiguous(), length, SHARED=cos.shape[0] == 1, HEADS=num_heads,
        KV_HEADS=k.shape[2], D=head_size, BLOCK_H=next_power(num_heads), BLOCK_K=next_power(k.shape[2]),
        BLOCK_D=next_power(head_size // 2), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
