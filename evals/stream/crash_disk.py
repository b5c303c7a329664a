"""Trials of `evals.stream.crash` without kills: disks that are full for a while, folders that two want to own."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from evals.stream.crash_runs import STEP, World, close, forked, logits
from vlmfast.core import UserError
from vlmfast.stream.archive.folder import StoreError
from vlmfast.stream.session import StreamSession

FULL = ("refused writes", "file size limit", "small tmpfs")


@contextlib.contextmanager
def refused_writes(path: Path, rnd: random.Random) -> Iterator[None]:
    """The disk takes a few more files, then none."""
    real, left = os.fsync, [rnd.randint(0, 6)]

    def fsync(fd: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)

    with mock.patch("os.fsync", fsync):
        yield


@contextlib.contextmanager
def file_size_limit(path: Path, rnd: random.Random) -> Iterator[None]:
    """The kernel cuts every file off at some kilobytes."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (rnd.choice([200, 2_000, 20_000]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def filled(path: Path, rnd: random.Random) -> Iterator[None]:
    """A file takes what the file system has left, but for some kilobytes."""
    filler = path / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as f:
        while f.write(bytes(4096)):
            pass
    os.truncate(filler, max(0, filler.stat().st_size - rnd.choice([0, 4096, 30_000])))
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def tmpfs(path: Path) -> Iterator[bool]:
    """A small file system in memory at `path`; False where that is not permitted."""
    path.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)], capture_output=True
        ).returncode
    except OSError:
        done = 1
    try:
        yield done == 0
    finally:
        if done == 0:
            subprocess.run(["umount", str(path)], check=True)


def full_disk(world: World, path: Path, how: str, seed: int) -> tuple[int, str] | None:
    """A stream whose disk is full now and then, every refused push repeated: (refusals, what is wrong); None where the
    trial is not permitted here."""
    path.mkdir()
    with tmpfs(path / "mount") if how == "small tmpfs" else contextlib.nullcontext(True) as permitted:
        if not permitted:
            return None
        where = path / "mount" if how == "small tmpfs" else path
        full = {"refused writes": refused_writes, "file size limit": file_size_limit, "small tmpfs": filled}[how]
        return _refused_and_repeated(world, where, full, random.Random(f"{how}{seed}"))


def _refused_and_repeated(world: World, path: Path, full, rnd: random.Random) -> tuple[int, str]:  # type: ignore[no-untyped-def]
    ram = rnd.choice(["1GiB", 700_000])
    session = world.session(disk=path / "s", flush_seconds=rnd.choice([2.0, 8.0]), ram=ram)
    refusals, step = 0, rnd.choice([2, 4, 10, 80])
    for at in range(0, len(world.frames), step):
        times = None if rnd.random() < 0.5 else [i / 2 for i in range(at, min(at + step, len(world.frames)))]
        part, taken = world.frames[at : at + step], False
        if rnd.random() < 0.4:
            with full(path, rnd):
                for _ in range(rnd.randint(1, 3)):
                    try:
                        session.push(part, times)
                        taken = True
                        break
                    except StoreError:
                        refusals += 1
        if not taken:
            session.push(part, times)
    with full(path, rnd):
        try:
            session.close()
        except StoreError:
            refusals += 1
    session.close()
    again = world.load(path / "s")
    wrong = world.wrong(again, exact=step == STEP) or "; ".join(again.stats()["lost"])
    if len(again.store.blocks) != len(world.blocks) or again.lost_seconds:
        wrong = f"{len(again.store.blocks)} of {len(world.blocks)} blocks"
    again.retriever = None
    if not wrong and not close(logits(again), logits(world.reference)):
        wrong = "the window"
    again.close(discard=True)
    return refusals, wrong


def refused_owner(world: World, path: Path) -> str:
    """While a session is open, another process may neither load nor make one there; what is wrong."""
    session = world.session(disk=path / "s", flush_seconds=1.0)
    session.push(world.frames[:STEP])

    def work(pipe: int) -> None:
        said = []
        for attempt in (world.load, lambda where: world.session(disk=where)):
            try:
                attempt(path / "s")
                said.append("it opened")
            except UserError as e:
                right = f"pid {os.getppid()} " in str(e) or "already holds a stream" in str(e)
                said.append("" if right and "\n" not in str(e) else str(e))
        os.write(pipe, "".join(said).encode())

    child, pipe = forked(work)
    wrong = b"".join(iter(lambda: os.read(pipe, 4096), b"")).decode()
    os.close(pipe)
    if os.waitpid(child, 0)[1]:
        wrong = wrong or "the second owner crashed"
    session.push(world.frames[STEP : 2 * STEP])
    session.close()
    again = world.load(path / "s")
    wrong = wrong or world.wrong(again) or "; ".join(again.stats()["lost"])
    again.close(discard=True)
    return wrong


def contest(world: World, path: Path, owners: int = 3) -> str:
    """Processes that all want to go on with one archive, each trying until it is its turn; what is wrong."""
    with world.session(disk=path / "s") as session:
        session.push(world.frames[:STEP])

    def work(pipe: int) -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                mine: StreamSession = world.load(path / "s")
            except UserError as e:
                if "open in another session" not in str(e):
                    raise
                time.sleep(0.01)
                continue
            mine.push(world.frames[:STEP])
            mine.close()
            return
        raise TimeoutError

    children = [forked(work) for _ in range(owners)]
    codes = []
    for child, pipe in children:
        os.close(pipe)
        codes.append(os.waitpid(child, 0)[1])
    again = world.load(path / "s")
    blocks, lost = list(again.store.blocks), again.stats()["lost"]
    starts = [b.start for b in again.store.blocks.values()]
    again.close(discard=True)
    if any(codes) or lost:
        return f"exit codes {codes}, lost {lost}"
    whole = blocks == list(range((owners + 1) * STEP // again.vision.frames_per_grid)) and starts == sorted(set(starts))
    return "" if whole else f"blocks {blocks}"
