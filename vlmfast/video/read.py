"""Reads chosen frames of a video or a folder of images, with their timestamps; writes videos.

    video = read_video("clip.mp4", select=Uniform(16), size=448)
    video.frames, video.timestamps            # (16, H, W, 3) uint8 RGB, (16,) seconds since the first frame

All frames are upright RGB uint8. Which frames are taken is decided by `selection`, from the timestamps in the file, and
is the same for every backend.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmfast.core import UserError
from vlmfast.fields import PositiveFloat, PositiveInt, checked
from vlmfast.video import decoders
from vlmfast.video.frame_index import read_index
from vlmfast.video.frames import reason
from vlmfast.video.images import (
    Size,
    as_frame,
    check_one_size,
    check_size,
    folder_images,
    image_size,
    read_image,
    resize,
    target,
)  # fmt: skip
from vlmfast.video.selection import Select, Uniform, parse_select

_MOST_BYTES = 8 << 30
_THUMBNAIL_SIDE = 24


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


class VideoReader:
    """The chosen frames of a video file or of a folder of images, before they are decoded.

    Arguments as in `read_video`. Opens the file, lists its frames and chooses; `read` decodes. T chosen frames of N:
    len() is T; timestamps, indices, fps, duration, total, size: as in `Video`. index: of a file's
    frames; a folder has none. opening_ms: what making this took.
    Raises UserError for bad files and bad arguments.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        select: Select | str | None = None,
        backend: str = "pyav",
        max_frames: int | None = None,
        fps: float | None = None,
    ) -> None:
        start_time = time.perf_counter()
        self.path, self.backend = Path(path), backend
        select = parse_select(select) if isinstance(select, str) else select or Uniform()
        if isinstance(select, type) or not isinstance(select, Select):
            raise UserError(f"select must be Uniform, Fps, SceneChange or text such as 'uniform:16', got {select!r}")
        decoders.require(backend)
        if max_frames is not None:
            checked("max_frames", max_frames, PositiveInt, "read_video")
        if fps is not None:
            checked("fps", fps, PositiveFloat, "read_video")
        self._folder = os.path.isdir(self.path)
        self._slower: list[str] = []  # what decoding said of itself
        if self._folder:
            self.fps = 1.0 if fps is None else fps
            self._files = folder_images(self.path)
            all_timestamps = np.arange(len(self._files)) / self.fps
            self.duration, self.size = len(all_timestamps) / self.fps, image_size(self._files[0])
            thumbnail_size = (_THUMBNAIL_SIDE, _THUMBNAIL_SIDE)
            thumbnails: Iterator[NDArray[np.uint8]] = (resize(read_image(file), thumbnail_size) for file in self._files)
        else:
            if fps is not None:
                raise UserError(
                    f"fps= is for folders of pictures; {path} has its own timestamps (choose by select=Fps(...))"
                )
            self.index = read_index(self.path)
            all_timestamps, self.fps, self.duration = self.index.timestamps, self.index.fps, self.index.duration
            self.size = self.index.upright_size
            thumbnails = decoders.thumbnails(self.index, _THUMBNAIL_SIDE)
        self.indices = _thin(select.pick(all_timestamps, thumbnails), max_frames)
        self.timestamps, self.total = all_timestamps[self.indices], len(all_timestamps)
        self.opening_ms = (time.perf_counter() - start_time) * 1e3

    def __len__(self) -> int:
        return len(self.indices)

    def decodes_more(self) -> str | None:
        """Why frames are decoded that nobody chose and no chosen frame refers to; None where that is not so.

        What only decoding finds out is known once the frames are read.
        """
        if self._slower:
            return self._slower[0]
        if self._folder or len(self) == self.total:
            return None
        if self.backend.startswith("torchcodec"):
            return f"{self.backend} leaves no frame out: all from a key frame to a chosen one are decoded"
        if self.backend != "pyav":
            return f"{self.backend} decodes every frame up to the last chosen one, backend='pyav' need not"
        if self.index.pts is None:
            return "its frames can only be counted, so every one up to the last chosen one is decoded"
        if not self.index.skips and len(self.index.keys) < self.total:
            return "its codec leaves no frame out, so all from a key frame to a chosen one are decoded"
        return None

    def read(self, size: Size = None) -> Video:
        """Decodes the chosen frames, at `size` as in `read_video`."""
        (height, width), decoded_frames = self.frames(size)
        frames = np.empty((len(self), height, width, 3), np.uint8)
        for position, frame in enumerate(decoded_frames):
            frames[position] = frame
        return self.video(frames)

    def video(self, frames: NDArray[np.uint8]) -> Video:
        """The chosen frames as a `Video`, once they are decoded."""
        return Video(frames, self.timestamps, self.indices, self.fps, self.duration, self.total, self.size)

    def frames(self, size: Size = None) -> tuple[tuple[int, int], Iterator[NDArray[np.uint8]]]:
        """(height, width) of the chosen frames at `size` as in `read_video`, and the frames, decoded one by one as they
        are asked for."""
        check_size(size)
        if self._folder and not isinstance(size, tuple):
            check_one_size(self._files)
        height, width = target(self.size, size, len(self))
        if len(self) * height * width * 3 > _MOST_BYTES:
            raise UserError(
                f"{len(self)} frames of {height}x{width} from {self.path} would take "
                f"{len(self) * height * width * 3 / 2**30:.0f} GiB of memory; select fewer, or pass max_frames= or a "
                "smaller size="
            )
        return (height, width), self._decoded((height, width), any_size=isinstance(size, tuple))

    def _decoded(self, size: tuple[int, int], any_size: bool) -> Iterator[NDArray[np.uint8]]:
        """The chosen frames, each scaled to (height, width). any_size: also those of another size than the first."""
        if self._folder:
            return (resize(read_image(self._files[frame_number]), size) for frame_number in self.indices)
        return decoders.fetch(self.index, self.indices, self.backend, size, any_size, self._slower)


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
    backend: "pyav", "torchcodec", "decord" or "opencv": who decodes. Frames and timestamps are the same, and the pixels
    too where frames keep their size; PyAV makes smaller ones in the decoder's own colour conversion, which rounds
    otherwise. "torchcodec-cuda" decodes on an NVIDIA GPU (not run yet). What a library cannot do exactly is refused
    max_frames: thins the selection evenly to at most that many
    size: (height, width), or an integer: the longer side is scaled down to it; None or "full" = as stored; or a
    function (frames, height, width) -> (height, width), which is asked once, with the number of selected frames
    fps: of a folder only: images per second, default 1
    Raises UserError for bad files and bad arguments. Only the selected frames are kept in memory.
    """
    check_size(size)
    return VideoReader(path, select, backend, max_frames, fps).read(size)


def _thin(indices: NDArray[np.int64], max_frames: int | None) -> NDArray[np.int64]:
    if max_frames is None or len(indices) <= max_frames:
        return indices
    return indices[Uniform(max_frames).pick(np.arange(len(indices), dtype=np.float64), iter(()))]


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
            video_stream: Any = None
            for frame in frames:
                picture = as_frame(frame)
                if video_stream is None:
                    first_height, first_width = picture.shape[:2]
                    if first_height % 2 or first_width % 2:
                        sides = f"{first_height}x{first_width}"
                        raise UserError(f"H.264 needs even sides, got {sides}; crop or pad the frames by one pixel")
                    video_stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(100_000))
                    video_stream.width, video_stream.height, video_stream.pix_fmt = first_width, first_height, "yuv420p"
                    # With x264's macroblock tree the same frames do not always make the same file.
                    video_stream.options = {"crf": str(crf), "x264-params": "mbtree=0"}
                if picture.shape[:2] != (first_height, first_width):
                    sides = f"{first_height}x{first_width} to {picture.shape[0]}x{picture.shape[1]}"
                    raise UserError(f"frames change size from {sides}")
                converted = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
                container.mux(video_stream.encode(converted))
            if video_stream is None:
                raise UserError(f"no frames to write to {path}")
            container.mux(video_stream.encode(None))
        os.replace(unfinished, path)
    except (av.error.FFmpegError, OSError) as av_error:
        raise UserError(f"cannot write {path} ({reason(av_error)})") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return path
