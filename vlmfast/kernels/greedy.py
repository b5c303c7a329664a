"""Greedy choice of a set, one pick a step: the specifications, their fast versions for a CPU, and the choice by device.

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
    score, gap = start, torch.full_like(start, 8)
    matrix, place = torch.arange(len(start), device=start.device), torch.arange(start.shape[1], device=start.device)
    for i in range(k):
        top, pick = score.max(1, keepdim=True)
        alive = top > 0
        gap = torch.where(alive, torch.minimum(gap, distance[matrix, pick[:, 0]]), gap)
        gap = gap.masked_fill(alive & (place == pick), -(i + 1))
        score = (gap * weight).masked_fill(gap <= SPENT, 0)
    return torch.where(gap <= -1, gap, score)


def most_probable_plain(kernel: Tensor, k: int) -> Tensor:
    """The greedy most probable k-set of the process with this kernel (N, N): always the place that raises the
    determinant most, by incremental Cholesky. Returns left (N,), in the kernel's dtype."""
    gain, basis = kernel.diagonal().clone(), kernel.new_zeros(k, len(kernel))
    least, place = gain * SPENT, torch.arange(len(kernel), device=kernel.device)
    for i in range(k):
        top, pick = gain.max(0, keepdim=True)
        alive = top > 0
        row = kernel.index_select(0, pick)[0] - basis[:i].index_select(1, pick)[:, 0] @ basis[:i]
        basis[i] = row = torch.where(alive, row / top.clamp(min=1e-30).sqrt(), 0)
        rest = gain - row.square()
        gain = torch.where(gain > 0, rest.masked_fill(rest <= least, 0), gain)
        gain = gain.masked_fill(alive & (place == pick), -(i + 1))
    return gain


def coverage_plain(matches: Tensor, k: int) -> Tensor:
    """Of candidates (N, R), a row each, always the one that most raises the sum over R of the best match so far.

    matches: 0 or more, a candidate's sum below 32. Returns left (N,), int64 in units of 2**-58.
    """
    covered = torch.zeros_like(matches[0])
    picked = torch.zeros(len(matches), dtype=torch.long, device=matches.device)
    place, least = torch.arange(len(matches), device=matches.device), None
    for i in range(k + 1):
        gain = ((matches - covered).clamp_(min=0) * UNIT).long().sum(1)
        least = gain // SHARE if least is None else least
        gain = torch.where(picked < 0, picked, gain.masked_fill(gain <= least, 0))
        if i < k:
            top, pick = gain.max(0, keepdim=True)
            picked = picked.masked_fill((top > 0) & (place == pick), -(i + 1))
            covered = torch.where(top > 0, torch.maximum(covered, matches.index_select(0, pick)[0]), covered)
    return gain


# -- by device ---------------------------------------------------------------------------------------------------------


def fused(x: Tensor) -> bool:
    """Do the persistent kernels take it: float32 on an NVIDIA card, with a Triton that can launch cooperatively?"""
    if not x.is_cuda or x.dtype != torch.float32 or torch.version.hip or importlib.util.find_spec("triton") is None:
        return False
    from vlmfast.kernels import triton_greedy

    return triton_greedy.available()


def farthest(distance: Tensor, start: Tensor, weight: Tensor, k: int) -> Tensor:
    """See `farthest_plain`."""
    if fused(distance):
        from vlmfast.kernels import triton_greedy

        return triton_greedy.farthest(distance, start, weight, k)
    return (farthest_cpu if distance.device.type == "cpu" else farthest_plain)(distance, start, weight, k)


def most_probable_rows(x: Tensor, gain: Tensor, k: int) -> Tensor:
    """See `most_probable_plain`. x (N, D): the kernel is x @ x.T with gain (N,), which it has up to rounding, as its
    diagonal."""
    if x.device.type == "cpu":
        return most_probable_cpu(x, gain, k)
    kernel = x @ x.T
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
    d, weights, score = distance.numpy(), weight.numpy(), start.numpy()
    frames, even = np.arange(len(d)), bool((weights == 1).all())
    gap = np.full_like(score, 8)
    for i in range(k):
        pick = score.argmax(1)
        alive = score[frames, pick] > 0
        if alive.all():
            np.minimum(gap, d[0, pick] if len(d) == 1 else d[frames, pick], out=gap)
            gap[frames, pick] = -(i + 1)
        elif alive.any():
            gap[alive] = np.minimum(gap[alive], d[frames, pick][alive])
            gap[frames[alive], pick[alive]] = -(i + 1)
        else:
            break
        if even and gap.max(1).min() > SPENT:
            score = gap
        else:
            score = np.where(gap > SPENT, gap * weights, 0)
    return torch.from_numpy(np.where(gap <= -1, gap, np.where(gap > SPENT, gap * weights, 0)))


