"""Yields frames with their seconds, one after the other: from files, folders, cameras, URLs or an iterable.

    for image, seconds in open_source("rtsp://camera/stream", sample_fps=2): ...

Time is what the stream's own stamps say, in seconds since the first frame. It never stands still or runs backwards,
neither when a camera restarts its clock nor over a lost connection.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlmfast.core import UserError
from vlmfast.fields import NonNegativeInt, PositiveFloat, checked
from vlmfast.video import images
from vlmfast.video.connections import (
    SCHEMES,
    Finished,
    Lost,
    Stamped,
    of_camera,
    of_url,
    well_formed,
    without_secrets,
)  # fmt: skip
from vlmfast.video.due import Due, DueStamps
from vlmfast.video.frames import (
    Conversion,
    Decoded,
    can_skip,
    frame_orientation,
    frames_of,
    of_picture,
    of_video,
    open_video,
    stamped,
    timestamp_of,
)  # fmt: skip
from vlmfast.video.images import Size
from vlmfast.video.packet_count import PacketCount

_LONGEST_WAIT = 30.0
_Timed = tuple[Decoded, float]  # and seconds since the first frame


class Frame(NamedTuple):
    """image (H, W, 3) uint8 RGB upright; timestamp in seconds since the source's first frame."""

    image: NDArray[np.uint8]
    timestamp: float


class Clock:
    """Turns stamps into seconds since the first frame, strictly increasing. `step` is the nominal frame interval."""

    def __init__(self, step: float) -> None:
        self.step, self.offset = step, 0.0
        self.last: float | None = None  # what was given out last
        self.stamp: float | None = None  # the stamp it came from
        self.away: float | None = None  # seconds without connection before the frame to come

    def __call__(self, stamp: float | None) -> float:
        if self.last is None:
            self.offset, seconds = -(stamp or 0.0), 0.0
        elif stamp is None:
            seconds = self.last + (self.step if self.away is None else max(self.step, self.away))
        else:
            if self.away is not None:  # the same clock, if it moved on by about as long as we were away
                stamp_interval = None if self.stamp is None else stamp - self.stamp
                if stamp_interval is None or not 0 < stamp_interval < self.away + 10:
                    self.offset = self.last + max(self.step, self.away) - stamp
            seconds = stamp + self.offset
            if seconds <= self.last:  # the clock was set back
                seconds = self.last + self.step
                self.offset = seconds - stamp
        self.last, self.stamp, self.away = seconds, stamp, None
        return seconds


def open_source(
    source: str | os.PathLike[str] | int | Iterable[Any],
    *,
    realtime: bool = False,
    fps: float | None = None,
    sample_fps: float | None = None,
    size: Size = None,
    reconnect: int = 5,
    backoff: float = 0.5,
    timeout: float = 10.0,
) -> Iterator[Frame]:
    """An iterator of `Frame(image, timestamp)`; every image has the size of the first one (or `size`).

    source: a video file, a folder of pictures (natural order), a URL (http, rtsp, rtmp, srt, udp, tcp), a camera
    number (through OpenCV), or any iterable of frames or of (frame, seconds) pairs
    realtime: files, folders and iterables: wait until each frame's time has come (else as fast as asked for)
    fps: of a folder or of frames without seconds: frames per second, default 1
    sample_fps: give out at most that many frames per second of stream time; the others are not converted
    size: (height, width), or an integer for the longer side, or a function as in `read_video`, asked for one frame;
    None or "full" = as they come
    reconnect: URLs and cameras: tries after a loss, waiting `backoff` seconds, then twice that, ... at most 30 s;
    every received frame resets the count. 0: a stream that closes ends the iteration; silence raises
    timeout: seconds without an answer after which a connection counts as lost
    Raises UserError at the call for bad arguments and missing files, later for damage and for streams that do not
    come back. A first connection that fails is not tried again.
    """
    images.check_size(size)
    positive = {"fps": fps, "sample_fps": sample_fps, "backoff": backoff, "timeout": timeout}
    for option_name, option_value in positive.items():
        if option_value is not None:
            checked(option_name, option_value, PositiveFloat, "open_source")
    checked("reconnect", reconnect, NonNegativeInt, "open_source", 5)
    frame_interval = 1.0 if fps is None else 1 / fps
    if realtime and (isinstance(source, int) or (isinstance(source, str) and "://" in source)):
        raise UserError("realtime= is for files, folders and iterables; cameras and URLs set their own pace")
    if isinstance(source, int):
        if isinstance(source, bool) or source < 0:
            raise UserError(f"a camera has a number, 0 or more, got {source!r}")
        frames = _reconnecting(f"camera {source}", lambda: of_camera(source), reconnect, backoff)
        return _deliver(frames, sample_fps, size, False)
    if isinstance(source, str) and "://" in source:
        scheme, _, address = source.partition("://")
        url = f"{scheme.lower()}://{address}"
        if scheme.lower() not in SCHEMES or not well_formed(url):
            raise UserError(
                f"cannot open {without_secrets(url)}; a URL must begin with {', '.join(SCHEMES)} and name a host"
            )
        progress: dict[str, float] = {}
        frames = _reconnecting(without_secrets(url), lambda: of_url(url, timeout, progress), reconnect, backoff)
        return _deliver(frames, sample_fps, size, False)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if os.path.isdir(path):
            picture_files = images.folder_images(path)
            if not isinstance(size, tuple):
                images.check_one_size(picture_files)
            timed_frames = (
                (partial(of_picture, partial(images.read_image, picture_file)), frame_index * frame_interval)
                for frame_index, picture_file in enumerate(picture_files)
            )
            return _deliver(timed_frames, sample_fps, size, realtime)
        if fps is not None:
            raise UserError(f"fps= is for folders and bare frames; {path} has its own timestamps (sample_fps= thins)")
        with open_video(path):
            pass  # whatever is wrong with it is raised now
        return _deliver(_file(path, sample_fps), sample_fps, size, realtime)
    if not isinstance(source, Iterable):
        raise UserError(f"a source is a path, a URL, a camera number or an iterable, got {type(source).__name__}")
    return _deliver(_iterated(source, frame_interval), sample_fps, size, realtime)


