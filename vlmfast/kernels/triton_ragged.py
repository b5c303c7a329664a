"""Flash-decoding over ragged rows on CUDA: the sequence of every row is split, partial results are combined.

One program per (row, split, piece of the queries) reads its share of the row once for all grouped queries of the piece
(G * q <= 128, q <= 16), keeping a running maximum and sum; a second kernel merges the splits. Specification:
`reference.ragged_attention`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfast.kernels.reference import Ragged

PIECE = 16  # query tokens that one program takes; more of them are more programs


@triton.jit
def _split(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, ks_ptr, vs_ptr, rows_ptr, offsets_ptr, lengths_ptr, acc_ptr, max_ptr, sum_ptr,
    scaling, Q, PIECE, M, SPLITS,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0)
    split = tl.program_id(1)
    piece = tl.program_id(2)
    row = tl.load(rows_ptr + entry)
    start = tl.load(offsets_ptr + entry)
    length = tl.load(lengths_ptr + entry)
    query_rows = tl.arange(0, BLOCK_M)
    key_dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    tokens = piece * PIECE + query_rows % PIECE
    query_slots = (row * (M // PIECE) + query_rows // PIECE) * Q + tokens
    query_mask = ((query_rows < M) & (tokens < Q))[:, None] & (key_dims[None, :] < D)
    queries = tl.load(q_ptr + query_slots[:, None] * D + key_dims[None, :], mask=query_mask, other=0.0)
    last_column = length - Q + tokens  # last column each query sees
    split_size = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_N) * BLOCK_N
    first_column = split * split_size
    end_column = tl.minimum(first_column + split_size, tl.minimum(length, length - Q + (piece + 1) * PIECE))
    maxima = tl.full([BLOCK_M], -1.0e30, tl.float32)
    totals = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for block_start in range(first_column, end_column, BLOCK_N):
        columns = block_start + tl.arange(0, BLOCK_N)
        in_range = columns < end_column
        slots = (start + columns).to(tl.int64)
        key_mask = in_range[None, :] & (key_dims[:, None] < D)
        keys = tl.load(k_ptr + slots[None, :] * D + key_dims[:, None], mask=key_mask, other=0.0)
        if INT8:
            scores = tl.dot(queries, keys.to(queries.dtype), input_precision="ieee") * scaling
            scores = scores * tl.load(ks_ptr + slots, mask=in_range, other=0.0)[None, :]
        else:
            scores = tl.dot(queries, keys, input_precision="ieee") * scaling
        visible = in_range[None, :] & (columns[None, :] <= last_column[:, None])
        scores = tl.where(visible, scores, -1.0e30)
        new_maxima = tl.maximum(maxima, tl.max(scores, 1))
        weights = tl.where(visible, tl.exp(scores - new_maxima[:, None]), 0.0)
        rescale = tl.exp(maxima - new_maxima)
        totals = totals * rescale + tl.sum(weights, 1)
        accumulator = accumulator * rescale[:, None]
        value_mask = in_range[:, None] & (value_dims[None, :] < DV)
        values = tl.load(v_ptr + slots[:, None] * DV + value_dims[None, :], mask=value_mask, other=0.0)
        if INT8:
            weights = weights * tl.load(vs_ptr + slots, mask=in_range, other=0.0)[None, :]
        accumulator += tl.dot(weights.to(queries.dtype), values.to(queries.dtype), input_precision="ieee")
        maxima = new_maxima
    offsets = ((entry * tl.num_programs(2) + piece) * SPLITS + split) * M + query_rows
    tl.store(max_ptr + offsets, maxima, mask=query_rows < M)
    tl.store(sum_ptr + offsets, totals, mask=query_rows < M)
    stored = (query_rows[:, None] < M) & (value_dims[None, :] < DV)
    tl.store(acc_ptr + offsets[:, None] * DV + value_dims[None, :], accumulator, mask=stored)


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    acc_ptr, max_ptr, sum_ptr, rows_ptr, o_ptr, Q, PIECE, M, SPLITS,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0)
    query_row = tl.program_id(1)
    piece = tl.program_id(2)
    splits = tl.arange(0, BLOCK_S)
    value_dims = tl.arange(0, BLOCK_DV)
    offsets = ((entry * tl.num_programs(2) + piece) * SPLITS + splits) * M + query_row
    maxima = tl.load(max_ptr + offsets, mask=splits < SPLITS, other=-1.0e30)
    weights = tl.exp(maxima - tl.max(maxima, 0))
    sum_total = tl.sum(tl.load(sum_ptr + offsets, mask=splits < SPLITS, other=0.0) * weights, 0)
    loaded = (splits[:, None] < SPLITS) & (value_dims[None, :] < DV)
    partials = tl.load(acc_ptr + offsets[:, None] * DV + value_dims[None, :], mask=loaded, other=0.0)
    combined = tl.sum(partials * weights[:, None], 0) / sum_total
    row = tl.load(rows_ptr + entry)
    token = piece * PIECE + query_row % PIECE
    out_slot = (row * (M // PIECE) + query_row // PIECE) * Q + token
    stored = (value_dims < DV) & (token < Q)
    tl.store(o_ptr + out_slot * DV + value_dims, combined.to(o_ptr.dtype.element_ty), mask=stored)


def supports(query: Tensor, kv: Ragged) -> bool:
    """True where the kernel takes it: groups of up to 128 queries (64 of heads above 128), heads up to 256, no bias."""
    fits = query.shape[3] <= 256 and query.dtype != torch.float64
    return kv.bias is None and fits and _piece(query, kv) > 0


def _piece(query: Tensor, kv: Ragged) -> int:
    """How many query tokens of a group one program takes, 0 = the group is too large."""
    batch, num_heads, num_queries, head_size = query.shape
    most = (128 if head_size <= 128 else 64) // (batch * num_heads // kv.total)
    return min(PIECE, most, num_queries)


def tile(head: int, queries: int) -> dict[str, int]:
    """Block sizes of `_split` that fit 99 KiB of shared memory and 255 registers, the least of sm_80 to sm_120."""
    block_d, block_m = (max(16, triton.next_power_of_2(size)) for size in (head, queries))
    block_n = 64 if block_d * block_m <= 8192 else 32
    if block_d > 128:
        block_n = 32 if block_d * block_m <= 8192 else 16
    most_of_4_warps = 4096 if block_d > 64 else 1024
    return {"BLOCK_D": block_d, "BLOCK_M": block_m, "BLOCK_N": block_n, "num_stages": 2,
            "num_warps": 8 if block_d * block_m > most_of_4_warps else 4}  # fmt: skip


def ragged_attention(query: Tensor, kv: Ragged, scaling: float, out: Tensor, splits: int | None = None) -> Tensor:
    """See `reference.ragged_attention`. `splits` of the sequence per row; default fills about two waves of programs."""
    batch, num_heads, num_queries, head_size = query.shape
    value_size, group_size = out.shape[-1], batch * num_heads // kv.total
    piece, num_entries = _piece(query, kv), len(kv)
    num_grouped, num_pieces = group_size * piece, triton.cdiv(num_queries, piece)
    longest = max(kv.lengths)
    if splits is None:
        splits_wanted = 264 // (num_entries * num_pieces)
        splits = max(1, min(splits_wanted, triton.cdiv(longest, 256), 64))
    device = query.device
    index = torch.tensor([kv.rows, kv.offsets, kv.lengths], dtype=torch.int64).to(device, non_blocking=True)
    rows, offsets, lengths = index.unbind(0)
    packed_queries = query.reshape(kv.total * group_size * num_queries, head_size).contiguous()
    shape = (num_entries, num_pieces, splits, num_grouped)
    partials = torch.empty(*shape, value_size, dtype=torch.float32, device=device)
    maxima = torch.empty(shape, dtype=torch.float32, device=device)
    totals = torch.empty_like(maxima)
    scales = (kv.key_scale, kv.value_scale) if kv.key_scale is not None else (packed_queries, packed_queries)
    next_power = triton.next_power_of_2
    value_block = max(16, next_power(value_size))
    block_sizes = tile(max(head_size, value_size), num_grouped) | {"BLOCK_D": max(16, next_power(head_size))}
    _split[(num_entries, splits, num_pieces)](
        packed_queries, kv.keys, kv.values, *scales, rows, offsets, lengths, partials, maxima, totals, scaling,
        num_queries, piece, num_grouped, splits, D=head_size, DV=value_size, BLOCK_DV=value_block,
        INT8=kv.key_scale is not None, **block_sizes,
    )  # fmt: skip
    _combine[(num_entries, num_grouped, num_pieces)](
        partials, maxima, totals, rows, out, num_queries, piece, num_grouped, splits, DV=value_size,
        BLOCK_DV=value_block, BLOCK_S=next_power(splits), num_warps=8,
    )  # fmt: skip
    return out
