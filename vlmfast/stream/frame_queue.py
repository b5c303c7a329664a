"""Frames before they are encoded: checked, queued while the model is busy, and read from a source in a thread."""

from __future__ import annotations

import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmfast.core import UserError
from vlmfast.video.images import SizeRule

TimedFrame = tuple[Tensor, float]  # (H, W, 3) uint8 RGB, and its seconds


def as_frames(frames: Any) -> list[Tensor]:
    """Frames (H, W, 3) uint8 from one of them, an array or tensor (T, H, W, 3) or (T, 3, H, W), or a list of those."""
    if isinstance(frames, (list, tuple)):
        return [frame for part in frames for frame in as_frames(part)]
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
            "a stream takes uint8 RGB (T, H, W, 3), or a list of such frames"
        )
    return list(frames)


def as_times(timestamps: Any, count: int, last: float | None, step: float) -> list[float]:
    """`count` seconds, strictly increasing and after `last`; None continues from `last` in steps of `step`."""
    if timestamps is None:
        start = 0.0 if last is None else last + step
        return [start + index * step for index in range(count)]
    times = [
        float(seconds)
        for seconds in (timestamps if isinstance(timestamps, Sequence) else np.atleast_1d(np.asarray(timestamps)))
    ]
    if len(times) != count:
        raise UserError(f"{count} frames came with {len(times)} timestamps: give one per frame, in seconds")
    previous = last
    for seconds in times:
        if not math.isfinite(seconds) or (previous is not None and seconds <= previous):
            raise UserError(
                f"timestamps go backwards: {seconds:g} s after {previous if previous is not None else 0:g} s; a "
                "stream's seconds must increase. None of these frames were taken, all before them are kept"
            )
        previous = seconds
    return times


class FrameQueue:
    """A bounded queue of frames. Full: the oldest unencoded frame is dropped and counted, or the writer waits."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise UserError(f"queue={size} must hold at least one frame")
        self.size, self.dropped = size, 0
        self._frames: deque[TimedFrame] = deque()
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._frames)

    def put(self, frame: TimedFrame) -> None:
        """Append one frame; when it is full the oldest makes room."""
        with self._changed:
            if len(self._frames) >= self.size:
                self._frames.popleft()
                self.dropped += 1
            self._frames.append(frame)
            self._changed.notify_all()

    def wait_for_room(self, seconds: float) -> None:
        """Until a frame was taken while it is full, or so long."""
        with self._changed:
            if len(self._frames) >= self.size:
                self._changed.wait(seconds)

    def room(self) -> bool:
        """Is there room for one more without dropping another?"""
        return len(self._frames) < self.size

    def give_back(self, frames: list[TimedFrame]) -> None:
        """Put frames that were taken, oldest first, in front again; none is dropped for it."""
        with self._changed:
            self._frames.extendleft(reversed(frames))
            self._changed.notify_all()

    def take(self, most: int) -> list[TimedFrame]:
        """Up to `most` frames, oldest first."""
        with self._changed:
            taken = [self._frames.popleft() for _ in range(min(most, len(self._frames)))]
            self._changed.notify_all()
            return taken

    def next(self, most: int) -> list[TimedFrame]:
        """What `take` would give now, without taking it."""
        with self._changed:
            return list(itertools.islice(self._frames, most))

    def wait(self, seconds: float) -> None:
        """Until something changes, or so long."""
        with self._changed:
            if not self._frames:
                self._changed.wait(seconds)


def open_frames(source: Any, options: dict[str, Any], frame_size: SizeRule) -> Iterable[Any]:
    """(frame, seconds) pairs of a file, folder, URL or camera by `open_source(**options)`, or an iterable as it is.

    frame_size: what size="model" means, which is the default of files and folders.
    """
    from vlmfast.video.live_source import open_source

    if isinstance(source, (str, int)) or hasattr(source, "__fspath__"):
        size = options.get("size", "full" if is_live(source) else "model")
        return open_source(source, **options | {"size": frame_size if size == "model" else size})
    if options:
        raise UserError(f"{', '.join(options)}: options are for files, cameras and URLs; frames came in ready")
    return iter(source)


def is_live(source: Any) -> bool:
    """Is it a camera or a URL, which does not wait for a slow reader?"""
    return isinstance(source, int) or (isinstance(source, str) and "://" in source)


class Watcher:
    """Reads a source in one thread and has its frames encoded in another: neither encoding nor answering makes a
    camera wait.

    frames: (frame, seconds) pairs. queue: where accepted frames wait. offer(frames, seconds): queue one frame; False
    where there is no room yet. encode: encode some of what waits. `error` holds what ended the watching early.
    """

    def __init__(
        self,
        frames: Iterable[Any],
        queue: FrameQueue,
        offer: Callable[[list[Tensor], float], bool],
        encode: Callable[[], None],
    ) -> None:
        self.frames, self.queue = frames, queue
        self.offer, self.encode = offer, encode
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._read = threading.Event()  # the reader has come to the end
        self._reader = threading.Thread(target=self._reading, daemon=True)
        self._encoder = threading.Thread(target=self._encoding, daemon=True)

    def start(self) -> None:
        self._reader.start()
        self._encoder.start()

    def _reading(self) -> None:
        try:
            for frame, seconds in self.frames:
                if self._stop.is_set():
                    break
                checked_frames = as_frames(frame)
                while not self._stop.is_set() and not self.offer(checked_frames, float(seconds)):
                    self.queue.wait_for_room(0.1)
        except BaseException as e:
            self.error = e
        finally:
            close_source = getattr(self.frames, "close", None)
            if close_source is not None:
                close_source()
            self._read.set()

    def _encoding(self) -> None:
        try:
            while not (self._read.is_set() and not len(self.queue)):
                if self._stop.is_set():
                    return
                self.queue.wait(0.05)
                self.encode()
                self._stop.wait(0.001)  # lets a question, or another call of the model, come in between
        except BaseException as e:
            self.error = self.error or e
            self._stop.set()

    @property
    def running(self) -> bool:
        return self._encoder.is_alive() or self._reader.is_alive()

    def wait(self, seconds: float | None = None) -> bool:
        """Until the source has ended and its frames are encoded (or so long); False when it still runs.

        Raises what ended the source early.
        """
        self._encoder.join(seconds)
        if not self._encoder.is_alive() and self.error is not None:
            error, self.error = self.error, None
            raise error
        return not self._encoder.is_alive()

    def stop(self) -> None:
        """End watching; frames in the queue are encoded with the next push or question."""
        self._stop.set()
        for thread in (self._reader, self._encoder):
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(5)
