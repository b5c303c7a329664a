"""Copies between the host and a GPU: there without waiting, back with one wait for many tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; the host goes on at once."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.contiguous().pin_memory()  # an expanded tensor cannot be pinned
    return tensor.to(device, non_blocking=True)


def on_host(tensor: Tensor, known: Tensor | None = None) -> Tensor:
    """The tensor on the host; known: the same, if it was read before: then nothing waits for the device."""
    return known if known is not None and known.shape == tensor.shape and tensor.is_cuda else tensor.cpu()


def true_places(mask: Tensor, count: int) -> Tensor:
    """(count,) int64: where mask (n,) bool is True, ascending; the count is known, so nothing waits for the device."""
    return (~mask).to(torch.uint8).argsort(stable=True)[:count] if mask.is_cuda else mask.nonzero()[:, 0]


def columns(mask: Tensor, device: torch.device) -> Tensor:
    """An index on the device of where a mask (n,) bool on the host is True; the mask itself on a CPU.

    A mask on a GPU would have to be read first.
    """
    return mask if device.type == "cpu" else to_device(mask.nonzero()[:, 0], device)


def read_back(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on the host: those of a GPU in pinned memory, after one wait; those of a CPU as they are."""
    out = []
    device = None
    for tensor in tensors:
        if not tensor.is_cuda:
            out.append(tensor)
            continue
        device = tensor.device
        out.append(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True))
        out[-1].copy_(tensor, non_blocking=True)
    if device is not None:
        torch.cuda.current_stream(device).synchronize()
    return out
