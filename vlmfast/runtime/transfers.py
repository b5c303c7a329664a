"""Copies between the host and a GPU: there without waiting, back with one wait for many tensors, or later."""

from __future__ import annotations

import functools
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


class Arrival:
    """Copies on their way from a GPU to the host, which may read them after `wait`."""

    def __init__(self, event: torch.cuda.Event | None = None) -> None:
        self.event = event

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()
            self.event = None

    def __deepcopy__(self, memo: dict) -> Arrival:
        self.wait()
        return Arrival()


@functools.cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def send_back(tensors: Sequence[Tensor], beside: bool = False) -> tuple[list[Tensor], Arrival]:
    """Contiguous copies in host memory, pinned where they come from a GPU; nothing waits for them yet.

    beside: large ones travel on a stream of their own, while the device goes on with what is queued after them. Whoever
    reads them there, too, must have waited on the host.
    """
    if not any(tensor.is_cuda for tensor in tensors):
        return [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors], Arrival()
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    device, event = tensors[0].device, torch.cuda.Event()
    computing = torch.cuda.current_stream(device)
    stream = _stream_beside(device) if beside else computing
    if beside:
        stream.wait_stream(computing)
    with torch.cuda.stream(stream):
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
            if beside:
                tensor.record_stream(stream)  # its memory is in use until then
        event.record(stream)
    return copies, Arrival(event)


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
