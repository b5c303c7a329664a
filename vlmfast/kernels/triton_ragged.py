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
    b, h, q, d = query.shape
    return (
        kv.bias is None
        and q <= MAX_QUERIES
        and b * h // kv.total * q <= (128 if d <= 128 else 64)
        and d <= 256
        and query.dtype != torch.float64
    )


def tile(head: int, queries: int) -> dict[str, int]:
    """Block sizes of `_split` that fit 99 KiB of shared memory and 255 registers, the least of sm_80 to sm_120."""
    block_d, block_m = (max(16, triton.next_power_of_2(n)) for n in (head, queries))
    columns = 64 if block_d * block_m <= 8192 else 32
    if block_d > 128:
        columns = 32 if block_d * block_m <= 8192 else 16
    return {"BLOCK_D": block_d, "BLOCK_M": block_m, "BLOCK_N": columns, "num_stages": 2,
            "num_warps": 8 if block_d * block_m > 4096 else 4}  # fmt: skip


def ragged_attention(query: Tensor, kv: Ragged, scaling: float, out: Tensor, splits: int | None = None) -> Tensor:
    """See `reference.ragged_attention`. `splits` of the sequence per row; default fills about two waves of programs."""
    b, h, q, d = query.shape
    dv, group = out.shape[-1], b * h // kv.total
    m, entries = group * q, len(kv)
    longest = max(kv.lengths)
    if splits is None:
        wanted = 264 // entries
        splits = max(1, min(wanted, triton.cdiv(longest, 256), 64))
    device = query.device
    index = torch.tensor([kv.rows, kv.offsets, kv.lengths], dtype=torch.int64).to(device, non_blocking=True)
    rows, offsets, lengths = index.unbind(0)
    flat = query.reshape(kv.total * m, d).contiguous()
    acc = torch.empty(entries, splits, m, dv, dtype=torch.float32, device=device)
    top = torch.empty(entries, splits, m, dtype=torch.float32, device=device)
    total = torch.empty_like(top)
    scales = (kv.key_scale, kv.value_scale) if kv.key_scale is not None else (flat, flat)
    block = triton.next_power_of_2
    sizes = tile(max(d, dv), m) | {"BLOCK_D": max(16, block(d))}
    _split[(entries, splits)](
        flat, kv.keys, kv.values, *scales, rows, offsets, lengths, acc, top, total, scaling, q, m, splits,
        D=d, DV=dv, BLOCK_DV=max(16, block(dv)), INT8=kv.key_scale is not None, **sizes,
    )  # fmt: skip
    _combine[(entries, m)](
        acc, top, total, rows, out, m, splits, DV=dv, BLOCK_DV=max(16, block(dv)), BLOCK_S=block(splits), num_warps=8
    )
    return out
