"""Reads a video by pieces of whole temporal patches, whose earlier ones the model's tower encodes meanwhile.

Frames are decoded in a thread, which also runs the processor where it works on the CPU. At most three pieces exist at
a time: one that is decoded, one that waits, one that is encoded.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmfast import families
from vlmfast.core import UserError
from vlmfast.preconditions import MARK
from vlmfast.runtime.early_features import EarlyFeatures, VideoPieces, put_early
from vlmfast.runtime.reading import Reading
from vlmfast.runtime.transfers import to_device
from vlmfast.runtime.weights import reason
from vlmfast.video.ahead import ahead
from vlmfast.video.images import Size
from vlmfast.video.read import Video, VideoReader

PIECES = 16  # of a video at most: so small a part of it is read before the tower has work
LEAST = 1024  # patches of a piece: with fewer, the tower takes longer to start than to compute


@dataclass
class EncodedVideo:
    """A video that was read, processed and encoded by pieces: its pixel values, and its grid [t, h, w] in patches.

    clip: its times and sizes; the frames themselves are gone, and their array holds nothing.
    """

    clip: Video
    grid: list[int]
    pixels: Tensor
    early: EarlyFeatures

    def shapes(self) -> list[Tensor]:
        """What its frames are to the processor: without data."""
        return _shapes(self.clip.frames.shape)

    def processor(self, processor: Any) -> Any:
        """The processor, which for `shapes` gives what was made of this video."""
        return _Processed(processor, self)

    def hand_over(self, inputs: dict[str, Tensor]) -> None:
        """Leave the features for the call with these inputs."""
        put_early(inputs["pixel_values_videos"], self.early)


class _Shapes:
    """A video processor whose work is done: it still answers for its settings, and for what it says of a video."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def __call__(self, videos: Any, device: Any = None, **options: Any) -> Any:
        made = self._own(videos, **options)
        made["pixel_values_videos"] = torch.zeros(()).expand(made["pixel_values_videos"].shape)  # some look at its size
        return made


class _Processed:
    """A processor that is given the shapes of one video, whose pixel values were made already."""

    def __init__(self, own: Any, video: EncodedVideo) -> None:
        self._own, self._video = copy.copy(own), video
        self._own.video_processor = _Shapes(own.video_processor)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def __call__(self, **call: Any) -> Any:
        made = self._own(**call)
        made["pixel_values_videos"] = self._video.pixels
        return made


