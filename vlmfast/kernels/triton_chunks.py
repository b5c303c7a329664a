"""Chunks in host memory chosen and fetched inside a static step on CUDA, two and one launches. Specification: `chunks`.

Pinned host memory is read by the kernel itself, at the address that the host knows it by (unified addressing). Grids
depend on sizes of tables alone, never on data: a CUDA graph may hold them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vlmfast.kernels.chunks import Chunks, hold

__all__ = ["MOST", "choose", "fetch", "hold"]

MOST = 16384  # chunks that one program ranks
PROGRAMS = 32  # that share the copies of a pair
BLOCK = 1024  # words copied at once


@triton.jit(do_not_specialize=["N"])
def _score(  # type: ignore[no-untyped-def]
    q_ptr, sizes_ptr, addresses_ptr, scores_ptr, N, MOST,
    G: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, MINMAX: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program a (pair, BLOCK_C chunks): how much each may matter to the queries of the first token."""
    pair, first = tl.program_id(0), tl.program_id(1) * BLOCK_C
    num_chunks = tl.load(sizes_ptr + pair * 4)
    if first < num_chunks:
        query_rows, dims, chunks = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), first + tl.arange(0, BLOCK_C)
        row, head = pair // HK, pair % HK
        query_mask = (query_rows[:, None] < G) & (dims[None, :] < D)
        query_index = row * N * (HK * G) + head * G + query_rows
        queries = tl.load(q_ptr + query_index[:, None] * D + dims[None, :], mask=query_mask, other=0.0)
        own_ptr = tl.load(addresses_ptr + pair * 6).to(tl.pointer_type(q_ptr.dtype.element_ty))
        chunk_mask = (chunks[None, :] < num_chunks) & (dims[:, None] < D)
        if MINMAX:
            own_ptr += chunks[None, :] * (2 * D) + dims[:, None]
            minima = tl.load(own_ptr, mask=chunk_mask, other=0.0)
            maxima = tl.load(own_ptr + D, mask=chunk_mask, other=0.0)
            zeros = tl.zeros_like(queries)
            scores = tl.dot(tl.where(queries < 0, queries, zeros), minima, input_precision="ieee")
            scores += tl.dot(tl.where(queries > 0, queries, zeros), maxima, input_precision="ieee")
        else:
            means = tl.load(own_ptr + chunks[None, :] * D + dims[:, None], mask=chunk_mask, other=0.0)
            scores = tl.dot(queries, means, input_precision="ieee")
        scores = scores.to(q_ptr.dtype.element_ty).to(tl.float32)  # rounded as a product of the storage's dtype is
        scores = tl.max(tl.where(query_rows[:, None] < G, scores, float("-inf")), 0)
        tl.store(scores_ptr + pair * MOST + chunks, scores, mask=chunks < num_chunks)


@triton.jit
def _select(  # type: ignore[no-untyped-def]
    sizes_ptr, scores_ptr, slot_of_ptr, moves_ptr, MOST, BLOCK_C: tl.constexpr, BITS: tl.constexpr
):
    """One program a pair: the S best chunks, the earlier of equals first; what has to come, and what may go."""
    pair, chunks = tl.program_id(0), tl.arange(0, BLOCK_C)
    num_chunks, num_slots = tl.load(sizes_ptr + pair * 4), tl.load(sizes_ptr + pair * 4 + 1)
    inside = chunks < num_chunks
    scores = tl.load(scores_ptr + pair * MOST + chunks, mask=inside, other=0.0)
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)  # -0 is 0
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # ordered as the scores are
    if BITS == 16:  # a score of half precision ends in zeros
        order = tl.where(inside, (order >> 16) + 32768, -1)
        one = tl.full([], 1, tl.int32)
    else:
        order = tl.where(inside, order.to(tl.int64) + 2147483648, -1)
        one = tl.full([], 1, tl.int64)
    threshold = one - one
    for i in range(BITS):  # the highest number that S chunks reach
        candidate = threshold + (one << (BITS - 1 - i))
        reached = tl.sum((order >= candidate).to(tl.int32), 0)
        threshold = tl.where(reached >= num_slots, candidate, threshold)
    above, equal = order > threshold, order == threshold
    spare = num_slots - tl.sum(above.to(tl.int32), 0)
    wanted = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= spare))
    slots = tl.load(slot_of_ptr + pair * MOST + chunks, mask=inside, other=-1)
    missing, leaving = inside & wanted & (slots < 0), inside & (wanted == 0) & (slots >= 0)
    come, go = tl.cumsum(missing.to(tl.int32), 0) - 1, tl.cumsum(leaving.to(tl.int32), 0) - 1
    tl.store(moves_ptr + pair * 2 * MOST + come, chunks, mask=missing)
    tl.store(moves_ptr + (pair * 2 + 1) * MOST + go, slots, mask=leaving)
    tl.store(slot_of_ptr + pair * MOST + chunks, tl.full([BLOCK_C], -1, tl.int32), mask=leaving)
    tl.store(sizes_ptr + pair * 4 + 3, tl.sum(missing.to(tl.int32), 0))


