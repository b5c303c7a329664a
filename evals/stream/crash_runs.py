"""One trial each of `evals.stream.crash`: a killed child, a damaged file, a full disk, a second owner; and the check
that what is left equals the stream cut at what survived."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vlmfast.core import UserError
from vlmfast.stream.archive.coarsening import coarsened
from vlmfast.stream.archive.folder import StoreError
from vlmfast.stream.archive.manifest import MANIFESTS
from vlmfast.stream.archive.segments import BlockLost
from vlmfast.stream.blocks import Block, PackedBlock
from vlmfast.stream.levels import Level
from vlmfast.stream.retrievers import UniformRetriever
from vlmfast.stream.session import StreamSession

QUESTION = "where is the red ring ?"
EVERY = UniformRetriever(frames=1 << 20)
FRAMES, STEP, KEPT = 240, 4, 40  # frames of the stream, of one push, and of the archive that is damaged
TOLERANCE = 2e-4  # of fp32 numbers that another cut sums in another order
MODES = ("push", "flush", "evict", "save", "close", "coarsen")
COARSEN = "age:four_bit=4,features=8,representative=12,keys=[0]"
DAMAGE = ("flip", "flip", "cut", "grow", "swap", "delete", "link", "device", "pipe", "folder")
FILES = ("manifest.json", "manifest-copy.json", "segment", "state", "heartbeat", "stream.lock")


class World:
    """A model, a stream, and the session that nothing ever happened to."""

    def __init__(self, model: Any, processor: Any, frames: torch.Tensor) -> None:
        self.model, self.processor, self.frames = model, processor, frames
        self.reference = self.session(ram="4GiB", coarsen="age:features=1e9")  # features kept, nothing coarsened
        for at in range(0, len(frames), STEP):
            self.reference.push(frames[at : at + STEP])
        self.blocks = self.reference.store.blocks

    def session(self, **options: Any) -> StreamSession:
        """A session of the settings that all of them share: nothing is rounded, so that equal means equal."""
        options = {"window": 128, "redundancy": 0.05, "keep_as": "model", "retrieve": None, "fps": 2.0} | options
        return StreamSession(self.model, self.processor, **options)

    def load(self, path: Path) -> StreamSession:
        return StreamSession.load(path, self.model, self.processor, retrieve=EVERY)

    def wrong(self, session: StreamSession, gaps: bool = False, exact: bool = True) -> str:
        """What differs from the reference cut at this session's last block; empty when nothing does. gaps: blocks may
        be missing, as after an eviction. exact: bit for bit, as pushes of the same length make them."""
        ids = list(session.store.blocks)
        if ids != sorted(set(ids)) or (not gaps and ids != list(range(len(ids)))):
            return f"blocks {ids}"
        for i in ids:
            mine = session.store.blocks[i]
            want, packed = self.expected(mine)
            if mine.json() | {"norm": 0} != want.json() | {"norm": 0} or abs(mine.norm - want.norm) > 2e-4:
                return f"the record of block {i}"
            try:
                held = session.store.whole(i).tensors()
            except BlockLost:
                return self.wrong(session, True, exact) if session.stats()["lost"] else f"block {i} is lost"
            for name, right in packed.tensors().items():
                if name not in held or not (torch.equal if exact else close)(held.pop(name), right):
                    return f"{name} of block {i}"
            if held:
                return f"{', '.join(held)} of block {i}, of which nothing should be kept"
        if ids and not close(logits(session), self.answer(session)):
            return "the answer"
        return ""

    def expected(self, block: Block) -> tuple[Block, PackedBlock]:
        """What should be kept of a block at the level that it has, with features where they are kept from the start."""
        record, packed = self.blocks[block.id], self.reference.store.whole(block.id)
        if block.visual is None:
            record = dataclasses.replace(record, visual=None)
            packed = dataclasses.replace(packed, features=None)
        return coarsened(record, packed, block.level, block.searched)

    def answer(self, session: StreamSession) -> torch.Tensor:
        """The logits that the reference would have after the question over this session's blocks: as coarse as they
        are, or full where its window holds them as they were made."""
        held = session.store.blocks
        if not any(block.level for block in held.values()):
            return logits(self.reference, [self.blocks[i] for i in held])
        mirror, encoder = self.session(ram="4GiB"), session.encoder
        mirror.encoder.first_extent = encoder.first_extent
        exact = encoder.window.first_column if encoder.last_features is not None else {}  # not rebuilt from the archive
        for block in held.values():
            full = block.id in exact and block.level < Level.REPRESENTATIVE
            mirror.store.insert(*self.expected(dataclasses.replace(block, level=Level.FULL) if full else block))
        return logits(mirror)

    def goes_on(self, session: StreamSession, path: Path) -> str:
        """Push, close and load once more; what goes wrong."""
        before = list(session.store.blocks)
        session.push(self.frames[:STEP], [1e4 + i / 2 for i in range(STEP)])
        session.ask(QUESTION, max_new_tokens=2)
        session.close()
        again = self.load(path)
        after, lost = list(again.store.blocks), again.stats()["lost"]
        again.close(discard=True)
        if lost:
            return f"lost after going on: {lost}"
        new = [i for i in after if i not in before]
        return (
            ""
            if len(new) == STEP // session.vision.frames_per_grid and new == sorted(new)
            else f"{before} became {after}"
        )


def logits(session: StreamSession, blocks: list[Block] | None = None) -> torch.Tensor:
    """(V,) after the question over all stored blocks, or over these."""
    ids = session.vision.prompt(session.vision.messages(session.turns, QUESTION))[1]
    held = list(session.store.blocks.values()) if blocks is None else blocks
    return session.builder.logits(session.builder.build(EVERY, held, QUESTION, ids, False), False)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Within the tolerance, or (representatives are float16) within a step of the dtype."""
    step = max(TOLERANCE, torch.finfo(b.dtype).eps)
    return float((a - b).abs().max()) <= step * max(1.0, float(b.abs().max()))


