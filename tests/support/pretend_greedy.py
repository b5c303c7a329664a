"""Twins of the Triton kernels of `vlmfast.kernels.triton_greedy` for the pretend CUDA device: the same on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmfast.kernels import greedy


def _farthest(grid: tuple, distance: Tensor, start: Tensor, weight: Tensor, left: Tensor, k: int, n: int,
              **constants: Any) -> None:  # fmt: skip
    left.copy_(greedy.farthest_plain(distance, start, weight, k))


def _grow(grid: tuple, schur: Tensor, basis: Tensor, gain: Tensor, least: Tensor, slot_gain: Tensor, slot_at: Tensor,
          arrived: Tensor, done: int, start: int, steps: int, *args: Any, **constants: Any) -> None:  # fmt: skip
    for j in range(start, start + steps):
        pick = int(gain.argmax())
        top = gain[pick].clone()
        basis[j] = 0
        if top <= 0:
            continue
        basis[j] = (schur[pick] - basis[:j, pick] @ basis[:j]) / top.sqrt()
        rest = gain - basis[j].square()
        gain.copy_(torch.where(gain > 0, rest.masked_fill(rest <= least, 0), gain))
        gain[pick] = -(done + j + 1)


def _cover(grid: tuple, by_candidate: Tensor, by_row: Tensor, covered: Tensor, gain: Tensor, *args: Any,
           **constants: Any) -> None:  # fmt: skip
    steps = args[9]
    if steps:
        gain.copy_(greedy.coverage_cpu(by_candidate, steps))


KERNELS = {"_farthest": _farthest, "_grow": _grow, "_cover": _cover}
