"""What a compressed layer hands to the engine, and what it takes back: `stepped_layer.PlainRows` of a `KVLayer`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmfast.prefill.host_groups import Group
from vlmfast.runtime.stepped_layer import HostRow, HostRows


def plain_rows(layer: Any) -> list[tuple[Tensor, ...]] | str:
    """See `stepped_layer.PlainRows`."""
    if layer.low is not None:
        return "some columns of a head are stored as int8, others are not"
    if any(store.bias is not None for store in layer.stores()):
        return "columns stand for several"
    if layer.dynamic is not None and any(type(group) is not Group for group in layer.dynamic.groups):
        return "dynamic heads multiply their keys from factors"
    if layer.dynamic is not None:
        layer.dynamic.settle()
    rows: dict[int, tuple[Tensor, ...]] = {}
    for store in layer.stores():
        for row, start, length in zip(store.rows, store.offsets, store.lengths, strict=True):
            parts = (store.keys, store.values, store.key_scale, store.value_scale)
            rows[row] = tuple(part[start : start + length] for part in parts if part is not None)
    return [rows[row] for row in sorted(rows)]


def host_rows(layer: Any) -> HostRows | None:
    """See `stepped_layer.PlainRows`."""
    dynamic = layer.dynamic
    groups = [] if dynamic is None else [group for group in dynamic.groups if 0 < group.slots < group.chunks]
    if not groups:
        return None
    rows = []
    for group in groups:
        _pin(group)
        for index, pair in enumerate(group.rows):
            keys, values, _ = group.chunked(index)
            rows.append(HostRow(pair, group.representatives[index], keys, values, group.how.sinks, group.held[index]))
    return HostRows(rows, dynamic.how.refresh, layer.get_seq_length() - dynamic.base)


def _pin(group: Group) -> None:
    """Keys and values in memory that a GPU may read, where they lie beside one: copies of a cache do not."""
    if group.representatives.is_cuda and not group.host_keys.is_pinned():
        group.host_keys, group.host_values = group.host_keys.pin_memory(), group.host_values.pin_memory()
