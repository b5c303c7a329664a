"""Unpacks one layer of many stored blocks on a GPU: a few copies and launches for all, none that the host waits for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmfast.runtime.transfers import to_device
from vlmfast.stream import quantized
from vlmfast.stream.blocks import PackedLayer


def unpack_on_device(
    blocks: Sequence[PackedLayer], dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """What `blocks.unpack` makes of each: keys and values (Hk, n, Dh) in `dtype`, on the device; at least one block."""
    unpacked: dict[int, tuple[Tensor, Tensor]] = {}
    for in_four_bits, unpack in ((True, _four_bit), (False, _others)):
        indices = [index for index, block in enumerate(blocks) if (block.keys.dtype == torch.uint8) is in_four_bits]
        if indices:
            unpacked |= zip(indices, unpack([blocks[index] for index in indices], dtype, device), strict=True)
    return [unpacked[index] for index in range(len(blocks))]


def _four_bit(blocks: Sequence[PackedLayer], dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Of blocks in 4 bits."""
    counts = [block.keys.shape[1] for block in blocks]
    block_of = to_device(torch.repeat_interleave(torch.tensor(counts)), device)
    representative = _joined([block.representative[:, None] for block in blocks], device)[:, block_of].float()
    keys, key_scale, values, value_scale = (
        _joined([getattr(block, name) for block in blocks], device)
        for name in ("keys", "key_scale", "values", "value_scale")
    )
    keys = (representative + quantized.unpacked(keys, key_scale)).to(dtype)
    return list(
        zip(keys.split(counts, 1), quantized.unpacked(values, value_scale).to(dtype).split(counts, 1), strict=True)
    )


def _others(blocks: Sequence[PackedLayer], dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Of blocks in 8 bits, or in a float dtype."""
    counts = [block.keys.shape[1] for block in blocks]
    keys, values = (
        _joined([block.keys for block in blocks], device),
        _joined([block.values for block in blocks], device),
    )
    if blocks[0].key_scale is not None:
        block_of = to_device(torch.repeat_interleave(torch.tensor(counts)), device)  # (n,) which block a token is of
        representative = _joined([block.representative[:, None] for block in blocks], device)[:, block_of].float()
        key_scale = _scale([block.key_scale for block in blocks], blocks[0], counts, block_of)
        keys = torch.addcmul(representative, keys.float(), key_scale)
        values = values.float() * _scale([block.value_scale for block in blocks], blocks[0], counts, block_of)
    return list(zip(keys.to(dtype).split(counts, 1), values.to(dtype).split(counts, 1), strict=True))


def _scale(scales: Sequence[Any], like: PackedLayer, counts: list[int], block_of: Tensor) -> Tensor:
    """The scales of all tokens, float32, (Hk, n, Dh) or, where no block has them by channel, (Hk, n, 1)."""
    heads, _, width = like.keys.shape
    by_channel = [scale.shape[1] == 1 and scale.shape[2] == width for scale in scales]
    ones = torch.ones(heads, 1, 1, dtype=torch.float16)
    combined: Tensor | None = None
    if any(by_channel):
        by_block = zip(scales, by_channel, strict=True)
        chosen = [scale if is_by_channel else ones.expand(-1, -1, width) for scale, is_by_channel in by_block]
        combined = _joined(chosen, block_of.device)[:, block_of].float()
    if not all(by_channel):
        with_counts = zip(scales, by_channel, counts, strict=True)
        chosen = [ones.expand(-1, count, -1) if is_by_channel else scale for scale, is_by_channel, count in with_counts]
        of_tokens = _joined(chosen, block_of.device).float()
        combined = of_tokens if combined is None else combined * of_tokens
    assert combined is not None
    return combined


def _joined(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Host tensors (Hk, ., .) one after the other along dimension 1, sent to the device from pinned memory."""
    first = tensors[0]
    shape = (first.shape[0], sum(tensor.shape[1] for tensor in tensors), first.shape[2])
    pinned = torch.empty(shape, dtype=first.dtype, pin_memory=True)
    return to_device(torch.cat(list(tensors), 1, out=pinned), device)