# ------------------------------------------------------------------------------------------------ kills


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """(process, pipe to read) of a child that does `work(pipe to write)` and ends."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    code = 1
    try:
        os.close(read)
        work(write)
        code = 0
    finally:
        os._exit(code)


def operations(world: World, mode: str, path: Path) -> Iterator[Callable[[], None]]:
    """One operation of a mode after the other, over a stream that goes on; what is not the mode's happens between."""
    more: dict[str, Any] = {"flush_seconds": 1e9, "disk": path / "s"}
    if mode == "push":
        more |= {"flush_seconds": 3.0, "ram": 400_000}
    elif mode == "evict":
        more |= {"flush_seconds": 4.0, "disk_limit": 500_000}
    elif mode == "coarsen":
        more |= {"flush_seconds": 3.0, "coarsen": COARSEN}
    session, at = world.session(**more), 0

    def push() -> None:
        session.push(world.frames[at : at + STEP])

    while at < len(world.frames):
        if mode in ("push", "evict", "coarsen"):
            yield push
        else:
            push()
            if mode == "flush":
                yield session.flush
            elif mode == "save":
                yield session.save
                yield partial(session.save, path / f"copy-{at}")
            elif mode == "close":
                yield session.close
                session = world.load(path / "s")
        at += STEP


