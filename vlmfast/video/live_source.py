"""Yields frames with their seconds, one after the other: from files, folders, cameras, URLs or an iterable.

    for image, seconds in open_source("rtsp://camera/stream", sample_fps=2): ...

Time is what the stream's own stamps say, in seconds since the first frame. It never stands still or runs backwards,
neither when a camera restarts its clock nor over a lost connection.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from vlmfast.core import UserError
from vlmfast.fields import NonNegativeInt, PositiveFloat, checked
from vlmfast.video import decoders, images
from vlmfast.video.frame_index import LIMITS, PacketCount, frames_of, limit_decoder, open_video, reason, timestamp_of
from vlmfast.video.images import Orientation, Size, frame_orientation

# What libav may open for a URL of each scheme: the stream itself and its parts, never a local file.
_HTTP = "http,https,httpproxy,tls,tcp,crypto,data"
_SCHEMES = {
    "http": _HTTP,
    "https": _HTTP,
    "rtsp": "rtp,srtp,udp,tcp,tls",
    "rtsps": "rtp,srtp,udp,tcp,tls",
    "rtmp": "rtmp,tcp",
    "rtmps": "rtmps,tls,tcp",
    "srt": "srt,udp",
    "tcp": "tcp",
    "udp": "udp",
}
_LONGEST_WAIT = 30.0
_UNSTAMPED = {"mpjpeg", "mjpeg"}  # MJPEG cameras send no stamps: the time of arrival is all there is
_Decoded = Callable[[], NDArray[np.uint8]]  # converts a decoded frame to pixels when it is wanted
_Stamped = tuple[_Decoded, float | None]  # and the stream's own stamp in seconds, if it has one
_Timed = tuple[_Decoded, float]  # and seconds since the first frame


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
                moved = None if self.stamp is None else stamp - self.stamp
                if moved is None or not 0 < moved < self.away + 10:
                    self.offset = self.last + max(self.step, self.away) - stamp
            seconds = stamp + self.offset
            if seconds <= self.last:  # the clock was set back
                seconds = self.last + self.step
                self.offset = seconds - stamp
        self.last, self.stamp, self.away = seconds, stamp, None
        return seconds


class _Lost(Exception):
    """The connection is gone; worth another try."""


class _Finished(Exception):
    """The stream was of known length and has been read to its end."""


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
    size: (height, width), or an integer for the longer side
    reconnect: URLs and cameras: tries after a loss, waiting `backoff` seconds, then twice that, ... at most 30 s;
    every received frame resets the count. 0: a stream that closes ends the iteration; silence raises
    timeout: seconds without an answer after which a connection counts as lost
    Raises UserError at the call for bad arguments and missing files, later for damage and for streams that do not
    come back. A first connection that fails is not tried again.
    """
    images.check_size(size)
    for name, value in (("fps", fps), ("sample_fps", sample_fps), ("backoff", backoff), ("timeout", timeout)):
        if value is not None:
            checked(name, value, PositiveFloat, "open_source")
    checked("reconnect", reconnect, NonNegativeInt, "open_source", 5)
    step = 1.0 if fps is None else 1 / fps
    if realtime and (isinstance(source, int) or (isinstance(source, str) and "://" in source)):
        raise UserError("realtime= is for files, folders and iterables; cameras and URLs set their own pace")
    if isinstance(source, int):
        if isinstance(source, bool) or source < 0:
            raise UserError(f"a camera has a number, 0 or more, got {source!r}")
        frames = _reconnecting(f"camera {source}", lambda: _camera(source), reconnect, backoff)
        return _deliver(frames, sample_fps, size, False)
    if isinstance(source, str) and "://" in source:
        scheme, _, rest = source.partition("://")
        url = f"{scheme.lower()}://{rest}"
        if scheme.lower() not in _SCHEMES or not _well_formed(url):
            raise UserError(
                f"cannot open {_without_secrets(url)}; a URL must begin with {', '.join(_SCHEMES)} and name a host"
            )
        seen: dict[str, float] = {}
        frames = _reconnecting(_without_secrets(url), lambda: _url(url, timeout, seen), reconnect, backoff)
        return _deliver(frames, sample_fps, size, False)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if os.path.isdir(path):
            files = images.folder_images(path, size)
            pairs = ((partial(images.read_image, file), number * step) for number, file in enumerate(files))
            return _deliver(pairs, sample_fps, size, realtime)
        if fps is not None:
            raise UserError(f"fps= is for folders and bare frames; {path} has its own timestamps (sample_fps= thins)")
        with open_video(path):
            pass  # whatever is wrong with it is said now
        return _deliver(_file(path), sample_fps, size, realtime)
    if not isinstance(source, Iterable):
        raise UserError(f"a source is a path, a URL, a camera number or an iterable, got {type(source).__name__}")
    return _deliver(_iterated(source, step), sample_fps, size, realtime)


