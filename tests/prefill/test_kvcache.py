"""The ragged storage itself, the scores and budgets policies use, and what is refused."""

from typing import Any

import pytest
import tiny
import torch
from compressed import SMALL, Accelerated, every_family, generate, prompt, steps, under
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer, QuantizedLayer, StaticCache

import vlmfast
from vlmfast import prefill
from vlmfast.core import CompressedLayer, Kind, Retrieval, Unsupported, UserError
from vlmfast.decode import Loose, PromptLookup, Speculate
from vlmfast.encode import Downsample, FastV, VidCom2
from vlmfast.prefill import AdaKV, Full, HybridAdvanced, HybridKV, KVLayer, Random, SnapKV, StreamingLLM, heads, persist
from vlmfast.prefill.budget import by_head, by_type
from vlmfast.runtime.cache_state import cache_state

# ---------------------------------------------------------------- the storage itself


def filled(kept=None, b=2, hk=2, n=70, d=16, seed=0, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    layer = KVLayer()
    keys, values = torch.randn(2, b, hk, n, d, generator=gen).to(dtype)
    layer.update(keys, values)
    layer.compress(kept)
    return layer, keys, values


def decode(layer, q=1, seed=1, group=3):
    """Append q columns and attend; returns (query, new keys, new values, output)."""
    gen = torch.Generator().manual_seed(seed)
    b, hk = layer.batch, layer.heads
    k, v = torch.randn(2, b, hk, q, 16, generator=gen)
    query = torch.randn(b, hk * group, q, 16, generator=gen)
    layer.update(k, v)
    return query, k, v, layer.attend(query, 0.25)


def dynamic(n, budget, b=2, hk=2, **how):
    rows = b * hk
    retrieval = Retrieval(**{"chunk": 4, "sinks": 2, "recent": 6, **how})
    keep = [torch.arange(n)] * rows
    return CompressedLayer(keep, torch.ones(rows, dtype=torch.bool), torch.full((rows,), budget), None, retrieval)


@pytest.mark.parametrize("q", [1, 3, 20])
@pytest.mark.parametrize("bound", ["mean", "minmax"])
def test_a_dynamic_head_that_retrieves_everything_is_full_attention(bound, q):
    layer, *_ = filled(dynamic(70, 70, bound=bound))
    full, *_ = filled()
    for step in range(3):
        torch.testing.assert_close(decode(layer, q, step)[-1], decode(full, q, step)[-1], atol=1e-6, rtol=1e-5)
    assert torch.equal(layer.lengths(), full.lengths())


@pytest.mark.parametrize("bound", ["mean", "minmax"])
def test_the_chunk_that_matters_is_brought_back(bound):
    layer, keys, values = KVLayer(), torch.randn(1, 1, 200, 16) * 0.1, torch.randn(1, 1, 200, 16)
    keys[0, 0, 101] = 8.0  # one loud key in the middle
    layer.update(keys, values)
    layer.compress(dynamic(200, 24, 1, 1, bound=bound))
    layer.update(torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 16))
    out = layer.attend(torch.full((1, 2, 1, 16), 1.0), 0.25)
    torch.testing.assert_close(out, values[:, :, 101:102].expand_as(out), atol=1e-3, rtol=1e-3)
    assert layer.lengths().item() == 25 - (24 - 2 - 6) % 4


def test_only_the_difference_of_chunk_sets_is_moved():
    layer, *_ = filled(dynamic(70, 40), b=2, hk=2)
    group = layer.dynamic.groups[0]
    query = torch.randn(4, 3, 16)
    group.load(group.choose(query), layer.dynamic.store)
    moved = group.moved
    group.load(group.choose(query), layer.dynamic.store)
    assert moved > 0 and group.moved == moved
    other = group.held.clone()
    missing = next(c for c in range(group.chunks) if c not in other[1].tolist())
    other[1, 0] = missing
    group.load(other, layer.dynamic.store)
    assert group.moved == moved + 1
    store = layer.dynamic.store
    at = store.offsets[store.rows.index(1)]
    where = store.positions[at : at + store.lengths[store.rows.index(1)]].long()
    torch.testing.assert_close(store.keys[at : at + len(where)], group.host_keys[1][where])  # contents follow positions


