"""Turns decoded frames into upright RGB arrays, smaller ones in the decoder's own colour conversion (swscale)."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmfast.video.images import Orientation, resize

_MOST_THREADS = 4
Target = Callable[[tuple[int, int]], tuple[int, int]]  # (height, width) of an upright frame -> that it is scaled to
Decoded = Callable[[Target], NDArray[np.uint8]]  # converts a decoded frame to pixels when it is wanted


class Conversion:
    """Converts the frames of one video, each when it is called with it, from several threads if need be.

    Smaller frames are scaled bicubically, over all pixels that a new one covers, while colours are converted, with
    colour at full resolution and exact rounding. That is one pass and no picture in between. Against converting first
    and scaling by Pillow or torchvision the pixels differ by rounding: about one of 256 levels on average.
    """

    def __init__(self, orientation: Orientation) -> None:
        self.orientation = orientation
        self._of_thread = threading.local()  # each thread's reformatter, which keeps its tables from frame to frame

    def all(self, frames: Iterable[Any], size: tuple[int, int] | None) -> Iterator[NDArray[np.uint8]]:
        """The frames converted, in order: in threads of their own, while the next ones are decoded."""
        workers = min(_MOST_THREADS, os.cpu_count() or 1)
        waiting: deque[Future[NDArray[np.uint8]]] = deque()
        with ThreadPoolExecutor(workers, "conversion") as executor:
            for frame in frames:
                waiting.append(executor.submit(self, frame, size))
                if len(waiting) > workers:  # no more decoded frames than that are held
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def upright_size(self, frame: Any) -> tuple[int, int]:
        """(height, width) of an av.VideoFrame or a stored array (H, W, 3), set upright."""
        height, width = frame.shape[:2] if isinstance(frame, np.ndarray) else (frame.height, frame.width)
        return self.orientation.upright_size((height, width))

    def __call__(self, frame: Any, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """(height, width, 3) uint8 RGB of an av.VideoFrame or of an array as stored. size: None = as it is."""
        height, width = upright = self.upright_size(frame)
        size = size or upright
        if isinstance(frame, np.ndarray):
            return resize(self.orientation.apply(frame), size)
        if size == upright or size[0] * size[1] > height * width:
            return resize(self.orientation.apply(frame.to_ndarray(format="rgb24")), size)
        return self.orientation.turn(self._scaled(frame, size[::-1] if self.orientation.transposed else size))

    def _scaled(self, frame: Any, size: tuple[int, int]) -> NDArray[np.uint8]:
        from av.video.reformatter import Interpolation, VideoReformatter

        if not hasattr(self._of_thread, "reformatter"):
            self._of_thread.reformatter = VideoReformatter()
        scaling_flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
        scaled_frame = self._of_thread.reformatter.reformat(
            frame, width=size[1], height=size[0], format="rgb24", interpolation=scaling_flags, threads=1
        )
        pixels: NDArray[np.uint8] = scaled_frame.to_ndarray()
        return pixels


def of_video(convert: Conversion, frame: Any, target: Target) -> NDArray[np.uint8]:
    """The pixels of an av.VideoFrame, at the size that `target` says."""
    return convert(frame, target(convert.upright_size(frame)))


def of_picture(picture: Callable[[], NDArray[np.uint8]], target: Target) -> NDArray[np.uint8]:
    """The pixels that `picture` gives, at the size that `target` says."""
    pixels = picture()
    return resize(pixels, target((pixels.shape[0], pixels.shape[1])))
