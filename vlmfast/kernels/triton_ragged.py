"""Flash-decoding over ragged rows on CUDA: the sequence of every row is split, partial results are combined.

One program per (row, split) reads its share of the row once for all grouped queries (G * q <= 128, q <= 16), keeping a
running maximum and sum; a second kernel merges the splits. Specification: `reference.ragged_attention`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfast.kernels.reference import Ragged

MAX_QUERIES = 16


@triton.jit
def _split(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, ks_ptr, vs_ptr, rows_ptr, offsets_ptr, lengths_ptr, acc_ptr, max_ptr, sum_ptr,
    scaling, Q, M, SPLITS,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.load(rows_ptr + entry)
    start = tl.load(offsets_ptr + entry)
    n = tl.load(lengths_ptr + entry)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    q = tl.load(q_ptr + (row * M + m[:, None]) * D + d[None, :], mask=(m[:, None] < M) & (d[None, :] < D), other=0.0)
    last = n - Q + m % Q  # last column each query sees
    share = tl.cdiv(tl.cdiv(n, SPLITS), BLOCK_N) * BLOCK_N
    low = split * share
    high = tl.minimum(low + share, n)
    top = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for at in range(low, high, BLOCK_N):
        c = at + tl.arange(0, BLOCK_N)
        inside = c < high
        slot = (start + c).to(tl.int64)
        k = tl.load(k_ptr + slot[None, :] * D + d[:, None], mask=inside[None, :] & (d[:, None] < D), other=0.0)
        if INT8:
            s = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scaling
            s = s * tl.load(ks_ptr + slot, mask=inside, other=0.0)[None, :]
        else:
            s = tl.dot(q, k, input_precision="ieee") * scaling
        seen = inside[None, :] & (c[None, :] <= last[:, None])
        s = tl.where(seen, s, -1.0e30)
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.where(seen, tl.exp(s - new_top[:, None]), 0.0)
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = tl.load(v_ptr + slot[:, None] * DV + dv[None, :], mask=inside[:, None] & (dv[None, :] < DV), other=0.0)
        if INT8:
            p = p * tl.load(vs_ptr + slot, mask=inside, other=0.0)[None, :]
        acc += tl.dot(p.to(q.dtype), v.to(q.dtype), input_precision="ieee")
        top = new_top
    out = (entry * SPLITS + split) * M + m
    tl.store(max_ptr + out, top, mask=m < M)
    tl.store(sum_ptr + out, total, mask=m < M)
    tl.store(acc_ptr + out[:, None] * DV + dv[None, :], acc, mask=(m[:, None] < M) & (dv[None, :] < DV))


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    acc_ptr, max_ptr, sum_ptr, rows_ptr, o_ptr, M, SPLITS,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0)
    m = tl.program_id(1)
    row = tl.load(rows_ptr + entry)
    s = tl.arange(0, BLOCK_S)
    dv = tl.arange(0, BLOCK_DV)
    at = (entry * SPLITS + s) * M + m
    top = tl.load(max_ptr + at, mask=s < SPLITS, other=-1.0e30)
    weight = tl.exp(top - tl.max(top, 0))
    total = tl.sum(tl.load(sum_ptr + at, mask=s < SPLITS, other=0.0) * weight, 0)
    acc = tl.load(acc_ptr + at[:, None] * DV + dv[None, :], mask=(s[:, None] < SPLITS) & (dv[None, :] < DV), other=0.0)
    out = tl.sum(acc * weight[:, None], 0) / total
    tl.store(o_ptr + (row * M + m) * DV + dv, out.to(o_ptr.dtype.element_ty), mask=dv < DV)


def supports(query: Tensor, kv: Ragged) -> bool:
    """True where the kernel takes it: up to 16 query tokens, 128 grouped queries (64 of heads above 128), heads up to
    256, no bias."""
    batch, num_heads, num_queries, head_size = query.shape
    return (
        kv.bias is None
        and num_queries <= MAX_QUERIES
        and batch * num_heads // kv.total * num_queries <= (128 if head_size <= 128 else 64)
        and head_size <= 256
        and query.dtype != torch.float64
    )


def tile(head: int, queries: int) -> dict[str, int]:
    """Block sizes of `_split` that fit 99 KiB of shared memory and 255 registers, the least of sm_80 to sm_120."""
    block_d, block_m = (max(16, triton.next_power_of_2(size)) for size in (head, queries))
    block_n = 64 if block_d * block_m <= 8192 else 32
    if block_d > 128:
        block_n = 32 if block_d * block_m <= 8192 else 16
    return {"BLOCK_D": block_d, "BLOCK_M": block_m, "BLOCK_N": block_n, "num_stages": 2,
            "num_warps": 8 if block_d * block_m > 4096 else 4}  # fmt: skip


def ragged_attention(query: Tensor, kv: Ragged, scaling: float, out: Tensor, splits: int | None = None) -> Tensor:
    """See `reference.ragged_attention`. `splits` of the sequence per row; default fills about two waves of programs."""
    batch, num_heads, num_queries, head_size = query.shape
    value_size, group_size = out.shape[-1], batch * num_heads // kv.total
    num_grouped, num_entries = group_size * num_queries, len(kv)
    longest = max(kv.lengths)
    if splits is None:
        splits_wanted = 264 // num_entries
        splits = max(1, min(splits_wanted, triton.cdiv(longest, 256), 64))
    device = query.device
    index = torch.tensor([kv.rows, kv.offsets, kv.lengths], dtype=torch.int64).to(device, non_blocking=True)
    rows, offsets, lengths = index.unbind(0)
    packed_queries = query.reshape(kv.total * num_grouped, head_size).contiguous()
    partials = torch.empty(num_entries, splits, num_grouped, value_size, dtype=torch.float32, device=device)
    maxima = torch.empty(num_entries, splits, num_grouped, dtype=torch.float32, device=device)
    totals = torch.empty_like(maxima)
    scales = (kv.key_scale, kv.value_scale) if kv.key_scale is not None else (packed_queries, packed_queries)
    next_power = triton.next_power_of_2
    value_block = max(16, next_power(value_size))
    block_sizes = tile(max(head_size, value_size), num_grouped) | {"BLOCK_D": max(16, next_power(head_size))}
    _split[(num_entries, splits)](
        packed_queries, kv.keys, kv.values, *scales, rows, offsets, lengths, partials, maxima, totals, scaling,
        num_queries, num_grouped, splits, D=head_size, DV=value_size, BLOCK_DV=value_block,
        INT8=kv.key_scale is not None, **block_sizes,
    )  # fmt: skip
    _combine[(num_entries, num_grouped)](
        partials, maxima, totals, rows, out, num_grouped, splits, DV=value_size, BLOCK_DV=value_block,
        BLOCK_S=next_power(splits), num_warps=8,
    )  # fmt: skip
    return out
