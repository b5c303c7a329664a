"""One segment file: writes blocks to bytes, and reads them back with every byte checked against its checksum.

A safetensors file. Its metadata holds the blocks' records and, per block, a CRC-32 of every layer's tensors and one of
its representative; the manifest holds the sums of the header and of the whole file.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from vlmfast.stream.archive.folder import Damaged, open_regular
from vlmfast.stream.blocks import Block, PackedBlock

_TYPES = {
    "I8": torch.int8, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
_LAYERED = ("k", "v", "ks", "vs")
_MOST_HEADER = 256 << 20  # bytes


def encode(blocks: list[tuple[Block, PackedBlock]]) -> tuple[bytes, int]:
    """The bytes of a segment, and the CRC-32 of its header."""
    tensors: dict[str, Tensor] = {}
    sums: dict[int, list[int]] = {}
    for block, packed in blocks:
        named = packed.tensors()
        tensors |= {f"{block.id}.{name}": x for name, x in named.items()}
        layered = [named[n] for n in _LAYERED if n in named]
        sums[block.id] = [_sum([x[layer] for x in layered]) for layer in range(len(named["rep"]))]
        sums[block.id].append(_sum([named[n] for n in ("rep", "emb") if n in named]))
    records = [b.json() | {"sums": sums[b.id]} for b, _ in blocks]
    data = to_bytes(tensors, {"blocks": json.dumps(records)})
    (size,) = struct.unpack("<Q", data[:8])
    return data, zlib.crc32(data[: 8 + size])


def bytes_in_file(block: Block, packed: PackedBlock) -> int:
    """Bytes of a block in a segment, its share of the header included (an upper bound)."""
    halves = packed.representative.numel() + (0 if packed.embedding is None else packed.embedding.numel())
    record = 900 + 8 * block.relative_positions.numel() + 12 * (packed.representative.shape[0] + 1)
    return packed.nbytes() + 2 * halves + record


def _sum(tensors: list[Tensor]) -> int:
    total = 0
    for x in tensors:
        total = zlib.crc32(x.contiguous().view(torch.uint8).numpy().data, total)
    return total


class SegmentFile:
    """An open segment. entry: its "bytes", "crc" and "head" in the manifest. Raises Damaged where the file is not what
    was written, OSError where it cannot be read."""

    def __init__(self, path: Path, entry: dict[str, Any]) -> None:
        self.bytes = entry["bytes"]
        self.file = open_regular(path, self.bytes)
        try:
            self._size()
            (size,) = struct.unpack("<Q", self._read(0, 8))
            if size > min(_MOST_HEADER, self.bytes - 8):
                raise Damaged("the header does not fit")
            head = self._read(0, 8 + size)
            if zlib.crc32(head) != entry["head"]:
                raise Damaged("the checksum of the header does not match")
            self.start = 8 + size
            try:
                self._parse(json.loads(head[8:]))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError, OverflowError):
                raise Damaged("the header is not that of a segment") from None
        except BaseException:
            self.file.close()
            raise

    def _size(self) -> None:
        size = os.fstat(self.file.fileno()).st_size
        if size != self.bytes:
            raise Damaged(f"{size:,} bytes instead of {self.bytes:,}")

    def _read(self, begin: int, size: int) -> bytes:
        data = os.pread(self.file.fileno(), size, begin)
        while len(data) < size:
            more = os.pread(self.file.fileno(), size - len(data), begin + len(data))
            if not more:
                raise Damaged("it is torn")
            data += more
        return data

    def _parse(self, header: dict[str, Any]) -> None:
        self.blocks: list[Block] = []
        self.sums: dict[int, list[int]] = {}
        self.places: dict[str, tuple[torch.dtype, list[int], int]] = {}  # name -> dtype, shape, first byte
        records = json.loads(header.pop("__metadata__")["blocks"])
        for name, entry in header.items():
            dtype, shape, (first, last) = _TYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if not 0 <= first <= last <= self.bytes - self.start or min(shape) < 1:
                raise ValueError(name)
            if last - first != math.prod(shape) * dtype.itemsize:
                raise ValueError(name)
            self.places[name] = dtype, shape, first
        for record in records:
            sums = record.pop("sums")
            block = Block.from_json(record)
            keys, representative = (self.places[f"{block.id}.{n}"][1] for n in ("k", "rep"))
            layers, heads, tokens, width = keys
            if (
                self.places[f"{block.id}.v"][1] != keys
                or representative != [layers, heads, width]
                or len(sums) != layers + 1
            ):
                raise ValueError(block.id)
            if tokens != block.num_tokens or {len(block.origin), len(block.advance)} != {len(block.relative_positions)}:
                raise ValueError(block.id)
            self.blocks.append(block)
            self.sums[block.id] = sums
        self.shape = representative

    def verify(self, crc: int) -> None:
        """Read all of it, in pieces. Raises Damaged."""
        total = 0
        for begin in range(0, self.bytes, 4 << 20):
            total = zlib.crc32(self._read(begin, min(4 << 20, self.bytes - begin)), total)
        if total != crc:
            raise Damaged("the checksum does not match")

    def layer(self, block: int, layer: int) -> dict[str, Tensor]:
        """The stored tensors of one layer of a block, by name."""
        self._size()
        return self._tensors(block, [n for n in _LAYERED if f"{block}.{n}" in self.places], layer)

    def representative(self, block: int) -> tuple[Tensor, Tensor | None]:
        """A block's representative (L, Hk, Dh) and its embedding (E,)."""
        named = self._tensors(block, [n for n in ("rep", "emb") if f"{block}.{n}" in self.places], None)
        return named["rep"], named.get("emb")

    def _tensors(self, block: int, names: list[str], layer: int | None) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        total = 0
        for name in names:
            dtype, shape, first = self.places[f"{block}.{name}"]
            size = math.prod(shape) * dtype.itemsize
            if layer is not None:
                size //= shape[0]
                first, shape = first + layer * size, shape[1:]
            data = bytearray(self._read(self.start + first, size))
            total = zlib.crc32(data, total)
            out[name] = torch.frombuffer(data, dtype=dtype).view(shape)
        if total != self.sums[block][-1 if layer is None else layer]:
            raise Damaged(f"the checksum of block {block} does not match")
        return out

    def close(self) -> None:
        self.file.close()
