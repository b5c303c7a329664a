"""One segment file: writes blocks to bytes, and reads them back with every byte checked against its checksum.

A safetensors file. Its metadata holds the blocks' records and, per block, a CRC-32 of every layer's tensors and one of
its representative and features; the manifest holds the sums of the header and of the whole file. A segment with blocks
coarser than FULL is made small: its header is compressed inside that of the file, and their representatives, which
differ little from block to block, are one compressed tensor.
"""

from __future__ import annotations

import base64
import json
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from vlmfast.stream import quantized
from vlmfast.stream.archive.folder import Damaged, open_regular
from vlmfast.stream.blocks import Block, PackedBlock
from vlmfast.stream.levels import Level

_TYPES = {
    "I8": torch.int8, "U8": torch.uint8, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64,
}  # fmt: skip
_LAYERED, _FOUND_BY, _GIVEN = ("k", "v", "ks", "vs"), ("rep", "emb"), ("x", "xs")
_REPRESENTATIVES = "representatives"
_PLANES = (0, 8, 16)  # bits of a difference of two int16 that the bytes of each plane begin at
_UNREADABLE = (
    ValueError, LookupError, TypeError, AttributeError, RecursionError, RuntimeError, OverflowError, zlib.error,
)  # fmt: skip
_MOST_HEADER = 256 << 20  # bytes


def encode(blocks: list[tuple[Block, PackedBlock]]) -> tuple[bytes, int]:
    """The bytes of a segment, and the CRC-32 of its header."""
    tensors: dict[str, Tensor] = {}
    sums: dict[int, list[int]] = {}
    for block, packed in blocks:
        tensor_of = packed.tensors()
        if block.level:
            del tensor_of["rep"]  # with the others, below
        tensors |= {f"{block.id}.{name}": tensor for name, tensor in tensor_of.items()}
        layered = [tensor_of[key] for key in _LAYERED if key in tensor_of]
        layers = range(len(layered[0]) if layered else 0)
        sums[block.id] = [_sum([tensor[layer] for tensor in layered]) for layer in layers]
        sums[block.id].append(_sum([tensor_of[key] for key in _FOUND_BY if key in tensor_of]))
        sums[block.id].append(_sum([tensor_of[key] for key in _GIVEN if key in tensor_of]))
    records = [block.json() | {"sums": sums[block.id] if block.visual else sums[block.id][:-1]} for block, _ in blocks]
    coarse = [(block.id, packed.representative) for block, packed in blocks if block.level]
    if not coarse:
        return _with_sum(to_bytes(tensors, {"blocks": json.dumps(records)}))
    tensors[_REPRESENTATIVES], about = _compressed(coarse)
    data = to_bytes(tensors, {"blocks": json.dumps(records), _REPRESENTATIVES: json.dumps(about)})
    (size,) = struct.unpack("<Q", data[:8])
    header = base64.b85encode(zlib.compress(data[8 : 8 + size], 9)).decode()
    body = torch.frombuffer(bytearray(data[8 + size :]), dtype=torch.uint8)
    return _with_sum(to_bytes({"data": body}, {"header": header}))


def _with_sum(data: bytes) -> tuple[bytes, int]:
    (size,) = struct.unpack("<Q", data[:8])
    return data, zlib.crc32(data[: 8 + size])


def _compressed(representatives: list[tuple[int, Tensor]]) -> tuple[Tensor, dict[str, Any]]:
    """Rounded representatives (L, Hk, Dh), each as its difference to the one before; and what `_expanded` must know."""
    codes, exponents = quantized.fixed_point(torch.stack([representative for _, representative in representatives]))
    rows = torch.cat([codes.flatten(1), exponents.flatten(1)], 1).int().numpy()
    change = np.diff(rows, axis=0, prepend=0)
    change = change << 1 ^ change >> 31  # small numbers of either sign are small
    data = zlib.compress(b"".join((change >> shift).astype(np.uint8).tobytes() for shift in _PLANES), 9)
    about = {
        "ids": [block_id for block_id, _ in representatives],
        "shape": list(codes.shape[1:]),
        "sum": zlib.crc32(data),
    }
    return torch.frombuffer(bytearray(data), dtype=torch.uint8), about


def _expanded(data: bytes, about: dict[str, Any]) -> dict[int, Tensor]:
    """{block id: representative (L, Hk, Dh) float16}. Raises ValueError, zlib.error for what is none."""
    ids, shape = about["ids"], about["shape"]
    size, groups = math.prod(shape), math.prod(shape[:2])
    flat = np.frombuffer(_decompressed(data, len(_PLANES) * len(ids) * (size + groups)), np.uint8)
    planes = flat.reshape(len(_PLANES), len(ids), size + groups).astype(np.int32)
    change = sum(plane << shift for plane, shift in zip(planes, _PLANES, strict=True))
    rows = torch.from_numpy(np.cumsum(change >> 1 ^ -(change & 1), 0)).to(torch.int16)
    values = quantized.from_fixed_point(rows[:, :size].view(-1, *shape), rows[:, size:].view(-1, *shape[:2]))
    return dict(zip(ids, values.unbind(0), strict=True))


def _decompressed(data: bytes, most: int) -> bytes:
    """At most so many bytes, whatever the data says."""
    return zlib.decompressobj().decompress(data, most)


