"""Measures the seconds of a model's work, also on a GPU, which works while the host goes on."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn


def clock(model: nn.Module) -> float:
    """Seconds, after the device has finished what was queued."""
    if torch.cuda.is_available() and next(model.parameters()).is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


class Stopwatch:
    """Sums spans of a model's work. On CUDA they are CUDA events, and nothing waits until `seconds` is called."""

    def __init__(self, model: nn.Module) -> None:
        self._cuda = torch.cuda.is_available() and next(model.parameters()).is_cuda
        self.spans: list[tuple[Any, Any]] = []

    def now(self) -> Any:
        """A mark of the present time, to be given to `add` later."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, start: Any) -> None:
        """Add the span from the mark `start` to now."""
        self.spans.append((start, self.now()))

    def seconds(self) -> float:
        """The sum so far; waits for the device."""
        if not self._cuda:
            return sum(end_mark - start_mark for start_mark, end_mark in self.spans)
        if self.spans:
            self.spans[-1][1].synchronize()
        return sum(start_mark.elapsed_time(end_mark) for start_mark, end_mark in self.spans) / 1e3


def in_milliseconds(numbers: dict[str, Any]) -> dict[str, Any]:
    """The same with every stopwatch read."""
    return {k: v.seconds() * 1e3 if isinstance(v, Stopwatch) else v for k, v in numbers.items()}
