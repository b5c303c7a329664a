"""The archive on disk: immutable segments of blocks and the saved window, named by one manifest.

A file is written under a number of its own and synced, then the manifest names it, then what it replaces is deleted: a
crash at any moment leaves a folder that opens as it was before or after, no block twice or half. Whatever is read is
checked against its size and sum; what does not match is reported and skipped.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from vlmfast.core import UserError
from vlmfast.stream.archive import manifest
from vlmfast.stream.archive.folder import MANIFESTS, Damaged, Folder, NoRoom, StoreError, read_regular
from vlmfast.stream.archive.segment_file import SegmentFile, encode
from vlmfast.stream.blocks import Block, PackedBlock
from vlmfast.stream.levels import Level

MOST_OPEN = 64  # segment files kept open
OTHER_BYTES = 400  # bytes of lock file, heartbeat and what the file system may add


class BlockLost(RuntimeError):
    """A stored block can no longer be read; it is reported and skipped."""


class Segments:
    """A folder of segments. `limit`: most bytes of ours in it at any time, None for no limit."""

    def __init__(self, path: str | os.PathLike[str], limit: int | None, head: dict[str, Any]) -> None:
        self.folder, self.limit, self.head = Folder(path), limit, head
        self.path = self.folder.path
        self.entries: dict[str, dict[str, Any]] = {}  # file -> {"bytes", "crc", "head", "blocks"}, in stream order
        self.file_of: dict[int, str] = {}  # block id -> file
        self.state: dict[str, Any] | None = None  # {"file", "bytes", "crc"} of the saved session state
        self.skipped: list[str] = []
        self.number = self.generation = self.peak = 0
        self.aside: dict[str, int] = {}  # damaged files that are kept, and their bytes
        self._opened: dict[str, SegmentFile] = {}
        self._broken: dict[str, int] = {}  # damaged files that the manifest on disk still names, and their bytes
        self._leaving: dict[str, int] = {}  # files that a manifest on disk may still name, and their bytes
        self._manifest_bytes = 0
        self._shape: list[int] | None = None  # (L, Hk, Dh) of every representative

    # -- life ----------------------------------------------------------------------------------------------------------

    def create(self) -> None:
        """Make the folder and own it; it is a stream's once `commit` was called. Raises UserError when it holds one."""
        if manifest.holds_stream(self.path):
            raise UserError(
                f"{self.path} already holds a stream: continue it with StreamSession.load({str(self.path)!r}, ...), "
                "or name an empty folder"
            )
        self.folder.make()
        self.aside = self.folder.aside()
        self.number = self.folder.highest()

    def open(self) -> tuple[list[Block], dict[int, tuple[Tensor, Tensor | None]]]:
        """Own the folder, read manifest and segments. Returns the blocks in order and {id: (representative,
        embedding)}; what was damaged is in `skipped`."""
        manifest.read(self.path)  # before a lock file is made in a folder that holds no stream
        self.folder.acquire()
        try:
            return self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> tuple[list[Block], dict[int, tuple[Tensor, Tensor | None]]]:
        body, damage, agree = manifest.read(self.path)
        self.skipped += damage
        self.head, self.state, self.generation = body["head"], body["state"], body["generation"]
        self.number = max(body["number"], self.folder.highest())
        self.aside = self.folder.aside()
        blocks: list[Block] = []
        representatives: dict[int, tuple[Tensor, Tensor | None]] = {}
        for file, entry in body["segments"].items():
            try:
                file_blocks, summaries = self._verified(file, entry)
            except OSError as e:
                raise UserError(
                    f"{self.path / file} cannot be read ({e.strerror}); nothing was changed: make it readable, or "
                    f"delete it to go on without its {len(entry['blocks'])} blocks"
                ) from None
            except Damaged as e:
                self.skipped.append(f"{file} ({len(entry['blocks'])} blocks): {e}")
                self._broken[file] = self.folder.size(file)
                continue
            self.entries[file] = entry
            self.file_of |= {block.id: file for block in file_blocks}
            blocks += file_blocks
            representatives |= summaries
        text = self._text(self.entries | {broken: body["segments"][broken] for broken in self._broken}, self.state)
        self._manifest_bytes = len(text)
        if agree or self._repaired(text):
            named = {*body["segments"], (self.state or {}).get("file", "")}
            for stray in self.folder.strays(named):
                self.folder.delete(stray)
        return sorted(blocks, key=lambda block: block.id), representatives

    def _verified(
        self, file: str, entry: dict[str, Any]
    ) -> tuple[list[Block], dict[int, tuple[Tensor, Tensor | None]]]:
        try:
            segment = SegmentFile(self.path / file, entry)
        except FileNotFoundError:
            raise Damaged("it is missing") from None
        try:
            segment.verify(entry["crc"])
            self._shape = self._shape or segment.shape
            if segment.shape != self._shape or [block.id for block in segment.blocks] != entry["blocks"]:
                raise Damaged("it holds other blocks than the manifest says")
            return segment.blocks, {block.id: segment.representative(block) for block in segment.blocks}
        finally:
            segment.close()

    def _repaired(self, text: bytes) -> bool:
        """Write both manifests as the one that was read."""
        try:
            for name in MANIFESTS:
                self.folder.put(name, text)
        except StoreError:
            return False
        return True

    def close(self) -> None:
        """Let go of files and folder; nothing is written."""
        for segment in self._opened.values():
            segment.close()
        self._opened.clear()
        self.folder.release()

    # -- writing -------------------------------------------------------------------------------------------------------

    @property
    def used(self) -> int:
        """Bytes of ours in the folder, the manifest counted three times because replacing it needs a third."""
        kept = sum(sum(list(files.values())) for files in (self.aside, self._leaving, self._broken))
        state = self.state["bytes"] if self.state else 0
        return self.segment_bytes + state + kept + 3 * self._manifest_bytes + OTHER_BYTES

    @property
    def segment_bytes(self) -> int:
        return sum(entry["bytes"] for entry in list(self.entries.values()))

    def write(self, blocks: list[tuple[Block, PackedBlock]], commit: bool = True) -> None:
        """One new segment of newer blocks. Raises StoreError, leaving the folder as it was. A saved state is older now
        and of no use: it goes."""
        file, entry = self._segment(blocks)
        self._name(self.entries | {file: entry}, None, [] if self.state is None else [self.state], file, commit)

    def rewrite(self, file: str, stays: list[tuple[Block, PackedBlock]]) -> None:
        """Replace a segment by one that holds only `stays` (nothing: delete it)."""
        new = dict([self._segment(stays)] if stays else [])
        entries: dict[str, dict[str, Any]] = {}
        for name, entry in self.entries.items():
            entries |= new if name == file else {name: entry}
        gone = {"file": file, "bytes": self.entries[file]["bytes"]}
        self._name(entries, self.state, [gone], next(iter(new), None), True)

    def _segment(self, blocks: list[tuple[Block, PackedBlock]]) -> tuple[str, dict[str, Any]]:
        """Write a segment that no manifest names yet."""
        data, head = encode(blocks)
        self.number += 1
        self.folder.put(file := f"segment-{self.number:08d}.safetensors", data)
        block_ids = [block.id for block, _ in blocks]
        return file, {"bytes": len(data), "crc": zlib.crc32(data), "head": head, "blocks": block_ids}

    def write_state(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Replace the saved session state; no block is given up for it. Raises NoRoom beyond the limit, StoreError."""
        data = to_bytes(tensors, {"state": json.dumps(meta)})
        if self.limit is not None and self.used + len(data) + 600 > self.limit:
            raise NoRoom(
                f"a state of {len(data):,} bytes does not fit disk_limit={self.limit:,} beside {self.used:,}: raise it"
            )
        self.number += 1
        self.folder.put(file := f"state-{self.number:08d}.safetensors", data)
        state = {"file": file, "bytes": len(data), "crc": zlib.crc32(data)}
        self._name(self.entries, state, [] if self.state is None else [self.state], file, True)

    def began(self, first: float | None, extent: int) -> None:
        """Note, for the manifests to come: seconds of the stream's first frame, spatial extent of its first grid."""
        self.head["stream"] = {"first": first, "span": extent}

    def drop_state(self) -> None:
        """Delete the saved state."""
        if self.state is not None:
            self._name(self.entries, None, [self.state], None, True)

    def commit(self) -> None:
        """Write the manifest."""
        self._name(self.entries, self.state, [], None, True)

    def abandon(self) -> None:
        """Undo a creation that failed: delete every file of ours, the folder too if it is empty, and let go."""
        self.folder.clear()
        self.close()

    def _name(
        self, entries: dict[str, dict[str, Any]], state: dict[str, Any] | None, gone: list[dict[str, Any]],
        new: str | None, commit: bool,
    ) -> None:  # fmt: skip
        """Make `entries` and `state` what the folder holds; then delete `gone`, or the file `new` if that fails."""
        if commit:
            text = self._text(entries, state, 1)
            try:
                self.folder.put(MANIFESTS[0], text)
            except StoreError:
                if new is not None:
                    self.folder.delete(new)
                raise
            self.generation += 1
            self._manifest_bytes = len(text)
        self.entries, self.state = entries, state
        self.file_of = {block_id: file for file, entry in entries.items() for block_id in entry["blocks"]}
        for old in gone:
            self._leaving[old["file"]] = old["bytes"]
            if old["file"] in self._opened:
                self._opened.pop(old["file"]).close()
        self.peak = max(self.peak, self.used)
        if commit:
            self._mirror(text)

    def _mirror(self, text: bytes) -> None:
        """Write the manifest's copy, then delete what neither names. Where the disk refuses the copy it stays a
        generation behind, and the files that it names stay too, until the next change."""
        try:
            self.folder.put(MANIFESTS[1], text, synced=False)
        except StoreError:
            return
        self.folder.sync()
        if self._broken:
            for file in self._broken:
                self.folder.set_aside(file)
            self.aside = self.folder.aside()
        for file in self._leaving:
            self.folder.delete(file)
        self._broken, self._leaving = {}, {}

    def _text(self, entries: dict[str, dict[str, Any]], state: dict[str, Any] | None, ahead: int = 0) -> bytes:
        body = {"generation": self.generation + ahead, "number": self.number, "head": self.head, "state": state}
        return manifest.dump(body | {"segments": entries})

    def drop_aside(self) -> None:
        """Delete the damaged files that are kept."""
        for file in self.aside:
            self.folder.delete(file)
        self.aside = {}

    # -- reading -------------------------------------------------------------------------------------------------------

    def read_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The saved state; None when there is none or it is damaged (then `skipped` says so)."""
        if not self.state:
            return None
        file, size = self.state["file"], self.state["bytes"]
        try:
            data = read_regular(self.path / file, size)
            if len(data) != size or zlib.crc32(data) != self.state["crc"]:
                raise Damaged("the checksum does not match")
            (head,) = struct.unpack("<Q", data[:8])
            meta = json.loads(json.loads(data[8 : 8 + head])["__metadata__"]["state"])
            return from_bytes(data), meta
        except OSError as e:
            self.skipped.append(f"{file} (the window): it cannot be read ({e.strerror})")
        except (SafetensorError, ValueError, KeyError, TypeError, struct.error) as e:
            self.skipped.append(f"{file} (the window): {e}")
        return None

    def _open_segment(self, file: str) -> SegmentFile:
        if file not in self._opened:
            segment = SegmentFile(self.path / file, self.entries[file])
            if len(self._opened) >= MOST_OPEN:
                self._opened.pop(next(iter(self._opened))).close()
            self._opened[file] = segment
        return self._opened[file]

    def _read(self, block: int, read: Callable[[SegmentFile], Any]) -> Any:
        """What `read` reads of a block's segment, checked. Raises BlockLost."""
        file = self.file_of[block]
        try:
            return read(self._open_segment(file))
        except (Damaged, FileNotFoundError) as e:
            raise BlockLost(f"{file}: {e if isinstance(e, Damaged) else 'it is missing'}") from None
        except OSError as e:  # such as too many open files: no damage
            raise UserError(f"{self.path / file} cannot be read now ({e.strerror}); nothing was changed") from None

    def layer(self, block: int, layer: int) -> dict[str, Tensor]:
        """The stored tensors of one layer of a block. Raises BlockLost."""
        return dict(self._read(block, lambda segment: segment.layer(block, layer)))

    def whole(self, block: Block, representative: Tensor, embedding: Tensor | None) -> PackedBlock:
        """A block as it is stored; representative (L, Hk, Dh) and embedding (E,) as they are in memory. Raises
        BlockLost."""
        layers = representative.shape[0] if block.level < Level.FEATURES else len(block.searched)
        by_layer = [self.layer(block.id, layer_index) for layer_index in range(layers)]
        names = ("k", "v", "ks", "vs")
        keys, values, key_scale, value_scale = (
            torch.stack([tensors[name] for tensors in by_layer]) if by_layer and name in by_layer[0] else None
            for name in names
        )
        packed = PackedBlock(keys, values, key_scale, value_scale, representative, embedding)
        if block.visual is not None:
            packed.features, packed.feature_scale = self._read(block.id, lambda segment: segment.features(block.id))
        return packed

    def forget(self, file: str) -> list[int]:
        """Drop a damaged segment; returns the blocks it held. The next change of the manifest sets its file aside."""
        entry = self.entries.pop(file)
        if file in self._opened:
            self._opened.pop(file).close()
        self._broken[file] = self.folder.size(file)
        for block in entry["blocks"]:
            self.file_of.pop(block, None)
        return list(entry["blocks"])

    def beat(self, seconds: float) -> None:
        """Note how far the stream has come."""
        self.folder.beat(seconds)