def bytes_in_file(block: Block, packed: PackedBlock) -> int:
    """Bytes of a block in a segment, its share of the header included (an upper bound)."""
    halves = packed.representative.numel() + (0 if packed.embedding is None else packed.embedding.numel())
    record = 900 + 8 * block.relative_positions.numel() + 12 * (packed.representative.shape[0] + 2)
    record += 200 if block.visual else 0
    return packed.nbytes() + 2 * halves + record


def _sum(tensors: list[Tensor]) -> int:
    total = 0
    for tensor in tensors:
        total = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data, total)
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
            except _UNREADABLE:
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
        metadata = header.pop("__metadata__")
        if "header" in metadata:
            compressed = base64.b85decode(metadata["header"])
            header = json.loads(_decompressed(compressed, _MOST_HEADER))
            metadata = header.pop("__metadata__")
        records = json.loads(metadata["blocks"])
        self.about = json.loads(metadata[_REPRESENTATIVES]) if _REPRESENTATIVES in metadata else None
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
            self._check(block, sums)
            self.blocks.append(block)
            self.sums[block.id] = sums
        if self.about is not None and self.about["ids"] != [block.id for block in self.blocks if block.level]:
            raise ValueError(self.about)
        self.shape = self._shape_of(self.blocks[0])
        self._coarse: dict[int, Tensor] = {}  # representatives of coarse blocks, once they are read

    def _shape_of(self, block: Block) -> list[int]:
        """(L, Hk, Dh) of a block's representative."""
        if block.level and self.about is not None:
            return list(self.about["shape"])
        return self.places[f"{block.id}.rep"][1]

    def _check(self, block: Block, sums: list[int]) -> None:
        """Raise ValueError where the tensors of a block are not those that its record says."""
        shape, tokens = self._shape_of(block), block.num_tokens
        searched = block.level >= Level.FEATURES  # layers whose keys alone are kept
        layers = len(block.searched) if searched else shape[0]
        if searched and not all(0 <= layer < shape[0] for layer in block.searched):
            raise ValueError(block.id)
        if layers:
            names, width = ("k",) if searched else ("k", "v"), shape[2] // 2 if block.level else shape[2]
            for name in names:
                if self.places[f"{block.id}.{name}"][1] != [layers, shape[1], tokens, width]:
                    raise ValueError(block.id)
        if block.visual is not None:
            first, last = block.visual
            rows = self.places[f"{block.id}.x"][1][0]
            if not 0 <= first < last <= tokens or rows < tokens or (rows - tokens) % (last - first):
                raise ValueError(block.id)
        elif searched:
            raise ValueError(block.id)
        if len(sums) != layers + 1 + (block.visual is not None):
            raise ValueError(block.id)
        if {len(block.origin), len(block.advance)} != {len(block.relative_positions)}:
            raise ValueError(block.id)

    def verify(self, crc: int) -> None:
        """Read all of it, in pieces. Raises Damaged."""
        total = 0
        for begin in range(0, self.bytes, 4 << 20):
            total = zlib.crc32(self._read(begin, min(4 << 20, self.bytes - begin)), total)
        if total != crc:
            raise Damaged("the checksum does not match")

    def layer(self, block: int, layer: int) -> dict[str, Tensor]:
        """The stored tensors of one layer of a block, by name. layer: from level FEATURES on a place in `searched`."""
        self._size()
        return self._tensors(block, _LAYERED, layer, layer)

    def features(self, block: int) -> tuple[Tensor, Tensor | None]:
        """A block's features and their scales."""
        self._size()
        tensor_of = self._tensors(block, _GIVEN, None, -1)
        return tensor_of["x"], tensor_of.get("xs")

    def representative(self, block: Block) -> tuple[Tensor, Tensor | None]:
        """A block's representative (L, Hk, Dh) and its embedding (E,)."""
        layers = len(block.searched) if block.level >= Level.FEATURES else self.shape[0]
        tensor_of = self._tensors(block.id, _FOUND_BY, None, layers)
        if not block.level:
            return tensor_of["rep"], tensor_of.get("emb")
        if not self._coarse:
            assert self.about is not None
            _, (size,), first = self.places[_REPRESENTATIVES]
            data = self._read(self.start + first, size)
            try:
                if zlib.crc32(data) != self.about["sum"]:
                    raise ValueError
                self._coarse = _expanded(data, self.about)
            except (ValueError, RuntimeError, zlib.error):
                raise Damaged("the checksum of the representatives does not match") from None
        return self._coarse[block.id], tensor_of.get("emb")

    def _tensors(self, block: int, names: tuple[str, ...], layer: int | None, number: int) -> dict[str, Tensor]:
        """Tensors of a block, of one layer or whole, that together have the block's sum of this number."""
        tensors: dict[str, Tensor] = {}
        total = 0
        for name in [candidate for candidate in names if f"{block}.{candidate}" in self.places]:
            dtype, shape, first = self.places[f"{block}.{name}"]
            size = math.prod(shape) * dtype.itemsize
            if layer is not None:
                size //= shape[0]
                first, shape = first + layer * size, shape[1:]
            data = bytearray(self._read(self.start + first, size))
            total = zlib.crc32(data, total)
            tensors[name] = torch.frombuffer(data, dtype=dtype).view(shape)
        if total != self.sums[block][number]:
            raise Damaged(f"the checksum of block {block} does not match")
        return tensors

    def close(self) -> None:
        self.file.close()
