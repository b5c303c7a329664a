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


def loads(text: str, where: str) -> Any:
    """JSON as Python has it. Raises UserError, naming `where`, for anything else: also for a key that comes twice,
    numbers that are none, digits without end, lists inside lists without end."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) < len(pairs):
            keys = [k for k, _ in pairs]
            twice = next(k for i, k in enumerate(keys) if k in keys[:i])
            raise UserError(f"{where}: the key {shown(twice)} is given twice")
        return out

    def refuse(word: str) -> None:
        raise UserError(f"{where}: {word} is no number of JSON")

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


def read_text(path: str | os.PathLike[str], what: str, most: int = SIZE) -> str:
    """The UTF-8 text of a regular file of at most `most` bytes. Raises UserError, which calls the file `what`."""
    name = shown(os.fspath(path))
    try:
        held = Path(path).stat()
        if stat.S_ISDIR(held.st_mode):
            raise UserError(f"{name} is a folder: give {what}")
        if not stat.S_ISREG(held.st_mode):
            raise UserError(f"{name} is not a regular file: give {what}")
        if held.st_size > most:
            raise UserError(f"{name} has {held.st_size} bytes, more than {what} may have ({most})")
        return Path(path).read_bytes().decode()
    except UnicodeDecodeError as e:
        raise UserError(f"{name} is not UTF-8 text (byte {e.start}): give {what}") from None
    except FileNotFoundError:
        raise UserError(f"no file at {name}: give {what}") from None
    except OSError as e:
        raise UserError(f"{name} cannot be read ({e.strerror}): give {what}") from None
    except UserError:
        raise
    except ValueError:  # a zero byte in the path
        raise UserError(f"no file at {name}: give {what}") from None
