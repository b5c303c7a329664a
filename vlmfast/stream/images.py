"""Pictures: reading one, listing a folder of them, checking and scaling frames. A frame is (H, W, 3) uint8 RGB."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmfast.core import UserError

Size = tuple[int, int] | int | None
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"}


def positive(name: str, value: Any, kind: str = "number") -> None:
    """Raises UserError unless `value` is finite and above zero (kind="integer": and whole)."""
    types: Any = (int, np.integer) if kind == "integer" else (int, float, np.number)
    if not isinstance(value, types) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"{name} must be a positive {kind}, got {value!r}")


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
        value = np.asarray(value.convert("RGB"))
    if not isinstance(value, np.ndarray):
        raise UserError(f"a frame must be an array, a tensor or a PIL image, got {type(value).__name__}")
    if value.dtype != np.uint8 or value.ndim != 3 or value.shape[-1] != 3:
        raise UserError(f"a frame must be uint8 of shape (height, width, 3), got {value.dtype} {value.shape}")
    if 0 in value.shape:
        raise UserError(f"a frame must have pixels, got shape {value.shape}")
    return np.ascontiguousarray(value)


def read_image(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """The picture upright (EXIF honoured) as (H, W, 3) uint8 RGB; transparency is dropped, 16 bits become 8.

    Raises UserError for a missing, broken, truncated or zero-size picture.
    """
    from PIL import Image, ImageOps

    path = Path(path)
    if not path.exists():
        raise UserError(f"no such picture: {path}")
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a picture; give one file, or the folder as a video")
    try:
        with Image.open(path) as file:
            image: Any = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16"):
                return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
            return as_frame(image)
    except UserError:
        raise UserError(f"{path} has no pixels; save it again") from None
    except Exception as e:  # PIL raises OSError, SyntaxError, struct.error, ValueError ... for broken files
        why = "not a picture" if type(e).__name__ == "UnidentifiedImageError" else " ".join(str(e).split())
        raise UserError(f"{path} cannot be read as a picture ({why}); check that it opens, or copy it again") from None


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) upright, from the header alone. Raises UserError as `read_image`."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            turned = file.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 lie on their side
            return (file.width, file.height) if turned else (file.height, file.width)
    except Exception:
        h, w = read_image(path).shape[:2]  # says what is wrong
        return h, w


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
