"""Which frames of a stream are given out when at most so many a second are asked for, known before they are decoded."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Container, Iterable, Iterator
from typing import Any

_AHEAD = 32  # shown frames read before one is decided: packets come in another order than frames, by 16 at most


class Due:
    """Whether a frame is given out: the first one at or after every tick of 1/rate seconds. rate: None = all are."""

    def __init__(self, rate: float | None) -> None:
        self.rate, self._next = rate, 0.0

    def __call__(self, seconds: float) -> bool:
        """To be asked of all frames in order."""
        if self.rate is None:
            return True
        if seconds < self._next - 6e-4:  # stamps are rounded, in mkv to 1 ms
            return False
        self._next = (math.floor((seconds + 7e-4) * self.rate) + 1) / self.rate
        return True


class DueStamps(Container[int]):
    """The stamps of the frames that `Due` gives out, decided from packets that are read ahead.

    unit: seconds of a stamp. Until `skipping` is set, and after stamps that jump back, every stamp is in it.
    """

    def __init__(self, rate: float, unit: float) -> None:
        self._due, self._unit = Due(rate), unit
        self._first: float | None = None  # seconds of the first frame
        self._decided = -math.inf  # stamps up to here are decided
        self._stamps: set[int] = set()
        self.skipping, self._lost = False, False

    def __contains__(self, stamp: object) -> bool:
        return not self.skipping or self._lost or stamp in self._stamps

    def ahead(self, packets: Iterable[Any]) -> Iterator[Any]:
        """The packets as they come, each when it is decided whether its frame is due."""
        waiting: deque[Any] = deque()
        shown_stamps: list[int] = []
        for packet in packets:
            waiting.append(packet)
            if packet.pts is not None and not packet.is_discard:
                self._lost |= packet.pts <= self._decided
                heapq.heappush(shown_stamps, packet.pts)
            while len(shown_stamps) > _AHEAD:
                self._decide(heapq.heappop(shown_stamps))
            while waiting and (self._lost or waiting[0].pts is None or waiting[0].pts <= self._decided):
                yield waiting.popleft()
        while shown_stamps:
            self._decide(heapq.heappop(shown_stamps))
        yield from waiting

    def _decide(self, stamp: int) -> None:
        seconds = float(stamp * self._unit)
        self._first = seconds if self._first is None else self._first
        self._decided = stamp
        if self._due(seconds - self._first):
            self._stamps.add(stamp)
