"""Greedy choice on CUDA by persistent kernels: a pick costs a barrier of the grid, not launches and not a host wait.

A launch is cooperative: all its programs run at once, one to a multiprocessor, so that they may wait for each other.
Each owns some of the places, with their gains in registers, and publishes its best; after a barrier all of them read
what was published and know the pick. Specifications: `vlmfast.kernels.greedy`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfast.kernels.greedy import SHARE, SPENT, UNIT

BLOCK = 512  # picks of `most_probable` between two products over the whole kernel
SERIAL = False  # one step a launch, whose end is the barrier: for an interpreter, which runs programs one by one


@triton.jit(do_not_specialize=["K"])
def _farthest(  # type: ignore[no-untyped-def]
    distance, start, weight, left, K, N, SPENT: tl.constexpr, WIDTH: tl.constexpr
):
    """A program for every matrix: gaps in registers, a pick is one row read and one reduction in the block."""
    at, base = tl.arange(0, WIDTH), tl.program_id(0).to(tl.int64) * N
    score = tl.load(start + base + at, mask=at < N, other=-2.0)
    share = tl.load(weight + base + at, mask=at < N, other=0.0)
    gap = tl.where(at < N, 8.0, -2.0)
    for i in range(K):
        top, pick = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
        pick = tl.where(top > 0, pick, N)  # N: everything is spent
        row = tl.load(distance + (base + pick) * N + at, mask=at < tl.where(top > 0, N, 0), other=8.0)
        gap = tl.minimum(gap, row)
        gap = tl.where(at == pick, -1.0 - i, gap)
        score = tl.where(gap > SPENT, gap * share, 0.0)
    tl.store(left + base + at, tl.where(gap <= -1.0, gap, score), mask=at < N)


@triton.jit
def _meet(arrived, target):  # type: ignore[no-untyped-def]
    """Every program of the grid waits until `target` arrivals; what was stored before is seen after."""
    tl.debug_barrier()
    seen = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") + 1
    while seen < target:
        seen = tl.atomic_add(arrived, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def _publish(slot_gain, slot_at, gain, columns, N, turn, G):  # type: ignore[no-untyped-def]
    top = tl.max(gain, 0)
    at = tl.min(tl.where(gain == top, columns, N), 0)
    tl.store(slot_gain + turn * G + tl.program_id(0), top)
    tl.store(slot_at + turn * G + tl.program_id(0), at)


@triton.jit
def _winner(slot_gain, slot_at, N, turn, G, GP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The best gain, its place (N where everything is spent), and how many places count (0 there)."""
    q = tl.arange(0, GP)
    gains = tl.load(slot_gain + turn * G + q, mask=q < G, other=-2, cache_modifier=".cg")
    at = tl.load(slot_at + turn * G + q, mask=q < G, other=N, cache_modifier=".cg")
    top = tl.max(gains, 0)
    pick = tl.min(tl.where(gains == top, at, N), 0)
    return top, tl.where(top > 0, pick, N), tl.where(top > 0, N, 0)


@triton.jit(do_not_specialize=["done", "start", "steps", "G"])
def _grow(  # type: ignore[no-untyped-def]
    schur, basis, gain_ptr, least_ptr, slot_gain, slot_at, arrived, done, start, steps, N, G,
    GP: tl.constexpr, C: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """`steps` picks of `most_probable` from row `start` of a block of B: a program owns C columns and their rows."""
    columns, rows = tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, B)
    inside = columns < N
    gain = tl.load(gain_ptr + columns, mask=inside, other=-2.0)
    least = tl.load(least_ptr + columns, mask=inside, other=0.0)
    own = tl.load(basis + rows[:, None] * N + columns, mask=(rows < start)[:, None] & inside, other=0.0)
    if steps == 0:
        _publish(slot_gain, slot_at, gain, columns, N, 0, G)
    for j in range(start, start + steps):
        top, pick, end = _winner(slot_gain, slot_at, N, (done + j) % 2, G, GP)
        entry = tl.load(basis + rows * N + pick, mask=rows < tl.minimum(j, end), other=0.0, cache_modifier=".cg")
        row = tl.load(schur + pick.to(tl.int64) * N + columns, mask=columns < end, other=0.0)
        row = (row - tl.sum(entry[:, None] * own, 0)) / tl.sqrt(tl.maximum(top, 1e-30))
        own = tl.where(rows[:, None] == j, row[None], own)
        tl.store(basis + j * N + columns, row, mask=inside)
        rest = gain - row * row
        gain = tl.where(gain > 0, tl.where(rest > least, rest, 0.0), gain)
        gain = tl.where(columns == pick, -1.0 - (done + j), gain)
        _publish(slot_gain, slot_at, gain, columns, N, (done + j + 1) % 2, G)
        if steps > 1:
            _meet(arrived, (j - start + 1) * G)
    tl.store(gain_ptr + columns, gain, mask=inside)


