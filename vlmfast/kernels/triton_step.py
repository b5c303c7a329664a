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

from vlmfast.kernels.step_reference import Scales

QUERIES = 64  # grouped queries that one program of the attention holds at most


@triton.jit
def _round(values, like):  # type: ignore[no-untyped-def]
    """float32 as the dtype behind the pointer would hold it."""
    return values.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _halves(pointer, half, inside):  # type: ignore[no-untyped-def]
    first = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    return first, tl.load(pointer + half, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _whole(values):  # type: ignore[no-untyped-def]
    """The nearest whole numbers within int8's, even ones where two are as near: what added 1.5 * 2 ** 23 leaves."""
    return tl.minimum(tl.maximum((values + 12582912.0) - 12582912.0, -127.0), 127.0)


@triton.jit
def _add_norm(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, w_ptr, sum_ptr, out_ptr, eps, D: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr
):
    """One program a token: sum = x + y, out = rms_norm(sum) * w."""
    columns = tl.arange(0, BLOCK)
    in_range = columns < D
    offsets = tl.program_id(0).to(tl.int64) * D + columns
    values = tl.load(x_ptr + offsets, mask=in_range, other=0.0).to(tl.float32)
    if ADD:
        values = _round(values + tl.load(y_ptr + offsets, mask=in_range, other=0.0).to(tl.float32), out_ptr)
        tl.store(sum_ptr + offsets, values, mask=in_range)
    values = _round(values * tl.rsqrt(tl.sum(values * values, 0) / D + eps), out_ptr)
    weights = tl.load(w_ptr + columns, mask=in_range, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, values * weights, mask=in_range)


@triton.jit(do_not_specialize=["N", "TABLE"])
def _rope(  # type: ignore[no-untyped-def]
    qkv_ptr, q_ptr, k_ptr, v_ptr, ks_ptr, vs_ptr, length_ptr, at_ptr, cos_ptr, sin_ptr, qn_ptr, kn_ptr, eps, CAPACITY,
    TABLE, N, H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
    INT8: tl.constexpr,
):  # fmt: skip
    """One program a (token, head of q, k or v), in two halves: normed, rotated; q to its buffer, k, v to the cache."""
    token, head = tl.program_id(0), tl.program_id(1)
    row, step = token // N, token % N
    half: tl.constexpr = D // 2
    columns = tl.arange(0, BLOCK)
    in_range = columns < half
    first, second = _halves(qkv_ptr + (token * (H + 2 * HK) + head).to(tl.int64) * D + columns, half, in_range)
    if head < H + HK:
        if NORM:
            w_ptr = qn_ptr
            if head >= H:
                w_ptr = kn_ptr
            first_weight, second_weight = _halves(w_ptr + columns, half, in_range)
            scale = tl.rsqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / D + eps)
            first = _round(_round(first * scale, q_ptr) * first_weight, q_ptr)
            second = _round(_round(second * scale, q_ptr) * second_weight, q_ptr)
        table_cells = (row * TABLE + tl.minimum(tl.load(at_ptr + row) + step, TABLE - 1)) * D + columns
        first_cos, second_cos = _halves(cos_ptr + table_cells, half, in_range)
        first_sin, second_sin = _halves(sin_ptr + table_cells, half, in_range)  # the table holds -sin in its first half
        first, second = (
            _round(first * first_cos, q_ptr) + _round(second * first_sin, q_ptr),
            _round(second * second_cos, q_ptr) + _round(first * second_sin, q_ptr),
        )
    if head < H:
        query_target = q_ptr + (token * H + head) * D + columns
        tl.store(query_target, first, mask=in_range)
        tl.store(query_target + half, second, mask=in_range)
    else:
        column = tl.load(length_ptr + row * HK + (head - H) % HK) + step
        in_range = in_range & (column < CAPACITY)
        cache_cell = (row * HK + (head - H) % HK).to(tl.int64) * CAPACITY + column
        target, scale_target = k_ptr, ks_ptr
        if head >= H + HK:
            target, scale_target = v_ptr, vs_ptr
        if INT8:
            first, second = _round(first, q_ptr), _round(second, q_ptr)
            largest = tl.maximum(tl.max(tl.abs(first), 0), tl.max(tl.abs(second), 0))
            unit = tl.div_rn(tl.maximum(largest, 1e-12), 127.0)
            first, second = _whole(tl.div_rn(first, unit)), _whole(tl.div_rn(second, unit))
            tl.store(scale_target + cache_cell, unit, mask=column < CAPACITY)
        cells = target + cache_cell * D + columns
        tl.store(cells, first.to(k_ptr.dtype.element_ty), mask=in_range)
        tl.store(cells + half, second.to(k_ptr.dtype.element_ty), mask=in_range)


