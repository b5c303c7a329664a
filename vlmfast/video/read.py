"""Reads chosen frames of a video or a folder of images, with their timestamps; writes videos.

    video = read_video("clip.mp4", select=Uniform(16), size=448)
    video.frames, video.timestamps            # (16, H, W, 3) uint8 RGB, (16,) seconds since the first frame

All frames are upright RGB uint8. Which frames are taken is decided here, from the timestamps in the file, and is the
same for every backend.
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from vlmfast import spec
from vlmfast.core import UserError
from vlmfast.fields import Method, NonNegativeFloat, PositiveFloat, PositiveInt, Range, checked
from vlmfast.video import decoders
from vlmfast.video.frame_index import read_index, reason
from vlmfast.video.images import (
    Size,
    as_frame,
    check_size,
    folder_images,
    image_size,
    read_image,
    resize,
    target,
)  # fmt: skip

_MOST_BYTES = 8 << 30
_THUMBNAIL_SIDE = 24
_SAME = 6e-4  # seconds; containers round stamps (mkv to 1 ms), so instants this close are one


# ------------------------------------------------------------------------------------- which frames


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


# ------------------------------------------------------------------------------------- videos


@dataclass(frozen=True)
class Video:
    """Chosen frames of a video. T frames of N in the source.

    frames: (T, H, W, 3) uint8 RGB, upright
    timestamps: (T,) float64, seconds since the source's first frame, strictly increasing
    indices: (T,) int64, their numbers in the source
    fps, duration, total, size: of the source: frames per second, seconds, N, (height, width) upright
    """

    frames: NDArray[np.uint8]
    timestamps: NDArray[np.float64]
    indices: NDArray[np.int64]
    fps: float
    duration: float
    total: int
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.frames)

    def metadata(self) -> dict[str, Any]:
        """What HF processors take as `video_metadata` (with `do_sample_frames=False`). They know only a constant
        rate, so the frame numbers are those that give the true timestamps at that rate."""
        return {
            "total_num_frames": max(self.total, round(self.duration * self.fps)),
            "fps": self.fps,
            "duration": self.duration,
            "frames_indices": np.round(self.timestamps * self.fps).astype(int).tolist(),
            "height": self.frames.shape[1],
            "width": self.frames.shape[2],
        }


def read_video(
    path: str | os.PathLike[str],
    select: Select | str | None = None,
    backend: str = "pyav",
    max_frames: int | None = None,
    size: Size = None,
    fps: float | None = None,
) -> Video:
    """Reads the selected frames of a video file or of a folder of images.

    select: Uniform (default, 16 frames), Fps or SceneChange, or the same as text ("fps:2")
    backend: "pyav", "decord" or "opencv": who decodes; frames and timestamps are the same
    max_frames: thins the selection evenly to at most that many
    size: (height, width), or an integer: the longer side is scaled down to it; None = as stored
    fps: of a folder only: images per second, default 1
    Raises UserError for bad files and bad arguments. Only the selected frames are kept in memory.
    """
    path = Path(path)
    select = parse_select(select) if isinstance(select, str) else select or Uniform()
    if isinstance(select, type) or not hasattr(select, "pick"):
        raise UserError(f"select must be Uniform, Fps, SceneChange or text such as 'uniform:16', got {select!r}")
    decoders.require(backend)
    check_size(size)
    if max_frames is not None:
        checked("max_frames", max_frames, PositiveInt, "read_video")
    if fps is not None:
        checked("fps", fps, PositiveFloat, "read_video")
    if os.path.isdir(path):
        return _read_folder(path, select, max_frames, size, 1.0 if fps is None else fps)
    if fps is not None:
        raise UserError(f"fps= is for folders of pictures; {path} has its own timestamps (choose by select=Fps(...))")
    index = read_index(path)
    indices = _thin(select.pick(index.timestamps, decoders.thumbnails(index, _THUMBNAIL_SIDE)), max_frames)
    frames = _collect(path, decoders.fetch(index, indices, backend), len(indices), index.upright_size, size)
    return Video(frames, index.timestamps[indices], indices, index.fps, index.duration, len(index), index.upright_size)


def _read_folder(path: Path, select: Select, max_frames: int | None, size: Size, fps: float) -> Video:
    files = folder_images(path, size)
    times = np.arange(len(files)) / fps
    thumbnails = (resize(read_image(file), (_THUMBNAIL_SIDE, _THUMBNAIL_SIDE)) for file in files)
    indices = _thin(select.pick(times, thumbnails), max_frames)
    upright = image_size(files[0])
    frames = _collect(path, (read_image(files[number]) for number in indices), len(indices), upright, size)
    return Video(frames, times[indices], indices, fps, len(files) / fps, len(files), upright)


def _thin(indices: NDArray[np.int64], max_frames: int | None) -> NDArray[np.int64]:
    if max_frames is None or len(indices) <= max_frames:
        return indices
    return indices[Uniform(max_frames).pick(np.arange(len(indices), dtype=np.float64), iter(()))]


def _collect(
    path: Path, frames: Iterable[NDArray[np.uint8]], count: int, upright: tuple[int, int], size: Size
) -> NDArray[np.uint8]:
    height, width = target(upright, size)
    if count * height * width * 3 > _MOST_BYTES:
        raise UserError(
            f"{count} frames of {height}x{width} from {path} would take {count * height * width * 3 / 2**30:.0f} GiB "
            "of memory; select fewer, or pass max_frames= or a smaller size="
        )
    collected = np.empty((count, height, width, 3), np.uint8)
    for position, frame in enumerate(frames):
        if frame.shape != (*upright, 3) and not isinstance(size, tuple):
            raise UserError(
                f"frames of {path} change size from {upright[0]}x{upright[1]} to {frame.shape[0]}x{frame.shape[1]}; "
                "pass size=(height, width)"
            )
        collected[position] = resize(frame, (height, width))
    return collected


def write_video(path: str | os.PathLike[str], frames: Any, fps: float, crf: int = 12) -> Path:
    """Writes frames (T, H, W, 3) uint8 RGB (an array, a tensor, or any iterable of such pictures) as H.264 mp4.

    fps: frames per second. crf: the x264 quality (0 lossless, 12 near so, 23 usual). The file appears whole or not at
    all. Raises UserError for no frames, odd or changing sizes and wrong dtypes. Returns the path.
    """
    import av

    path = Path(path)
    checked("fps", fps, PositiveFloat, "write_video")
    if not path.parent.is_dir():
        raise UserError(f"no such folder: {path.parent}; create it first")
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; give the name of a file, such as {path / 'clip.mp4'}")
    unfinished = path.with_name(f".{uuid.uuid4().hex}.part.mp4")
    try:
        with av.open(unfinished, "w", format="mp4") as container:
            stream: Any = None
            for frame in frames:
                picture = as_frame(frame)
                if stream is None:
                    h, w = picture.shape[:2]
                    if h % 2 or w % 2:
                        raise UserError(f"H.264 needs even sides, got {h}x{w}; crop or pad the frames by one pixel")
                    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(100_000))
                    stream.width, stream.height, stream.pix_fmt = w, h, "yuv420p"
                    # With x264's macroblock tree the same frames do not always make the same file.
                    stream.options = {"crf": str(crf), "x264-params": "mbtree=0"}
                if picture.shape[:2] != (h, w):
                    raise UserError(f"frames change size from {h}x{w} to {picture.shape[0]}x{picture.shape[1]}")
                converted = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
                container.mux(stream.encode(converted))
            if stream is None:
                raise UserError(f"no frames to write to {path}")
            container.mux(stream.encode(None))
        os.replace(unfinished, path)
    except (av.error.FFmpegError, OSError) as e:
        raise UserError(f"cannot write {path} ({reason(e)})") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return path
