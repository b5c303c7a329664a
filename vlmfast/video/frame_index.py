"""Opens a local video file, and lists its frames and the second at which each is shown.

`read_index(path)` reads packets and decodes nothing where the container allows. The index is made by PyAV, whatever
backend decodes, and is the only authority on frame numbers and timestamps.
"""

from __future__ import annotations

from collections.abc import Container, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmfast.core import UserError
from vlmfast.video.conversion import Orientation, frame_orientation
from vlmfast.video.due import DueStamps
from vlmfast.video.limits import MOST_PIXELS, check_pixels, regular

# What libav may take a file for: containers of video, and sound and pictures in order to say that it is one. Left out
# are the formats that name further files or addresses (playlists, session descriptions, concatenations).
_FORMATS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,h264,hevc,vvc,obu,av1,ivf,m4v,mpegvideo,mjpeg,gif,apng,nut,mxf,dv,"
    "yuv4mpegpipe,rm,wav,mp3,flac,aac,ac3,aiff,au,png_pipe,jpeg_pipe,bmp_pipe,webp_pipe,tiff_pipe,gif_pipe,image2"
)
LIMITS = {"max_pixels": str(MOST_PIXELS)}  # of libav's decoders, also while it probes a file
_STAMPED = {"mp4", "matroska", "mpegts"}  # their packets carry true presentation stamps; elsewhere frames are counted
_STAMPLESS = {"avi", "h264", "hevc", "mpegvideo", "m4v"}  # only a frame rate: what libav makes up is no better


@dataclass(frozen=True)
class Index:
    """The frames of one file in the order they are shown. N frames.

    timestamps: (N,) float64, seconds since the first frame, strictly increasing
    pts: (N,) int64 stamps as stored, or None when frames can only be counted
    keys: (K,) int64, the stamps a decoder can start from; empty when pts is None
    fps: average frames per second; duration in seconds, last frame included
    size: (height, width) of the decoded frames; orientation: what sets them upright
    container: libav's name of the file format, such as "mov,mp4,m4a,3gp,3g2,mj2"
    skips: can the decoder leave out just those frames to which no other refers (see `can_skip`)?
    """

    path: Path
    timestamps: NDArray[np.float64]
    pts: NDArray[np.int64] | None
    keys: NDArray[np.int64]
    fps: float
    duration: float
    size: tuple[int, int]
    orientation: Orientation
    container: str
    skips: bool = False

    def __len__(self) -> int:
        return len(self.timestamps)

    @property
    def upright_size(self) -> tuple[int, int]:
        """(height, width) of the upright frames."""
        return self.orientation.upright_size(self.size)


