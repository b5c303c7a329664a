"""Greedy choice of a set, one pick at a time: the specifications, fast CPU versions, and the choice by device.

Three rules: `farthest` (farthest-point selection), `most_probable` (greedy MAP of a determinantal point process) and
`coverage` (greedy maximum coverage). Each returns `left` (..., N): -(i + 1) for the i-th pick, what a place that is not
picked would still add, and 0 where that is nothing: a gain is *spent* when it has fallen to `SPENT` of its first value
(farthest-point selection: of a cosine distance of 1). A spent place is never picked, so fewer than k may be. Of equal
gains the earlier place is picked. On CUDA `triton_greedy` picks in a few launches; the `_plain` functions say what all
of them compute, and run on every other device.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from torch import Tensor

from vlmfast.kernels.gains import SHARE, SPENT, UNIT


def farthest_plain(distance: Tensor, start: Tensor, weight: Tensor, k: int) -> Tensor:
    """k places of every matrix: always the one whose weighted distance to its nearest picked place is largest.

    distance (T, N, N), 0 or more up to rounding. start (T, N): the first pick is its largest; 0 or less is never
    picked first. weight (T, N), 0 or more. Returns left (T, N), float.
    """
    scores, distances = start, torch.full_like(start, 8)
    matrices, columns = torch.arange(len(start), device=start.device), torch.arange(start.shape[1], device=start.device)
    for step in range(k):
        best_score, picked = scores.max(1, keepdim=True)
        alive = best_score > 0
        distances = torch.where(alive, torch.minimum(distances, distance[matrices, picked[:, 0]]), distances)
        distances = distances.masked_fill(alive & (columns == picked), -(step + 1))
        scores = (distances * weight).masked_fill(distances <= SPENT, 0)
    return torch.where(distances <= -1, distances, scores)


def most_probable_plain(kernel: Tensor, k: int) -> Tensor:
    """The greedy most probable k-set of the process with this kernel (N, N): always the place that raises the
    determinant most, by incremental Cholesky. Returns left (N,), in the kernel's dtype."""
    gains, basis = kernel.diagonal().clone(), kernel.new_zeros(k, len(kernel))
    spent_gains, columns = gains * SPENT, torch.arange(len(kernel), device=kernel.device)
    for step in range(k):
        best_gain, picked = gains.max(0, keepdim=True)
        alive = best_gain > 0
        basis_row = kernel.index_select(0, picked)[0] - basis[:step].index_select(1, picked)[:, 0] @ basis[:step]
        basis[step] = basis_row = torch.where(alive, basis_row / best_gain.clamp(min=1e-30).sqrt(), 0)
        remaining = gains - basis_row.square()
        gains = torch.where(gains > 0, remaining.masked_fill(remaining <= spent_gains, 0), gains)
        gains = gains.masked_fill(alive & (columns == picked), -(step + 1))
    return gains


def coverage_plain(matches: Tensor, k: int) -> Tensor:
    """Of candidates (N, R), a row each, always the one that most raises the sum over R of the best match so far.

    matches: 0 or more, a candidate's sum below 32. Returns left (N,), int64 in units of 2**-58.
    """
    covered = torch.zeros_like(matches[0])
    picked = torch.zeros(len(matches), dtype=torch.long, device=matches.device)
    candidates, spent_gains = torch.arange(len(matches), device=matches.device), None
    for step in range(k + 1):
        gains = ((matches - covered).clamp_(min=0) * UNIT).long().sum(1)
        spent_gains = gains // SHARE if spent_gains is None else spent_gains
        gains = torch.where(picked < 0, picked, gains.masked_fill(gains <= spent_gains, 0))
        if step < k:
            best_gain, candidate = gains.max(0, keepdim=True)
            picked = picked.masked_fill((best_gain > 0) & (candidates == candidate), -(step + 1))
            covered = torch.where(best_gain > 0, torch.maximum(covered, matches.index_select(0, candidate)[0]), covered)
    return gains


