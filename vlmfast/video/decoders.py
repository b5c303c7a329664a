"""Decodes chosen frames of a video file, by PyAV, torchcodec, decord or OpenCV.

A backend is only asked for frames by number (`fetch(index, wanted, backend)`), and the numbers come from the one index
made by PyAV, so it cannot change which frames are seen. What a library cannot deliver exactly is refused.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmfast.core import UserError
from vlmfast.video.frame_index import Index
from vlmfast.video.frames import Conversion, frames_of, open_video

BACKENDS = {
    "pyav": "av",
    "decord": "decord",
    "opencv": "cv2",
    "torchcodec": "torchcodec",
    "torchcodec-cuda": "torchcodec",
}
_PIP = {
    "pyav": "av", "decord": "decord", "opencv": "opencv-python-headless", "torchcodec": "torchcodec",
    "torchcodec-cuda": "torchcodec",
}  # fmt: skip
_SEEK_PAYS = 12  # frames to skip before a seek (flush, refill of the decoder's threads) is cheaper than decoding on


def require(backend: str) -> None:
    """Raises UserError unless `backend` is known and installed."""
    if backend not in BACKENDS:
        raise UserError(f"unknown video backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if importlib.util.find_spec(BACKENDS[backend]) is None:
        on_cpu = {name: module_name for name, module_name in BACKENDS.items() if not name.endswith("cuda")}
        installed = [name for name, module_name in on_cpu.items() if importlib.util.find_spec(module_name)]
        raise UserError(
            f"the video backend {backend!r} is not installed; pip install {_PIP[backend]}, "
            f"or use {' or '.join(map(repr, installed)) or 'another one'}"
        )
    if backend == "torchcodec-cuda" and not _has_cuda():
        raise UserError("torchcodec-cuda decodes on an NVIDIA GPU, and there is none here: use 'torchcodec' or 'pyav'")


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def fetch(
    index: Index,
    wanted: NDArray[np.int64],
    backend: str = "pyav",
    size: tuple[int, int] | None = None,
    any_size: bool = False,
    notes: list[str] | None = None,
) -> Iterator[NDArray[np.uint8]]:
    """Yields the frames numbered `wanted` (ascending, distinct), upright, each (height, width, 3) uint8 RGB.

    size: (height, width) they are scaled to; None = as stored. any_size: take frames of another size than the first.
    notes: gets a line where frames come in a slower way than they should.
    Raises UserError when the backend is missing or cannot deliver exactly these frames.
    """
    require(backend)
    decode_frames: Any = {
        "pyav": partial(_pyav, notes=notes), "decord": _decord, "opencv": _opencv, "torchcodec": _torchcodec,
        "torchcodec-cuda": partial(_torchcodec, device="cuda"),
    }[backend]  # fmt: skip
    convert = Conversion(index.orientation)

    def checked() -> Iterator[Any]:
        for frame in decode_frames(index, wanted):
            height, width = convert.upright_size(frame)
            if (height, width) != index.upright_size and not any_size:
                first_height, first_width = index.upright_size
                raise UserError(
                    f"frames of {index.path} change size from {first_height}x{first_width} to {height}x{width}; "
                    "pass size=(height, width)"
                )
            yield frame

    yield from convert.all(checked(), size)


def thumbnails(index: Index, side: int) -> Iterator[NDArray[np.uint8]]:
    """Yields every frame scaled to (side, side, 3) uint8 RGB, as stored (not set upright)."""
    with open_video(index.path) as (container, stream):
        known_stamps: set[int] | None = None if index.pts is None else set(index.pts.tolist())
        for frame in frames_of(container, stream, index.path):
            if known_stamps is None or frame.pts in known_stamps:
                yield frame.to_ndarray(format="rgb24", width=side, height=side, interpolation="AREA")


def _pyav(index: Index, wanted: NDArray[np.int64], notes: list[str] | None = None) -> Iterator[Any]:
    import av

    shown_stamps = index.pts
    if shown_stamps is None:
        remaining = iter(wanted.tolist())
        next_number = next(remaining, None)
        with open_video(index.path) as (container, stream):
            for frame_number, frame in enumerate(frames_of(container, stream, index.path)):
                if next_number is None:
                    return
                if frame_number == next_number:
                    yield frame
                    next_number = next(remaining, None)
        return
    targets = shown_stamps[wanted]
    num_done = 0
    # a second pass over every frame in order, should a seek land behind its target, or skipping miss a frame
    for in_turn in (False, True):
        skipping = frozenset(targets.tolist()) if index.skips and not in_turn else None
        with open_video(index.path) as (container, stream):
            frames = frames_of(container, stream, index.path, None, skipping)
            decoded = -1  # the number of the last decoded frame
            for target_stamp in targets[num_done:].tolist():
                key_index = np.searchsorted(index.keys, target_stamp, side="right") - 1
                start_number = int(np.searchsorted(shown_stamps, index.keys[key_index])) if key_index >= 0 else 0
                if not in_turn and start_number - decoded > _SEEK_PAYS:
                    frames.close()
                    try:
                        container.seek(int(index.keys[key_index]), stream=stream, backward=True)
                    except av.error.FFmpegError:
                        break
                    frames = frames_of(container, stream, index.path, None, skipping)
                shown_frame = next(
                    (candidate for candidate in frames if candidate.pts is not None and candidate.pts >= target_stamp),
                    None,
                )
                if shown_frame is None or shown_frame.pts != target_stamp:
                    break
                decoded = int(wanted[num_done])
                num_done += 1
                yield shown_frame
        if num_done == len(targets):
            return
        if notes is not None and not in_turn:
            notes.append("a seek in it, or leaving frames out, fails: all of its frames are decoded in turn")
    raise UserError(
        f"{index.path} announces a frame at {index.timestamps[wanted[num_done]]:.2f} s that cannot be decoded; "
        "it is damaged there: copy it again"
    )


def _refuse_inexact(index: Index, backend: str) -> None:
    """Raise UserError for what these libraries turn by rules of their own, or number otherwise than it is shown."""
    if replace(index.orientation, stretch=Fraction(1)):
        raise UserError(
            f"{backend} cannot decode {index.path}, which is stored rotated or mirrored; use backend='pyav'"
        )
    if not {"mp4", "matroska"} & set(index.container.split(",")):  # they lose or shift frames in ts and avi
        raise UserError(f"{backend} misnumbers the frames of {index.path}; use backend='pyav', or convert it to mp4")


def _decord(index: Index, wanted: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
    import decord

    _refuse_inexact(index, "decord")
    decord.logging.set_level(decord.logging.QUIET)
    try:
        video_reader = decord.VideoReader(str(index.path.absolute()), num_threads=2)
        if len(video_reader) != len(index):
            num_seen = f"{len(video_reader)} of {len(index)} frames"
            raise UserError(f"decord sees {num_seen} in {index.path}; use backend='pyav'")
        decoded = 0
        # its random access is not exact in open groups of pictures, so every frame is decoded in turn
        for frame_number in wanted.tolist():
            while decoded <= frame_number:
                frame = video_reader.next()
                decoded += 1
            yield frame.asnumpy()
    except (decord.DECORDError, RuntimeError, StopIteration) as error:
        error_text = " ".join(str(error).split())[-80:]
        raise UserError(f"decord cannot decode {index.path} ({error_text}); use backend='pyav'") from None


def _opencv(index: Index, wanted: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
    import cv2

    capture = cv2.VideoCapture(str(index.path.absolute()), cv2.CAP_FFMPEG)
    try:
        capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 0)  # we set frames upright ourselves, alike for every backend
        num_passed = 0
        for frame_number in wanted.tolist():  # its seeks are not frame-exact
            while num_passed < frame_number and capture.grab():
                num_passed += 1
            delivered, frame = capture.read() if num_passed == frame_number else (False, None)
            if not delivered or frame is None:
                raise UserError(f"opencv stops at frame {num_passed} of {index.path}; use backend='pyav'")
            num_passed += 1
            yield np.ascontiguousarray(frame[..., ::-1])
    finally:
        capture.release()


def _torchcodec(index: Index, wanted: NDArray[np.int64], device: str = "cpu") -> Iterator[NDArray[np.uint8]]:
    """device: "cuda" decodes in the card's own decoder (not run yet); frames come to the host at their full size."""
    _refuse_inexact(index, "torchcodec")
    try:
        from torchcodec.decoders import VideoDecoder

        decoder = VideoDecoder(
            str(index.path.absolute()), dimension_order="NHWC", num_ffmpeg_threads=0, device=device, seek_mode="exact"
        )
        num_frames = decoder.metadata.num_frames
        if num_frames != len(index):
            raise UserError(f"torchcodec sees {num_frames} of {len(index)} frames in {index.path}; use backend='pyav'")
        for frame_number in wanted.tolist():
            yield decoder.get_frame_at(frame_number).data.cpu().numpy()
    except UserError:
        raise
    except (ImportError, OSError, RuntimeError, ValueError, IndexError) as error:  # its libraries, or the file
        error_text = " ".join(str(error).split())[:120]
        raise UserError(f"torchcodec cannot decode {index.path} ({error_text}); use backend='pyav'") from None
