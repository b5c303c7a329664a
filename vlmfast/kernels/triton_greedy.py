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

from vlmfast.kernels.gains import SHARE, SPENT, UNIT

BLOCK = 512  # picks of `most_probable` between two products over the whole kernel
SERIAL = False  # one step a launch, whose end is the barrier: for an interpreter, which runs programs one by one


@triton.jit(do_not_specialize=["K"])
def _farthest(  # type: ignore[no-untyped-def]
    distance, start, weight, left, K, N, SPENT: tl.constexpr, WIDTH: tl.constexpr
):
    """A program for every matrix: gaps in registers, a pick is one row read and one reduction in the block."""
    columns, row_start = tl.arange(0, WIDTH), tl.program_id(0).to(tl.int64) * N
    score = tl.load(start + row_start + columns, mask=columns < N, other=-2.0)
    weights = tl.load(weight + row_start + columns, mask=columns < N, other=0.0)
    distances = tl.where(columns < N, 8.0, -2.0)
    for step in range(K):
        best_score, picked = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
        picked = tl.where(best_score > 0, picked, N)  # N: everything is spent
        end_column = tl.where(best_score > 0, N, 0)
        new_distances = tl.load(distance + (row_start + picked) * N + columns, mask=columns < end_column, other=8.0)
        distances = tl.minimum(distances, new_distances)
        distances = tl.where(columns == picked, -1.0 - step, distances)
        score = tl.where(distances > SPENT, distances * weights, 0.0)
    tl.store(left + row_start + columns, tl.where(distances <= -1.0, distances, score), mask=columns < N)


