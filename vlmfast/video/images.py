"""Pictures: reading one, listing a folder of them, checking and scaling frames. A frame is (H, W, 3) uint8 RGB."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmfast.core import UserError
from vlmfast.video.limits import MOST_PICTURE_BYTES, check_pixels, regular

Size = tuple[int, int] | int | None
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM")  # others reach for programs, or are seldom meant
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"}


def check_size(size: Size) -> None:
    """Raises UserError unless `size` is None, a positive integer or two of them."""
    sides = size if isinstance(size, (tuple, list)) else (size,)
    if size is None:
        return
    if len(sides) > 2 or not all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sides):
        raise UserError(f"size must be (height, width) or one integer for the longer side, got {size!r}")


def target(shown: tuple[int, int], size: Size) -> tuple[int, int]:
    """(height, width) that a picture of `shown` (height, width) is scaled to; an integer never scales up."""
    if size is None:
        return shown
    if not isinstance(size, int):
        return size[0], size[1]
    scale = min(1.0, size / max(shown))
    return max(1, round(shown[0] * scale)), max(1, round(shown[1] * scale))


def resize(frame: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The frame at (height, width), bicubic with antialiasing; the frame itself when it has that size."""
    if frame.shape[:2] == size:
        return frame
    from PIL import Image

    return np.asarray(Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def as_frame(value: Any) -> NDArray[np.uint8]:
    """A picture of the user's as (H, W, 3) uint8: a numpy array, a torch tensor, or a PIL image. UserError else."""
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

    kind = image.format
    image = ImageOps.exif_transpose(image)
    deep = image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM"))  # grey, 16 bits
    if deep:
        return np.repeat((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise UserError(
            f"a picture of mode {image.mode!r} (32 bits a pixel) does not say what is white; save it with 8 bits"
        )
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """The PIL image of a picture file, its header read and found sensible. UserError for whatever is wrong with it."""
    from PIL import Image, UnidentifiedImageError

    path = regular(path, "picture")
    if path.stat().st_size > MOST_PICTURE_BYTES:
        raise UserError(f"{path} has more than {MOST_PICTURE_BYTES >> 20} MiB; scale the picture down first")
    try:
        with Image.open(path, formats=FORMATS) as file:
            check_pixels(path, file.height, file.width)
            if getattr(file, "is_animated", False) and file.format != "MPO":  # phones hide more pictures in a JPEG
                raise UserError(
                    f"{path} holds {getattr(file, 'n_frames', 'several')} pictures; give an animation as a video, "
                    "or save the one you mean"
                )
            yield file
    except UserError as e:
        raise UserError(str(e) if str(path) in str(e) else f"{path}: {e}") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path} announces more pixels than any picture has; scale it down first") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is not a picture of a kind that is read ({', '.join(FORMATS)}); convert it") from None
    except MemoryError:
        raise UserError(f"{path} does not fit into memory; scale it down first") from None
    except Exception as e:  # PIL raises OSError, SyntaxError, struct.error, ValueError ... for broken files
        why = " ".join(str(e).split()) or type(e).__name__
        raise UserError(
            f"{path} cannot be read as a picture ({why:.120}); check that it opens, or copy it again"
        ) from None


def read_image(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """The picture upright (EXIF honoured) as (H, W, 3) uint8 RGB; transparency is dropped, 16 bits become 8.

    Raises UserError for a missing, broken, truncated, zero-size, huge or animated picture, for a kind not in FORMATS
    and for what is no regular file.
    """
    with _opened(path) as file:
        return as_frame(file)


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) upright, from the header alone. Raises UserError as `read_image`."""
    with _opened(path) as file:
        # EXIF orientations 5 to 8 lie on their side; of a TIFF, PIL gives the upright size itself.
        turned = file.format != "TIFF" and file.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return (file.width, file.height) if turned else (file.height, file.width)


def folder_images(path: Path, size: Size = None) -> list[Path]:
    """The pictures in a folder in natural order (frame2 before frame10); hidden and other files are left out.

    Raises UserError for a folder without pictures, and for mixed sizes unless `size` is (height, width).
    """
    files = [f for f in path.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith(".")]
    if not files:
        raise UserError(f"{path} holds no pictures ({', '.join(sorted(SUFFIXES))}); give a folder of frames")
    files.sort(key=lambda f: [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"([0-9]+)", f.name.lower())])
    if not isinstance(size, tuple):
        first = image_size(files[0])
        for f in files[1:]:
            if (other := image_size(f)) != first:
                raise UserError(
                    f"the pictures in {path} differ in size: {files[0].name} is {first[0]}x{first[1]}, "
                    f"{f.name} is {other[0]}x{other[1]}; pass size=(height, width) to scale them all"
                )
    return files
