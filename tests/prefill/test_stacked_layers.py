"""Several layers compressed as one give what each gives by itself."""

from __future__ import annotations

from typing import Any

import methods
import pytest
import tiny
import torch

import vlmfast
from vlmfast.core import CompressedLayer, Kind, LayerView, Rotation
from vlmfast.prefill import (
    CAKE,
    AdaKV,
    ElasticCache,
    HybridKV,
    KVMerger,
    LookM,
    MixKV,
    PrefixKV,
    PyramidKV,
    Quantised,
    RazorAttention,
    SnapKV,
)
from vlmfast.runtime import stacked_layers

LAYERS, HEADS, COLUMNS = 3, 2, 40
SMALL = {"sinks": 1, "recent": 2}
STACKED = [policy for policy in methods.POLICIES if policy.stacks]
STACKED += [HybridKV(keep=0.4, split=split, **SMALL) for split in (0.5, 1.0)]
STACKED += [RazorAttention(keep=0.6, heads=((1, 0), (2, 1)), **SMALL), LookM(keep=0.3, merge="averaged", **SMALL)]


def views(policy: Any, batch: int) -> list[LayerView]:
    """Layers over the same columns; the second row of a batch is padded."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.full((batch, COLUMNS), Kind.TEXT, dtype=torch.int8)
    kinds[:, 6:30], kinds[1:, :5] = Kind.VISUAL, Kind.PAD
    positions = torch.where(kinds != Kind.PAD, torch.arange(COLUMNS), -1)
    angles = torch.rand(batch, COLUMNS, 4, generator=generator).repeat(1, 1, 2)
    rotation = Rotation(angles.cos(), angles.sin(), 0)
    out = []
    for layer in range(LAYERS):
        keys, values = (torch.randn(batch, HEADS, COLUMNS, 8, generator=generator) for _ in range(2))
        window = None
        if policy.window():
            window = torch.rand(batch, 2 * HEADS, 4, COLUMNS, generator=generator).softmax(-1)
        queries = torch.ones(batch, 4, dtype=torch.bool)
        view = LayerView(keys, values, kinds, window, layer, LAYERS, positions, queries, rotation, rank=layer)
        out.append(view)
    return out


def stack(each: list[LayerView]) -> LayerView:
    view = stacked_layers.side_by_side(each)
    windows = [layer.window for layer in each if layer.window is not None]
    view.window = torch.cat(windows, 1) if windows else None
    return view


def plain(kept: CompressedLayer) -> dict[str, Any]:
    """Everything a layer keeps as lists."""
    out = {}
    for name in ("keep", "dynamic", "budget", "int8", "low", "merged", "mass"):
        value = getattr(kept, name)
        if isinstance(value, torch.Tensor):
            value = value.tolist()
        elif value is not None:
            value = [
                None if entry is None else torch.stack(entry).tolist() if isinstance(entry, tuple) else entry.tolist()
                for entry in value
            ]
        out[name] = value
    factors = [(f.left.tolist(), f.right.tolist(), f.owner) for f in kept.low_rank or [] if f is not None]
    return out | {"stats": kept.stats, "factors": factors}


def test_many_policies_stack() -> None:
    assert {policy.name for policy in methods.POLICIES if not policy.stacks} <= {"random"}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("policy", STACKED, ids=repr)
def test_side_by_side_equals_one_by_one(policy: Any, batch: int) -> None:
    each = views(policy, batch)
    if policy.spans:
        want = policy.compress_all(each, [policy.rate(view) for view in each])
        pair = [stack(each[:2]), each[2]]
        first, last = policy.compress_all(pair, [policy.rate(view) for view in pair])
        got = [*stacked_layers.by_layer(first, 2, batch), last]
        assert [plain(kept) for kept in got] == [plain(kept) for kept in want]
        return
    want = [policy.compress(view) for view in each]
    together = policy.compress(stack(each))
    assert together is not None and all(want)
    got = stacked_layers.by_layer(together, LAYERS, batch)
    assert [plain(kept) for kept in got] == [plain(kept) for kept in want]
    positions = each[0].positions.to(torch.int32)
    view = stack(each)
    rows = stacked_layers.gathered(together, view.keys, view.values, positions)
    for i, layer_rows in enumerate(stacked_layers.gathered_by_layer(rows, LAYERS, batch)):
        alone_rows = stacked_layers.gathered(want[i], each[i].keys, each[i].values, positions)
        (alone,) = stacked_layers.gathered_by_layer(alone_rows, 1, batch)
        for own, part in ((alone.kept, layer_rows.kept), (alone.low, layer_rows.low)):
            assert part is None or own is not None  # of heads of different lengths each layer gathers its own
            if part is not None and own is not None:
                assert part.length == own.length
                pairs = zip(own.parts, part.parts, strict=True)
                assert all(torch.equal(a[:, : own.length], b[:, : own.length]) for a, b in pairs)


@pytest.mark.parametrize(
    "policy",
    [
        SnapKV(keep=0.3, **SMALL), SnapKV(keep=0.3, int8=True, **SMALL), AdaKV(keep=0.3, **SMALL),
        PyramidKV(keep=0.5, beta=2, **SMALL), MixKV(keep=0.3, **SMALL), Quantised(keep=0.3, **SMALL),
        HybridKV(keep=0.3, **SMALL), HybridKV(keep=0.3, split=0.5, **SMALL), CAKE(keep=0.3, **SMALL),
        PrefixKV(keep=0.3, **SMALL), RazorAttention(keep=0.4, share=0.3, **SMALL), LookM(keep=0.3, **SMALL),
        KVMerger(keep=0.3, **SMALL), ElasticCache(keep=0.3, distance=3, **SMALL),
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("at_once", [2**28, 3 * 2 * 2 * 40 * 16 * 4])
def test_a_call_answers_the_same(policy: Any, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("qwen2_5_vl", num_hidden_layers=4)
    inputs = tiny.inputs("qwen2_5_vl", media=("video",), frames=4, size=(16, 24), text=8)
    caches, answers, sizes, together = [], [], [], stacked_layers.side_by_side
    for stacks in (False, True):
        if stacks:
            monkeypatch.setattr(stacked_layers, "AT_ONCE", at_once)
            monkeypatch.setattr(
                stacked_layers, "is_full",
                lambda view, waiting: (waiting + 1) * 2 * view.keys.numel() * view.keys.element_size() > at_once,
            )  # fmt: skip
            monkeypatch.setattr(stacked_layers, "side_by_side", lambda vs: sizes.append(len(vs)) or together(vs))
        with torch.no_grad(), vlmfast.accelerate(model, kv=policy):
            out = model.generate(**inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
        answers.append(out.sequences)
        caches.append(
            [(layer.exact or layer.int8).keys for layer in out.past_key_values.layers if layer.exact or layer.int8]
        )
    assert torch.equal(*answers) and max(sizes) > 1
    assert caches[0] and all(torch.equal(a, b) for a, b in zip(*caches, strict=True))
