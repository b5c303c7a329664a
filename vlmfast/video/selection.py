"""Chooses which frames of a video are taken, by their timestamps: evenly, at a rate, or where the scene changes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from vlmfast import spec
from vlmfast.core import UserError
from vlmfast.fields import Method, NonNegativeFloat, PositiveFloat, PositiveInt, Range

_SAME = 6e-4  # seconds; containers round stamps (mkv to 1 ms), so instants this close are one


class Select(Protocol):
    """Chooses frames: `pick` gets the timestamps (N,) of all frames, ascending, and (only if it asks for the next
    one) thumbnails (24, 24, 3) uint8 of one frame after the other; returns ascending distinct numbers (K,) int64."""

    def pick(self, times: NDArray[np.float64], thumbs: Iterator[NDArray[np.uint8]]) -> NDArray[np.int64]: ...


@dataclass(frozen=True)
class Uniform(Method):
    """`frames` frames evenly spaced in time, first and last included (one: the middle one); all, if there are fewer."""

    frames: PositiveInt = 16
    name: ClassVar[str] = "uniform"

    def pick(self, times: NDArray[np.float64], thumbs: Iterator[NDArray[np.uint8]]) -> NDArray[np.int64]:
        total, count = len(times), self.frames
        if count >= total:
            return np.arange(total)
        wanted = np.linspace(times[0], times[-1], count) if count > 1 else (times[:1] + times[-1:]) / 2
        right = np.clip(np.searchsorted(times, wanted), 1, total - 1)
        near = right - (wanted - times[right - 1] <= times[right] - wanted)
        # Where frames are sparse two instants share a frame: give each its own, pushing forward, then back.
        step = np.arange(count)
        near = np.maximum.accumulate(near - step) + step
        near = np.minimum(near, total - count + step)
        return near.astype(np.int64)


@dataclass(frozen=True)
class Fps(Method):
    """The frame on show at every 1/`rate` seconds from the first one on; each frame at most once."""

    rate: PositiveFloat = 2.0
    name: ClassVar[str] = "fps"

    def pick(self, times: NDArray[np.float64], thumbs: Iterator[NDArray[np.uint8]]) -> NDArray[np.int64]:
        span = times[-1] - times[0]
        if span * self.rate > 64 * len(times):  # far more instants than frames: every frame is on show at one
            return np.arange(len(times))
        ticks = times[0] + np.arange(math.floor((span + _SAME) * self.rate) + 1) / self.rate
        return np.unique(np.searchsorted(times, ticks + _SAME, side="right") - 1)


@dataclass(frozen=True)
class SceneChange(Method):
    """The first frame, then every frame that differs from the last one kept by more than `threshold`.

    threshold: mean absolute difference of the thumbnails, 0 to 1 (about 0.02: something moved; 0.1: another shot)
    min_gap: seconds that two kept frames are apart at least
    max_gap: seconds after which a frame is kept anyway; None = never

    Decodes every frame once, small.
    """

    threshold: Annotated[float, Range(0, 1, "both")] = 0.08
    min_gap: NonNegativeFloat = 0.2
    max_gap: PositiveFloat | None = None
    name: ClassVar[str] = "scene"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_gap is not None and self.max_gap <= self.min_gap:
            raise UserError(f"max_gap={self.max_gap} in scene must be longer than min_gap={self.min_gap}")

    def pick(self, times: NDArray[np.float64], thumbs: Iterator[NDArray[np.uint8]]) -> NDArray[np.int64]:
        kept, last_kept = [0], next(thumbs).astype(np.int16)
        longest = math.inf if self.max_gap is None else self.max_gap
        for number, thumb in enumerate(thumbs, start=1):
            interval = times[number] - times[kept[-1]]
            if interval < self.min_gap - 1e-6:
                continue
            thumbnail = thumb.astype(np.int16)
            if interval >= longest or np.abs(thumbnail - last_kept).mean() / 255 > self.threshold:
                kept.append(number)
                last_kept = thumbnail
        return np.asarray(kept, np.int64)


SELECTIONS: dict[str, type[Method]] = {kind.name: kind for kind in (Uniform, Fps, SceneChange)}


def parse_select(text: str) -> Select:
    """`uniform:16`, `fps:rate=2`, `scene:0.1,max_gap=10` as a selection; see `spec`."""
    select: Select = spec.read("frame selection", text, SELECTIONS)
    return select
