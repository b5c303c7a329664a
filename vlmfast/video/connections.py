"""One connection to a camera or to a stream over the network: decoded frames with the stream's own stamps."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from vlmfast.core import UserError
from vlmfast.video import decoders
from vlmfast.video.frames import (
    LIMITS,
    Conversion,
    Decoded,
    frame_orientation,
    limit_decoder,
    of_picture,
    of_video,
    reason,
)  # fmt: skip

# What libav may open for a URL of each scheme: the stream itself and its parts, never a local file.
_HTTP = "http,https,httpproxy,tls,tcp,crypto,data"
SCHEMES = {
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
_UNSTAMPED = {"mpjpeg", "mjpeg"}  # MJPEG cameras send no stamps: the time of arrival is all there is
Stamped = tuple[Decoded, float | None]  # and the stream's own stamp in seconds, if it has one


class Lost(Exception):
    """The connection is gone; worth another try."""


class Finished(Exception):
    """The stream was of known length and has been read to its end."""


def well_formed(url: str) -> bool:
    """Is it well-formed, with a host and no character that would end a line?"""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0) and url.isprintable()
    except ValueError:
        return False


def without_secrets(url: str) -> str:
    """The URL without user name, password and query, for messages."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "that URL"
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def of_url(url: str, timeout: float, progress: dict[str, float]) -> Iterator[Stamped]:
    """One connection to `url`. `progress["until"]` carries the last media time over connections, for streams of known
    length: they begin anew, and what was given out already is passed over."""
    import av

    scheme = urlsplit(url).scheme
    options = {"protocol_whitelist": f"{scheme},{SCHEMES[scheme]}", **LIMITS}
    if scheme.startswith("rtsp"):
        options["rtsp_transport"] = "tcp"  # UDP loses packets, and firewalls drop it
    end_time: float | None = None  # media time, where the length is known
    frame_received = False
    try:
        with av.open(url, options=options, timeout=(timeout, timeout)) as container:
            if not container.streams.video:
                raise UserError(f"{without_secrets(url)} has no video track; give the address of a video stream")
            stream = container.streams.video[0]
            limit_decoder(stream, without_secrets(url))
            stream.thread_type = "SLICE"  # frame threads would hold back one frame per thread
            if container.duration is not None:
                end_time = ((container.start_time or 0) + container.duration) / 1e6
            arrival = bool(_UNSTAMPED & set(container.format.name.split(",")))
            convert: Conversion | None = None
            for frame in _tolerant(container, stream):
                frame_received = True
                convert = convert or Conversion(frame_orientation(frame, stream, without_secrets(url)))
                timestamp = None if frame.pts is None else float(frame.pts * stream.time_base)
                timestamp = time.monotonic() if arrival else timestamp
                if end_time is not None and timestamp is not None:
                    if timestamp <= progress.get("until", -np.inf):
                        continue
                    progress["until"] = timestamp
                yield partial(of_video, convert, frame), timestamp
    except av.error.ExitError:  # raised by PyAV's timeout
        raise Lost(f"no answer for {timeout:g} s") from None
    except av.error.FFmpegError as av_error:
        # Without a length in its header the end of an HTTP stream gives libav these errors too: no failure by itself.
        if not (frame_received and av_error.errno in (errno.EIO, errno.ECONNRESET, errno.EPIPE)):
            raise Lost(reason(av_error)) from None
    if end_time is not None and progress.get("until", -np.inf) >= end_time - 1.0:
        raise Finished


def _tolerant(container: Any, stream: Any) -> Iterator[Any]:
    """Decoded frames; a live stream may begin or break in the middle of a picture, so broken packets are skipped."""
    import av

    num_broken = 0
    try:
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError as av_error:
                num_broken += 1
                if num_broken > 250:  # ten seconds of nothing but noise
                    raise Lost(reason(av_error)) from None
                continue
            for frame in frames:
                num_broken = 0
                yield frame
    except av.error.FFmpegError:
        with suppress(av.error.FFmpegError):  # what arrived before the loss is still in the decoder
            yield from stream.codec_context.decode(None)
        raise


def of_camera(number: int) -> Iterator[Stamped]:
    """One connection to a camera, through OpenCV. Stamps are the driver's, or the time of arrival where it has none."""
    decoders.require("opencv")
    import cv2

    capture = cv2.VideoCapture(number)
    try:
        if not capture.isOpened():
            raise Lost("no such camera, or another program has it")
        while capture.grab():
            driver_time = capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3
            delivered, frame = capture.retrieve()
            if not delivered:
                break
            picture = partial(np.ascontiguousarray, frame[..., ::-1])
            yield partial(of_picture, picture), driver_time if driver_time > 0 else time.monotonic()
        raise Lost("it gave no more frames")
    finally:
        capture.release()