@triton.jit
def _fetch(  # type: ignore[no-untyped-def]
    sizes_ptr, addresses_ptr, held_ptr, slot_of_ptr, moves_ptr, MOST,
    PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a (pair, every PROGRAMS-th of its moves): keys and values of a chunk, from the host to a slot."""
    pair, first = tl.program_id(0), tl.program_id(1)
    words, count = tl.load(sizes_ptr + pair * 4 + 2), tl.load(sizes_ptr + pair * 4 + 3)
    pointer = tl.pointer_type(tl.int32)
    own_ptr = addresses_ptr + pair * 6
    keys_ptr, values_ptr = tl.load(own_ptr + 1).to(pointer), tl.load(own_ptr + 2).to(pointer)
    fast_keys_ptr, fast_values_ptr = tl.load(own_ptr + 3).to(pointer), tl.load(own_ptr + 4).to(pointer)
    for move in range(first, count, PROGRAMS):
        chunk = tl.load(moves_ptr + pair * 2 * MOST + move)
        slot = tl.load(moves_ptr + (pair * 2 + 1) * MOST + move)
        source, target = chunk.to(tl.int64) * words, slot.to(tl.int64) * words
        for start in range(0, words, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            keys = tl.load(keys_ptr + source + columns, mask=columns < words)
            values = tl.load(values_ptr + source + columns, mask=columns < words)
            tl.store(fast_keys_ptr + target + columns, keys, mask=columns < words)
            tl.store(fast_values_ptr + target + columns, values, mask=columns < words)
        tl.store(held_ptr + pair * MOST + slot, chunk)
        tl.store(slot_of_ptr + pair * MOST + chunk, slot)


def choose(queries: Tensor, n: int, head_size: int, chunks: Chunks) -> None:
    """See `chunks.choose`."""
    num_pairs, most = chunks.scores.shape
    group_size = queries.numel() // (n * num_pairs * head_size)
    sizes = tile(group_size, head_size)
    _score[(num_pairs, triton.cdiv(most, sizes["BLOCK_C"]))](
        queries, chunks.sizes, chunks.addresses, chunks.scores, n, most, G=group_size,
        HK=num_pairs * n // queries.shape[0], D=head_size, MINMAX=chunks.minmax, num_warps=4, num_stages=1, **sizes,
    )  # fmt: skip
    _select[(num_pairs,)](
        chunks.sizes, chunks.scores, chunks.slot_of, chunks.moves, most, BLOCK_C=most,
        BITS=8 * queries.element_size() if queries.element_size() < 4 else 32, num_warps=max(4, min(32, most // 256)),
    )  # fmt: skip


def fetch(chunks: Chunks) -> None:
    """See `chunks.fetch`."""
    num_pairs, most = chunks.held.shape
    _fetch[(num_pairs, min(PROGRAMS, most))](
        chunks.sizes, chunks.addresses, chunks.held, chunks.slot_of, chunks.moves, most,
        PROGRAMS=min(PROGRAMS, most), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def tile(queries: int, head_size: int) -> dict[str, int]:
    """Block sizes of `_score`."""
    return {
        "BLOCK_G": max(16, triton.next_power_of_2(queries)), "BLOCK_D": max(16, triton.next_power_of_2(head_size)),
        "BLOCK_C": 32 if head_size <= 128 else 16,
    }  # fmt: skip