# -- by device ---------------------------------------------------------------------------------------------------------


def fused(tensor: Tensor) -> bool:
    """Do the persistent kernels take it: float32 on an NVIDIA card, with a Triton that can launch cooperatively?"""
    if not tensor.is_cuda or tensor.dtype != torch.float32 or torch.version.hip:
        return False
    if importlib.util.find_spec("triton") is None:
        return False
    from vlmfast.kernels import triton_greedy

    return triton_greedy.available()


def farthest(distance: Tensor, start: Tensor, weight: Tensor, k: int) -> Tensor:
    """See `farthest_plain`."""
    if fused(distance):
        from vlmfast.kernels import triton_greedy

        return triton_greedy.farthest(distance, start, weight, k)
    return (farthest_cpu if distance.device.type == "cpu" else farthest_plain)(distance, start, weight, k)


def most_probable_rows(features: Tensor, gain: Tensor, k: int) -> Tensor:
    """See `most_probable_plain`. features (N, D): the kernel is features @ features.T, with diagonal gain (N,)."""
    if features.device.type == "cpu":
        return most_probable_cpu(features, gain, k)
    kernel = features @ features.T
    kernel.diagonal().copy_(gain)
    return most_probable(kernel, k)


def most_probable(kernel: Tensor, k: int) -> Tensor:
    """See `most_probable_plain`. kernel (N, N) is used up."""
    if fused(kernel):
        from vlmfast.kernels import triton_greedy

        return triton_greedy.most_probable(kernel, k)
    return most_probable_plain(kernel, k)


def coverage(matches: Tensor, k: int) -> Tensor:
    """See `coverage_plain`."""
    if fused(matches):
        from vlmfast.kernels import triton_greedy

        return triton_greedy.coverage(matches, k)
    return (coverage_cpu if matches.device.type == "cpu" else coverage_plain)(matches, k)


# -- on a CPU ----------------------------------------------------------------------------------------------------------


def farthest_cpu(distance: Tensor, start: Tensor, weight: Tensor, k: int) -> Tensor:
    """The specification itself, without torch's cost a call."""
    distances, weights, scores = distance.numpy(), weight.numpy(), start.numpy()
    frames, unweighted = np.arange(len(distances)), bool((weights == 1).all())
    gaps = np.full_like(scores, 8)
    for step in range(k):
        picked = scores.argmax(1)
        alive = scores[frames, picked] > 0
        if alive.all():
            np.minimum(gaps, distances[0, picked] if len(distances) == 1 else distances[frames, picked], out=gaps)
            gaps[frames, picked] = -(step + 1)
        elif alive.any():
            gaps[alive] = np.minimum(gaps[alive], distances[frames, picked][alive])
            gaps[frames[alive], picked[alive]] = -(step + 1)
        else:
            break
        if unweighted and gaps.max(1).min() > SPENT:
            scores = gaps
        else:
            scores = np.where(gaps > SPENT, gaps * weights, 0)
    return torch.from_numpy(np.where(gaps <= -1, gaps, np.where(gaps > SPENT, gaps * weights, 0)))