def killed(world: World, mode: str, path: Path, seed: int) -> dict[str, Any]:
    """Kill a child at a random moment of a random operation; check what it leaves. The result says: inside (did the
    kill come within the operation), wrong (empty when all is well), lost_seconds."""
    rnd = random.Random(f"{mode}{seed}")
    steps = len(world.frames) // STEP
    skip = rnd.randint(steps // 6, steps // 2) if mode in ("evict", "coarsen") else rnd.randint(1, max(1, steps // 5))

    def work(pipe: int) -> None:
        for operation in operations(world, mode, path):
            os.write(pipe, b"<")
            operation()
            os.write(pipe, b">")

    child, pipe = forked(work)
    started = took = 0.0
    for n in range(2 * skip - 1):  # up to the beginning of the operation; its length is that of those before
        if not os.read(pipe, 1):
            break
        now = time.perf_counter()
        took = max(took, now - started) if n % 2 else took
        started = now
    time.sleep(rnd.random() * min(0.2, took or 0.02))
    os.kill(child, signal.SIGKILL)
    rest = b"".join(iter(lambda: os.read(pipe, 4096), b""))
    os.close(pipe)
    os.waitpid(child, 0)
    inside = rest.count(b">") == rest.count(b"<")
    return {"inside": inside} | left(world, path, gaps=mode == "evict")


def left(world: World, path: Path, gaps: bool) -> dict[str, Any]:
    """Check the stream that a kill left, and the copies: each is whole or none."""
    out: dict[str, Any] = {"wrong": "", "lost_seconds": 0.0}
    try:
        session = world.load(path / "s")
        out["lost_seconds"], out["blocks"] = session.lost_seconds, len(session.store.blocks)
        out["wrong"] = world.wrong(session, gaps) or "; ".join(session.stats()["lost"])
        out["wrong"] = out["wrong"] or world.goes_on(session, path / "s")
        for copy in sorted(path.glob("copy-*")):
            with contextlib.suppress(StoreError):
                out["wrong"] = out["wrong"] or _copy(world, copy)
    except Exception as e:
        out["wrong"] = f"{type(e).__name__}: {e}"
    return out


def _copy(world: World, copy: Path) -> str:
    if not any((copy / name).exists() for name in MANIFESTS):
        try:
            world.load(copy)
        except UserError as e:
            return "" if "holds no stream" in str(e) else str(e)
        return f"{copy.name} has no manifest and opens"
    session = world.load(copy)
    whole = int(copy.name.partition("-")[2]) // session.vision.frames_per_grid + STEP // session.vision.frames_per_grid
    wrong = world.wrong(session)
    if len(session.store.blocks) != whole or session.lost_seconds or session.stats()["lost"]:
        wrong = f"{copy.name} holds {len(session.store.blocks)} of {whole} blocks"
    session.close(discard=True)
    return wrong


# ------------------------------------------------------------------------------------------------ damage


def damage(file: Path, kind: str, rnd: random.Random) -> None:
    """Spoil one file."""
    data = file.read_bytes()
    if kind == "flip":
        spoiled = bytearray(data or b"\0")
        for _ in range(rnd.choice([1, 1, 1, 4])):
            spoiled[rnd.randrange(len(spoiled))] ^= 1 << rnd.randrange(8)
        file.write_bytes(bytes(spoiled))
    elif kind == "cut":
        file.write_bytes(data[: rnd.randrange(len(data))])
    elif kind == "grow":
        with file.open("ab") as f:
            f.write(rnd.randbytes(rnd.choice([1, 8, 4096])))
    elif kind == "swap":
        other = rnd.choice([f for f in sorted(file.parent.iterdir()) if f != file])
        its = other.read_bytes()
        other.write_bytes(data)
        file.write_bytes(its)
    else:
        file.unlink()
        outside = file.parent.parent / "outside"
        if kind == "link":
            outside.write_bytes(data)
            file.symlink_to(outside)
        elif kind == "device":
            file.symlink_to(rnd.choice(["/dev/zero", "/dev/null"]))
        elif kind == "pipe":
            os.mkfifo(file)
        elif kind == "folder":
            file.mkdir()


def damaged(world: World, kept: Path, path: Path, name: str, kind: str, seed: int, while_open: bool) -> str:
    """Spoil a file of a copy of an archive, before it is opened or while it is; "refused", "reported", "same", or what
    is wrong."""
    rnd = random.Random(f"{name}{kind}{seed}")
    shutil.copytree(kept, path)
    file = rnd.choice(sorted(f for f in path.iterdir() if f.name.startswith(name)))
    signal.alarm(120)
    try:
        if not while_open:
            damage(file, kind, rnd)
        session = world.load(path)
        if while_open:
            damage(file, kind, rnd)
        answer = logits(session) if session.store.blocks else None
        same = answer is not None and len(session.store.blocks) == KEPT // session.vision.frames_per_grid
        wrong = world.wrong(session, gaps=bool(session.stats()["lost"]))
        lost = session.stats()["lost"]
        try:
            session.close()
        except StoreError:
            session.close(discard=True)
            return wrong or "refused"
        return wrong or ("reported" if lost else "same" if same and not session.lost_seconds else "silent difference")
    except UserError as e:
        return "refused" if "\n" not in str(e) else f"more than one line: {e}"
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    finally:
        signal.alarm(0)