@triton.jit(do_not_specialize=["start", "steps", "G"])
def _cover(  # type: ignore[no-untyped-def]
    by_candidate, by_row, covered, gain_ptr, least_ptr, slot_gain, slot_at, found, changed, old_ptr, new_ptr, arrived,
    start, steps, N, R, G, unit,
    PHASES: tl.constexpr, GP: tl.constexpr, C: tl.constexpr, RB: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """`coverage`: a program owns C columns (gains) and RB rows (what is covered). Phase 1 lists the rows that the pick
    betters, phase 2 takes their loss out of the own columns' gains."""
    me = tl.program_id(0)
    columns, rows = me * C + tl.arange(0, C), me * RB + tl.arange(0, RB)
    inside = columns < N
    gain = tl.load(gain_ptr + columns, mask=inside, other=-2)
    least = tl.load(least_ptr + columns, mask=inside, other=0)
    old = tl.load(covered + rows, mask=rows < R, other=float("inf"))
    if steps == 0:
        _publish(slot_gain, slot_at, gain, columns, N, 0, G)
    for i in range(start, start + steps):
        _, pick, end = _winner(slot_gain, slot_at, N, i % 2, G, GP)
        if PHASES != 2:
            new = tl.load(by_candidate + pick.to(tl.int64) * R + rows, mask=rows < tl.where(end > 0, R, 0), other=0.0)
            better = (new > old).to(tl.int32)
            base = tl.atomic_add(found + i, tl.sum(better, 0), sem="relaxed")
            at = base + tl.cumsum(better, 0) - 1
            tl.store(changed + at, rows, mask=better > 0)
            tl.store(old_ptr + at, old, mask=better > 0)
            tl.store(new_ptr + at, new, mask=better > 0)
            old = tl.maximum(old, new)
        if PHASES == 3:
            _meet(arrived, (2 * (i - start) + 1) * G)
        if PHASES != 1:
            total = tl.load(found + i, cache_modifier=".cg")
            rest = gain
            for t in range(0, total, T):
                q = t + tl.arange(0, T)
                r = tl.load(changed + q, mask=q < total, other=0, cache_modifier=".cg").to(tl.int64)
                was = tl.load(old_ptr + q, mask=q < total, other=0.0, cache_modifier=".cg")
                now = tl.load(new_ptr + q, mask=q < total, other=0.0, cache_modifier=".cg")
                m = tl.load(by_row + r[:, None] * N + columns, mask=inside & (q < total)[:, None], other=0.0)
                loss = (tl.maximum(m - was[:, None], 0.0) * unit).to(tl.int64)
                loss -= (tl.maximum(m - now[:, None], 0.0) * unit).to(tl.int64)
                rest -= tl.sum(tl.where((q < total)[:, None], loss, 0), 0)
            gain = tl.where(gain > 0, tl.where(rest > least, rest, 0), gain)
            gain = tl.where(columns == pick, gain * 0 - 1 - i, gain)
            _publish(slot_gain, slot_at, gain, columns, N, (i + 1) % 2, G)
        if PHASES == 3:
            _meet(arrived, (2 * (i - start) + 2) * G)
    tl.store(gain_ptr + columns, gain, mask=inside)
    tl.store(covered + rows, old, mask=rows < R)


@functools.cache
def available() -> bool:
    """Can this Triton launch cooperatively (from 3.3 on)?"""
    from triton.backends.nvidia.compiler import CUDAOptions

    return hasattr(CUDAOptions, "launch_cooperative_grid")


def processors(device: torch.device) -> int:
    """Multiprocessors of the device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def _run(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    kernel[(programs,)](*arguments, **options, **({} if SERIAL else {"launch_cooperative_grid": True}))


def _shape(num_columns: int, device: torch.device) -> tuple[int, dict[str, int], Tensor]:
    """Programs, what they own, and two turns of slots for what each holds best."""
    columns_each = max(64, triton.next_power_of_2(triton.cdiv(num_columns, 132 if SERIAL else processors(device))))
    num_programs = triton.cdiv(num_columns, columns_each)
    slots = torch.empty(2 * num_programs, dtype=torch.int32, device=device)
    return num_programs, {"GP": triton.next_power_of_2(num_programs), "C": columns_each}, slots


def block_of(own: int, capability: tuple[int, int]) -> tuple[int, int]:
    """Picks of `most_probable` between two products, and warps: the picks' rows of `own` places stay in registers.

    Compilers for other cards than H100 and B200 spill blocks of that size.
    """
    if own == 64 and capability in ((9, 0), (10, 0)):
        return BLOCK, 16
    return max(16, min(BLOCK, 2**13 // own)), 8


def farthest(distance: Tensor, start: Tensor, weight: Tensor, k: int) -> Tensor:
    """See `greedy.farthest_plain`."""
    matrices, num_columns = start.shape
    remaining, width = torch.empty_like(start), triton.next_power_of_2(num_columns)
    num_warps = min(32, max(4, width // 256))
    arguments = (distance, start, weight, remaining, k, num_columns)
    _farthest[(matrices,)](*arguments, SPENT=SPENT, WIDTH=width, num_warps=num_warps)
    return remaining


def most_probable(kernel: Tensor, k: int) -> Tensor:
    """See `greedy.most_probable_plain`. kernel (N, N) is used up: after each block of picks it holds what they leave
    unexplained."""
    num_columns = len(kernel)
    num_programs, options, slot_place = _shape(num_columns, kernel.device)
    capability = (9, 0) if SERIAL else torch.cuda.get_device_capability(kernel.device)
    block_size, num_warps = block_of(options["C"], capability)
    gains, basis = kernel.diagonal().clone(), kernel.new_empty(block_size, num_columns)
    spent_gain, slot_gain = gains * SPENT, gains.new_empty(2 * num_programs)
    arrived = slot_place.new_zeros(triton.cdiv(k, block_size))
    for num_done in range(0, k, block_size):
        num_picks = min(block_size, k - num_done)
        barriers = arrived[num_done // block_size :]
        arguments = (kernel, basis, gains, spent_gain, slot_gain, slot_place, barriers, num_done)
        launches = [(pick, 1) for pick in range(num_picks)] if SERIAL else [(0, num_picks)]
        for first_pick, steps in [(0, 0)] * (num_done == 0) + launches:
            _run(
                _grow, num_programs, *arguments, first_pick, steps, num_columns, num_programs, B=block_size,
                num_warps=num_warps, **options,
            )  # fmt: skip
        if num_done + num_picks < k:
            kernel.addmm_(basis[:num_picks].T, basis[:num_picks], alpha=-1)
    return gains


def coverage(matches: Tensor, k: int) -> Tensor:
    """See `greedy.coverage_plain`."""
    num_columns, num_rows = matches.shape
    num_programs, options, slot_place = _shape(num_columns, matches.device)
    by_row, gains = matches.T.contiguous(), (matches * UNIT).long().sum(1)
    spent_gain, slot_gain = gains // SHARE, gains.new_empty(2 * num_programs)
    covered, values = matches.new_zeros(num_rows), matches.new_empty(2, num_rows)
    changed_rows = slot_place.new_empty(num_rows)
    counts = slot_place.new_zeros(k + 1)
    rows_each = triton.next_power_of_2(triton.cdiv(num_rows, num_programs))
    launches = [(0, 0, 3)] + ([(pick, 1, phase) for pick in range(k) for phase in (1, 2)] if SERIAL else [(0, k, 3)])
    for first_pick, num_picks, phases in launches:
        _run(
            _cover, num_programs, matches, by_row, covered, gains, spent_gain, slot_gain, slot_place, counts,
            changed_rows, values[0], values[1], counts[k:], first_pick, num_picks, num_columns, num_rows, num_programs,
            UNIT, PHASES=phases, RB=rows_each, T=16, num_warps=8, **options,
        )  # fmt: skip
    return gains
