"""What the greedy methods share: unit rows, cosines, and the rule for where nothing new is left.

A greedy method adds the token that is newest to those it has; in a still scene, or past the rank of the features, no
token is: gains are rounding, and picks by them are noise, or the first columns in order. So of every method a gain that
has fallen to 1e-5 of its first value ends (`vlmfast.kernels.greedy`), and what is left of the budget goes
  1. by relevance, in steps of a thousandth: to the question (CDPruner, MMTok), by tower attention (FlashVID);
  2. then evenly over time, and over the places of a frame: along a lattice of (frame, place), see `even`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.torch_version import TorchVersion

from vlmfast.kernels import ranking

LATTICE = (0.6180339887498949, 0.4142135623730951)  # per frame and place: the golden and the silver ratio
PICKED = {torch.int64: 2**62, torch.float32: 2.0**22, torch.float64: 2.0**40}  # above every gain


def unit_rows(x: Tensor) -> Tensor:
    """Rows of x (N, D) at length one, in float32 (float64 stays); what is not a number becomes 0."""
    return normalize(x if x.dtype == torch.float64 else x.float(), dim=-1).nan_to_num_()


def gram(x: Tensor, blocks: int = 8) -> Tensor:
    """x @ x.T of x (N, D), each pair of rows multiplied once: little more than half the work of the plain product."""
    n = len(x)
    if x.is_cuda or n < 64 * blocks:
        return x @ x.T
    out, step = x.new_empty(n, n), -(-n // blocks)
    for a in range(0, n, step):
        b = min(n, a + step)
        torch.mm(x[a:b], x[a:].T, out=out[a:b, a:])
        out[b:, a:b] = out[a:b, b:].T
    return out


def cosines(features: Tensor, rows: Tensor) -> Tensor:
    """(N, N) cosine of every pair of tokens, in float32 or more; rows = unit_rows(features).

    On CUDA the products of bf16 and fp16 features are exact in float32, so tensor cores serve as well as float32 ones.
    """
    half = features.is_cuda and features.dtype in (torch.bfloat16, torch.float16)
    if not half or TorchVersion(torch.__version__) < "2.8":
        return gram(rows)
    x = features.nan_to_num()
    cos = torch.mm(x, x.T, out_dtype=torch.float32)  # type: ignore[call-overload]
    inverse = cos.diagonal().clamp(min=1e-24).rsqrt_()
    return cos.mul_(inverse[:, None]).mul_(inverse)  # type: ignore[no-any-return]


def places(frame: Tensor) -> Tensor:
    """(N,) int64, each token's place in its frame; frame (N,) ascending."""
    return torch.arange(len(frame), device=frame.device).sub_(torch.searchsorted(frame, frame))


def even(frame: Tensor, place: Tensor) -> Tensor:
    """(N,) float64 in [0, 1): tokens in this order lie evenly over time, and over the places of every frame."""
    return (frame.double() * LATTICE[0]).add_(place, alpha=LATTICE[1]).frac_()


def in_order(left: Tensor, relevance: Tensor | None, spread: Tensor) -> Tensor:
    """(..., N) int64, the best first: the picks, then by what a token would still add, then the rule for the rest.

    left (..., N): as `vlmfast.kernels.greedy` returns it. relevance (..., N) in [0, 1]; spread (N,): `even`.
    """
    fallback = -spread if relevance is None else torch.sub(relevance.round(decimals=3), spread, alpha=1e-3)
    return ranking(left.add(left < 0, alpha=PICKED[left.dtype]), fallback.expand_as(left))


def kept_set(left: Tensor, frame: Tensor, relevance: Tensor | None, budget: int, floor: int) -> Tensor:
    """`budget` indices, the best by `in_order`, of which each frame's best `floor` go first. No host wait on CUDA."""
    if left.device.type == "cpu":  # where looking costs nothing
        picked = (left < 0).nonzero()[:, 0]
        sizes = torch.bincount(frame)
        short = torch.bincount(frame[picked], minlength=len(sizes)) < sizes.clamp(max=floor)
        if len(picked) == budget and not bool(short.any()):
            return picked
    place = places(frame)
    order = in_order(left, relevance, even(frame, place))
    if floor == 0:
        return order[:budget]
    by_frame = order[frame[order].argsort(stable=True)]  # frames ascending, best first within each
    rank = order.argsort()[by_frame].add_(place < floor, alpha=-len(order))
    return by_frame[rank.argsort()[:budget]]
