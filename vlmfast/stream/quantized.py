"""Numbers in 8 and in 4 bits, in groups with a scale each, and representatives in fixed point.

Round trip errors: at most half a step, which is the largest magnitude of a group over 127 (8 bits) or 7 (4 bits), and
what float16 rounds off the scale.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GROUP = 32  # most values that share a scale
LARGEST = {8: 127, 4: 7}  # code, by bits


def group_of(width: int) -> int:
    """Values of a group along a last dimension of this width."""
    return math.gcd(width, GROUP)


def packed(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x (..., D) -> codes, int8 (..., D) or two 4-bit ones in a byte, uint8 (..., D / 2); scales float16 (..., D / g).

    D must be even in 4 bits.
    """
    groups = x.float().unflatten(-1, (-1, group_of(x.shape[-1])))
    scale = (groups.abs().amax(-1) / LARGEST[bits]).clamp(max=6e4).half().clamp(min=6e-8)
    codes = (groups / scale.float()[..., None]).round_().clamp_(-LARGEST[bits], LARGEST[bits]).flatten(-2)
    if bits == 8:
        return codes.to(torch.int8), scale
    pairs = (codes + 8).to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4, scale


def unpacked(codes: Tensor, scale: Tensor) -> Tensor:
    """What `packed` packed, float32 (..., D)."""
    if codes.dtype == torch.uint8:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).to(torch.int8) - 8
    groups = codes.float().unflatten(-1, (scale.shape[-1], -1))
    return (groups * scale.float()[..., None]).flatten(-2)


def rounded(x: Tensor) -> Tensor:
    """x (..., D) float16, each row of D to whole multiples of a power of two: its step.

    A step is at most an eighth of the median magnitude of the row, however large a few of its numbers are (key biases),
    unless those need more than 16 bits then. So `fixed_point` makes small whole numbers of it.
    """
    magnitudes = x.float().abs()
    step = torch.maximum(magnitudes.median(-1).values / 32, magnitudes.amax(-1) / 32000)
    step = torch.exp2(torch.ceil(torch.log2(step)).clamp(-24, 9))[..., None]
    return ((x.float() / step).round() * step).half()


def fixed_point(x: Tensor) -> tuple[Tensor, Tensor]:
    """`rounded` numbers (..., D) -> codes int16 (..., D), exponents int8 (...): x is codes * 2 ** exponents, exactly.

    The exponents are the largest that do, so packing what was unpacked gives the same.
    """
    units = (x.double() * 2**24).long()  # float16 has no smaller ones
    lowest = torch.where(units == 0, 1 << 40, units & -units).amin(-1)  # the lowest bit that any of them has
    exponents = torch.log2(lowest.double()).round().long().clamp(max=30)
    codes = units >> exponents[..., None]
    if codes.abs().max() > 32767:
        raise ValueError("numbers that were not rounded")
    return codes.to(torch.int16), (exponents - 24).to(torch.int8)


def from_fixed_point(codes: Tensor, exponents: Tensor) -> Tensor:
    """float16 (..., D) of `fixed_point`."""
    return (codes.float() * torch.exp2(exponents.float())[..., None]).half()
