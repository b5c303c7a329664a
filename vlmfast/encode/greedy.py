"""What the greedy methods share: unit rows, cosines, and how the budget is spent once no token adds anything.

A greedy method adds the token that differs most from those it has. In a still scene, or past the rank of the features,
no token differs: gains are rounding errors, and picks by them are noise. So picking stops when a gain has fallen to
1e-5 of its first value (`vlmfast.kernels.greedy`), and what is left of the budget goes
  1. by relevance, in steps of a thousandth: to the question (CDPruner, MMTok), by tower attention (FlashVID);
  2. then evenly over time, and over the places of a frame: along a lattice of (frame, place), see `even`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.torch_version import TorchVersion

from vlmfast.kernels import by_parts, ranking

LATTICE = (0.6180339887498949, 0.4142135623730951)  # per frame and place: the golden and the silver ratio
PICKED = {torch.int64: 2**62, torch.float32: 2.0**22, torch.float64: 2.0**40}  # above every gain


def unit_rows(features: Tensor) -> Tensor:
    """Rows of features (N, D) at length one, in float32 (float64 stays); what is not a number becomes 0."""

    def unit(some: Tensor) -> Tensor:
        return normalize(some if some.dtype == torch.float64 else some.float(), dim=-1).nan_to_num_()

    return by_parts(unit, features)


def gram(features: Tensor, blocks: int = 8) -> Tensor:
    """(N, N) product of features (N, D) with themselves, each pair of rows once: half the work of a plain one."""
    num_rows = len(features)
    if features.is_cuda or num_rows < 64 * blocks:
        return features @ features.T
    product, block_size = features.new_empty(num_rows, num_rows), -(-num_rows // blocks)
    for start in range(0, num_rows, block_size):
        stop = min(num_rows, start + block_size)
        torch.mm(features[start:stop], features[start:].T, out=product[start:stop, start:])
        product[stop:, start:stop] = product[start:stop, stop:].T
    return product


def cosines(features: Tensor, unit_features: Tensor) -> Tensor:
    """(N, N) cosine of every pair of tokens, in float32 or more; unit_features = unit_rows(features).

    On CUDA the products of bf16 and fp16 features are exact in float32, so tensor cores serve as well as float32 ones.
    """
    half_precision = features.is_cuda and features.dtype in (torch.bfloat16, torch.float16)
    if not half_precision or TorchVersion(torch.__version__) < "2.8":
        return gram(unit_features)
    finite = features.nan_to_num()
    similarity = torch.mm(finite, finite.T, out_dtype=torch.float32)  # type: ignore[call-overload]
    inverse_norm = similarity.diagonal().clamp(min=1e-24).rsqrt_()
    return similarity.mul_(inverse_norm[:, None]).mul_(inverse_norm)  # type: ignore[no-any-return]


def places(frame: Tensor) -> Tensor:
    """(N,) int64, each token's place in its frame; frame (N,) ascending."""
    return torch.arange(len(frame), device=frame.device).sub_(torch.searchsorted(frame, frame))


def even(frame: Tensor, place_in_frame: Tensor) -> Tensor:
    """(N,) float64 in [0, 1): tokens in this order lie evenly over time, and over the places of every frame."""
    return (frame.double() * LATTICE[0]).add_(place_in_frame, alpha=LATTICE[1]).frac_()


def in_order(remaining: Tensor, relevance: Tensor | None, spread: Tensor) -> Tensor:
    """(..., N) int64, the best first: the picks, then by what a token would still add, then the rule for the rest.

    remaining (..., N): as `vlmfast.kernels.greedy` returns it. relevance (..., N) in [0, 1]; spread (N,): `even`.
    """
    fallback = -spread if relevance is None else torch.sub(relevance.round(decimals=3), spread, alpha=1e-3)
    return ranking(remaining.add(remaining < 0, alpha=PICKED[remaining.dtype]), fallback.expand_as(remaining))


def kept_set(remaining: Tensor, frame: Tensor, relevance: Tensor | None, budget: int, floor: int) -> Tensor:
    """`budget` indices, the best by `in_order`, of which each frame's best `floor` go first. No host wait on CUDA."""
    if remaining.device.type == "cpu":  # reading costs nothing there
        picked = (remaining < 0).nonzero()[:, 0]
        frame_sizes = torch.bincount(frame)
        below_floor = torch.bincount(frame[picked], minlength=len(frame_sizes)) < frame_sizes.clamp(max=floor)
        if len(picked) == budget and not bool(below_floor.any()):
            return picked
    place_in_frame = places(frame)
    best_first = in_order(remaining, relevance, even(frame, place_in_frame))
    if floor == 0:
        return best_first[:budget]
    by_frame = best_first[frame[best_first].argsort(stable=True)]  # frames ascending, best first within each
    sort_key = best_first.argsort()[by_frame].add_(place_in_frame < floor, alpha=-len(best_first))
    return by_frame[sort_key.argsort()[:budget]]