@triton.jit
def _wait_for_all(arrived, target):  # type: ignore[no-untyped-def]
    """Every program of the grid waits until `target` programs have arrived; what was stored before is seen after."""
    tl.debug_barrier()
    arrivals = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") + 1
    while arrivals < target:
        arrivals = tl.atomic_add(arrived, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def _publish(slot_gain, slot_at, gain, columns, N, parity, num_programs):  # type: ignore[no-untyped-def]
    best_gain = tl.max(gain, 0)
    best_column = tl.min(tl.where(gain == best_gain, columns, N), 0)
    tl.store(slot_gain + parity * num_programs + tl.program_id(0), best_gain)
    tl.store(slot_at + parity * num_programs + tl.program_id(0), best_column)


@triton.jit
def _winner(slot_gain, slot_at, N, parity, num_programs, GP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The best gain, its place (N where everything is spent), and how many places count (0 there)."""
    programs = tl.arange(0, GP)
    owned = programs < num_programs
    gains = tl.load(slot_gain + parity * num_programs + programs, mask=owned, other=-2, cache_modifier=".cg")
    columns = tl.load(slot_at + parity * num_programs + programs, mask=owned, other=N, cache_modifier=".cg")
    best_gain = tl.max(gains, 0)
    picked = tl.min(tl.where(gains == best_gain, columns, N), 0)
    return best_gain, tl.where(best_gain > 0, picked, N), tl.where(best_gain > 0, N, 0)


@triton.jit(do_not_specialize=["done", "start", "steps", "G"])
def _grow(  # type: ignore[no-untyped-def]
    schur, basis, gain_ptr, least_ptr, slot_gain, slot_at, arrived, done, start, steps, N, G,
    GP: tl.constexpr, C: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """`steps` picks of `most_probable` from row `start` of a block of B: a program owns C columns and their rows."""
    columns, rows = tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, B)
    in_range = columns < N
    gain = tl.load(gain_ptr + columns, mask=in_range, other=-2.0)
    least = tl.load(least_ptr + columns, mask=in_range, other=0.0)
    own_basis = tl.load(basis + rows[:, None] * N + columns, mask=(rows < start)[:, None] & in_range, other=0.0)
    if steps == 0:
        _publish(slot_gain, slot_at, gain, columns, N, 0, G)
    for step in range(start, start + steps):
        best_gain, picked, end_column = _winner(slot_gain, slot_at, N, (done + step) % 2, G, GP)
        known_rows = rows < tl.minimum(step, end_column)
        pick_basis = tl.load(basis + rows * N + picked, mask=known_rows, other=0.0, cache_modifier=".cg")
        basis_row = tl.load(schur + picked.to(tl.int64) * N + columns, mask=columns < end_column, other=0.0)
        basis_row = (basis_row - tl.sum(pick_basis[:, None] * own_basis, 0)) / tl.sqrt(tl.maximum(best_gain, 1e-30))
        own_basis = tl.where(rows[:, None] == step, basis_row[None], own_basis)
        tl.store(basis + step * N + columns, basis_row, mask=in_range)
        remaining = gain - basis_row * basis_row
        gain = tl.where(gain > 0, tl.where(remaining > least, remaining, 0.0), gain)
        gain = tl.where(columns == picked, -1.0 - (done + step), gain)
        _publish(slot_gain, slot_at, gain, columns, N, (done + step + 1) % 2, G)
        if steps > 1:
            _wait_for_all(arrived, (step - start + 1) * G)
    tl.store(gain_ptr + columns, gain, mask=in_range)


@triton.jit(do_not_specialize=["start", "steps", "G"])
def _cover(  # type: ignore[no-untyped-def]
    by_candidate, by_row, covered, gain_ptr, least_ptr, slot_gain, slot_at, found, changed, old_ptr, new_ptr, arrived,
    start, steps, N, R, G, unit,
    PHASES: tl.constexpr, GP: tl.constexpr, C: tl.constexpr, RB: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """`coverage`: a program owns C columns (gains) and RB rows (what is covered). Phase 1 lists the rows that the pick
    betters, phase 2 takes their loss out of the own columns' gains."""
    program = tl.program_id(0)
    columns, rows = program * C + tl.arange(0, C), program * RB + tl.arange(0, RB)
    in_range = columns < N
    gain = tl.load(gain_ptr + columns, mask=in_range, other=-2)
    least = tl.load(least_ptr + columns, mask=in_range, other=0)
    known_cover = tl.load(covered + rows, mask=rows < R, other=float("inf"))
    if steps == 0:
        _publish(slot_gain, slot_at, gain, columns, N, 0, G)
    for step in range(start, start + steps):
        _, picked, end_column = _winner(slot_gain, slot_at, N, step % 2, G, GP)
        if PHASES != 2:
            end_row = tl.where(end_column > 0, R, 0)
            candidate = tl.load(by_candidate + picked.to(tl.int64) * R + rows, mask=rows < end_row, other=0.0)
            improved = (candidate > known_cover).to(tl.int32)
            list_start = tl.atomic_add(found + step, tl.sum(improved, 0), sem="relaxed")
            positions = list_start + tl.cumsum(improved, 0) - 1
            tl.store(changed + positions, rows, mask=improved > 0)
            tl.store(old_ptr + positions, known_cover, mask=improved > 0)
            tl.store(new_ptr + positions, candidate, mask=improved > 0)
            known_cover = tl.maximum(known_cover, candidate)
        if PHASES == 3:
            _wait_for_all(arrived, (2 * (step - start) + 1) * G)
        if PHASES != 1:
            num_changed = tl.load(found + step, cache_modifier=".cg")
            remaining = gain
            for start_entry in range(0, num_changed, T):
                entries = start_entry + tl.arange(0, T)
                row_index = tl.load(changed + entries, mask=entries < num_changed, other=0, cache_modifier=".cg")
                row_index = row_index.to(tl.int64)
                old_cover = tl.load(old_ptr + entries, mask=entries < num_changed, other=0.0, cache_modifier=".cg")
                new_cover = tl.load(new_ptr + entries, mask=entries < num_changed, other=0.0, cache_modifier=".cg")
                matched = tl.load(
                    by_row + row_index[:, None] * N + columns, mask=in_range & (entries < num_changed)[:, None],
                    other=0.0,
                )  # fmt: skip
                losses = (tl.maximum(matched - old_cover[:, None], 0.0) * unit).to(tl.int64)
                losses -= (tl.maximum(matched - new_cover[:, None], 0.0) * unit).to(tl.int64)
                remaining -= tl.sum(tl.where((entries < num_changed)[:, None], losses, 0), 0)
            gain = tl.where(gain > 0, tl.where(remaining > least, remaining, 0), gain)
            gain = tl.where(columns == picked, gain * 0 - 1 - step, gain)
            _publish(slot_gain, slot_at, gain, columns, N, (step + 1) % 2, G)
        if PHASES == 3:
            _wait_for_all(arrived, (2 * (step - start) + 2) * G)
    tl.store(gain_ptr + columns, gain, mask=in_range)
    tl.store(covered + rows, known_cover, mask=rows < R)


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
