"""Counts the packets of a video track, to tell a file that is cut short from a whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmfast.core import UserError


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
