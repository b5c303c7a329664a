"""Captured tower calls: on CUDA a grid that comes back (a camera's frames, equal pictures) is replayed, not launched.

A call of few patches takes longer to launch than to compute. The second call of a grid is captured as a CUDA graph,
later ones replay it; a handful of graphs are kept, the least recently used one goes first.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

GRAPHS = 4
MOST_PATCHES = 8_192  # larger calls keep the device busy without a graph


@dataclasses.dataclass
class Captured:
    graph: Any
    pixels: Tensor
    output: Any
    weights: tuple[int, ...]  # where the tower's tensors lay
    bytes: int = 0  # that capturing it took on the device


class TowerGraphs:
    """The captured calls of one tower."""

    def __init__(self) -> None:
        self._seen: set[Any] = set()
        self._graphs: OrderedDict[Any, Captured] = OrderedDict()
        self.failed: str | None = None
        self.replays = 0

    def take(self, tower: Any, pixels: Tensor) -> bool:
        """May this call be captured: on CUDA, small, without gradients and without hooks that must run?"""
        if not pixels.is_cuda or self.failed or len(pixels) > MOST_PATCHES or torch.is_grad_enabled():
            return False
        return not any(m._forward_hooks or m._forward_pre_hooks for m in tower.modules() if m is not tower)

    def run(self, key: Any, call: Callable[[Tensor], Any], pixels: Tensor, weights: tuple[int, ...]) -> Any:
        """call(pixels), replayed where a call of this key (the grid's value) was captured before.

        weights: addresses of the tensors that a graph reads; other addresses are another graph.
        """
        key = (key, pixels.shape, pixels.dtype, pixels.device)
        captured = self._graphs.pop(key, None)
        if captured is not None and captured.weights != weights:
            captured = None
        if captured is None:
            if key not in self._seen:
                self._seen.add(key)
                return call(pixels)
            captured = self._capture(call, pixels, weights)
            if captured is None:
                return call(pixels)
        self._graphs[key] = captured
        if len(self._graphs) > GRAPHS:
            self._graphs.popitem(last=False)
        captured.pixels.copy_(pixels)
        captured.graph.replay()
        self.replays += 1
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, captured.output)

    def _capture(self, call: Callable[[Tensor], Any], pixels: Tensor, weights: tuple[int, ...]) -> Captured | None:
        before = torch.cuda.memory_allocated(pixels.device)
        static = pixels.clone()
        try:
            side = torch.cuda.Stream(pixels.device)
            side.wait_stream(torch.cuda.current_stream(pixels.device))
            with torch.cuda.stream(side):
                call(static)
            torch.cuda.current_stream(pixels.device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use CUDA meanwhile
                output = call(static)
        except (RuntimeError, torch.cuda.OutOfMemoryError) as e:
            self.failed = str(e).splitlines()[0][:120]
            self.clear()
            return None
        return Captured(graph, static, output, weights, torch.cuda.memory_allocated(pixels.device) - before)

    def report(self) -> dict[str, Any]:
        """For the report: how many graphs are kept and what their inputs and outputs hold."""
        if not self._graphs:
            return {}
        held = sum(captured.bytes for captured in self._graphs.values())
        return {"tower_graphs": len(self._graphs), "tower_replays": self.replays, "tower_graph_bytes": held}

    def clear(self) -> None:
        self._graphs.clear()
        self._seen.clear()