def _deliver(frames: Iterable[_Timed], max_fps: float | None, size: Size, realtime: bool) -> Iterator[Frame]:
    """Thins, paces, converts and scales."""
    start_time, due = time.monotonic(), Due(max_fps)
    first_target: list[tuple[int, int]] = []

    def target(upright: tuple[int, int]) -> tuple[int, int]:
        if not first_target:
            first_target.append(images.target(upright, size))
        return first_target[0]

    for decoded, seconds in frames:
        if not due(seconds):
            continue
        if realtime:
            time.sleep(max(0.0, start_time + seconds - time.monotonic()))
        yield Frame(decoded(target), float(seconds))


def _file(path: Path, max_fps: float | None) -> Iterator[_Timed]:
    with open_video(path) as (container, stream):
        clock = Clock(1 / float(stream.guessed_rate or stream.average_rate or 25))
        convert: Conversion | None = None
        packet_count = PacketCount()
        due_stamps = DueStamps(max_fps, float(stream.time_base)) if max_fps is not None and stamped(container) else None
        for frame in frames_of(container, stream, path, packet_count, due_stamps):
            if convert is None and due_stamps is not None:
                due_stamps.skipping = can_skip(stream, frame)
            convert = convert or Conversion(frame_orientation(frame, stream, path))
            yield partial(of_video, convert, frame), clock(timestamp_of(container, frame))
        if convert is None:
            raise UserError(f"{path} has no frames; check that it plays, or record it again")
        packet_count.check(path, container, stream)


def _iterated(source: Iterable[Any], frame_interval: float) -> Iterator[_Timed]:
    last_seconds, frame_number = -np.inf, -1
    for frame_number, element in enumerate(source):
        timed = isinstance(element, tuple) and len(element) == 2
        frame, seconds = element if timed else (element, frame_number * frame_interval)
        if not isinstance(seconds, (int, float, np.number)) or not last_seconds < seconds < np.inf:
            order = f"seconds must increase (the last was {last_seconds:g})"
            raise UserError(f"frame {frame_number} has the timestamp {seconds!r}; {order}")
        last_seconds = float(seconds)
        yield partial(of_picture, partial(images.as_frame, frame)), last_seconds
    if frame_number < 0:
        raise UserError("the source gave no frames")


def _reconnecting(
    name: str, connect: Callable[[], Iterator[Stamped]], max_tries: int, backoff: float
) -> Iterator[_Timed]:
    """Frames of one connection after the other, on one clock. `connect` raises Lost, or ends when the stream does."""
    clock, num_failed, received = Clock(1 / 25), 0, time.monotonic()
    while True:
        reason = "it ended"
        try:
            for decoded, timestamp in connect():
                if num_failed:
                    clock.away, num_failed = time.monotonic() - received, 0
                yield decoded, clock(timestamp)
                received = time.monotonic()
            if max_tries == 0 and clock.last is not None:
                return
        except Finished:
            return
        except Lost as loss:
            reason = str(loss)
        if clock.last is None:
            advice = "check the address, that it runs, and the password"
            raise UserError(f"cannot open {name} ({reason}); {advice}") from None
        if num_failed >= max_tries:
            raise UserError(
                f"{name} stopped after {clock.last:.1f} s ({reason}) and did not come back in {max_tries} tries; "
                "start it again, or raise reconnect="
            ) from None
        time.sleep(min(_LONGEST_WAIT, backoff * 2**num_failed))
        num_failed += 1