@dataclass
class PieceReader:
    """Reads and encodes videos for a model. video_processor: the model's; options: of its calls; device: {"device": the
    model's} where it works there, else {}. name: of the checkpoint, for messages."""

    model: Any
    video_processor: Any
    options: dict[str, Any]
    device: dict[str, Any]
    name: str

    def read(self, video: VideoReader, size: Size, reading: Reading, rows: int) -> EncodedVideo | None:
        """The video, each piece of it encoded while the next is read; None where it must be read as a whole: the model
        is not accelerated, the video is too short, or for a reason that `reading` notes.

        size: as in `read_video`. rows: of the call. Raises what the thread raises, once it has ended.
        """
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        handle = vars(model).get(MARK)
        if handle is None:
            return None
        pieces: VideoPieces = handle.columns.pieces
        whole = pieces.whole if rows == 1 else "several questions are one batch"
        if whole is None:
            frame_size, frames = video.frames(size)
            grid, shape = self._grid(frame_size, len(video))
            counts = piece_lengths(len(video), pieces.family.temporal_patch(self.video_processor), grid)
            if len(counts) <= 1:
                return None
            if not self._fit(frame_size, grid, counts):
                whole = "its processor scales parts of it otherwise"
        if whole is not None:
            reading.notes.append(f"read: the whole video came before the tower began: {whole}")
            return None
        clip = video.video(np.broadcast_to(np.uint8(0), (len(video), *frame_size, 3)))
        pixels = torch.empty(shape, dtype=self.model.dtype, device=self.model.device)
        encoded = EncodedVideo(clip, grid, pixels, pieces.begin())

        def made(stopped: threading.Event) -> Generator[Tensor, None, None]:
            pinned = bool(self.device) and self.model.device.type == "cuda"
            for piece in _stacked(frames, frame_size, counts, stopped, reading, pinned):
                if self.device:
                    yield piece
                    continue
                start = time.perf_counter()
                made_pixels = self._pixels(piece.permute(0, 3, 1, 2))
                reading.thread_ms += (time.perf_counter() - start) * 1e3
                yield made_pixels

        with ahead(made) as arriving:
            self._encode(arriving, encoded, reading)
        reading.pieces, reading.encoding = len(counts), encoded.early.encoding
        return encoded

    def _grid(self, size: tuple[int, int], frames: int) -> tuple[list[int], torch.Size]:
        """[t, h, w] in patches, and the shape of the pixel values, of so many frames of (height, width).

        Zeros where the processor takes no such frames; it says why when it gets them.
        """
        try:
            made = self.video_processor(_shapes((frames, *size, 3)), return_tensors="pt", **self.options)
        except (ValueError, RuntimeError, ArithmeticError):
            return [0, 0, 0], torch.Size()
        return families.get(self.model).video_grid(self.model, made), made["pixel_values_videos"].shape

    def _fit(self, size: tuple[int, int], grid: list[int], counts: list[int]) -> bool:
        """Are the grids of the pieces parts of that of the whole?"""
        grids = {count: self._grid(size, count)[0] for count in set(counts)}
        same_size = all(part[1:] == grid[1:] for part in grids.values())
        return same_size and sum(grids[count][0] for count in counts) == grid[0]

    def _encode(self, arriving: Any, encoded: EncodedVideo, reading: Reading) -> None:
        """Encode the pieces as they arrive: pixel values, or frames where the processor works on the model's device."""
        num_patches, height, width = encoded.grid
        along = families.get(self.model).pieces_along
        rows_of_patch, done = encoded.pixels.shape[along] // num_patches, 0
        for piece in arriving:
            start_mark = reading.processing.now()
            if self.device:
                piece = self._pixels(to_device(piece, self.model.device).permute(0, 3, 1, 2))
            num_rows = piece.shape[along]
            part = encoded.pixels.narrow(along, done, num_rows)
            part.copy_(piece)
            reading.processing.add(start_mark)
            encoded.early.add(part, torch.tensor([[num_rows // rows_of_patch, height, width]]))
            done += num_rows

    def _pixels(self, clip: Tensor) -> Tensor:
        """Pixel values of a piece (T, 3, H, W)."""
        try:
            made = self.video_processor([clip], return_tensors="pt", **self.options | self.device)
        except (ValueError, RuntimeError, ArithmeticError) as error:
            raise not_taken(self.name, [clip.shape[-2:]], error) from None
        return made["pixel_values_videos"]  # type: ignore[no-any-return]


def not_taken(name: str, sizes: Sequence[Sequence[int]], error: Exception) -> UserError:
    """What to raise where the processor of `name` does not take media of these (height, width)."""
    listed_sizes = ", ".join(f"{width} x {height}" for height, width in sizes)
    return UserError(
        f"the processor of {name} does not take these media ({listed_sizes} pixels): {reason(error)}; crop or pad"
    )


def piece_lengths(frames: int, patch: int, grid: list[int]) -> list[int]:
    """Frames of each piece of a video with this grid [t, h, w]: whole temporal patches of `patch` frames each.

    The last piece is up to twice as long.
    """
    _, height, width = grid
    length = max(1, -(-(frames // patch) // PIECES), -(-LEAST // max(1, height * width))) * patch
    lengths = [length] * (frames // length)
    rest = frames - sum(lengths)
    if rest >= patch or not lengths:
        lengths.append(rest)
    elif rest:
        lengths[-1] += rest
    return lengths


def _shapes(shape: tuple[int, ...]) -> list[Tensor]:
    """One video of this shape (T, H, W, 3) without data, as (T, 3, H, W)."""
    frames, height, width, _ = shape
    return [torch.empty(frames, 3, height, width, dtype=torch.uint8, device="meta")]


def _stacked(
    frames: Any, size: tuple[int, int], counts: list[int], stopped: threading.Event, reading: Reading, pinned: bool
) -> Generator[Tensor, None, None]:
    """Pieces (count, height, width, 3) uint8 of the frames; ends early once `stopped`.

    pinned: in memory that a GPU copies from by itself. Pinning a piece later would copy it with all cores, which the
    decoder's threads keep busy.
    """
    try:
        for count in counts:
            buffer = torch.empty((count, *size, 3), dtype=torch.uint8, pin_memory=pinned)
            piece, start = buffer.numpy(), time.perf_counter()
            for place in range(count):
                if stopped.is_set():
                    return
                piece[place] = next(frames)
            reading.read_ms = (reading.read_ms or 0.0) + (time.perf_counter() - start) * 1e3
            yield buffer
    finally:
        frames.close()