def most_probable_cpu(x: Tensor, gain: Tensor, k: int, width: int = 192) -> Tensor:
    """Blocks of picks with exact repair. Gains only fall, so a stale gain is an upper bound: greedy runs among the
    `width` places with the largest, on their own small kernel, until one outside could be better; then all places take
    in the block's picks by two products and a triangular solve."""
    n, done, basis, least = len(x), 0, x.new_empty(k, len(x)), gain * SPENT
    while done < k:
        order = gain.argsort(descending=True, stable=True)
        if float(gain[order[0]]) <= 0:
            break
        among = order[:width]
        outside, outside_at = (float(gain[order[width]]), int(order[width])) if width < n else (0.0, n)
        small = torch.addmm(x[among] @ x[among].T, basis[:done, among].T, basis[:done, among], alpha=-1).numpy()
        own, picks, roots = _greedy_among(
            small,
            gain[among].numpy().copy(),
            least[among].numpy(),
            among.numpy(),
            max(outside, 0),
            outside_at,
            k - done,
        )
        p, m = among[torch.tensor(picks)], len(picks)
        rows = torch.addmm(x[p] @ x.T, basis[:done, p].T, basis[:done], alpha=-1)
        lower = torch.from_numpy(own[:m])[:, picks].T.tril(-1) + torch.tensor(roots, dtype=x.dtype).diag()
        basis[done : done + m] = torch.linalg.solve_triangular(lower, rows, upper=False)
        rest = gain - basis[done : done + m].square().sum(0)
        gain = torch.where(gain > 0, rest.masked_fill(rest <= least, 0), gain)
        gain[p] = -torch.arange(done + 1, done + m + 1).to(gain)
        done += m
    return gain


def _greedy_among(
    kernel: np.ndarray, gain: np.ndarray, least: np.ndarray, place: np.ndarray, outside: float, outside_at: int, k: int
) -> tuple[np.ndarray, list[int], list[float]]:
    """Up to k picks, until the best place outside, or nothing, is better: basis rows, picks, diagonal of the factor."""
    own = np.zeros((min(len(gain), k), len(gain)), kernel.dtype)
    picks: list[int] = []
    roots: list[float] = []
    while len(picks) < len(own):
        top = gain.max()
        ties = np.flatnonzero(gain == top)
        j = int(ties[place[ties].argmin()])
        if top <= 0 or top < outside or (top == outside and place[j] > outside_at):
            break
        i = len(picks)
        roots.append(float(np.sqrt(top)))
        own[i] = (kernel[j] - own[:i, j] @ own[:i]) / roots[i]
        rest = gain - own[i] * own[i]
        gain = np.where(gain > 0, np.where(rest > least, rest, 0), gain)
        gain[j] = -1
        picks.append(j)
    return own, picks, roots


def coverage_cpu(matches: Tensor, k: int) -> Tensor:
    """Each pick betters few rows (about N / i at pick i): only those change the gains."""
    by_candidate, by_row = matches.numpy(), matches.T.contiguous().numpy()
    unit = by_candidate.dtype.type(UNIT)
    gain = np.concatenate([(part * unit).astype(np.int64).sum(1) for part in np.array_split(by_candidate, 16)])
    least = gain // SHARE
    covered = np.zeros(matches.shape[1], by_candidate.dtype)
    for i in range(k):
        pick = gain.argmax()
        if gain[pick] <= 0:
            break
        new = by_candidate[pick]
        rows = np.flatnonzero(new > covered)
        rest = gain.copy()
        for at in range(0, len(rows), 64):
            r = rows[at : at + 64]
            match, old, now = by_row[r], covered[r, None], new[r, None]
            match = np.maximum(match, old)  # max(m - old, 0) is max(m, old) - old, to the bit
            fall = ((match - old) * unit).astype(np.int64) - ((np.maximum(match, now) - now) * unit).astype(np.int64)
            rest -= fall.sum(0)
        covered[rows] = new[rows]
        gain = np.where(gain > 0, np.where(rest > least, rest, 0), gain)
        gain[pick] = -(i + 1)
    return torch.from_numpy(gain)
