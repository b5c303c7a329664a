"""Tiny models under one KV policy, through the hooks of the runtime alone."""

import dataclasses

import pytest
import tiny
import torch

from vlmfast import families
from vlmfast.prefill import AdaKV, HybridAdvanced, HybridKV, KeyDiff, Random, SnapKV, StreamingLLM
from vlmfast.runtime.kv_hooks import KVHooks
from vlmfast.runtime.patch import Patch
from vlmfast.runtime.prune_input import InputPruning
from vlmfast.runtime.request_state import Requests

SMALL = {"keep": 0.5, "sinks": 2, "recent": 4}  # small enough for prompts of tiny models


POLICIES = [
    HybridKV(split=0.5, advanced=HybridAdvanced(chunk=4, queries=16), **SMALL),
    HybridKV(split=1.0, advanced=HybridAdvanced(chunk=4, bound="minmax", refresh=3), **SMALL),
    SnapKV(**SMALL, queries=8, pool=5),
    AdaKV(**SMALL, scorer=SnapKV(queries=8)),
    StreamingLLM(**SMALL),
    KeyDiff(**SMALL),
    Random(**SMALL, int8=True),
]


IDS = ["hybridkv", "hybridkv-dynamic", "snapkv", "adakv", "streamingllm", "keydiff", "random-int8"]


policies = pytest.mark.parametrize("policy", POLICIES, ids=IDS)


every_family = pytest.mark.parametrize("family", tiny.FAMILIES)


class Accelerated:
    """A tiny model under one policy, through the runtime's hooks alone."""

    def __init__(self, model, policy, pruner=None):
        self.reports, self.patch, self.model = [], Patch(), model
        family = families.get(model)
        text = family.text(model)
        KVHooks(text, text.config, policy, self.reports.append).install(self.patch)
        InputPruning(model, family, Requests(model, pruner)).install(self.patch)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.patch.remove()


def generate(model, inputs, n=4, **kw):
    return model.generate(
        **inputs, max_new_tokens=n, do_sample=False, return_dict_in_generate=True, output_logits=True, **kw
    )


def under(policy, model, inputs, n=4, **kw):
    with Accelerated(model, policy) as a:
        out = generate(model, inputs, n, **kw)
    return out, a.reports


def prompt(family, **kw):
    return tiny.inputs(family, **{"media": ("image",), "text": 12, **kw})


def doubled(inputs):
    return {k: v.double() if v.is_floating_point() and k != "second_per_grid_ts" else v for k, v in inputs.items()}


def same_row(policy, model, row, out, i, single):
    """Row i of the batch `out` says what the row alone says, up to float32 noise. Where columns are int8, a value at a
    rounding border may round either way: stored values then differ by one step at most, a few of them, and logits by
    less than quantisation itself changes them."""
    both, alone = torch.stack([x[i] for x in out.logits]), torch.stack([x[0] for x in single.logits])
    moved = stored = 0
    for a, b in zip(out.past_key_values.layers, single.past_key_values.layers):
        for name in ("int8", "low"):
            one, two = getattr(a, name, None), getattr(b, name, None)
            if two is None:
                continue
            for head in two.rows:
                at, there = one.rows.index(i * a.heads + head), two.rows.index(head)
                n = two.lengths[there]
                spans = slice(one.offsets[at], one.offsets[at] + n), slice(two.offsets[there], two.offsets[there] + n)
                for values, scales in (("keys", "key_scale"), ("values", "value_scale")):
                    x, y = getattr(one, values)[spans[0]].int(), getattr(two, values)[spans[1]].int()
                    assert (x - y).abs().max() <= 1
                    moved, stored = moved + int((x != y).sum()), stored + x.numel()
                    scale = getattr(one, scales)[spans[0]], getattr(two, scales)[spans[1]]
                    torch.testing.assert_close(*scale, atol=2e-5, rtol=1e-3)
    if not stored:
        torch.testing.assert_close(both, alone, atol=2e-4, rtol=1e-4)
        return
    assert moved <= 0.01 * stored
    whole = {"int8": False} if policy.int8 else {"keep": 1.0, "budget": None}
    exact, _ = under(dataclasses.replace(policy, **whole), model, row, len(alone))
    step = max(float((alone[0] - exact.logits[0][0]).abs().max()), float((alone[1] - exact.logits[1][0]).abs().max()))
    torch.testing.assert_close(both, alone, atol=max(2e-4, step), rtol=1e-4)


def walk(x, seen=None):
    """Bytes of every tensor reachable from x, each storage once; short refresh histories are tables, not storage."""
    seen = set() if seen is None else seen
    if isinstance(x, torch.Tensor):
        storage = x.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            yield storage.nbytes()
    elif isinstance(x, (list, tuple)):
        for v in x:
            yield from walk(v, seen)
    elif hasattr(x, "__dict__") and not isinstance(x, (torch.dtype, torch.device)):
        for name, v in vars(x).items():
            if name != "history":
                yield from walk(v, seen)


def steps(model, cache, ids):
    """Logits of feeding ids (B, n) one by one on a copy-free cache."""
    out = []
    for t in range(ids.shape[1]):
        out.append(model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(out, 1)


def state(model):
    return [
        (name, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(k for k in vars(m) if not k.startswith("_")))
        for name, m in model.named_modules()
    ] + [model.config.text_config._attn_implementation, model.config.vision_config._attn_implementation]