def test_growth_beyond_the_free_slots_keeps_every_byte():
    layer, keys, _ = filled(b=1, n=40)
    parts = [keys]
    for step in range(90):
        parts.append(decode(layer, 1 + step % 3, step)[1])
    want = torch.cat(parts, 2)
    store = layer.exact
    for row, at, n in zip(store.rows, store.offsets, store.lengths):
        assert torch.equal(store.keys[at : at + n], want[0, row])
        assert store.positions[at : at + n].tolist() == list(range(n))


KEEP = CompressedLayer(
    [torch.arange(0, 70, 2), torch.arange(9), torch.arange(70), torch.arange(60, 70)],
    torch.tensor([False, False, True, False]), torch.tensor([0, 0, 30, 0]),
    torch.tensor([False, True, False, False]), Retrieval(4, "mean", 1, 2, 6),
)  # fmt: skip


def test_rows_are_selected_repeated_and_reordered():
    layer, *_ = filled(KEEP)
    want = decode(layer.fork())[-1]
    swapped, repeated, one = layer.fork(), layer.fork(), layer.fork()
    swapped.reorder_cache(torch.tensor([1, 0]))
    query, k, v, _ = decode(layer.fork())
    swapped.update(k[[1, 0]], v[[1, 0]])
    assert torch.equal(swapped.attend(query[[1, 0]], 0.25), want[[1, 0]])
    repeated.batch_repeat_interleave(2)
    repeated.update(k[[0, 0, 1, 1]], v[[0, 0, 1, 1]])
    torch.testing.assert_close(repeated.attend(query[[0, 0, 1, 1]], 0.25), want[[0, 0, 1, 1]])
    one.batch_select_indices(torch.tensor([True, False]))
    one.update(k[:1], v[:1])
    assert one.dynamic is None and torch.equal(one.attend(query[:1], 0.25), want[:1])


def test_int8_heads_are_within_half_a_step():
    layer, keys, _ = filled(CompressedLayer([torch.arange(70)] * 4, int8=torch.ones(4, dtype=torch.bool)))
    store = layer.int8
    for i in range(4):
        row, got, _, _ = store.segment(i, torch.float32)
        want = keys.view(4, 70, 16)[row]
        assert ((got - want).abs() <= want.abs().amax(-1, keepdim=True) / 127 * 0.501).all()


def test_saved_and_loaded_cache_continues_alike(tmp_path):
    model, inputs = tiny.build("qwen2_5_vl"), prompt("qwen2_5_vl", text=24)
    ids = torch.randint(tiny.FIRST_TEXT, tiny.VOCAB, (1, 5))
    with Accelerated(model, HybridKV(split=0.5, advanced=HybridAdvanced(chunk=4), **SMALL)), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        persist.save(cache, tmp_path / "kv.safetensors")
        want = steps(model, cache, ids)
        got = steps(model, persist.load(tmp_path / "kv.safetensors"), ids)
    assert torch.equal(got, want)
    with pytest.raises(UserError, match="DynamicLayer: only compressed caches are saved"):
        persist.save(generate(model, inputs, 1).past_key_values, tmp_path / "x")
    with pytest.raises(UserError, match="no saved cache"):
        persist.load(tmp_path / "nothing")


def alike(a: Any, b: Any) -> bool:
    """Are two trees of objects, containers and tensors equal, type by type and bit by bit?"""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(alike, a, b))
    if hasattr(a, "__dict__"):
        return type(a) is type(b) and alike(vars(a), vars(b))
    return bool(a == b)


@pytest.mark.parametrize("stages", [
    {"kv": SnapKV(**SMALL), "prune": VidCom2(keep=0.5)}, {"prune": FastV(keep=0.5)}, {"prune": Downsample(keep=0.5)},
], ids=["compressed", "cut between layers", "resized"])  # fmt: skip
def test_everything_remembered_of_a_cache_survives_the_disk(tmp_path, stages):
    """Columns, cuts, visual states and the shortened prompt: a later turn over the loaded cache is the same one."""
    model = tiny.build("qwen2_5_vl")
    inputs = prompt("qwen2_5_vl", text=24)
    loose = Speculate(PromptLookup(), Loose(digits=False, negation=False, comparison=False), length=3)
    with vlmfast.accelerate(model, **stages, speculate=loose):
        turn = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        first = model.generate(**inputs, **turn)
        cache = first.past_key_values
        persist.save(cache, tmp_path / "kv.safetensors")
        loaded = persist.load(tmp_path / "kv.safetensors")
        state = cache_state(cache)
        assert state.columns is not None and state.visual
        assert bool(state.cuts) == isinstance(stages["prune"], FastV)
        assert (state.shortened is not None) == isinstance(stages["prune"], Downsample)
        assert alike(cache_state(loaded), state)
        ids = torch.cat([first.sequences, torch.full((1, 6), tiny.FIRST_TEXT + 1)], 1)
        want, got = (model.generate(input_ids=ids, past_key_values=c, **turn) for c in (cache, loaded))
    assert torch.equal(got.sequences, want.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))


