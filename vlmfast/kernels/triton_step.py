"""The parts of a decoder step of static shape on CUDA, 1, 1, 2 and 1 launches. Specification: `step_reference`.

Grids and shapes depend on sizes alone, never on data: a CUDA graph may hold them. Numbers of tokens and of splits are
ordinary arguments that nothing is specialised for, so that a model compiles each kernel once, or once per block size.
Past the capacity nothing is written: the host must see to it that there is room.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

QUERIES = 64  # grouped queries that one program of the attention holds at most


@triton.jit
def _round(x, like):  # type: ignore[no-untyped-def]
    """float32 as the dtype behind the pointer would hold it."""
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _halves(ptr, half, inside):  # type: ignore[no-untyped-def]
    first = tl.load(ptr, mask=inside, other=0.0).to(tl.float32)
    return first, tl.load(ptr + half, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _add_norm(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, w_ptr, sum_ptr, out_ptr, eps, D: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr
):
    """One program a token: sum = x + y, out = rms_norm(sum) * w."""
    i = tl.arange(0, BLOCK)
    inside = i < D
    at = tl.program_id(0).to(tl.int64) * D + i
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x = _round(x + tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32), out_ptr)
        tl.store(sum_ptr + at, x, mask=inside)
    x = _round(x * tl.rsqrt(tl.sum(x * x, 0) / D + eps), out_ptr)
    tl.store(out_ptr + at, x * tl.load(w_ptr + i, mask=inside, other=0.0).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["N", "TABLE"])
def _rope(  # type: ignore[no-untyped-def]
    qkv_ptr, q_ptr, k_ptr, v_ptr, length_ptr, at_ptr, cos_ptr, sin_ptr, qn_ptr, kn_ptr, eps, CAPACITY, TABLE, N,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One program a (token, head of q, k or v), in two halves: normed, rotated; q to its buffer, k, v to the cache."""
    token, head = tl.program_id(0), tl.program_id(1)
    row, j = token // N, token % N
    half: tl.constexpr = D // 2
    i = tl.arange(0, BLOCK)
    inside = i < half
    a, b = _halves(qkv_ptr + (token * (H + 2 * HK) + head).to(tl.int64) * D + i, half, inside)
    if head < H + HK:
        if NORM:
            w_ptr = qn_ptr
            if head >= H:
                w_ptr = kn_ptr
            wa, wb = _halves(w_ptr + i, half, inside)
            scale = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / D + eps)
            a, b = _round(_round(a * scale, q_ptr) * wa, q_ptr), _round(_round(b * scale, q_ptr) * wb, q_ptr)
        where = (row * TABLE + tl.minimum(tl.load(at_ptr + row) + j, TABLE - 1)) * D + i
        ca, cb = _halves(cos_ptr + where, half, inside)
        sa, sb = _halves(sin_ptr + where, half, inside)  # the table holds -sin in its first half
        a, b = _round(a * ca, q_ptr) + _round(b * sa, q_ptr), _round(b * cb, q_ptr) + _round(a * sb, q_ptr)
    to = q_ptr + (token * H + head) * D
    if head >= H:
        place = tl.load(length_ptr + row * HK + (head - H) % HK) + j
        inside = inside & (place < CAPACITY)
        cell = ((row * HK + (head - H) % HK).to(tl.int64) * CAPACITY + place) * D
        to = k_ptr + cell
        if head >= H + HK:
            to = v_ptr + cell
    tl.store(to + i, a, mask=inside)
    tl.store(to + half + i, b, mask=inside)


