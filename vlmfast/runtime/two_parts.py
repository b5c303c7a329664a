"""Choices that are begun at once and ended later, so that the host does not wait while the device has little to do.

A policy such as HybridKV launches its scores, and the host must read which heads are of which kind before it can go on.
On a GPU the layers that follow are launched first: what is read has long arrived when the choice is ended.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol, TypeVar, runtime_checkable

from vlmfast.core import CompressedLayer, LayerView

Result = TypeVar("Result")


@runtime_checkable
class TwoParts(Protocol):
    """A policy whose `compress` may be ended later."""

    def compressing(self, view: LayerView) -> Generator[None, None, CompressedLayer | None]:
        """`compress`: launches what can be launched, yields once, and returns what stays."""
        ...


def ended(running: Generator[None, None, Result]) -> Result:
    """Run it to its end: what it returns."""
    while True:
        try:
            next(running)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


class BegunChoices:
    """Groups of layers whose choice was begun, in order; each is ended when the next has begun, on a CPU at once."""

    def __init__(self) -> None:
        self._begun: list[tuple[list[LayerView], LayerView, Generator[None, None, CompressedLayer | None]]] = []

    def begin(self, policy: TwoParts, views: list[LayerView], view: LayerView) -> None:
        """Begin the choice of some layers; view: the same side by side, whose attention is freed."""
        running = policy.compressing(view)
        next(running, None)
        for layer_view in (view, *views):
            layer_view.window = None
        self._begun.append((views, view, running))

    def due(self, is_last: bool) -> Generator[tuple[list[LayerView], LayerView, CompressedLayer | None], None, None]:
        """What stays of the groups that are to be ended now, of all of them where the last one has begun."""
        while self._begun and (is_last or len(self._begun) > int(self._begun[-1][1].keys.is_cuda)):
            views, view, running = self._begun.pop(0)
            yield views, view, ended(running)