def _deliver(frames: Iterable[_Timed], max_fps: float | None, size: Size, realtime: bool) -> Iterator[Frame]:
    """Thins, paces, converts and scales."""
    start, next_due = time.monotonic(), 0.0
    target_size: tuple[int, int] | None = None
    for decoded, seconds in frames:
        if max_fps is not None and seconds < next_due - 6e-4:  # stamps are rounded, in mkv to 1 ms
            continue
        if max_fps is not None:
            next_due = (np.floor((seconds + 7e-4) * max_fps) + 1) / max_fps
        if realtime:
            time.sleep(max(0.0, start + seconds - time.monotonic()))
        image = decoded()
        target_size = target_size or images.target((image.shape[0], image.shape[1]), size)
        yield Frame(images.resize(image, target_size), float(seconds))


def _file(path: Path) -> Iterator[_Timed]:
    with open_video(path) as (container, stream):
        clock, upright = Clock(1 / float(stream.guessed_rate or stream.average_rate or 25)), None
        count = PacketCount()
        for frame in frames_of(container, stream, path, count):
            upright = frame_orientation(frame, stream, path) if upright is None else upright
            yield partial(_pixels, frame, upright), clock(timestamp_of(container, frame))
        if upright is None:
            raise UserError(f"{path} has no frames; check that it plays, or record it again")
        count.check(path, container, stream)


def _pixels(frame: Any, upright: Orientation) -> NDArray[np.uint8]:
    return upright.apply(frame.to_ndarray(format="rgb24"))


def _iterated(source: Iterable[Any], step: float) -> Iterator[_Timed]:
    last, number = -np.inf, -1
    for number, element in enumerate(source):
        frame, now = element if isinstance(element, tuple) and len(element) == 2 else (element, number * step)
        if not isinstance(now, (int, float, np.number)) or not last < now < np.inf:
            raise UserError(f"frame {number} has the timestamp {now!r}; seconds must increase (the last was {last:g})")
        last = float(now)
        yield partial(images.as_frame, frame), last
    if number < 0:
        raise UserError("the source gave no frames")


def _reconnecting(name: str, connect: Callable[[], Iterator[_Stamped]], tries: int, backoff: float) -> Iterator[_Timed]:
    """Frames of one connection after the other, on one clock. `connect` raises _Lost, or ends when the stream does."""
    clock, failed, received = Clock(1 / 25), 0, time.monotonic()
    while True:
        why = "it ended"
        try:
            for decoded, stamp in connect():
                if failed:
                    clock.away, failed = time.monotonic() - received, 0
                yield decoded, clock(stamp)
                received = time.monotonic()
            if tries == 0 and clock.last is not None:
                return
        except _Finished:
            return
        except _Lost as loss:
            why = str(loss)
        if clock.last is None:
            raise UserError(f"cannot open {name} ({why}); check the address, that it runs, and the password") from None
        if failed >= tries:
            raise UserError(
                f"{name} stopped after {clock.last:.1f} s ({why}) and did not come back in {tries} tries; "
                "start it again, or raise reconnect="
            ) from None
        time.sleep(min(_LONGEST_WAIT, backoff * 2**failed))
        failed += 1