def reason(error: BaseException) -> str:
    """The message of a libav error, on one line and without its number and path."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".")


@contextmanager
def open_video(path: Path) -> Iterator[tuple[Any, Any]]:
    """(container, video stream) of a local file, threads on. Raises UserError for whatever is not a video."""
    import av

    path = regular(path, "file")
    with path.open("rb") as video_file:
        first_bytes = video_file.read(16).lstrip().lower()
    if first_bytes.startswith((b"#extm3u", b"ffconcat")):
        # A playlist would make libav open files and addresses that the user never named.
        raise UserError(f"{path} is a playlist, not a video; give the video itself, or the stream's URL")
    try:
        # The protocol is spelled out so that a name like "http:x" or "concat:a|b" stays a file name.
        options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS, **LIMITS}
        container = av.open(f"file:{path.absolute()}", options=options)
    except (av.error.FFmpegError, ValueError) as av_error:
        raise UserError(
            f"{path} cannot be read as a video ({reason(av_error)}): it is damaged, cut short or not a video; "
            "check that it plays, or copy it again"
        ) from None
    with container:
        streams = [
            track for track in container.streams.video if not track.disposition & 0x400
        ]  # 0x400: a cover picture
        format_name = container.format.name
        if format_name == "image2" or format_name.endswith("_pipe"):
            raise UserError(f"{path} is a picture, not a video; give it as an image")
        if not streams or format_name == "tty":  # libav takes any .txt for terminal art
            raise UserError(f"{path} is not a video (it has no video track); give a file such as mp4, mkv or webm")
        limit_decoder(streams[0], path)
        streams[0].thread_type = "AUTO"  # by frames and by slices, on all cores
        streams[0].codec_context.thread_count = 0
        yield container, streams[0]


def limit_decoder(stream: Any, name: object) -> None:
    """Hold the decoder to MOST_PIXELS, also where a later frame is larger. UserError where the header says more."""
    if stream.codec_context is None:
        raise UserError(f"{name} is damaged, or coded in a way that is not known here; convert it to H.264")
    check_pixels(name, stream.height, stream.width)
    stream.codec_context.options = LIMITS


class PacketCount:
    """Counts the packets of one video track, and compares them with what the file's header announces."""

    def __init__(self) -> None:
        self.packets = 0
        self.last_duration, self.longest = 0, 0  # stamps that the last packet lasts, and between two packets at most
        self.first: int | None = None  # the smallest and the largest stamp
        self.last: int | None = None
        self._before: int | None = None

    def add(self, packet: Any) -> bool:
        """Count one packet; False for the mark at the end."""
        if packet.size == 0 and packet.dts is None:
            return False
        self.packets += 1
        if packet.pts is not None and not packet.is_discard:
            self.first = packet.pts if self.first is None else min(self.first, packet.pts)
            self.last = packet.pts if self.last is None else max(self.last, packet.pts)
            self.last_duration = packet.duration or 0
        if packet.dts is not None:
            self.longest = max(self.longest, packet.dts - self._before) if self._before is not None else 0
            self._before = packet.dts
        return True

    def check(self, path: Path, container: Any, stream: Any) -> None:
        """Raises UserError when the header promises clearly more than the file holds."""
        formats = set(container.format.name.split(","))
        least_shares = {"mp4": 1.0, "avi": 0.9}  # AVI also counts frames that only repeat the one before
        shares = [least_share for format_name, least_share in least_shares.items() if format_name in formats]
        num_needed = max(shares, default=0.0) * stream.frames
        if self.packets < num_needed:
            what_is_there = f"{self.packets} of the {stream.frames} frames"
        elif "matroska" in formats and self.first is not None and (promised := _promised(container, stream)):
            stamp_seconds = float(stream.time_base)
            held_seconds = ((self.last or 0) - self.first + self.last_duration) * stamp_seconds
            track_length = (
                "DURATION" in stream.metadata
            )  # the track's own length, but for how long its last frame is shown
            tolerance = 1.5 * self.longest * stamp_seconds + 0.04 if track_length else max(0.5, 0.02 * promised)
            if held_seconds > promised - tolerance:
                return
            what_is_there = f"{held_seconds:.1f} of the {promised:.1f} seconds"
        else:
            return
        raise UserError(
            f"{path} is truncated: it holds {what_is_there} its header announces; copy it again, or keep what is there "
            f"with: ffmpeg -i {path.name} -c copy whole.mkv"
        )


def can_skip(stream: Any, frame: Any) -> bool:
    """Can the stream's decoder leave out just those frames to which no other refers? frame: a decoded one of it.

    In H.264 and MPEG-2 every picture is marked as one that others refer to, or not. In HEVC that holds within one
    temporal layer, and the header in mp4 and mkv holds their number. Interlaced fields may come as two packets.
    """
    context = stream.codec_context
    if frame.interlaced_frame:
        return False
    codec_header = context.extradata or b""
    is_hvcc = len(codec_header) > 21 and codec_header[0] == 1
    one_layer = is_hvcc and (codec_header[21] >> 3) & 7 == 1  # its numTemporalLayers
    return context.name in ("h264", "mpeg2video") or (context.name == "hevc" and one_layer)


def frames_of(
    container: Any, stream: Any, path: Path, count: PacketCount | None = None, wanted: Container[int] | None = None
) -> Generator[Any, None, None]:
    """Decoded av.VideoFrame objects from where the container stands. UserError where decoding fails.

    count: of the packets on the way, for a reader that goes from the beginning to the end.
    wanted: stamps of the frames that must come; of the others, those to which no frame refers are not decoded.
    """
    import av

    last_seconds: float | None = None
    packets = container.demux(stream)
    try:
        for packet in wanted.ahead(packets) if isinstance(wanted, DueStamps) else packets:
            if count is not None:
                count.add(packet)
            if wanted is not None:  # holds for this packet alone, also with several decoding threads
                stream.codec_context.skip_frame = "DEFAULT" if packet.pts is None or packet.pts in wanted else "NONREF"
            for frame in packet.decode():
                last_seconds = frame.time
                yield frame
    except av.error.FFmpegError as av_error:
        location = "at its start" if last_seconds is None else f"after {last_seconds:.2f} s"
        raise UserError(
            f"{path} is damaged {location} ({reason(av_error)}); copy it again, or repair it with: "
            f"ffmpeg -err_detect ignore_err -i {path.name} repaired.mp4"
        ) from None


