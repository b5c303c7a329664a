"""Checks files before they are opened: regular ones of a sensible size. A pipe or a device could block for ever."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from vlmfast.core import UserError

MOST_PIXELS = 1 << 26  # of one picture or frame, 67 million: what decoding takes is 10 to 20 bytes a pixel
MOST_PICTURE_BYTES = 1 << 29


def regular(path: str | os.PathLike[str], kind: str) -> Path:
    """The path of a regular file that is not empty. kind: what it is to be ("picture", "video"), for the message.

    Raises UserError for what is missing, a folder, a pipe, a socket, a device, empty, or may not be read.
    """
    try:
        path = Path(path)
        file_status = path.stat()
        if stat.S_ISREG(file_status.st_mode) and file_status.st_size and not os.access(path, os.R_OK):
            raise PermissionError(13, "permission denied")
    except FileNotFoundError:
        raise UserError(f"no such {kind}: {path}; check the name") from None
    except (OSError, ValueError, TypeError) as error:  # a loop of links, a name that is too long or holds a zero byte
        error_text = " ".join(str(getattr(error, "strerror", None) or error).split())
        shown_path = f"{os.fspath(path)!r:.200}"
        raise UserError(f"{shown_path} cannot be opened as a {kind} ({error_text}); check the name") from None
    if stat.S_ISDIR(file_status.st_mode):
        raise UserError(
            f"{path} is a folder, not a {kind}; give one file" + ", or the folder as a video" * (kind == "picture")
        )
    if not stat.S_ISREG(file_status.st_mode):
        raise UserError(
            f"{path} is no regular file but a pipe, socket or device; save the {kind} to a file and give that"
        )
    if file_status.st_size == 0:
        raise UserError(f"{path} is empty (0 bytes); copy it again")
    return path


def check_pixels(path: object, height: int, width: int) -> None:
    """Raises UserError for a picture or frame of more than MOST_PIXELS, before it is decoded."""
    if height * width > MOST_PIXELS:
        raise UserError(
            f"{path} has {width} x {height} pixels; more than {MOST_PIXELS / 1e6:.0f} million are not decoded: "
            "scale it down first"
        )
