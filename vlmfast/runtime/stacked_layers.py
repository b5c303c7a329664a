"""Several layers of one prefill compressed as one: their heads lie side by side, so that one launch serves them all.

On a GPU a policy's rule is dozens of small launches a layer, which take the host longer than the layer's own work takes
the device. Layers wait for each other until copies of their keys and values reach `AT_ONCE`. On a CPU every layer is
compressed by itself, which holds one layer at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlmfast.core import CompressedLayer, LayerView
from vlmfast.kernels import quantise

AT_ONCE = 2**28  # bytes of keys and values that are copied to stand side by side

# keys (R, m, D), values (R, m, Dv), positions (R, m) of rows of one length; of int8 rows scales of keys and values too
Rows = tuple[Tensor, ...]


@dataclass
class Gathered:
    """What stays, gathered for all rows at once; None where rows differ in length or in kind."""

    kept: Rows | None
    low: Rows | None  # what stays besides, as int8


@dataclass
class EvenRows:
    """Rows that hold `length` columns each, with room behind them: keys (R, capacity, D) and so on."""

    parts: Rows
    length: int


@dataclass
class LayerRows:
    """`Gathered` of one layer."""

    kept: EvenRows | None
    low: EvenRows | None


def room(length: int) -> int:
    """Free slots behind a row of so many columns, for those that are decoded."""
    return max(32, length // 32)


def is_full(view: LayerView, waiting: int) -> bool:
    """Would one layer more like this one take too much memory? True on a CPU."""
    layer_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (view.keys, view.values))
    return view.keys.device.type == "cpu" or (waiting + 1) * layer_bytes > AT_ONCE


def side_by_side(views: list[LayerView]) -> LayerView:
    """One view of layers that hold the same columns; without their windows."""
    if len(views) == 1:
        return views[0]
    keys, values = (torch.cat([getattr(view, name) for view in views], 1) for name in ("keys", "values"))
    numbers = tuple(view.layer for view in views)
    return replace(views[0], keys=keys, values=values, window=None, stacked=len(views), numbers=numbers)


def gathered(kept: CompressedLayer, keys: Tensor, values: Tensor, positions: Tensor) -> Gathered:
    """What stays of keys (B, Hk, L, D), values (B, Hk, L, Dv) and positions (B, L) int32."""
    return Gathered(kept_rows(kept, keys, values, positions), low_rows(kept, keys, values, positions))


def kept_rows(kept: CompressedLayer, keys: Tensor, values: Tensor, positions: Tensor) -> Rows | None:
    """`Gathered.kept`."""
    as_int8 = set([False] if kept.int8 is None else kept.int8.tolist())
    own_vectors = [] if kept.merged is None else [pair is None for pair in kept.merged]
    is_dynamic = kept.dynamic is not None and bool(kept.dynamic.any())
    if len({len(indices) for indices in kept.keep}) > 1 or len(as_int8) > 1 or any(own_vectors) or is_dynamic:
        return None
    rows = taken(kept.keep, keys, values, positions, kept.merged)
    return quantised(*rows) if True in as_int8 else rows


def low_rows(kept: CompressedLayer, keys: Tensor, values: Tensor, positions: Tensor) -> Rows | None:
    """`Gathered.low`."""
    if kept.low is None or len({len(indices) for indices in kept.low}) > 1:
        return None
    return quantised(*taken(kept.low, keys, values, positions))


def taken(
    columns: list[Tensor], keys: Tensor, values: Tensor, positions: Tensor, merged: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Columns (m,) of every row as one tensor each; merged: pairs of vectors (m, D) that stand in their place."""
    batch_size, num_heads = keys.shape[:2]
    indices = torch.stack(columns).view(batch_size, num_heads, -1)
    places = [batch_row[batch_indices] for batch_row, batch_indices in zip(positions, indices, strict=True)]
    if merged is not None:
        vectors = [torch.stack(row_vectors) for row_vectors in zip(*merged, strict=True)]
    else:
        head_index = torch.arange(num_heads, device=keys.device)[:, None]
        vectors = [
            _joined([batch_row[head_index, batch_indices] for batch_row, batch_indices in zip(x, indices, strict=True)])
            for x in (keys, values)
        ]
    return vectors[0], vectors[1], _joined(places)


def quantised(keys: Tensor, values: Tensor, positions: Tensor) -> Rows:
    """Rows as int8, with the scales of their keys and values."""
    (int8_keys, key_scale), (int8_values, value_scale) = quantise(keys), quantise(values)
    return int8_keys, int8_values, positions, key_scale, value_scale


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def by_layer(kept: CompressedLayer, layers: int, batch: int) -> list[CompressedLayer]:
    """What a view of several layers keeps, layer by layer."""
    if layers == 1:
        return [kept]
    num_heads = len(kept.keep) // (layers * batch)

    def rows_of(layer: int) -> slice | list[int]:
        if batch == 1:
            return slice(layer * num_heads, (layer + 1) * num_heads)
        return [
            (batch_index * layers + layer) * num_heads + head
            for batch_index in range(batch)
            for head in range(num_heads)
        ]

    def pick(values: Any, rows: slice | list[int]) -> Any:
        if values is None or isinstance(values, Tensor) or isinstance(rows, slice):
            return None if values is None else values[rows]
        return [values[row] for row in rows]

    per_head = ("keep", "dynamic", "budget", "int8", "merged", "mass", "low", "low_rank")
    out = []
    for layer in range(layers):
        rows = rows_of(layer)
        statistics = [row[layer] if isinstance(row, list) else row for row in kept.stats.get("rows", [])]
        fields = {name: pick(getattr(kept, name), rows) for name in per_head}
        out.append(replace(kept, **fields, stats={"rows": statistics} if statistics else {}))
    return out


def gathered_by_layer(rows: Gathered, layers: int, batch: int) -> list[LayerRows]:
    """`gathered` of a view, layer by layer, each row with room behind it; the layers share their buffers."""
    kept, low = (
        [None] * layers if stacked_rows is None else spaced(stacked_rows, layers, batch, grows)
        for stacked_rows, grows in ((rows.kept, True), (rows.low, False))
    )
    return [LayerRows(*parts) for parts in zip(kept, low, strict=True)]


def spaced(rows: Rows, layers: int, batch: int, grows: bool) -> list[EvenRows]:
    """Rows of (batch, layers, heads) in that order, layer by layer, in one buffer each for keys, values and so on."""
    length, buffers = rows[0].shape[1], []
    capacity = length + (room(length) if grows else 0)
    for part in rows:
        by_row = part.unflatten(0, (batch, layers, -1))
        new_buffer = part.new_empty if part is rows[2] else part.new_zeros  # nobody reads positions of free slots
        buffer = new_buffer(layers, batch, by_row.shape[2], capacity, *part.shape[2:])
        buffer[:, :, :, :length] = by_row.transpose(0, 1)
        buffers.append(buffer.flatten(1, 2).unbind(0))
    return [EvenRows(parts, length) for parts in zip(*buffers, strict=True)]


def ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    number_ranges: list[list[int]] = []
    for number in numbers:
        if number_ranges and number == number_ranges[-1][-1] + 1:
            number_ranges[-1].append(number)
        else:
            number_ranges.append([number])
    return ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in number_ranges)