def _well_formed(url: str) -> bool:
    """Is it well-formed, with a host and no character that would end a line?"""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0) and url.isprintable()
    except ValueError:
        return False


def _without_secrets(url: str) -> str:
    """The URL without user name, password and query, for messages."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "that URL"
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def _url(url: str, timeout: float, progress: dict[str, float]) -> Iterator[_Stamped]:
    """One connection to `url`. `progress["until"]` carries the last media time over connections, for streams of known
    length: they begin anew, and what was given out already is passed over."""
    import av

    scheme = urlsplit(url).scheme
    options = {"protocol_whitelist": f"{scheme},{_SCHEMES[scheme]}", **LIMITS}
    if scheme.startswith("rtsp"):
        options["rtsp_transport"] = "tcp"  # UDP loses packets, and firewalls drop it
    end_time: float | None = None  # media time, where the length is known
    begun = False
    try:
        with av.open(url, options=options, timeout=(timeout, timeout)) as container:
            if not container.streams.video:
                raise UserError(f"{_without_secrets(url)} has no video track; give the address of a video stream")
            stream = container.streams.video[0]
            limit_decoder(stream, _without_secrets(url))
            stream.thread_type = "SLICE"  # frame threads would hold back one frame per thread
            if container.duration is not None:
                end_time = ((container.start_time or 0) + container.duration) / 1e6
            arrival = bool(_UNSTAMPED & set(container.format.name.split(",")))
            upright: Orientation | None = None
            for frame in _tolerant(container, stream):
                begun = True
                upright = frame_orientation(frame, stream, _without_secrets(url)) if upright is None else upright
                stamp = None if frame.pts is None else float(frame.pts * stream.time_base)
                stamp = time.monotonic() if arrival else stamp
                if end_time is not None and stamp is not None:
                    if stamp <= progress.get("until", -np.inf):
                        continue
                    progress["until"] = stamp
                yield partial(_pixels, frame, upright), stamp
    except av.error.ExitError:  # what PyAV's timeout looks like
        raise _Lost(f"no answer for {timeout:g} s") from None
    except av.error.FFmpegError as e:
        # Without a length in its header an HTTP stream's end looks like this to libav: no failure by itself.
        if not (begun and e.errno in (errno.EIO, errno.ECONNRESET, errno.EPIPE)):
            raise _Lost(reason(e)) from None
    if end_time is not None and progress.get("until", -np.inf) >= end_time - 1.0:
        raise _Finished


def _tolerant(container: Any, stream: Any) -> Iterator[Any]:
    """Decoded frames; a live stream may begin or break in the middle of a picture, so broken packets are skipped."""
    import av

    num_broken = 0
    try:
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError as e:
                num_broken += 1
                if num_broken > 250:  # ten seconds of nothing but noise
                    raise _Lost(reason(e)) from None
                continue
            for frame in frames:
                num_broken = 0
                yield frame
    except av.error.FFmpegError:
        with suppress(av.error.FFmpegError):  # what arrived before the loss is still in the decoder
            yield from stream.codec_context.decode(None)
        raise


def _camera(number: int) -> Iterator[_Stamped]:
    """One connection to a camera, through OpenCV. Stamps are the driver's, or the time of arrival where it has none."""
    decoders.require("opencv")
    import cv2

    capture = cv2.VideoCapture(number)
    try:
        if not capture.isOpened():
            raise _Lost("no such camera, or another program has it")
        while capture.grab():
            driver_time = capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3
            delivered, frame = capture.retrieve()
            if not delivered:
                break
            yield partial(np.ascontiguousarray, frame[..., ::-1]), driver_time if driver_time > 0 else time.monotonic()
        raise _Lost("it gave no more frames")
    finally:
        capture.release()
