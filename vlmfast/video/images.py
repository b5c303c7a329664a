"""Reads, lists, checks and scales images and frames. A frame is (H, W, 3) uint8 RGB."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmfast.core import UserError
from vlmfast.video.limits import MOST_PICTURE_BYTES, check_pixels, regular

SizeRule = Callable[[int, int, int], tuple[int, int]]  # (frames, height, width) upright -> (height, width)
Size = tuple[int, int] | int | str | SizeRule | None
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM")  # others reach for programs, or are seldom meant
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"}


def check_size(size: Size) -> None:
    """Raises UserError unless `size` is None, "full", a function, a positive integer or two of them."""
    sides = size if isinstance(size, (tuple, list)) else (size,)
    if size is None or size == "full" or callable(size):
        return
    if size == "model":
        raise UserError(
            "size='model' asks the processor of a model for its size: read with vlmfast.read_inputs, or watch in a "
            "session"
        )
    if len(sides) > 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        raise UserError(f"size must be (height, width) or one integer for the longer side, got {size!r}")


def target(upright: tuple[int, int], size: Size, frames: int = 1) -> tuple[int, int]:
    """(height, width) that `frames` images of `upright` (height, width) are scaled to; an integer never scales up."""
    if size is None or isinstance(size, str):
        return upright
    if callable(size):
        return size(frames, *upright)
    if not isinstance(size, int):
        return size[0], size[1]
    scale_factor = min(1.0, size / max(upright))
    return max(1, round(upright[0] * scale_factor)), max(1, round(upright[1] * scale_factor))


def resize(frame: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The frame at (height, width), bicubic with antialiasing; the frame itself when it has that size."""
    if frame.shape[:2] == size:
        return frame
    from PIL import Image

    return np.asarray(Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def as_frame(value: Any) -> NDArray[np.uint8]:
    """A frame of the user's as (H, W, 3) uint8: a numpy array, a torch tensor, or a PIL image. UserError else."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    elif hasattr(value, "convert"):
        value = _pixels(value)
    if not isinstance(value, np.ndarray):
        raise UserError(f"a frame must be an array, a tensor or a PIL image, got {type(value).__name__}")
    if value.dtype != np.uint8 or value.ndim != 3 or value.shape[-1] != 3:
        raise UserError(f"a frame must be uint8 of shape (height, width, 3), got {value.dtype} {value.shape}")
    if 0 in value.shape:
        raise UserError(f"a frame must have pixels, got shape {value.shape}")
    return np.ascontiguousarray(value)


def _pixels(image: Any) -> NDArray[np.uint8]:
    """A PIL image upright (EXIF honoured) as (H, W, 3) uint8; transparency is dropped, 16 bits become 8."""
    from PIL import ImageOps

    file_format = image.format
    image = ImageOps.exif_transpose(image)
    grey_16_bits = image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM"))
    if grey_16_bits:
        return np.repeat((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise UserError(
            f"a picture of mode {image.mode!r} (32 bits a pixel) does not say what is white; save it with 8 bits"
        )
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """The PIL image of an image file, its header read and found sensible. UserError for whatever is wrong with it."""
    from PIL import Image, UnidentifiedImageError

    path = regular(path, "picture")
    if path.stat().st_size > MOST_PICTURE_BYTES:
        raise UserError(f"{path} has more than {MOST_PICTURE_BYTES >> 20} MiB; scale the picture down first")
    try:
        with Image.open(path, formats=FORMATS) as picture:
            check_pixels(path, picture.height, picture.width)
            animated = getattr(picture, "is_animated", False)
            if animated and picture.format != "MPO":  # phones hide more pictures in a JPEG
                raise UserError(
                    f"{path} holds {getattr(picture, 'n_frames', 'several')} pictures; give an animation as a video, "
                    "or save the one you mean"
                )
            yield picture
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path} announces more pixels than any picture has; scale it down first") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is not a picture of a kind that is read ({', '.join(FORMATS)}); convert it") from None
    except MemoryError:
        raise UserError(f"{path} does not fit into memory; scale it down first") from None
    except Exception as error:  # PIL raises OSError, SyntaxError, struct.error, ValueError ... for broken files
        error_text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path} cannot be read as a picture ({error_text:.120}); check that it opens, or copy it again"
        ) from None


def read_image(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """The image upright (EXIF honoured) as (H, W, 3) uint8 RGB; transparency is dropped, 16 bits become 8.

    Raises UserError for a missing, broken, truncated, zero-size, huge or animated image, for a kind not in FORMATS
    and for what is no regular file.
    """
    with _opened(path) as picture:
        return as_frame(picture)


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) upright, from the header alone. Raises UserError as `read_image`."""
    with _opened(path) as picture:
        # EXIF orientations 5 to 8 lie on their side; of a TIFF, PIL gives the upright size itself.
        sideways = picture.format != "TIFF" and picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return (picture.width, picture.height) if sideways else (picture.height, picture.width)


def folder_images(path: Path) -> list[Path]:
    """The images in a folder in natural order (frame2 before frame10); hidden and other files are left out.

    Raises UserError for a folder without images.
    """
    visible = [file for file in path.iterdir() if not file.name.startswith(".")]
    picture_files = [file for file in visible if file.suffix.lower() in SUFFIXES]
    if not picture_files:
        raise UserError(f"{path} holds no pictures ({', '.join(sorted(SUFFIXES))}); give a folder of frames")
    picture_files.sort(
        key=lambda file: [
            (int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", file.name.lower())
        ]
    )
    return picture_files


def check_one_size(files: list[Path]) -> None:
    """Raises UserError for images of a folder that differ in size, from their headers."""
    first_size = image_size(files[0])
    for file in files[1:]:
        if (other_size := image_size(file)) != first_size:
            raise UserError(
                f"the pictures in {file.parent} differ in size: {files[0].name} is {first_size[0]}x{first_size[1]}, "
                f"{file.name} is {other_size[0]}x{other_size[1]}; pass size=(height, width) to scale them all"
            )
