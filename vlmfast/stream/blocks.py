"""Blocks: what the stream remembers of one temporal grid; how it is packed for storage, and where it is positioned.

A temporal grid is one frame, or the pair of frames that Qwen reads as one. Its path: frames -> `GridFeatures`
(vision.py) -> a `Block` and its `BlockTensors` (encoder.py) -> a `PackedBlock` (archive/) -> a `WorkingSet`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmfast.runtime import transfers
from vlmfast.runtime.transfers import to_device
from vlmfast.stream import quantized
from vlmfast.stream.levels import Level

FORMATS = ("int8", "bf16", "model")


@dataclass
class Block:
    """The record of a block of n tokens, without its keys and values. A position axes.

    id: its number in the stream. start, end: seconds (end is where the next one starts, as far as known).
    origin (A,): position of the block in the stream. advance (A,): step to a block that follows without a gap.
    relative_positions (A, n) int16: positions of its tokens less `origin`. frames: camera frames in it.
    novelty: share of its tokens that redundancy kept; norm: mean L2 norm of its values; eviction ranks by both.
    visual: first and one past the last of its tokens that are of the picture, where its features are stored.
    level: what is kept of it. searched: layers whose keys are kept beside its features, ascending.
    """

    id: int
    start: float
    end: float
    origin: tuple[int, ...]
    advance: tuple[int, ...]
    relative_positions: Tensor
    frames: int = 1
    novelty: float = 1.0
    norm: float = 1.0
    visual: tuple[int, int] | None = None
    level: Level = Level.FULL
    searched: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return int(self.relative_positions.shape[1])

    def json(self) -> dict[str, Any]:
        """The record as it is stored; what a block does not have is left out."""
        optional_fields: dict[str, Any] = {} if self.visual is None else {"visual": list(self.visual)}
        if self.level:
            optional_fields["level"] = self.level.name.lower()
        if self.searched:
            optional_fields["searched"] = list(self.searched)
        return optional_fields | {
            "id": self.id, "start": self.start, "end": self.end, "origin": list(self.origin),
            "advance": list(self.advance), "rel": self.relative_positions.tolist(), "frames": self.frames,
            "novelty": round(self.novelty, 4), "norm": round(self.norm, 4),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Block:
        data = dict(data)
        positions = torch.tensor(data.pop("rel"), dtype=torch.int16)
        names = ("origin", "advance", "visual", "searched")
        tuple_fields: dict[str, Any] = {name: tuple(data[name]) for name in names if name in data}
        if "level" in data:
            data["level"] = Level[data["level"].upper()]
        return cls(**data | tuple_fields, relative_positions=positions)


@dataclass
class BlockInput:
    """What a block gives to the language model: embeddings (n, D) of its tokens; visual: which of them are of the
    picture; deepstack: DeepStack features of those (v, D), one tensor a level."""

    block: Block
    embeddings: Tensor
    visual: slice
    deepstack: list[Tensor]


def joined(inputs: Sequence[BlockInput], device: torch.device) -> tuple[Tensor, dict[str, Any]]:
    """Embeddings (n, D) of several blocks, one after the other, and the DeepStack arguments of their forward."""
    embeddings = torch.cat([block_input.embeddings for block_input in inputs])
    if not inputs[0].deepstack:
        return embeddings, {}
    visual_masks = [torch.zeros(block_input.block.num_tokens, dtype=torch.bool) for block_input in inputs]
    for block_input, visual_mask in zip(inputs, visual_masks, strict=True):
        visual_mask[block_input.visual] = True
    levels = zip(*(block_input.deepstack for block_input in inputs), strict=True)
    return embeddings, {
        "visual_pos_masks": to_device(torch.cat(visual_masks)[None], device),
        "deepstack_visual_embeds": [torch.cat(level_features) for level_features in levels],
    }


@dataclass
class BlockTensors:
    """A block's tensors as the model made them: keys (un-rotated) and values (L, Hk, n, Dh); representative
    (L, Hk, Dh), the mean key that retrieval compares with; embedding (E,) of an external encoder, or None; norms (n,)
    of the values, the mean over layers and heads; given: what they were made of."""

    keys: Tensor
    values: Tensor
    representative: Tensor
    embedding: Tensor | None = None
    norms: Tensor | None = None
    given: BlockInput | None = None


class PackedLayer(NamedTuple):
    """One layer of a block as it is stored: keys, values (Hk, n, Dh), or (Hk, n, 0) where none are kept; scales
    (Hk, 1, Dh) or (Hk, n, 1); representative (Hk, Dh)."""

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None
    representative: Tensor


@dataclass
class PackedBlock:
    """A block's tensors as they are stored, K DeepStack levels.

    keys, values (L, Hk, n, Dh), in 4 bits uint8 (L, Hk, n, Dh / 2), from level FEATURES on no values, and keys of the
    layers `Block.searched` alone, in 4 bits, or None; scales float16, broadcastable, in 4 bits (L, Hk, n, groups), or
    None; representative (L, Hk, Dh) float16; embedding (E,) float16 or None; features (n + K * v, D): embeddings of its
    tokens, then every DeepStack level of its v visual ones, with scales (n + K * v, groups) float16 or None; None where
    they are not kept.
    """

    keys: Tensor | None
    values: Tensor | None
    key_scale: Tensor | None
    value_scale: Tensor | None
    representative: Tensor
    embedding: Tensor | None = None
    features: Tensor | None = None
    feature_scale: Tensor | None = None

    def nbytes(self) -> int:
        """Bytes of keys, values, features and scales (the representative is counted where it is kept)."""
        stored_tensors = (self.keys, self.values, self.key_scale, self.value_scale, self.features, self.feature_scale)
        return sum(tensor.numel() * tensor.element_size() for tensor in stored_tensors if tensor is not None)

    def layer(self, layer: int) -> PackedLayer:
        """What `unpack` makes one layer's keys and values of."""
        assert self.keys is not None
        keys, representative = self.keys[layer], self.representative[layer]
        values = keys[..., :0] if self.values is None else self.values[layer]
        scales = [None if scale is None else scale[layer] for scale in (self.key_scale, self.value_scale)]
        return PackedLayer(keys, values, scales[0], scales[1], representative)

    def tensors(self) -> dict[str, Tensor]:
        """By their names in a segment file."""
        tensor_of = {
            "k": self.keys, "v": self.values, "ks": self.key_scale, "vs": self.value_scale,
            "rep": self.representative, "emb": self.embedding, "x": self.features, "xs": self.feature_scale,
        }  # fmt: skip
        return {name: tensor.contiguous() for name, tensor in tensor_of.items() if tensor is not None}


