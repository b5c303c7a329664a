"""Files that commands read and write: JSON and text from a stranger, whether a file may be written (said before the
work), and texts that appear whole or not."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from vlmfast.core import UserError, brief, shown

SIZE = 2**20  # bytes of a plan file


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
        folder = path.parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            raise UserError(f"{option} {path}: {folder} is a file, not a folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"{option} {path}: the folder {folder} cannot be written to")
    except OSError as e:
        raise UserError(f"{option} {brief(str(path))}: {e.strerror or e}") from None


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text so that a reader sees the whole file or none; makes the folder.

    Raises UserError when it cannot be written; what stood there then stays.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".part")
        try:
            with open(descriptor, "w", encoding="utf-8") as text_file:
                text_file.write(text)
            creation_mask = os.umask(0)
            os.umask(creation_mask)
            os.chmod(unfinished, 0o666 & ~creation_mask)
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
            raise
    except (OSError, ValueError) as e:  # ValueError: text that UTF-8 cannot hold, a zero byte in the path
        problem = e.strerror if isinstance(e, OSError) else "text that UTF-8 cannot hold"
        raise UserError(f"{shown(str(path))} cannot be written ({problem}): give another path") from None


def loads(text: str, where: str) -> Any:
    """JSON as Python has it. Raises UserError, naming `where`, for anything else: also for a key that comes twice,
    numbers that are none, digits without end, lists inside lists without end."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        json_object = dict(pairs)
        if len(json_object) < len(pairs):
            keys = [key for key, _ in pairs]
            repeated = next(key for index, key in enumerate(keys) if key in keys[:index])
            raise UserError(f"{where}: the key {shown(repeated)} is given twice")
        return json_object

    def refuse(constant: str) -> None:
        raise UserError(f"{where}: {constant} is no number of JSON")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except json.JSONDecodeError as e:
        raise UserError(f"{where} is not JSON ({e.msg}, line {e.lineno}, column {e.colno})") from None
    except RecursionError:
        raise UserError(f"{where} is not usable: its lists or objects are nested without end") from None
    except UserError:
        raise
    except ValueError:
        raise UserError(f"{where} is not usable: a number in it has thousands of digits") from None


def read_text(path: str | os.PathLike[str], what: str, max_bytes: int = SIZE) -> str:
    """The UTF-8 text of a regular file of at most `most` bytes. Raises UserError, which calls the file `what`."""
    shown_path = shown(os.fspath(path))
    try:
        file_status = Path(path).stat()
        if stat.S_ISDIR(file_status.st_mode):
            raise UserError(f"{shown_path} is a folder: give {what}")
        if not stat.S_ISREG(file_status.st_mode):
            raise UserError(f"{shown_path} is not a regular file: give {what}")
        if file_status.st_size > max_bytes:
            raise UserError(f"{shown_path} has {file_status.st_size} bytes, more than {what} may have ({max_bytes})")
        return Path(path).read_bytes().decode()
    except UnicodeDecodeError as e:
        raise UserError(f"{shown_path} is not UTF-8 text (byte {e.start}): give {what}") from None
    except FileNotFoundError:
        raise UserError(f"no file at {shown_path}: give {what}") from None
    except OSError as e:
        raise UserError(f"{shown_path} cannot be read ({e.strerror}): give {what}") from None
    except UserError:
        raise
    except ValueError:  # a zero byte in the path
        raise UserError(f"no file at {shown_path}: give {what}") from None