def stamped(container: Any) -> bool:
    """Do its packets carry true presentation stamps?"""
    return bool(_STAMPED & set(container.format.name.split(",")))


def timestamp_of(container: Any, frame: Any) -> float | None:
    """When the frame is shown, in seconds on the container's clock, or None where only the frame rate is known."""
    return None if container.format.name in _STAMPLESS else frame.time


def read_index(path: Path) -> Index:
    """Reads the frame index of `path` (packets only where the container allows, else one decoding pass).

    Raises UserError for a missing, empty, damaged or truncated file, for one without frames and for non-videos.
    """
    import av

    with open_video(path) as (container, stream):
        first_frame = next(frames_of(container, stream, path), None)
        if first_frame is None:
            raise UserError(f"{path} has no frames; check that it plays, or record it again")
        stored_size, orientation = (first_frame.height, first_frame.width), frame_orientation(first_frame, stream, path)
        skippable = can_skip(stream, first_frame)
        nominal_fps = float(stream.guessed_rate or stream.average_rate or 0)
        average_fps, stamp_seconds = float(stream.average_rate or 0), float(stream.time_base)
        format_name, stamps_exact = container.format.name, stamped(container)
    packet_stamps, key_stamps, packet_count = [], [], PacketCount()
    with open_video(path) as (container, stream):
        try:
            for packet in container.demux(stream):
                if not packet_count.add(packet):
                    continue
                stamps_exact &= packet.pts is not None
                if packet.pts is None or packet.is_discard:
                    continue  # decoded for others to refer to, never shown
                packet_stamps.append(packet.pts)
                if packet.is_keyframe:
                    key_stamps.append(packet.pts)
        except av.error.FFmpegError as av_error:
            location = f"after {packet_count.packets} frames"
            raise UserError(f"{path} is damaged {location} ({reason(av_error)}); copy it again") from None
        packet_count.check(path, container, stream)
    shown_stamps = np.unique(np.asarray(packet_stamps, np.int64))
    if stamps_exact and len(shown_stamps) == len(packet_stamps) and first_frame.pts == shown_stamps[0]:
        timestamps = (shown_stamps - shown_stamps[0]) * stamp_seconds
        keys, rates = np.sort(np.asarray(key_stamps, np.int64)), _rate_and_duration(timestamps, average_fps)
        return Index(path, timestamps, shown_stamps, keys, *rates, stored_size, orientation, format_name, skippable)
    with open_video(path) as (container, stream):
        frame_seconds = [timestamp_of(container, frame) for frame in frames_of(container, stream, path)]
    timestamps = np.asarray([np.nan if seconds is None else seconds for seconds in frame_seconds], np.float64)
    if not np.all(np.diff(timestamps) > 0):  # stamps missing or not in order: the nominal rate is all there is
        timestamps = np.arange(len(frame_seconds)) / (nominal_fps or 25.0)
    timestamps = timestamps - timestamps[0]
    rates = _rate_and_duration(timestamps, nominal_fps)
    return Index(path, timestamps, None, np.empty(0, np.int64), *rates, stored_size, orientation, format_name)


def _rate_and_duration(timestamps: NDArray[np.float64], nominal: float) -> tuple[float, float]:
    """(fps, duration). The container's nominal rate is kept where the stamps bear it out (they may be rounded)."""
    if len(timestamps) == 1:
        fps = nominal or 25.0
        return fps, 1 / fps
    measured = (len(timestamps) - 1) / timestamps[-1]
    fps = nominal if nominal and abs(nominal / measured - 1) < 0.02 else measured
    return float(fps), float(timestamps[-1] + np.median(np.diff(timestamps)))


def _promised(container: Any, stream: Any) -> float | None:
    """Seconds of video that a Matroska header announces: the track's own tag, or the file's when it is alone."""
    duration_text = stream.metadata.get("DURATION", "")
    try:
        hours, minutes, seconds = duration_text.split(":")
        return (
            int(hours) * 3600 + int(minutes) * 60 + float(seconds) - (stream.start_time or 0) * float(stream.time_base)
        )
    except ValueError:
        only_track = len(container.streams) == 1 and container.duration
        return container.duration / 1e6 if only_track else None