# ---------------------------------------------------------------- scores, budgets, head types


class Spy(SnapKV):
    per_query = True

    def fits(self, columns):
        return False

    def compress(self, view):
        seen.append(view)


seen = []


@every_family
def test_window_attention_is_the_models_own(family):
    model, inputs = tiny.build(family), prompt(family, batch=2, text=9)
    model.set_attn_implementation("eager")
    seen.clear()
    with Accelerated(model, Spy(queries=6)), torch.no_grad():
        weights = model(**inputs, output_attentions=True, use_cache=True).attentions
    assert len(seen) == len(weights) == 4
    for view, want in zip(seen, weights):
        assert view.queries.all() and view.window.shape[2] == 6
        torch.testing.assert_close(view.window, want[:, :, -6:], atol=1e-5, rtol=1e-4)


def test_only_text_after_the_media_is_observed():
    model = tiny.build("llava")
    inputs = tiny.inputs("llava", media=("image",), batch=2, text=[3, 5])
    seen.clear()
    with Accelerated(model, Spy(queries=32)), torch.no_grad():
        model(**inputs, use_cache=True)
    assert seen[0].queries.sum(1).tolist() == [4, 6]  # one token of text follows each media item by itself
    assert seen[0].window.shape[2] == 6 and (seen[0].window[0, :, :2] == 0).all()


def test_static_heads_keep_text_first():
    gen = torch.Generator().manual_seed(0)
    kinds = torch.tensor([Kind.SYSTEM] * 5 + [Kind.VISUAL] * 80 + [Kind.TEXT] * 15, dtype=torch.int8)
    row = prefill.base.Row(*torch.randn(2, 2, 100, 8, generator=gen), kinds, torch.rand(4, 6, 100, generator=gen), 0, 1)
    choice = HybridKV(keep=0.3, sinks=2, recent=4, split=0.0, advanced=HybridAdvanced(chunk=4)).choose(row)
    text = (kinds != Kind.VISUAL).nonzero()[:, 0]
    assert all(set(text.tolist()) <= set(k.tolist()) for k in choice.keep)
    assert sum(map(len, choice.keep)) == 60


def test_budgets_add_up():
    assert by_type(100, 4, 0, 1.0, 10, 20) == (400, 0) and by_type(100, 4, 4, 2.0, 10, 20) == (0, 400)
    assert by_type(100, 4, 2, 1.5, 10, 20) == (100, 300)
    assert by_type(100, 4, 2, 9.0, 10, 20) == (20, 380)  # static heads keep their least
    for weights in ([1.0, 2.0, 3.0], [0.0, 0.0, 1.0], [5.0, 5.0, 5.0]):
        got = by_head(100, torch.tensor(weights), 10, 60)
        assert sum(got) == 100 and min(got) >= 10 and max(got) <= 60
    assert by_head(100, torch.tensor([0.0, 0.0, 1.0]), 10, 60) == [20, 20, 60]
    assert by_head(999, torch.ones(2), 10, 60) == [60, 60]