def most_probable_cpu(features: Tensor, gain: Tensor, k: int, width: int = 192) -> Tensor:
    """Blocks of picks with exact repair. Gains only fall, so a stale gain is an upper bound: greedy runs among the
    `width` places with the largest, on their own small kernel, until one outside could be better; then all places take
    in the block's picks by two products and a triangular solve."""
    num_rows, num_done, basis, spent_gains = len(features), 0, features.new_empty(k, len(features)), gain * SPENT
    while num_done < k:
        best_first = gain.argsort(descending=True, stable=True)
        if float(gain[best_first[0]]) <= 0:
            break
        candidates = best_first[:width]
        outside_gain, outside_row = 0.0, num_rows
        if width < num_rows:
            outside_gain, outside_row = max(0.0, float(gain[best_first[width]])), int(best_first[width])
        known = basis[:num_done, candidates]
        sub_kernel = torch.addmm(features[candidates] @ features[candidates].T, known.T, known, alpha=-1).numpy()
        sub_gain = gain[candidates].numpy().copy()
        sub_basis, positions, roots = _greedy_among(
            sub_kernel, sub_gain, spent_gains[candidates].numpy(), candidates.numpy(), outside_gain, outside_row,
            k - num_done,
        )  # fmt: skip
        picked, num_picked = candidates[torch.tensor(positions)], len(positions)
        rows = torch.addmm(features[picked] @ features.T, basis[:num_done, picked].T, basis[:num_done], alpha=-1)
        lower = torch.from_numpy(sub_basis[:num_picked])[:, positions].T.tril(-1)
        factor = lower + torch.tensor(roots, dtype=features.dtype).diag()
        new_rows = basis[num_done : num_done + num_picked]
        new_rows.copy_(torch.linalg.solve_triangular(factor, rows, upper=False))
        remaining = gain - new_rows.square().sum(0)
        gain = torch.where(gain > 0, remaining.masked_fill(remaining <= spent_gains, 0), gain)
        gain[picked] = -torch.arange(num_done + 1, num_done + num_picked + 1).to(gain)
        num_done += num_picked
    return gain


def _greedy_among(
    kernel: np.ndarray, gain: np.ndarray, spent_gains: np.ndarray, rows: np.ndarray, outside_gain: float,
    outside_row: int, k: int,
) -> tuple[np.ndarray, list[int], list[float]]:  # fmt: skip
    """Up to k picks, until the best place outside, or nothing, is better: basis rows, picks, diagonal of the factor."""
    basis = np.zeros((min(len(gain), k), len(gain)), kernel.dtype)
    positions: list[int] = []
    roots: list[float] = []
    while len(positions) < len(basis):
        best_gain = gain.max()
        ties = np.flatnonzero(gain == best_gain)
        position = int(ties[rows[ties].argmin()])
        if best_gain <= 0 or best_gain < outside_gain or (best_gain == outside_gain and rows[position] > outside_row):
            break
        step = len(positions)
        roots.append(float(np.sqrt(best_gain)))
        basis[step] = (kernel[position] - basis[:step, position] @ basis[:step]) / roots[step]
        remaining = gain - basis[step] * basis[step]
        gain = np.where(gain > 0, np.where(remaining > spent_gains, remaining, 0), gain)
        gain[position] = -1
        positions.append(position)
    return basis, positions, roots


def coverage_cpu(matches: Tensor, k: int) -> Tensor:
    """Each pick betters few rows (about N / i at pick i): only those change the gains."""
    by_candidate, by_row = matches.numpy(), matches.T.contiguous().numpy()
    unit = by_candidate.dtype.type(UNIT)
    gains = np.concatenate([(part * unit).astype(np.int64).sum(1) for part in np.array_split(by_candidate, 16)])
    spent_gains = gains // SHARE
    covered = np.zeros(matches.shape[1], by_candidate.dtype)
    for step in range(k):
        picked = gains.argmax()
        if gains[picked] <= 0:
            break
        candidate = by_candidate[picked]
        rows = np.flatnonzero(candidate > covered)
        remaining = gains.copy()
        for start in range(0, len(rows), 64):
            block = rows[start : start + 64]
            matched, before, after = by_row[block], covered[block, None], candidate[block, None]
            matched = np.maximum(matched, before)  # max(match - old, 0) is max(match, old) - old, bit for bit
            gain_before = ((matched - before) * unit).astype(np.int64)
            gain_after = ((np.maximum(matched, after) - after) * unit).astype(np.int64)
            remaining -= (gain_before - gain_after).sum(0)
        covered[rows] = candidate[rows]
        gains = np.where(gains > 0, np.where(remaining > spent_gains, remaining, 0), gains)
        gains[picked] = -(step + 1)
    return torch.from_numpy(gains)
