"""Several layers of one prefill compressed as one: their heads lie side by side, so that one launch serves them all.

On a GPU a policy's rule is dozens of small launches a layer, which take the host longer than the layer's own work takes
the device. Layers wait for each other until copies of their keys and values reach `AT_ONCE`. On a CPU every layer is
compressed by itself, which holds one layer at a time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlmfast.core import CompressedLayer, LayerView

AT_ONCE = 2**28  # bytes of keys and values that are copied to stand side by side

Gathered = tuple[Tensor, Tensor, Tensor]  # keys (R, m, D), values (R, m, Dv), positions (R, m) of rows of one length


def is_full(view: LayerView, waiting: int) -> bool:
    """Would one layer more like this one take too much memory? True on a CPU."""
    layer_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (view.keys, view.values))
    return view.keys.device.type == "cpu" or (waiting + 1) * layer_bytes > AT_ONCE


def side_by_side(views: list[LayerView]) -> LayerView:
    """One view of layers that hold the same columns; without their windows."""
    if len(views) == 1:
        return views[0]
    keys, values = (torch.cat([getattr(view, name) for view in views], 1) for name in ("keys", "values"))
    return replace(views[0], keys=keys, values=values, window=None, stacked=len(views))


def gathered(kept: CompressedLayer, keys: Tensor, values: Tensor, positions: Tensor) -> Gathered | None:
    """What stays of keys (B, Hk, L, D), values (B, Hk, L, Dv) and positions (B, L) int32, gathered at once; None where
    rows differ in length or in kind, or hold other vectors than their own."""
    batch_size, num_heads = keys.shape[:2]
    same_length = len({len(indices) for indices in kept.keep}) == 1 and kept.merged is None
    same_kind = kept.int8 is None or len(set(kept.int8.tolist())) == 1
    if not same_length or not same_kind or (kept.dynamic is not None and bool(kept.dynamic.any())):
        return None
    indices = torch.stack(kept.keep).view(batch_size, num_heads, -1)
    head_index = torch.arange(num_heads, device=keys.device)[:, None]
    parts = [
        (keys[index][head_index, places], values[index][head_index, places], positions[index][places])
        for index, places in enumerate(indices)
    ]
    return parts[0] if batch_size == 1 else tuple(torch.cat(part) for part in zip(*parts, strict=True))  # type: ignore[return-value]


def by_layer(kept: CompressedLayer, layers: int, batch: int) -> list[CompressedLayer]:
    """What a view of several layers keeps, layer by layer."""
    if layers == 1:
        return [kept]
    num_heads = len(kept.keep) // (layers * batch)

    def rows_of(layer: int) -> list[int]:
        return [
            (batch_index * layers + layer) * num_heads + head
            for batch_index in range(batch)
            for head in range(num_heads)
        ]

    def pick(values: Any, rows: list[int]) -> Any:
        if values is None:
            return None
        return values[rows] if isinstance(values, Tensor) else [values[row] for row in rows]

    per_head = ("keep", "dynamic", "budget", "int8", "merged", "mass", "low", "low_rank")
    out = []
    for layer in range(layers):
        rows = rows_of(layer)
        statistics = [row[layer] if isinstance(row, list) else row for row in kept.stats.get("rows", [])]
        fields = {name: pick(getattr(kept, name), rows) for name in per_head}
        out.append(replace(kept, **fields, stats={"rows": statistics} if statistics else {}))
    return out


def gathered_by_layer(rows: Gathered | None, layers: int, batch: int) -> list[Gathered | None]:
    """`gathered` of a view, layer by layer."""
    if rows is None or layers == 1:
        return [rows] * layers
    split = [tensor.unflatten(0, (batch, layers, -1)) for tensor in rows]
    return [tuple(tensor[:, layer].flatten(0, 1) for tensor in split) for layer in range(layers)]  # type: ignore[misc]
