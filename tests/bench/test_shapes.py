"""The benchmarks' models run on data: features, keys, values and logits of every shape differ from token to token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vlmfast
from evals.speed import shapes
from vlmfast.encode import METHODS
from vlmfast.runtime.cache_state import cache_state

SHAPES = [s for s in vars(shapes).values() if isinstance(s, shapes.Shape)]
NARROW = {"hidden": 256, "heads": 2, "kv_heads": 1, "intermediate": 1376, "vision_hidden": 160, "vision_heads": 2}


def narrow(shape: shapes.Shape) -> shapes.Shape:
    """The shape with an eighth of its widths, a few layers and a short clip: quick, and built by the same code."""
    if shape is shapes.TOY:
        return shape
    layers, depth = min(shape.layers, 6), min(shape.depth, 5)
    return replace(
        shape, **NARROW, layers=layers, depth=depth, vocab=1000, vision_intermediate=428, full_attention=(depth - 1,),
        grid=(4, 4, 4), text=16,
    )  # fmt: skip


def assert_spread(name: str, x: Tensor) -> None:
    """x (n, D): no channel is the same in all n rows, no row is the same in all channels, no two rows are equal."""
    x = x.float()
    assert x.isfinite().all(), name
    size = x.square().mean().sqrt()
    assert 0.1 < size < 100, f"{name}: of size {size:.2g}"
    assert x.std(0).min() > 0.01 * size, f"{name}: a channel that does not change"
    assert x.std(1).min() > 0.01 * size, f"{name}: a row that says nothing"
    assert len(x.unique(dim=0)) == len(x), f"{name}: rows that are equal"


def run(shape: shapes.Shape) -> tuple[Any, Tensor, Any]:
    """The model, its visual features (N, D), and the output of one forward."""
    model, inputs, seen = shapes.build(shape, dtype="float32"), shapes.clip(shape, dtype="float32"), []
    handle = model.model.visual.merger.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
    handle.remove()
    return model, seen[0], out


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_every_shape_has_spread(shape: shapes.Shape) -> None:
    shape = narrow(shape)
    _, features, out = run(shape)
    assert_spread("visual features", features)
    visual = shapes.clip(shape)["input_ids"][0] == 2
    for i, layer in enumerate(out.past_key_values.layers):
        for name, x in (("keys", layer.keys), ("values", layer.values)):
            for head in x[0]:
                assert_spread(f"{name} of layer {i}", head[visual])
    assert_spread("logits", out.logits[0])


def test_every_parameter_is_drawn() -> None:
    model = shapes.build(narrow(shapes.QWEN_3B_TWELFTH), dtype="float32")
    for name, p in model.named_parameters():
        assert p.isfinite().all() and p.abs().max() > 0, name
        if name.endswith("bias") or p.ndim > 1:
            assert p.std() > 0.005 and abs(float(p.mean())) < 0.1 * float(p.std()) + 0.01, name
        else:
            assert (p == 1).all(), name
    module = torch.nn.PReLU()
    with pytest.raises(TypeError, match="PReLU"):
        shapes.fill(module, torch.Generator())


def test_pruners_have_something_to_choose_by() -> None:
    """What is kept on a benchmark's clip is not the clip's beginning, and differs from one rule to the other."""
    shape = narrow(shapes.QWEN_3B_TWELFTH)
    inputs, kept = shapes.clip(shape, dtype="float32"), {}
    for name in ("vidcom2", "maxmin", "cdpruner"):
        model = shapes.build(shape, dtype="float32")
        with torch.no_grad(), vlmfast.accelerate(model, prune=METHODS[name](keep=0.25)):
            out = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True)
        columns = cache_state(out.past_key_values).columns.index[0]
        kept[name] = columns[inputs["input_ids"][0, columns] == 2].tolist()
        first = int((inputs["input_ids"][0] == 2).nonzero()[0])
        assert kept[name] != list(range(first, first + len(kept[name]))), name
    assert len({tuple(k) for k in kept.values()}) == 3