# -- storage formats ---------------------------------------------------------------------------------------------------


def pack_all(
    blocks: Sequence[tuple[Block, BlockTensors]], keep_as: str, with_features: bool = False
) -> list[tuple[Block, PackedBlock]]:
    """`pack` of several blocks, on the CPU (pinned, if a GPU made them, which is waited for once); sets the `norm` of
    those whose tensors tell it, and `visual` of those whose features are kept."""
    with_norms = [(block, tensors.norms) for block, tensors in blocks if tensors.norms is not None]
    packed, norms = _on_host(
        [pack(tensors, keep_as, with_features) for _, tensors in blocks], [norms for _, norms in with_norms]
    )
    for block, tensors in blocks:
        if with_features and tensors.given is not None:
            block.visual = tensors.given.visual.start, tensors.given.visual.stop
    for (block, _), of_tokens in zip(with_norms, norms, strict=True):
        block.norm = float(of_tokens.mean())
    return [(block, stored) for (block, _), stored in zip(blocks, packed, strict=True)]


def _on_host(blocks: list[PackedBlock], more: list[Tensor]) -> tuple[list[PackedBlock], list[Tensor]]:
    """Blocks, and more tensors, brought to the host at once."""
    fields = [[getattr(block, field.name) for field in dataclasses.fields(block)] for block in blocks]
    present = [tensor for tensors in fields for tensor in tensors if tensor is not None]
    arrived = iter(transfers.read_back([*present, *more]))
    packed = [PackedBlock(*(tensor if tensor is None else next(arrived) for tensor in tensors)) for tensors in fields]  # type: ignore[arg-type]
    return packed, list(arrived)


def pack(block: BlockTensors, keep_as: str, with_features: bool = False) -> PackedBlock:
    """A block's tensors in a format of `FORMATS`, made where they lie.

    "model": the model's dtype. "bf16". "int8": symmetric, one scale per channel or per token of every (layer, head),
    whichever needs fewer of them; a quarter of float32, half of bf16. Keys are quantised as their difference to the
    block's representative, so that large constant channels (key biases, KIVI arXiv 2402.02750) cost no precision.
    with_features: what it was made of too, in the same dtype; "int8": with a scale per group of a token's values.
    """
    features = pack_features(block.given, keep_as) if with_features and block.given is not None else (None, None)
    representative = block.representative.half()
    embedding = None if block.embedding is None else block.embedding.half()
    if keep_as == "int8":
        keys, key_scale = _int8(block.keys.float() - representative[:, :, None].float())
        values, value_scale = _int8(block.values.float())
        return PackedBlock(keys, values, key_scale, value_scale, representative, embedding, *features)
    dtype = torch.bfloat16 if keep_as == "bf16" else block.keys.dtype
    keys, values = (x.to(dtype, copy=True).contiguous() for x in (block.keys, block.values))
    return PackedBlock(keys, values, None, None, representative, embedding, *features)


