"""The disk tier: immutable safetensors segments and a JSON index, each written whole or not at all.

A segment is written to a temporary name, synced, renamed, and only then named in `index.json`, which is replaced the
same way; so a crash at any moment leaves a folder that opens, short of what was not flushed. Sizes and CRC-32 sums are
checked when a folder is opened; what does not match is reported and skipped.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from vlmfast.core import UserError
from vlmfast.stream.blocks import Block
from vlmfast.stream.pack import Packed

FORMAT = 1
OPEN = 64  # segment files kept mapped


class StoreError(UserError):
    """The disk does not take what should be written; what was stored before is untouched."""


class BlockLost(RuntimeError):
    """A stored block can no longer be read; it is reported and skipped."""


class Segments:
    """A folder of segments. `limit`: most bytes in it at any time, None for no limit."""

    def __init__(self, path: str | os.PathLike[str], limit: int | None, head: dict[str, Any]) -> None:
        self.path, self.limit, self.head = Path(path), limit, head
        self.entries: dict[str, dict[str, Any]] = {}  # file -> {"bytes", "crc", "blocks"}
        self.where: dict[int, str] = {}  # block id -> file
        self.state: dict[str, Any] | None = None  # {"file", "bytes", "crc"} of the saved session state
        self.skipped: list[str] = []
        self.number = 0
        self.peak = 0
        self._mapped: dict[str, Any] = {}
        self._index_bytes = 0

    # -- life ----------------------------------------------------------------------------------------------------------

    def create(self) -> None:
        """Make the folder. Raises UserError when it holds a stream, StoreError when it cannot be written."""
        if (self.path / "index.json").exists():
            raise UserError(
                f"{self.path} already holds a stream: continue it with StreamSession.load({str(self.path)!r}, ...), "
                "or name an empty folder"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise StoreError(f"{self.path} cannot be made ({e.strerror}): name a folder that can be written") from None
        self.write_index()

    def open(self) -> tuple[list[Block], dict[int, tuple[Tensor, Tensor | None]]]:
        """Read index and segments. Returns the blocks in order and {id: (rep, embedding)}; see `skipped`."""
        index = read_index(self.path)
        self.head = index["head"]
        self.number, self.state = index["number"], index["state"]
        blocks: list[Block] = []
        reps: dict[int, tuple[Tensor, Tensor | None]] = {}
        for file, entry in index["segments"].items():
            try:
                found = self._check(file, entry)
                with safe_open(self.path / file, "pt") as f:
                    names = set(f.keys())
                    for block in found:
                        emb = f.get_tensor(f"{block.id}.emb") if f"{block.id}.emb" in names else None
                        reps[block.id] = (f.get_tensor(f"{block.id}.rep"), emb)
            except (OSError, SafetensorError, ValueError, KeyError) as e:
                self.skipped.append(f"{file} ({len(entry['blocks'])} blocks): {e}")
                continue
            self.entries[file] = entry
            blocks += found
            self.where |= {b.id: file for b in found}
        self._index_bytes = (self.path / "index.json").stat().st_size
        known = {*self.entries, "index.json", "heartbeat", (self.state or {}).get("file")}
        for stray in self.path.glob("*.safetensors*"):
            if stray.name not in known and stray.name not in index["segments"]:
                stray.unlink(missing_ok=True)  # a write that a crash cut short
        return sorted(blocks, key=lambda b: b.id), reps

    def _check(self, file: str, entry: dict[str, Any]) -> list[Block]:
        data = (self.path / file).read_bytes()
        if len(data) != entry["bytes"]:
            raise ValueError(f"{len(data)} bytes instead of {entry['bytes']}")
        if zlib.crc32(data) != entry["crc"]:
            raise ValueError("the checksum does not match")
        (size,) = struct.unpack("<Q", data[:8])
        meta = json.loads(data[8 : 8 + size])["__metadata__"]
        return [Block.from_json(b) for b in json.loads(meta["blocks"])]

    # -- writing -------------------------------------------------------------------------------------------------------

    @property
    def used(self) -> int:
        """Bytes in the folder, the index counted twice because replacing it needs both."""
        state = self.state["bytes"] if self.state else 0
        return self.segment_bytes + state + 2 * self._index_bytes + 64

    @property
    def segment_bytes(self) -> int:
        return sum(e["bytes"] for e in list(self.entries.values()))

    def write(self, blocks: list[tuple[Block, Packed]]) -> str:
        """One new segment; returns its file name. Raises StoreError, leaving the folder as it was."""
        tensors = {f"{b.id}.{name}": x for b, p in blocks for name, x in p.tensors().items()}
        data = to_bytes(tensors, {"blocks": json.dumps([b.json() for b, _ in blocks])})
        self.number += 1
        file = f"seg-{self.number:06d}.safetensors"
        self._put(file, data)
        self.entries[file] = {
            "bytes": len(data),
            "crc": zlib.crc32(data),
            "blocks": [b.id for b, _ in blocks],
        }
        try:
            self.write_index()
        except StoreError:
            del self.entries[file]
            (self.path / file).unlink(missing_ok=True)
            raise
        self.where |= {b.id: file for b, _ in blocks}
        return file

    def write_state(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Replace the saved session state."""
        data = to_bytes(tensors, {"state": json.dumps(meta)})
        if self.limit is not None and self.used + len(data) > self.limit:
            raise StoreError(
                f"a state of {len(data):,} bytes does not fit disk_limit={self.limit:,} beside {self.used:,}: raise it"
            )
        self.number += 1
        old, file = self.state, f"state-{self.number:06d}.safetensors"
        self._put(file, data)
        self.state = {"file": file, "bytes": len(data), "crc": zlib.crc32(data)}
        try:
            self.write_index()
        except StoreError:
            self.state = old
            (self.path / file).unlink(missing_ok=True)
            raise
        if old:
            (self.path / old["file"]).unlink(missing_ok=True)

    def read_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The saved state; None when there is none or it is damaged (then `skipped` says so)."""
        if not self.state:
            return None
        try:
            data = (self.path / self.state["file"]).read_bytes()
            if zlib.crc32(data) != self.state["crc"]:
                raise ValueError("the checksum does not match")
            with safe_open(self.path / self.state["file"], "pt") as f:
                return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["state"])  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as e:
            self.skipped.append(f"{self.state['file']} (the window): {e}")
            return None

    def rewrite(self, file: str, keep: list[tuple[Block, Packed]]) -> None:
        """Replace a segment by one that holds only `keep` (nothing: delete it)."""
        if keep:
            self.write(keep)
        entry = self.entries.pop(file)
        self._mapped.pop(file, None)
        for block in entry["blocks"]:
            if self.where.get(block) == file:
                del self.where[block]
        self.write_index()
        (self.path / file).unlink(missing_ok=True)

    def write_index(self) -> None:
        data = json.dumps(
            {
                "format": FORMAT,
                "head": self.head,
                "number": self.number,
                "state": self.state,
                "segments": self.entries,
            }
        ).encode()
        self._put("index.json", data)
        self._index_bytes = len(data)
        self.peak = max(self.peak, self.used)

    def _put(self, file: str, data: bytes) -> None:
        temporary = self.path / f"{file}.tmp"
        try:
            with open(temporary, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, self.path / file)
        except OSError as e:
            temporary.unlink(missing_ok=True) if os.access(self.path, os.W_OK) else None
            raise StoreError(
                f"writing {self.path / file} failed ({e.strerror}); nothing stored is lost, what is not on disk yet "
                "stays in memory: free space or make the folder writable, then go on"
            ) from None

    def beat(self, seconds: float) -> None:
        """Note, without syncing, how far the stream has come: `load` tells from it what a crash lost."""
        try:
            with open(self.path / "heartbeat", "wb") as f:
                f.write(struct.pack("<d", seconds))
        except OSError:  # the flush to come reports a folder that cannot be written
            return

    def last_beat(self) -> float | None:
        try:
            return float(struct.unpack("<d", (self.path / "heartbeat").read_bytes())[0])
        except (OSError, struct.error):
            return None

    # -- reading -------------------------------------------------------------------------------------------------------

    def _map(self, file: str) -> tuple[Any, frozenset[str]]:
        entry, path = self.entries[file], self.path / file
        try:
            if path.stat().st_size != entry["bytes"]:  # a mapped file that shrank must not be touched
                raise BlockLost(f"{file} is torn")
            if file not in self._mapped:
                if len(self._mapped) >= OPEN:
                    self._mapped.pop(next(iter(self._mapped)))
                f = safe_open(path, "pt")
                self._mapped[file] = (f, frozenset(f.keys()))
        except (OSError, SafetensorError) as e:
            raise BlockLost(f"{file} cannot be read: {e}") from None
        return self._mapped[file]  # type: ignore[no-any-return]

    def layer(self, block: int, layer: int) -> dict[str, Tensor]:
        """The stored tensors of one layer of a block, memory-mapped. Raises BlockLost."""
        f, have = self._map(self.where[block])
        try:
            names = [n for n in ("k", "v", "ks", "vs") if f"{block}.{n}" in have]
            return {n: f.get_slice(f"{block}.{n}")[layer : layer + 1][0] for n in names}
        except SafetensorError as e:
            raise BlockLost(f"{self.where[block]}: {e}") from None

    def whole(self, block: int) -> Packed:
        """A block with all its layers."""
        f, have = self._map(self.where[block])
        get = {
            n: f.get_tensor(f"{block}.{n}").clone()
            for n in ("k", "v", "ks", "vs", "rep", "emb")
            if f"{block}.{n}" in have
        }
        return Packed(get["k"], get["v"], get.get("ks"), get.get("vs"), get["rep"], get.get("emb"))

    def forget(self, file: str) -> list[int]:
        """Drop a damaged segment from the index; returns the blocks it held."""
        entry = self.entries.pop(file)
        self._mapped.pop(file, None)
        for block in entry["blocks"]:
            self.where.pop(block, None)
        return list(entry["blocks"])

    def close(self) -> None:
        self._mapped.clear()


def read_index(path: Path) -> dict[str, Any]:
    """The index of a stream's folder. Raises UserError when there is none or it is of another format."""
    try:
        index = json.loads((path / "index.json").read_text())
    except FileNotFoundError:
        raise UserError(
            f"{path} holds no stream (no index.json): name the folder given as disk= or to save()"
        ) from None
    except (OSError, json.JSONDecodeError) as e:
        raise UserError(f"{path / 'index.json'} cannot be read ({e})") from None
    if index.get("format") != FORMAT:
        raise UserError(f"{path} is of format {index.get('format')}, this version reads format {FORMAT}")
    return dict(index)


def as_dtype(name: str) -> torch.dtype:
    """torch.float32 from "torch.float32"."""
    return getattr(torch, name.removeprefix("torch."))  # type: ignore[no-any-return]
