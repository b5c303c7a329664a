"""CUDA graphs of decoder steps, and copies of their results to the host that do not wait for the newest step."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]  # a step, or what replays it: its tensors are the same every time


class Memory:
    """The memory pool that all graphs of a model share, and the stream that they are captured on: a workspace of cuBLAS
    stays with each stream, and graphs of two models may run at the same time. A pool whose last graph is gone cannot be
    used again."""

    def __init__(self) -> None:
        self.handle: Any = None
        self.stream: Any = None
        self.graphs = 0

    def capture(self, body: Run) -> Run:
        """See `capture`."""
        if self.graphs == 0:
            self.handle, self.stream = graph_memory(), self.stream or capture_stream()
        run = capture(body, self.handle, self.stream)
        self.graphs += 1
        return run


class Graphs:
    """The captured steps over one set of slots; off CUDA a step runs as it is.

    captures, seconds: how many were captured, and how long it took.
    """

    def __init__(self, device: torch.device, memory: Memory) -> None:
        self.device, self.memory = device, memory
        self.held: dict[Any, Run] = {}
        self.captures, self.seconds = 0, 0.0

    def get(self, key: Any, body: Run) -> tuple[Run, bool]:
        """What runs the step of this key, and whether it was captured just now: counters have moved then."""
        if key in self.held:
            return self.held[key], False
        if self.device.type != "cuda":
            self.held[key] = body
            return body, False
        started = time.perf_counter()
        self.held[key] = self.memory.capture(body)
        self.captures += 1
        self.seconds += time.perf_counter() - started
        return self.held[key], True

    def clear(self) -> None:
        """Give all graphs back."""
        if self.device.type == "cuda":
            self.memory.graphs -= len(self.held)
        self.held.clear()


@functools.cache
def _side(device: int) -> torch.cuda.Stream:
    """The stream that steps are warmed on: always the same, since a workspace of cuBLAS stays with each."""
    return torch.cuda.Stream(device)


def graph_memory() -> Any:
    """The handle of a new memory pool for CUDA graphs."""
    return torch.cuda.graph_pool_handle()


def capture_stream() -> Any:
    """A stream to capture CUDA graphs on."""
    return torch.cuda.Stream()


def capture(body: Run, memory: Any, stream: Any = None) -> Run:
    """The body as one CUDA graph: run once beforehand, on a side stream, so that kernels and workspaces are there.

    stream: to capture on, None = the one of all such graphs.
    """
    side_stream = _side(torch.cuda.current_device())
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        body()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
        output = body()

    def replay() -> Any:
        graph.replay()
        return output

    return replay


class Readback:
    """Copies a small tensor to the host while the device goes on: sent now, read a round later."""

    def __init__(self, source: Tensor, depth: int = 2) -> None:
        self.source = source
        on_cuda = source.is_cuda
        self.events = [torch.cuda.Event() for _ in range(depth)] if on_cuda else []
        self.host = [torch.empty(source.shape, dtype=source.dtype, pin_memory=on_cuda) for _ in range(depth)]

    def send(self, number: int) -> None:
        """Queue the copy of what the source holds now, as number i."""
        number %= len(self.host)
        self.host[number].copy_(self.source, non_blocking=True)
        if self.events:
            self.events[number].record()

    def read(self, number: int) -> Tensor:
        """Number i, once it is there."""
        number %= len(self.host)
        if self.events:
            self.events[number].synchronize()
        return self.host[number]
