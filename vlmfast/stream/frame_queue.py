"""Frames on their way in: checked, timed, and queued while the model is busy."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmfast.core import UserError

Timed = tuple[Tensor, float]


def as_frames(frames: Any) -> list[Tensor]:
    """Frames (H, W, 3) uint8 from one picture, an array or tensor (T, H, W, 3) or (T, 3, H, W), or a list of those."""
    if isinstance(frames, (list, tuple)):
        return [f for item in frames for f in as_frames(item)]
    if not isinstance(frames, Tensor):
        array = np.ascontiguousarray(np.asarray(frames))
        frames = torch.from_numpy(array if array.flags.writeable else array.copy())
    if frames.ndim == 3:
        frames = frames[None]
    if frames.ndim == 4 and frames.shape[-1] != 3 and frames.shape[1] == 3:
        frames = frames.permute(0, 2, 3, 1)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
        raise UserError(
            f"frames of shape {tuple(frames.shape)} and dtype {frames.dtype} came in; "
            "a stream takes uint8 RGB (T, H, W, 3), or a list of such pictures"
        )
    return list(frames)


def as_times(timestamps: Any, count: int, last: float | None, step: float) -> list[float]:
    """`count` seconds, strictly increasing and after `last`; None continues from `last` in steps of `step`."""
    if timestamps is None:
        start = 0.0 if last is None else last + step
        return [start + i * step for i in range(count)]
    times = [
        float(t) for t in (timestamps if isinstance(timestamps, Sequence) else np.atleast_1d(np.asarray(timestamps)))
    ]
    if len(times) != count:
        raise UserError(f"{count} frames came with {len(times)} timestamps: give one per frame, in seconds")
    before = last
    for t in times:
        if not math.isfinite(t) or (before is not None and t <= before):
            raise UserError(
                f"timestamps go backwards: {t:g} s after {before if before is not None else 0:g} s; a stream's seconds "
                "must increase. None of these frames were taken, all before them are kept"
            )
        before = t
    return times


class FrameQueue:
    """A bounded queue of frames. Full: the oldest unencoded frame is dropped and counted, or the writer waits."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise UserError(f"queue={size} must hold at least one frame")
        self.size, self.dropped = size, 0
        self._items: deque[Timed] = deque()
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Timed) -> None:
        """Append one frame; when it is full the oldest makes room."""
        with self._changed:
            if len(self._items) >= self.size:
                self._items.popleft()
                self.dropped += 1
            self._items.append(item)
            self._changed.notify_all()

    def wait_for_room(self, seconds: float) -> None:
        """Until a frame was taken while it is full, or so long."""
        with self._changed:
            if len(self._items) >= self.size:
                self._changed.wait(seconds)

    def room(self) -> bool:
        """Is there room for one more without dropping another?"""
        return len(self._items) < self.size

    def give_back(self, items: list[Timed]) -> None:
        """Put frames that were taken, oldest first, in front again; none is dropped for it."""
        with self._changed:
            self._items.extendleft(reversed(items))
            self._changed.notify_all()

    def take(self, most: int) -> list[Timed]:
        """Up to `most` frames, oldest first."""
        with self._changed:
            out = [self._items.popleft() for _ in range(min(most, len(self._items)))]
            self._changed.notify_all()
            return out

    def wait(self, seconds: float) -> None:
        """Until something changes, or so long."""
        with self._changed:
            if not self._items:
                self._changed.wait(seconds)

    def newest(self) -> float | None:
        """Seconds of the newest frame waiting."""
        with self._changed:
            return self._items[-1][1] if self._items else None