@triton.jit(do_not_specialize=["SPLITS", "N"])
def _split(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, ks_ptr, vs_ptr, length_ptr, acc_ptr, top_ptr, sum_ptr, scale, CAPACITY, SPLITS, N,
    G: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, INT8: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program a ((row, kv head), split, BLOCK_M of the N * G queries): its columns for those queries."""
    pair, split = tl.program_id(0), tl.program_id(1)
    row, head = pair // HK, pair % HK
    length = tl.load(length_ptr + pair).to(tl.int32)
    cache_end = tl.minimum(length + N, CAPACITY)
    split_size = tl.cdiv(tl.cdiv(cache_end, SPLITS), 16) * 16
    first_column = split * split_size
    end_column = tl.minimum(first_column + split_size, cache_end)  # an empty split stores a sum of 0 and no partials
    query_rows, dims = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    in_range = (query_rows[:, None] < N * G) & (dims[None, :] < D) & (first_column < end_column)
    query_index = (row * N + query_rows // G) * (HK * G) + head * G + query_rows % G
    queries = tl.load(q_ptr + query_index[:, None] * D + dims[None, :], mask=in_range, other=0.0)
    cache_start = pair.to(tl.int64) * CAPACITY * D
    maxima = tl.full([BLOCK_M], -1.0e30, tl.float32)
    totals = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for block_start in range(first_column, end_column, BLOCK_N):
        columns = block_start + tl.arange(0, BLOCK_N)
        key_mask = (columns[None, :] < end_column) & (dims[:, None] < D)
        keys = tl.load(k_ptr + cache_start + columns[None, :] * D + dims[:, None], mask=key_mask, other=0.0)
        value_mask = (columns[:, None] < end_column) & (dims[None, :] < D)
        values = tl.load(v_ptr + cache_start + columns[:, None] * D + dims[None, :], mask=value_mask, other=0.0)
        visible = (columns[None, :] < end_column) & (columns[None, :] <= length + query_rows[:, None] // G)
        scores = tl.dot(queries, keys.to(queries.dtype), input_precision="ieee") * scale
        if INT8:
            scales = pair.to(tl.int64) * CAPACITY + columns
            scores *= tl.load(ks_ptr + scales, mask=columns < end_column, other=0.0)[None, :]
        scores = tl.where(visible, scores, -1.0e30)
        new_maxima = tl.maximum(maxima, tl.max(scores, 1))
        weights = tl.where(visible, tl.exp(scores - new_maxima[:, None]), 0.0)
        rescale = tl.exp(maxima - new_maxima)
        totals = totals * rescale + tl.sum(weights, 1)
        if INT8:
            weights *= tl.load(vs_ptr + scales, mask=columns < end_column, other=0.0)[None, :]
        weighted = tl.dot(weights.to(queries.dtype), values.to(queries.dtype), input_precision="ieee")
        accumulator = accumulator * rescale[:, None] + weighted
        maxima = new_maxima
    offsets = (pair * SPLITS + split) * (N * G) + query_rows
    tl.store(top_ptr + offsets, maxima, mask=query_rows < N * G)
    tl.store(sum_ptr + offsets, totals, mask=query_rows < N * G)
    tl.store(acc_ptr + offsets[:, None] * D + dims[None, :], accumulator, mask=in_range)


@triton.jit(do_not_specialize=["SPLITS", "N"])
def _combine(  # type: ignore[no-untyped-def]
    acc_ptr, top_ptr, sum_ptr, out_ptr, SPLITS, N,
    G: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a (token and query head, BLOCK of its columns): the partials of every split become one row."""
    output_row = tl.program_id(0)
    token, head = output_row // (HK * G), output_row % (HK * G)
    split_index, columns = tl.arange(0, BLOCK_S), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offsets = ((token // N * HK + head // G) * SPLITS + split_index) * (N * G) + token % N * G + head % G
    totals = tl.load(sum_ptr + offsets, mask=split_index < SPLITS, other=0.0)
    maxima = tl.load(top_ptr + offsets, mask=split_index < SPLITS, other=-1.0e30)
    weights = tl.where(totals > 0, tl.exp(maxima - tl.max(maxima, 0)), 0.0)
    loaded = (totals > 0)[:, None] & (columns[None, :] < D)
    partials = tl.load(acc_ptr + offsets[:, None] * D + columns[None, :], mask=loaded, other=0.0)
    combined = tl.sum(partials * weights[:, None], 0) / tl.sum(totals * weights, 0)
    tl.store(out_ptr + output_row * D + columns, combined, mask=columns < D)


@triton.jit
def _gate(x_ptr, out_ptr, I: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: E741
    """One program a (token, BLOCK columns): silu(x[:I]) * x[I:]."""
    token, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gates, ups = _halves(x_ptr + token * 2 * I + columns, I, columns < I)
    activated = _round(tl.div_rn(gates, 1.0 + tl.exp(-gates)), out_ptr)
    tl.store(out_ptr + token * I + columns, activated * ups, mask=columns < I)


def block(size: int, smallest: int = 16) -> int:
    """The next power of two, at least `smallest`."""
    return max(smallest, triton.next_power_of_2(size))


def tile(head_size: int, queries: int, wide: bool = False, int8: bool = False) -> dict[str, int]:
    """Block sizes of `_split` that fit 99 KiB of shared memory and 255 registers, the least of sm_80 to sm_120.

    wide: queries in float32, which tensor cores do not multiply exactly: small blocks, held in registers.
    """
    block_d, block_m = block(head_size), min(QUERIES, block(queries))
    if wide:
        return {
            "BLOCK_D": block_d, "BLOCK_M": 16, "BLOCK_N": 16 if int8 or block_d > 128 else 32,
            "num_warps": 4 if block_d > 128 else 8, "num_stages": 2,
        }  # fmt: skip
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
    q_norm: Tensor | None, k_norm: Tensor | None, eps: float, scales: Scales = None,
) -> Tensor:  # fmt: skip
    """See `step_reference.rope`."""
    _, num_kv_heads, capacity, head_size = keys.shape
    num_heads = qkv.shape[1] // head_size - 2 * num_kv_heads
    queries = qkv.new_empty(qkv.shape[0], num_heads * head_size)
    # no fusion: it would make one fma.rn.bf16 of a product and the sum, and skip a rounding that transformers has
    _rope[(qkv.shape[0], num_heads + 2 * num_kv_heads)](
        qkv, queries, keys, values, *(scales or (queries, queries)), length, at, cos, sin,
        queries if q_norm is None else q_norm, queries if k_norm is None else k_norm, eps, capacity, cos.shape[1], n,
        H=num_heads, HK=num_kv_heads, D=head_size, BLOCK=block(head_size // 2), NORM=q_norm is not None,
        INT8=scales is not None, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return queries


def attend(
    q: Tensor, keys: Tensor, values: Tensor, length: Tensor, n: int, scale: float, splits: int, scales: Scales = None
) -> Tensor:
    """See `step_reference.attend`."""
    batch, num_kv_heads, capacity, head_size = keys.shape
    group_size, attended = q.shape[1] // (num_kv_heads * head_size), torch.empty_like(q)
    partials = q.new_empty(batch * num_kv_heads, splits, n * group_size, head_size, dtype=torch.float32)
    maxima, totals = q.new_empty(2, batch * num_kv_heads, splits, n * group_size, dtype=torch.float32).unbind(0)
    block_sizes = tile(head_size, n * group_size, q.dtype == torch.float32, scales is not None)
    _split[(batch * num_kv_heads, splits, triton.cdiv(n * group_size, block_sizes["BLOCK_M"]))](
        q, keys, values, *(scales or (q, q)), length, partials, maxima, totals, scale, capacity, splits, n,
        G=group_size, HK=num_kv_heads, D=head_size, INT8=scales is not None, **block_sizes,
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
