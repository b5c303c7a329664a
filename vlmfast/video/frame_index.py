"""Lists the frames of a local video file and the second at which each is shown.

`read_index(path)` reads packets and decodes nothing where the container allows. The index is made by PyAV, whatever
backend decodes, and is the only authority on frame numbers and timestamps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlmfast.core import UserError
from vlmfast.video.frames import (
    Orientation,
    can_skip,
    frame_orientation,
    frames_of,
    open_video,
    reason,
    stamped,
    timestamp_of,
)  # fmt: skip
from vlmfast.video.packet_count import PacketCount


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
