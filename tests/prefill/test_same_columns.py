"""Policies whose scores are pooled keep the same columns whatever the order and the precision of a device's sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmfast.core import Kind, LayerView
from vlmfast.prefill import CAKE, AdaKV, LazyEviction, PyramidKV, SnapKV

COLUMNS, HEADS, QUERIES = 600, 4, 8
POLICIES = [
    SnapKV(keep=0.2), SnapKV(keep=0.2, pool=13), AdaKV(keep=0.2), CAKE(keep=0.2), LazyEviction(keep=0.2),
    PyramidKV(keep=0.3, beta=4),
]  # fmt: skip
ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "queries": lambda window: window.flip(2),
    "heads of a group": lambda window: window.unflatten(1, (2, -1)).flip(2).flatten(1, 2),
    "float64": lambda window: window.double(),
}


def kept(policy: Any, change: Callable[[Tensor], Tensor] = lambda window: window) -> list[list[int]]:
    """What every head of three layers keeps."""
    views = []
    for layer in range(3):
        generator = torch.Generator().manual_seed(layer)
        keys, values = torch.randn(2, 1, 2, COLUMNS, 8, generator=generator)
        # a few columns are looked at, the others hardly: pooling makes plateaus around them
        window = (3 * torch.randn(1, HEADS, QUERIES, COLUMNS, generator=generator)).softmax(-1)
        kinds = torch.full((1, COLUMNS), Kind.VISUAL, dtype=torch.int8)
        kinds[:, -40:] = Kind.TEXT
        queries = torch.ones(1, QUERIES, dtype=torch.bool)
        views.append(LayerView(keys, values, kinds, change(window), layer, 3, None, queries, rank=layer))
    if policy.spans:
        layers = policy.compress_all([replace(view) for view in views], [policy.rate(view) for view in views])
    else:
        layers = [policy.compress(view) for view in views]
    return [columns.tolist() for layer in layers for columns in layer.keep]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_the_same_columns_from_sums_in_another_order(policy: Any, order: str) -> None:
    want = kept(policy)
    assert len({len(columns) for columns in want}) <= 6 and all(0 < len(columns) < COLUMNS for columns in want)
    assert kept(policy, ORDERS[order]) == want


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_the_same_columns_from_any_number_of_threads(policy: Any) -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(kept(policy))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]
