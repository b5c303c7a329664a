"""The folder of an archive: a lock for its one owner, and files that are written whole or not at all.

Nothing that is not named here is ever read, replaced or deleted, and only by the owner: who holds the lock. Only
regular files are opened (no links, devices, pipes), and their size is looked at before they are read.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import struct
import weakref
import zlib
from contextlib import suppress
from pathlib import Path
from typing import IO

from vlmfast.core import Unsupported, UserError

LOCK, BEAT, MANIFESTS = "stream.lock", "heartbeat", ("manifest.json", "manifest-copy.json")
SEGMENT = re.compile(r"segment-\d{8}\.safetensors", re.ASCII)
STATE = re.compile(r"state-\d{8}\.safetensors", re.ASCII)
_STRAY = re.compile(r"(segment|state)-(\d{8})\.safetensors(\.tmp)?|manifest(-copy)?\.json\.tmp", re.ASCII)
_OURS = re.compile(rf"{_STRAY.pattern}|manifest(-copy)?\.json|heartbeat", re.ASCII)
DAMAGED = ".damaged"  # the end of a name that a damaged segment is kept under
_MARK = "archive of a vlmfast stream"
_SAFE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


class StoreError(UserError):
    """The disk does not take what should be written; what was stored before is untouched."""


class NoRoom(StoreError):
    """The limit that the user gave leaves no room."""


class Damaged(ValueError):
    """A file is not what was written; says why."""


def open_regular(path: Path, most: int) -> IO[bytes]:
    """A regular file, unbuffered, for reading. Raises Damaged for anything else and for more than `most` bytes, before
    a byte is read; OSError where it cannot be opened."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise Damaged("it is no regular file")
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | _SAFE), "rb", buffering=0)
    except OSError as e:
        if e.errno in (errno.ELOOP, errno.ENXIO):
            raise Damaged("it is no regular file") from None
        raise
    file_status = os.fstat(file.fileno())
    if not stat.S_ISREG(file_status.st_mode) or file_status.st_size > most:
        file.close()
        raise Damaged(f"{file_status.st_size:,} bytes, where at most {most:,} are expected")
    return file


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a regular file; raises as `open_regular`, also when it grows meanwhile."""
    content = bytearray()
    with open_regular(path, most) as file:
        while part := file.read(min(8 << 20, most + 1 - len(content))):
            content += part
            if len(content) > most:
                raise Damaged(f"more than {most:,} bytes")
    return bytes(content)


class Folder:
    """One folder. `acquire` makes this object its owner until `release`; a forked copy of the owner owns nothing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: IO[bytes] | None = None
        _OWNERS.add(self)

    @property
    def owned(self) -> bool:
        return self._lock is not None

    def make(self) -> None:
        """Make the folder and own it. Raises UserError when it holds files of our names that are no leftovers of a
        creation cut short; such leftovers are deleted."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise StoreError(f"{self.path} cannot be made ({e.strerror}): name a folder that can be written") from None
        ours_before = self.acquire()
        try:
            for name in [file_name for file_name in os.listdir(self.path) if _OURS.fullmatch(file_name)]:
                if name in MANIFESTS or not ours_before:
                    raise UserError(
                        f"{self.path} holds a {name} already, of another stream or program: name another folder"
                    )
                self.delete(name)
        except BaseException:
            self.release()
            raise

    def acquire(self) -> bool:
        """Become the owner; returns whether the folder had a lock file of ours before. Raises UserError when another
        session, in this process or any other, has it open."""
        try:
            import fcntl
        except ImportError:  # not a POSIX system
            raise Unsupported(
                "a stream on disk needs POSIX file locks, which this system lacks: leave disk= out"
            ) from None
        path = self.path / LOCK
        for _ in range(5):
            file = self._open_lock(path)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = re.sub(r"[^\w .,-]", "", os.pread(file.fileno(), 200, 0).decode(errors="replace"))
                file.close()
                raise UserError(
                    f"{self.path} is open in another session ({_who(owner)}): close that one "
                    "first; it can be asked, or saved to another folder, meanwhile"
                ) from None
            except OSError as e:
                file.close()
                raise StoreError(f"{path} cannot be locked ({e.strerror}): keep streams on a local disk") from None
            with suppress(OSError):
                if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                    break
            file.close()  # deleted between opening and locking
        else:
            raise UserError(f"{path} changes all the time: is another session being opened there?")
        before = os.pread(file.fileno(), 200, 0).decode(errors="replace")
        with suppress(OSError):  # a full or read-only disk: the lock itself holds
            text = f"{_MARK}, owner pid {os.getpid()} on {socket.gethostname()}\n".encode()
            os.pwrite(file.fileno(), text, 0)
            os.ftruncate(file.fileno(), len(text))
        self._lock = file
        return before.startswith(_MARK)

    def _open_lock(self, path: Path) -> IO[bytes]:
        try:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _SAFE, 0o644)
            except OSError as e:
                if e.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                    raise
                descriptor = os.open(path, os.O_RDONLY | _SAFE)
        except OSError as e:
            raise StoreError(f"{path} cannot be opened ({e.strerror}): the archive needs its lock file") from None
        file = os.fdopen(descriptor, "rb", buffering=0)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            file.close()
            raise UserError(f"{path} is no regular file: delete it, the archive makes its own")
        return file

    def release(self) -> None:
        """Give the folder up."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _check(self) -> None:
        if self._lock is None:
            raise StoreError(
                f"{self.path} is not owned by this session any more (it was closed, or this is a forked copy of it)"
            )

    def put(self, name: str, data: bytes, synced: bool = True) -> None:
        """Write a file: afterwards it is there whole, or (StoreError) as it was before. synced: its bytes are on the
        disk, also after a power cut."""
        self._check()
        temporary = self.path / f"{name}.tmp"
        try:
            temporary.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFE
            with os.fdopen(os.open(temporary, flags, 0o644), "wb") as file:
                file.write(data)
                file.flush()
                if synced:
                    os.fsync(file.fileno())
            os.replace(temporary, self.path / name)
        except OSError as e:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise StoreError(
                f"writing {self.path / name} failed ({e.strerror}); nothing stored is lost, what is not on disk yet "
                "stays in memory: free space or make the folder writable, then go on"
            ) from None

    def sync(self) -> None:
        """Make renames last (their order is kept anyway); a file system that cannot sync a folder may refuse."""
        with suppress(OSError):
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def delete(self, name: str) -> None:
        """Delete a file of ours; one that cannot be deleted stays, for the next owner to try."""
        self._check()
        with suppress(OSError):
            os.unlink(self.path / name)

    def clear(self) -> None:
        """Delete every file of ours, the lock file last, and the folder if nothing else is in it."""
        for name in [file_name for file_name in os.listdir(self.path) if _OURS.fullmatch(file_name)] + [LOCK]:
            self.delete(name)
        with suppress(OSError):
            self.path.rmdir()

    def size(self, name: str) -> int:
        """Bytes of a file of ours, whatever it is by now; 0 when it is gone."""
        try:
            return os.lstat(self.path / name).st_size
        except OSError:
            return 0

    def set_aside(self, name: str) -> None:
        """Keep a damaged file under another name."""
        self._check()
        with suppress(OSError):
            os.replace(self.path / name, self.path / (name + DAMAGED))

    def aside(self) -> dict[str, int]:
        """The damaged files that are kept, and their bytes."""
        names = [
            file_name
            for file_name in os.listdir(self.path)
            if file_name.endswith(DAMAGED) and SEGMENT.fullmatch(file_name[: -len(DAMAGED)])
        ]
        return {file_name: self.size(file_name) for file_name in sorted(names)}

    def strays(self, named: set[str]) -> list[str]:
        """Files of ours that are not in `named`: what a crash left behind."""
        return [
            file_name for file_name in os.listdir(self.path) if _STRAY.fullmatch(file_name) and file_name not in named
        ]

    def highest(self) -> int:
        """The highest number in a file's name."""
        matches = [_STRAY.match(file_name) for file_name in os.listdir(self.path)]
        return max((int(match[2]) for match in matches if match and match[2]), default=0)

    # -- heartbeat -----------------------------------------------------------------------------------------------------

    def beat(self, seconds: float) -> None:
        """Note, in place and without syncing, how far the stream has come: `load` tells from it what a crash lost."""
        if self._lock is None:
            return
        data = struct.pack("<d", seconds)
        with suppress(OSError):  # the flush to come reports a folder that cannot be written
            descriptor = os.open(self.path / BEAT, os.O_WRONLY | os.O_CREAT | _SAFE, 0o644)
            try:
                if stat.S_ISREG(os.fstat(descriptor).st_mode):
                    os.pwrite(descriptor, data + struct.pack("<I", zlib.crc32(data)), 0)
            finally:
                os.close(descriptor)

    def last_beat(self) -> float | None:
        """Seconds of the last heartbeat, None before the first. Raises Damaged."""
        try:
            data = read_regular(self.path / BEAT, 12)
        except FileNotFoundError:
            raise Damaged("it is missing") from None
        except OSError as e:
            raise Damaged(f"it cannot be read: {e.strerror}") from None
        if len(data) != 12 or zlib.crc32(data[:8]) != struct.unpack("<I", data[8:])[0]:
            raise Damaged("the checksum does not match")
        seconds = float(struct.unpack("<d", data[:8])[0])
        return None if seconds == float("-inf") else seconds


def _who(text: str) -> str:
    """The owner that a lock file names."""
    owner = text.partition(", ")[2].strip() or "unknown"
    return f"{owner}, this process" if owner == f"owner pid {os.getpid()} on {socket.gethostname()}" else owner


_OWNERS: weakref.WeakSet[Folder] = weakref.WeakSet()


def _forked() -> None:
    for folder in list(_OWNERS):
        folder.release()  # closes this process's copy; the parent's lock stays


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
