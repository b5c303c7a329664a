"""Chooses which frames of a video are taken, by their timestamps: evenly, at a rate, or where the scene changes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from vlmfast import spec
from vlmfast.core import UserError
from vlmfast.fields import Method, NonNegativeFloat, PositiveFloat, PositiveInt, Range

_SAME = 6e-4  # seconds; containers round stamps (mkv to 1 ms), so instants this close are one


@runtime_checkable
class Select(Protocol):
    """Chooses frames: `pick` gets the timestamps (N,) of all frames, ascending, and (only if it asks for the next
    one) thumbnails (24, 24, 3) uint8 of one frame after the other; returns ascending distinct numbers (K,) int64."""

    def pick(self, times: NDArray[np.float64], thumbnails: Iterator[NDArray[np.uint8]]) -> NDArray[np.int64]: ...


@dataclass(frozen=True)
class Uniform(Method):
    """`frames` frames evenly spaced in time, first and last included (one: the middle one); all, if there are fewer."""

    frames: PositiveInt = 16
    name: ClassVar[str] = "uniform"

    def pick(self, times: NDArray[np.float64], thumbnails: Iterator[NDArray[np.uint8]]) -> NDArray[np.int64]:
        num_frames, num_wanted = len(times), self.frames
        if num_wanted >= num_frames:
            return np.arange(num_frames)
        instants = np.linspace(times[0], times[-1], num_wanted) if num_wanted > 1 else (times[:1] + times[-1:]) / 2
        next_frames = np.clip(np.searchsorted(times, instants), 1, num_frames - 1)
        nearest = next_frames - (instants - times[next_frames - 1] <= times[next_frames] - instants)
        # Where frames are sparse two instants share a frame: give each its own, pushing forward, then back.
        frame_places = np.arange(num_wanted)
        nearest = np.maximum.accumulate(nearest - frame_places) + frame_places
        nearest = np.minimum(nearest, num_frames - num_wanted + frame_places)
        return nearest.astype(np.int64)


@dataclass(frozen=True)
class Fps(Method):
    """The frame on show at every 1/`rate` seconds from the first one on; each frame at most once."""

    rate: PositiveFloat = 2.0
    name: ClassVar[str] = "fps"

    def pick(self, times: NDArray[np.float64], thumbnails: Iterator[NDArray[np.uint8]]) -> NDArray[np.int64]:
        duration = times[-1] - times[0]
        if duration * self.rate > 64 * len(times):  # far more instants than frames: every frame is on show at one
            return np.arange(len(times))
        instants = times[0] + np.arange(math.floor((duration + _SAME) * self.rate) + 1) / self.rate
        return np.unique(np.searchsorted(times, instants + _SAME, side="right") - 1)


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

    def pick(self, times: NDArray[np.float64], thumbnails: Iterator[NDArray[np.uint8]]) -> NDArray[np.int64]:
        kept_numbers, last_kept = [0], next(thumbnails).astype(np.int16)
        longest = math.inf if self.max_gap is None else self.max_gap
        for number, picture in enumerate(thumbnails, start=1):
            interval = times[number] - times[kept_numbers[-1]]
            if interval < self.min_gap - 1e-6:
                continue
            thumbnail = picture.astype(np.int16)
            if interval >= longest or np.abs(thumbnail - last_kept).mean() / 255 > self.threshold:
                kept_numbers.append(number)
                last_kept = thumbnail
        return np.asarray(kept_numbers, np.int64)


SELECTIONS: dict[str, type[Method]] = {kind.name: kind for kind in (Uniform, Fps, SceneChange)}


def parse_select(text: str) -> Select:
    """`uniform:16`, `fps:rate=2`, `scene:0.1,max_gap=10` as a selection; see `spec`."""
    selection: Select = spec.read("frame selection", text, SELECTIONS)
    return selection
