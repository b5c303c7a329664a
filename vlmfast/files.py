"""Files that commands write: whether one may be written, said before the work, and texts that appear whole or not."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from vlmfast.core import UserError, brief, shown


def claim(path: str | Path, force: bool = False, endings: tuple[str, ...] = (), option: str = "--out") -> None:
    """Raise UserError unless `path` may be written: its ending, an existing file without `force`, folder and rights.

    endings: allowed suffixes such as (".json",), all when empty. option: how the user named it.
    """
    path = Path(path)
    if endings and path.suffix not in endings:
        raise UserError(f"{option} {path.name}: the file must end in {' or '.join(endings)}")
    try:
        if path.is_dir():
            raise UserError(f"{option} {path} is a folder: name a file in it")
        if path.exists() and not force:
            raise UserError(f"{path} exists: choose another {option}, or pass --force to replace it")
        home = path.parent
        while not home.exists() and home != home.parent:
            home = home.parent
        if not home.is_dir():
            raise UserError(f"{option} {path}: {home} is a file, not a folder")
        if not os.access(home, os.W_OK | os.X_OK):
            raise UserError(f"{option} {path}: the folder {home} cannot be written to")
    except OSError as e:
        raise UserError(f"{option} {brief(str(path))}: {e.strerror or e}") from None


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text so that a reader sees the whole file or none; makes the folder.

    Raises UserError when it cannot be written; what stood there then stays.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".part")
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(part, 0o666 & ~mask)
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise
    except (OSError, ValueError) as e:  # ValueError: text that UTF-8 cannot hold, a zero byte in the path
        why = e.strerror if isinstance(e, OSError) else "text that UTF-8 cannot hold"
        raise UserError(f"{shown(str(path))} cannot be written ({why}): give another path") from None