@triton.jit(do_not_specialize=["SPLITS", "N"])
def _split(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, length_ptr, acc_ptr, top_ptr, sum_ptr, scale, CAPACITY, SPLITS, N,
    G: tl.constexpr, HK: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program a ((row, kv head), split, BLOCK_M of the N * G queries): its columns for those queries."""
    pair, split = tl.program_id(0), tl.program_id(1)
    row, head = pair // HK, pair % HK
    held = tl.load(length_ptr + pair).to(tl.int32)
    end = tl.minimum(held + N, CAPACITY)
    share = tl.cdiv(tl.cdiv(end, SPLITS), 16) * 16
    low = split * share
    high = tl.minimum(low + share, end)  # low >= high: nothing is read, the partial says sum 0 and `acc` is left alone
    m, d = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    here = (m[:, None] < N * G) & (d[None, :] < D) & (low < high)
    query = (row * N + m // G) * (HK * G) + head * G + m % G
    q = tl.load(q_ptr + query[:, None] * D + d[None, :], mask=here, other=0.0)
    base = pair.to(tl.int64) * CAPACITY * D
    top = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for at in range(low, high, BLOCK_N):
        c = at + tl.arange(0, BLOCK_N)
        k = tl.load(k_ptr + base + c[None, :] * D + d[:, None], mask=(c[None, :] < high) & (d[:, None] < D), other=0.0)
        v = tl.load(v_ptr + base + c[:, None] * D + d[None, :], mask=(c[:, None] < high) & (d[None, :] < D), other=0.0)
        seen = (c[None, :] < high) & (c[None, :] <= held + m[:, None] // G)
        s = tl.where(seen, tl.dot(q, k, input_precision="ieee") * scale, -1.0e30)
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.where(seen, tl.exp(s - higher[:, None]), 0.0)
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(q.dtype), v, input_precision="ieee")
        top = higher
    out = (pair * SPLITS + split) * (N * G) + m
    tl.store(top_ptr + out, top, mask=m < N * G)
    tl.store(sum_ptr + out, total, mask=m < N * G)
    tl.store(acc_ptr + out[:, None] * D + d[None, :], acc, mask=here)


@triton.jit(do_not_specialize=["SPLITS", "N"])
def _combine(  # type: ignore[no-untyped-def]
    acc_ptr, top_ptr, sum_ptr, out_ptr, SPLITS, N,
    G: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a (token and query head, BLOCK of its columns): the partials of every split become one row."""
    where = tl.program_id(0)
    token, head = where // (HK * G), where % (HK * G)
    s, d = tl.arange(0, BLOCK_S), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = ((token // N * HK + head // G) * SPLITS + s) * (N * G) + token % N * G + head % G
    total = tl.load(sum_ptr + at, mask=s < SPLITS, other=0.0)
    top = tl.load(top_ptr + at, mask=s < SPLITS, other=-1.0e30)
    weight = tl.where(total > 0, tl.exp(top - tl.max(top, 0)), 0.0)
    acc = tl.load(acc_ptr + at[:, None] * D + d[None, :], mask=(total > 0)[:, None] & (d[None, :] < D), other=0.0)
    tl.store(out_ptr + where * D + d, tl.sum(acc * weight[:, None], 0) / tl.sum(total * weight, 0), mask=d < D)


@triton.jit
def _gate(x_ptr, out_ptr, I: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: E741
    """One program a (token, BLOCK columns): silu(x[:I]) * x[I:]."""
    token, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, second = _halves(x_ptr + token * 2 * I + i, I, i < I)
    tl.store(out_ptr + token * I + i, _round(tl.div_rn(first, 1.0 + tl.exp(-first)), out_ptr) * second, mask=i < I)


def block(size: int, smallest: int = 16) -> int:
    """The next power of two, at least `smallest`."""
    return max(smallest, triton.next_power_of_2(size))


def tile(head_size: int, queries: int) -> dict[str, int]:
    """Block sizes of `_split` that fit 99 KiB of shared memory and 255 registers, the least of sm_80 to sm_120."""
    block_d, block_m = block(head_size), min(QUERIES, block(queries))
    return {
        "BLOCK_D": block_d, "BLOCK_M": block_m, "BLOCK_N": 64 if block_d <= 128 else 32,
        "num_warps": 8 if block_d * block_m > 4096 else 4, "num_stages": 2,
    }  # fmt: skip


def splits_for(pairs: int, capacity: int, processors: int) -> int:
    """Splits of one (row, kv head): a power of two, about two programs a processor, 16 columns each or more."""
    return block(max(1, min(64, 2 * processors // pairs, capacity // 16)) + 1, 1) // 2


def add_norm(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `step_reference.add_norm`."""
    width, normed = x.shape[1], torch.empty_like(x)
    summed = x if y is None else torch.empty_like(x)
    _add_norm[(x.shape[0],)](
        x, x if y is None else y, weight, summed, normed, eps,
        D=width, BLOCK=block(width), ADD=y is not None, num_warps=4 if width <= 2048 else 8,
    )  # fmt: skip
    return summed, normed


def rope(
    qkv: Tensor, keys: Tensor, values: Tensor, length: Tensor, at: Tensor, cos: Tensor, sin: Tensor, n: int,
    q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    """See `step_reference.rope`."""
    _, num_kv_heads, capacity, head_size = keys.shape
    num_heads = qkv.shape[1] // head_size - 2 * num_kv_heads
    queries = qkv.new_empty(qkv.shape[0], num_heads * head_size)
    # no fusion: it would make one fma.rn.bf16 of a product and the sum, and skip a rounding that transformers has
    _rope[(qkv.shape[0], num_heads + 2 * num_kv_heads)](
        qkv, queries, keys, values, length, at, cos, sin, queries if q_norm is None else q_norm,
        queries if k_norm is None else k_norm, eps, capacity, cos.shape[1], n,
        H=num_heads, HK=num_kv_heads, D=head_size, BLOCK=block(head_size // 2), NORM=q_norm is not None, num_warps=1,
        enable_fp_fusion=False,
    )  # fmt: skip
    return queries


def attend(q: Tensor, keys: Tensor, values: Tensor, length: Tensor, n: int, scale: float, splits: int) -> Tensor:
    """See `step_reference.attend`."""
    batch, num_kv_heads, capacity, head_size = keys.shape
    group_size, attended = q.shape[1] // (num_kv_heads * head_size), torch.empty_like(q)
    partials = q.new_empty(batch * num_kv_heads, splits, n * group_size, head_size, dtype=torch.float32)
    maxima, totals = q.new_empty(2, batch * num_kv_heads, splits, n * group_size, dtype=torch.float32).unbind(0)
    block_sizes = tile(head_size, n * group_size)
    _split[(batch * num_kv_heads, splits, triton.cdiv(n * group_size, block_sizes["BLOCK_M"]))](
        q, keys, values, length, partials, maxima, totals, scale, capacity, splits, n, G=group_size, HK=num_kv_heads,
        D=head_size, **block_sizes,
    )  # fmt: skip
    _combine[(batch * n * num_kv_heads * group_size, triton.cdiv(head_size, 64))](
        partials, maxima, totals, attended, splits, n, G=group_size, HK=num_kv_heads, D=head_size,
        BLOCK_S=block(splits, 1), BLOCK=64, num_warps=4,
    )  # fmt: skip
    return attended


def gate(joined: Tensor) -> Tensor:
    """See `step_reference.gate`."""
    num_rows, width = joined.shape[0], joined.shape[1] // 2
    output = joined.new_empty(num_rows, width)
    _gate[(num_rows, triton.cdiv(width, 512))](joined, output, I=width, BLOCK=512, num_warps=4)
    return output