def pack_features(given: BlockInput, keep_as: str) -> tuple[Tensor, Tensor | None]:
    """What a block gave to the language model, (n + K * v, D), and the scales of "int8"."""
    feature_rows = torch.cat([given.embeddings, *given.deepstack])
    if keep_as == "int8":
        return quantized.packed(feature_rows, 8)
    return feature_rows.to(torch.bfloat16) if keep_as == "bf16" else feature_rows, None


def unpack_features(block: Block, packed: PackedBlock, like: Tensor) -> BlockInput:
    """What a block gave to the language model, in the dtype and on the device of `like`."""
    assert block.visual is not None and packed.features is not None
    feature_rows = packed.features
    if packed.feature_scale is not None:
        feature_rows = quantized.unpacked(feature_rows, packed.feature_scale)
    rows = to_device(feature_rows.to(like.dtype), like.device)
    visual, num_tokens = slice(*block.visual), block.num_tokens
    deepstack = list(rows[num_tokens:].split(visual.stop - visual.start)) if len(rows) > num_tokens else []
    return BlockInput(block, rows[:num_tokens], visual, deepstack)


def _int8(numbers: Tensor) -> tuple[Tensor, Tensor]:
    axis = 2 if numbers.shape[2] > numbers.shape[3] else 3
    scale = (numbers.abs().amax(axis, keepdim=True) / 127).clamp(min=1e-8, max=6e4).half().clamp(min=6e-8)
    return (numbers / scale.float()).round_().clamp_(-127, 127).to(torch.int8), scale


def unpack(layer: PackedLayer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One layer's keys and values (Hk, n, Dh) in `dtype`."""
    keys, values, scale = unpack_keys(layer, dtype), layer.values, layer.value_scale
    if scale is None:
        return keys, values.to(dtype)
    in_four_bits = values.dtype == torch.uint8
    return keys, (quantized.unpacked(values, scale) if in_four_bits else values.float() * scale.float()).to(dtype)


def unpack_keys(layer: PackedLayer, dtype: torch.dtype) -> Tensor:
    """One layer's keys (Hk, n, Dh) in `dtype`."""
    keys, scale, representative = layer.keys, layer.key_scale, layer.representative[:, None].float()
    if scale is None:
        return keys.to(dtype)
    if keys.dtype == torch.uint8:
        return (representative + quantized.unpacked(keys, scale)).to(dtype)
    return torch.addcmul(representative, keys.float(), scale.float()).to(dtype)


# -- positions of chosen blocks ----------------------------------------------------------------------------------------


def origins(blocks: Sequence[Block], base: Sequence[int], contiguous: bool) -> list[tuple[int, ...]]:
    """The new origin of every block (ascending ids), the first one at `base` (A,).

    contiguous (ReKV, arXiv 2503.00540): blocks that follow one another in the stream keep their distance, any gap
    closes to the natural step of the block before it; otherwise distances are those of the stream. Under M-RoPE a block
    keeps its own (h, w) grid; only its origin moves.
    """
    placed = [tuple(base)] if blocks else []
    for before, block in pairwise(blocks):
        step: Sequence[int] = [after - here for after, here in zip(block.origin, before.origin, strict=True)]
        if contiguous and block.id != before.id + 1:
            step = before.advance
        placed.append(tuple(map(add, placed[-1], step)))
    return placed


def block_positions(blocks: Sequence[Block], base: Sequence[int], contiguous: bool) -> Tensor:
    """Positions (A, n) int64 of all tokens of `blocks`, in order."""
    if not blocks:
        return torch.zeros(len(base), 0, dtype=torch.long)
    relative = [block.relative_positions for block in blocks]
    lengths = torch.tensor([positions.shape[1] for positions in relative])
    placed = torch.tensor(origins(blocks, base, contiguous)).T.repeat_interleave(lengths, 1)
    return torch.cat(relative, 1).long() + placed


def text_position(
    blocks: Sequence[Block], base: Sequence[int], contiguous: bool, timed: bool, after_max: bool, extent: int
) -> int:
    """Where text after the blocks begins (the same on every axis).

    Chained layouts (1-D RoPE, Qwen3-VL): after the last block. Timed ones (Qwen2/2.5-VL): after the maximum of all
    axes, or, where the model's own rule is not `after_max`, after the spatial `extent` of the first grid.
    """
    if not blocks:
        return max(base)
    last_origin = origins(blocks, base, contiguous)[-1]
    if not timed:
        return max(map(add, last_origin, blocks[-1].advance))
    after_first_grid = max(base) + extent
    return max(last_origin[0] + 1, after_first_grid) if after_max else after_first_grid
