"""On a CPU large tensors are worked on some rows at a time, which stay in its cache.

A whole tensor would go out to memory and, above the allocator's limit, be mapped anew for every operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CACHED = 2**17  # numbers that a thread of a CPU works on at a time: a few such tensors stay in its cache


def parts(num_rows: int, numbers_per_row: int) -> Iterator[slice]:
    """Slices that cover `num_rows` rows of a tensor on a CPU in order, each small enough for the cache.

    For sums, products and roots alone, whose rounding does not depend on where a number stands.
    """
    step = max(1, CACHED * torch.get_num_threads() // max(1, numbers_per_row))
    return (slice(begin, begin + step) for begin in range(0, num_rows, step))


def in_parts(tensor: Tensor, numbers: int) -> bool:
    """Is work on so many numbers, on the device of a tensor, done in parts?"""
    return tensor.device.type == "cpu" and numbers > CACHED and not torch.is_grad_enabled()


def by_parts(function: Callable[..., Tensor], *tensors: Tensor, numbers_per_row: int | None = None) -> Tensor:
    """function(*tensors) of tensors (N, ...) in any dtype, a tensor (N, ...) whose row depends on theirs alone.

    On a CPU some rows at a time, elsewhere at once; the same bits under the condition of `parts`. numbers_per_row: how
    many numbers the function works on for a row, those in a row of the first tensor if not given.
    """
    first = tensors[0]
    width = first[:1].numel() if numbers_per_row is None else numbers_per_row
    if not in_parts(first, len(first) * width):
        return function(*tensors)
    return torch.cat([function(*(tensor[some] for tensor in tensors)) for some in parts(len(first), width)])
