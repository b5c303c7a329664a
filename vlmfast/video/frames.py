"""From a video file to frames: opens it through libav, decodes it in order, sets each frame upright as an RGB array.

Smaller frames are scaled in the decoder's own colour conversion (swscale).
"""

from __future__ import annotations

import os
import struct
import threading
from collections import deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmfast.core import UserError
from vlmfast.video.due import DueStamps
from vlmfast.video.images import resize
from vlmfast.video.limits import MOST_PIXELS, check_pixels, regular
from vlmfast.video.packet_count import PacketCount

# What libav may take a file for: containers of video, and sound and pictures in order to say that it is one. Left out
# are the formats that name further files or addresses (playlists, session descriptions, concatenations).
_FORMATS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,h264,hevc,vvc,obu,av1,ivf,m4v,mpegvideo,mjpeg,gif,apng,nut,mxf,dv,"
    "yuv4mpegpipe,rm,wav,mp3,flac,aac,ac3,aiff,au,png_pipe,jpeg_pipe,bmp_pipe,webp_pipe,tiff_pipe,gif_pipe,image2"
)
LIMITS = {"max_pixels": str(MOST_PIXELS)}  # of libav's decoders, also while it probes a file
_STAMPED = {"mp4", "matroska", "mpegts"}  # their packets carry true presentation stamps; elsewhere frames are counted
_STAMPLESS = {"avi", "h264", "hevc", "mpegvideo", "m4v"}  # only a frame rate: what libav makes up is no better
_MOST_THREADS = 4  # that convert frames
_THREADS_OF_A_CORE, _MOST_DECODING = 4, 32  # a decoder's: they wait for each other; one a core leaves cores idle
Target = Callable[[tuple[int, int]], tuple[int, int]]  # (height, width) of an upright frame -> that it is scaled to
Decoded = Callable[[Target], NDArray[np.uint8]]  # converts a decoded frame to pixels when it is wanted


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
        streams[0].thread_type = "AUTO"  # by frames and by slices
        streams[0].codec_context.thread_count = min(_MOST_DECODING, _THREADS_OF_A_CORE * _cores())
        yield container, streams[0]


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_decoder(stream: Any, name: object) -> None:
    """Hold the decoder to MOST_PIXELS, also where a later frame is larger. UserError where the header says more."""
    if stream.codec_context is None:
        raise UserError(f"{name} is damaged, or coded in a way that is not known here; convert it to H.264")
    check_pixels(name, stream.height, stream.width)
    stream.codec_context.options = LIMITS


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


# -- from decoded frames to pixels -------------------------------------------------------------------------------------


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
        workers = min(_MOST_THREADS, _cores())
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
        if isinstance(frame, np.ndarray) or size == upright or size[0] * size[1] > height * width:
            stored = frame if isinstance(frame, np.ndarray) else frame.to_ndarray(format="rgb24")
            pixels = self.orientation.apply(stored)
            return pixels if size == upright else resize(pixels, size)
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


# -- which way up ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Orientation:
    """How a stored frame is set upright: stretch the width by `stretch`, exchange rows and columns (`transposed`), then
    reverse the rows (`upside_down`) and the columns (`mirrored`)."""

    transposed: bool = False
    upside_down: bool = False
    mirrored: bool = False
    stretch: Fraction = Fraction(1)

    def __bool__(self) -> bool:
        """Is there anything to do?"""
        return self != Orientation()

    def apply(self, frame: NDArray[Any]) -> NDArray[Any]:
        """The upright frame of a stored one (H, W, ...); the same array where there is nothing to do."""
        if not self:
            return frame
        return self.turn(resize(frame, self._square((frame.shape[0], frame.shape[1]))))

    def turn(self, frame: NDArray[Any]) -> NDArray[Any]:
        """`apply` without the stretch, for a frame whose pixels are square already."""
        if self.transposed:
            frame = frame.swapaxes(0, 1)
        return np.ascontiguousarray(frame[:: -1 if self.upside_down else 1, :: -1 if self.mirrored else 1])

    def _square(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0], max(1, round(size[1] * self.stretch))

    def upright_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the upright frame of a stored one of `size` (height, width)."""
        height, width = self._square(size)
        return (width, height) if self.transposed else (height, width)


def matrix_orientation(matrix: tuple[int, ...]) -> Orientation:
    """The orientation of a display matrix, 9 integers (a, b, u, c, d, v, x, y, w) as libav gives them.

    A stored point (x, y), y downwards, is shown at (a x + c y, b x + d y); scale and offset do not matter. Raises
    UserError for anything but quarter turns and mirrors of those.
    """
    x_to_x, x_to_y, y_to_x, y_to_y = matrix[0], matrix[1], matrix[3], matrix[4]
    unturned, turned = min(abs(x_to_x), abs(y_to_y)), min(abs(x_to_y), abs(y_to_x))
    if 10 * max(abs(x_to_y), abs(y_to_x)) < unturned:
        return Orientation(False, y_to_y < 0, x_to_x < 0)
    if 10 * max(abs(x_to_x), abs(y_to_y)) < turned:
        return Orientation(True, x_to_y < 0, y_to_x < 0)
    raise UserError(
        "it asks to be shown slanted or squeezed to a line (its display matrix is no quarter turn); "
        "re-encode it upright"
    )


def frame_orientation(frame: Any, stream: Any, name: object) -> Orientation:
    """The orientation that a decoded av.VideoFrame carries, with the pixel shape that its stream announces (between a
    quarter and four; what lies beyond is no camera's). Raises UserError, naming the file, as `matrix_orientation`."""
    pixel_aspect = Fraction(stream.sample_aspect_ratio or 1)
    stretch = pixel_aspect if Fraction(1, 4) <= pixel_aspect <= 4 else Fraction(1)
    metadata = frame.side_data.get("DISPLAYMATRIX")
    if metadata is None:
        return Orientation(stretch=stretch)
    try:
        return replace(matrix_orientation(struct.unpack("=9i", bytes(metadata)[:36])), stretch=stretch)
    except UserError as error:
        raise UserError(f"{name} cannot be shown upright: {error}") from None