def test_heads_are_classified_and_drawn(tmp_path):
    model, inputs = tiny.build("qwen3_vl"), prompt("qwen3_vl", batch=2, text=24)
    plain = generate(model, inputs, 2)
    table = heads.classify(model, inputs, HybridKV(split=0.5, recent=4))
    assert table.dynamic.shape == table.concentration.shape == (2, 4, 2) and table.layers == [0, 1, 2, 3]
    assert (table.dynamic.sum(-1) == 1).all()
    assert (table.dynamic.long().argmax(-1) == table.concentration.argmax(-1)).all()
    turned = HybridKV(split=0.5, dynamic="diffuse")
    assert all(
        torch.equal(~turned.classify(s), HybridKV(split=0.5).classify(s)) for s in table.concentration.flatten(0, 1)
    )
    assert len(table.rows()) == 16 and {r["type"] for r in table.rows()} == {"static", "dynamic"}
    assert table.draw(tmp_path / "heads.png").stat().st_size > 1000
    assert torch.equal(generate(model, inputs, 2).sequences, plain.sequences)
    with pytest.raises(UserError, match="no head types"):
        heads.classify(model, inputs, SnapKV())


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SnapKV(keep=0), "keep=0 in snapkv: keep must be a finite number above 0, at most 1"),
        (lambda: SnapKV(pool=4), "pool=4 in snapkv: pool must be a whole number at least 1, odd"),
        (lambda: StreamingLLM(budget=30), "budget=30 cannot hold the 36 columns it must keep"),
        (lambda: HybridKV(budget=36), r"cannot hold the 37 columns it must keep \(sinks=4, recent=32\)"),
        (lambda: HybridKV(advanced=HybridAdvanced(bound="max")), "must be one of mean, minmax"),
        (
            lambda: HybridKV(advanced=HybridAdvanced(theta=2.0)),
            "theta=2.0 in hybridkv:advanced: theta must be a finite number at least 0, at most 1",
        ),
        (lambda: AdaKV(scorer=HybridKV), "scorer must be a KVPolicy"),
        (lambda: Random(seed=-1), "whole number at least 0"),
    ],
)
def test_bad_fields_are_named(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_caches_that_cannot_shrink_are_refused():
    model, inputs = tiny.build("llava"), prompt("llava")
    config = model.config.text_config
    quantised = DynamicCache(config=config)
    concrete = {"_quantize": None, "_dequantize": None}
    quantised.layers[1] = object.__new__(type("FourBit", (QuantizedLayer,), concrete))
    for cache, message in [
        (StaticCache(config=config, max_cache_len=200), "StaticLayer has a fixed layout"),
        (quantised, "FourBit has a fixed layout"),
    ]:
        with Accelerated(model, SnapKV(**SMALL)), pytest.raises(Unsupported, match=message):
            model(**inputs, past_key_values=cache, use_cache=True)
    offloaded = DynamicCache(config=config)
    offloaded.offloading = True
    with Accelerated(model, SnapKV(**SMALL)), pytest.raises(Unsupported, match="offloaded DynamicCache cannot hold"):
        model(**inputs, past_key_values=offloaded, use_cache=True)
    with pytest.raises(Unsupported, match="own host tier"):
        KVLayer().offload()


def test_padding_it_cannot_honour_is_refused():
    model, inputs = tiny.build("llava"), prompt("llava", batch=2)
    right = inputs | {"attention_mask": inputs["attention_mask"].flip(1)}
    with Accelerated(model, SnapKV(**SMALL)), torch.no_grad():
        with pytest.raises(Unsupported, match="pad on the left"):
            model(**right, use_cache=True)
        cache = model(**inputs, use_cache=True).past_key_values
        mask = torch.cat([inputs["attention_mask"], torch.tensor([[1, 1], [0, 1]])], 1)
        with pytest.raises(Unsupported, match="a later turn whose rows differ"):
            model(input_ids=torch.full((2, 2), 9), attention_mask=mask, past_key_values=cache)


def test_sliding_layers_are_left_alone_and_named():
    types = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
    kw = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "layer_types": types}
    model, inputs = tiny.build("qwen2_5_vl", **kw), prompt("qwen2_5_vl", batch=2, text=14)
    plain = generate(model, inputs, 6)
    got, reports = under(Full(), model, inputs, 6)
    assert torch.equal(got.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(plain.logits), atol=1e-4, rtol=1e-4)
    kinds = [type(layer) for layer in got.past_key_values.layers]
    assert kinds == [KVLayer, KVLayer, DynamicSlidingWindowLayer, DynamicSlidingWindowLayer]
    assert "layers 2-3 (DynamicSlidingWindowLayer) were left alone" in reports[0]["notes"][0]
    model = tiny.build("qwen2_5_vl", **kw | {"layer_types": ["sliding_attention"] * 4, "max_window_layers": 0})
    with (
        Accelerated(model, SnapKV(**SMALL)),
        pytest.raises(Unsupported, match="every layer is a DynamicSlidingWindowLayer"),
    ):
        generate(model, inputs)
