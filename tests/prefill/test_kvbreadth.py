"""The breadth of KV policies: the laws on every one, and each rule against plain code on a small example by hand."""

import copy
import dataclasses
import itertools
import re

import compressed
import methods
import pytest
import tiny
import torch
from compressed import Accelerated, generate, prompt, same_row, state, steps, under, walk

import vlmfast
from vlmfast import kernels
from vlmfast import prefill as p
from vlmfast.core import CompressedLayer, Kind, LayerView, Rotation, Unsupported, UserError
from vlmfast.decode import PromptLookup, Speculate
from vlmfast.prefill import persist
from vlmfast.prefill.base import Row
from vlmfast.prefill.ragged_layer import KVLayer
from vlmfast.prefill.ragged_store import Store

ELSEWHERE = {type(policy) for policy in compressed.POLICIES}  # whose laws stand there
ROWS = [row for row in methods.POLICIES if type(row) not in ELSEWHERE]
every_policy = pytest.mark.parametrize("policy", ROWS, ids=repr)


# ---------------------------------------------------------------- the laws


@every_policy
def test_keep_one_is_bypassed_and_bit_identical(policy):
    model, inputs = tiny.build("qwen3_vl"), prompt("qwen3_vl", batch=2, pad=1)
    plain = generate(model, inputs, 3)
    got, reports = under(dataclasses.replace(policy, keep=1.0), model, inputs, 3)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, plain.logits))
    assert "kv: the context fits the budget, bypassed" in reports[0]["notes"]


@every_policy
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_padded_rows_equal_single_rows_and_the_budget_holds(policy, family):
    model = tiny.build(family)
    args = {"media": ("image", "image"), "text": [20, 14], "batch": 2}
    out, _ = under(policy, model, tiny.inputs(family, **args, pad=2), 5)
    for i, row in enumerate(tiny.rows(family, **args)):
        single, _ = under(policy, model, row, 5)
        held = torch.stack([layer.lengths()[0] for layer in single.past_key_values.layers])
        both = torch.stack([layer.lengths()[i] for layer in out.past_key_values.layers])
        assert torch.equal(both, held)
        total = policy.total(row["input_ids"].shape[1])
        if isinstance(policy, p.Quantised):
            assert (held == row["input_ids"].shape[1] + 4).all()
            held = held - torch.stack([lengths(layer.low) for layer in single.past_key_values.layers])
        spare = policy.chunk if isinstance(policy, p.ShadowKV) else 1  # it reads whole chunks
        assert total - spare < float(held.double().mean()) - left_of(4, policy) <= total
        same_row(policy, model, row, out, i, single)


@every_policy
def test_a_row_that_fits_the_budget_stays_whole_beside_one_that_does_not(policy):
    model, args = tiny.build("qwen2_5_vl"), {"media": ("image", "image"), "text": [20, 14], "batch": 2}
    alone = tiny.rows("qwen2_5_vl", **args)
    policy = dataclasses.replace(policy, budget=alone[1]["input_ids"].shape[1])
    out, reports = under(policy, model, tiny.inputs("qwen2_5_vl", **args), 6)
    assert not any("bypassed" in note for note in reports[0]["notes"])
    for i, row in enumerate(alone):
        single, _ = under(policy, model, row, 6)
        same_row(policy, model, row, out, i, single)


def left_of(decoded, policy):
    """Columns more than after the prefill when so many tokens were decoded."""
    if isinstance(policy, p.LazyEviction):
        return decoded - policy.lag * ((decoded - 1) // policy.lag)  # it acts before the next token
    return 0 if getattr(policy, "distance", None) else decoded


def lengths(store):
    """(Hk,) columns of each head of a one-row store that holds all heads."""
    return torch.tensor([store.lengths[store.rows.index(h)] for h in range(len(store))])


@every_policy
def test_bytes_are_those_of_the_tensors(policy):
    out, _ = under(policy, tiny.build("qwen2_5_vl"), prompt("qwen2_5_vl", batch=2, media=("image", "image")), 3)
    layers = out.past_key_values.layers
    assert sum(layer.nbytes()["resident"] for layer in layers) == sum(walk(layers))
    for layer in layers if not isinstance(policy, p.ShadowKV) else ():
        tiers, bias = layer.nbytes(), 4 * (layer.exact.bias is not None)
        assert tiers["resident"] == sum(walk(layer)) and tiers["fast"] <= tiers["fast_allocated"]
        low = sum(layer.low.lengths) if layer.low is not None else 0
        assert tiers["int8"] == low * (2 * 16 + 2 * 4 + 4) + (8 * layer.lengths().numel() if low else 0)
        exact = (2 * 16 * 4 + 4 + bias) * (int(layer.lengths().sum()) - low) + 8 * layer.lengths().numel()
        tables = 8 * layer.last.numel() if isinstance(policy, p.LazyEviction) else 0
        tables += 8 * sum(len(x) for x in layer.stores() if x.rows != list(range(x.total)))  # the order of its rows
        assert tiers["fast"] == exact + tiers["int8"] + tables


@every_policy
def test_crop_after_compression_is_exact_and_reaches_into_the_prefill(policy):
    model, inputs = tiny.build("qwen2_5_vl"), prompt("qwen2_5_vl", text=24)
    ids = torch.randint(tiny.FIRST_TEXT, tiny.VOCAB, (1, 11), generator=torch.Generator().manual_seed(3))
    with Accelerated(model, policy), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        if policy not in methods.CROPPABLE:
            cache.crop(-10)
            steps(model, cache, ids[:, :3])
            with pytest.raises(Unsupported, match="evicts while decoding and cannot take 2 tokens back"):
                cache.crop(-2)
            return
        want, length = steps(model, copy.deepcopy(cache), ids[:, :3]), cache.get_seq_length()
        steps(model, cache, ids[:, 3:8])
        model(input_ids=ids[:, 8:], past_key_values=cache)
        cache.crop(-8)
        slack = 2e-5 if isinstance(policy, p.ShadowKV) else 0  # chunks come back in other slots
        torch.testing.assert_close(steps(model, cache, ids[:, :3]), want, atol=slack, rtol=5 * slack)
        cache.crop(-13)  # three decoded columns and ten of the prompt
        assert cache.get_seq_length() == length - 10
        for layer in cache.layers:
            for s in layer.stores():
                assert all(int(s.positions[at + n - 1]) < length - 10 for at, n in zip(s.offsets, s.lengths))
        assert steps(model, cache, ids[:, :3]).isfinite().all()


@every_policy
def test_removal_restores(policy):
    model, inputs = tiny.build("qwen2_vl"), prompt("qwen2_vl")
    before, plain = state(model), generate(model, inputs, 3)
    got, _ = under(policy, model, inputs, 3)
    assert not all(torch.equal(a, b) for a, b in zip(got.logits, plain.logits))
    assert state(model) == before
    assert all(torch.equal(a, b) for a, b in zip(generate(model, inputs, 3).logits, plain.logits))


# ---------------------------------------------------------------- each rule by hand


def example(n=12, hk=2, group=2, w=3, dh=4, seed=0, layer=0, layers=4, visual=None):
    """A row of n columns: random keys and values, softmax weights of w queries, kinds (all text unless told)."""
    gen = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, hk, n, dh, generator=gen)
    window = torch.randn(hk * group, w, n, generator=gen).softmax(-1)
    kinds = torch.full((n,), Kind.TEXT, dtype=torch.int8)
    if visual is not None:
        kinds[visual] = Kind.VISUAL
    return Row(keys, values, kinds, window, layer, layers)


def view_of(*rows):
    """One-layer view of rows of equal length, without padding."""
    queries = torch.ones(len(rows), rows[0].window.shape[1], dtype=torch.bool)
    parts = [torch.stack([getattr(r, name) for r in rows]) for name in ("keys", "values", "kinds", "window")]
    n, dh = rows[0].keys.shape[1:]
    angle = torch.arange(n)[:, None] * 100.0 ** (-torch.arange(dh // 2) / (dh // 2))
    cos, sin = (torch.cat([f(angle)] * 2, -1)[None] for f in (torch.cos, torch.sin))
    return LayerView(*parts, rows[0].layer, rows[0].layers, None, queries, Rotation(cos, sin, 0))


def test_snapkv_pools_up_to_the_recent_columns():
    row = example(n=12, w=3)
    row.window[..., 10] = 5.0  # a recent column stays anyway and lifts none of its neighbours
    p_mean = row.window.mean(1).view(2, 2, 12).mean(1)
    got = p.SnapKV(sinks=1, recent=2, pool=3).score(row)
    for head in range(2):
        assert got[head, 10:].tolist() == p_mean[head, 10:].tolist()
        assert got[head, :10].tolist() == [float(p_mean[head, max(0, i - 1) : min(10, i + 2)].max()) for i in range(10)]
    for wrapper in (p.AdaKV, p.Quantised):  # the wrapper says what stays
        assert torch.equal(wrapper(sinks=1, recent=2, scorer=p.SnapKV(pool=3)).score(row), got)


def test_h2o_keeps_heavy_hitters_and_recent_columns():
    row = example(n=12, w=3)
    choice = p.H2O(budget=6, sinks=0, recent=1).choose(row)
    for head, kept in enumerate(choice.keep):
        summed = sum(row.window[2 * head + g, q] for g in range(2) for q in range(3))
        heavy = sorted(range(9), key=lambda i: -summed[i])[:3]
        assert kept.tolist() == sorted([*heavy, 9, 10, 11])


def test_pyramidkv_falls_linearly_and_keeps_the_mean():
    policy = p.PyramidKV(budget=50, sinks=2, recent=8, beta=20)
    counts = [len(policy.choose(example(n=200, layer=i, layers=5)).keep[0]) for i in range(5)]
    assert counts == [88, 69, 50, 31, 12]  # 10 always, and 78 ... 2 around 40 = 2 * 40 - 40 / 20 ... 40 / 20
    tight = [len(policy.choose(example(n=70, layer=i, layers=5)).keep[0]) for i in range(5)]
    assert tight == [70, 60, 50, 40, 30]  # the first layer holds all there is
    row = example(n=70)
    assert torch.equal(policy.score(row), p.SnapKV(recent=8).score(row))


def layers_of(policy, rows):
    """What a policy that spans layers keeps of one row in each of them: a list per layer of a list per head."""
    views = [view_of(row) for row in rows]
    kept = policy.compress_all(views, [policy.rate(view) for view in views])
    return [[k.tolist() for k in layer.keep] for layer in kept]


def sharpened(row, power):
    """The row with more concentrated attention."""
    weights = row.window**power
    return dataclasses.replace(row, window=weights / weights.sum(-1, keepdim=True))


def test_cake_gives_columns_where_attention_is_dispersed_and_shifts():
    rows = [sharpened(example(n=40, seed=i, layer=i, layers=3), power) for i, power in enumerate((0.5, 1.0, 3.0))]
    policy = p.CAKE(budget=12, sinks=1, recent=2, tau1=1.6, tau2=0.8, pool=1, gamma=200.0)
    want = []
    for row in rows:
        mean = row.window.mean(1)
        h = sum(float(-(a * a.log()).sum()) for a in mean) / 4
        v = sum(float(((w - w.mean(0)) ** 2).mean(0).sum()) for w in row.window) / 4
        want.append(h ** (1 / 1.6) * v ** (1 / 0.8))
    free = [3 + (36 - 9) * x / sum(want) for x in want]
    kept = layers_of(policy, rows)
    assert sum(len(layer[0]) for layer in kept) == 36
    assert all(abs(len(layer[0]) - x) < 1 for layer, x in zip(kept, free))
    for layer, row in zip(kept, rows):
        for head, columns in enumerate(layer):
            both = row.window[2 * head : 2 * head + 2]
            score = (both.mean(1) + 200 * both.var(1, correction=0)).mean(0)[1:38]
            best = 1 + score.topk(len(columns) - 3).indices
            assert columns == sorted([0, 38, 39, *best.tolist()])


def test_prefixkv_keeps_one_share_of_attention_everywhere():
    rows = [sharpened(example(n=60, seed=i, layer=i, layers=3), power) for i, power in enumerate((0.5, 1.0, 3.0))]
    policy = p.PrefixKV(budget=20, sinks=0, recent=1)
    curves = []
    for row in rows:
        heads = [sorted(row.window[2 * h : 2 * h + 2].mean((0, 1))[:59].tolist(), reverse=True) for h in range(2)]
        curves.append([sum(sum(m[: k + 1]) / sum(m) for m in heads) / 2 for k in range(59)])
    share = max(  # the largest share for which the prefixes fit, searched among all that matter; one column is recent
        p for curve in curves for p in curve if sum(2 + sum(x < p for x in c) for c in curves) <= 60
    )
    lengths = [len(layer[0]) for layer in layers_of(policy, rows)]
    assert lengths == [2 + sum(x < share for x in c) for c in curves] and len(set(lengths)) == 3
    assert lengths == sorted(lengths, reverse=True) and 58 <= sum(lengths) <= 60


def test_mixkv_mixes_by_redundancy():
    row = example(n=10)
    row.keys[1] = torch.tensor([1.0, 0, 0, 0]) + 0.05 * row.keys[1]  # a head whose keys repeat each other
    policy = p.MixKV()
    score = policy.score(row)
    for head in range(2):
        keys = [k / k.norm() for k in row.keys[head]]
        r = sum(float(a @ b) for i, a in enumerate(keys) for j, b in enumerate(keys) if i != j) / 90
        r = min(1.0, max(0.0, r))
        attention = row.window[2 * head : 2 * head + 2].mean((0, 1))
        norm = row.values[head].norm(dim=-1)
        norm = (norm - norm.min()) / (norm.max() - norm.min())
        importance = attention + norm * attention.mean() / norm.mean()
        mean = torch.stack(keys).mean(0)
        unlike = -torch.stack([k @ mean / mean.norm() for k in keys])
        unlike = (unlike - unlike.min()) / (unlike.max() - unlike.min())
        want = r * unlike * importance.mean() / unlike.mean() + (1 - r) * importance
        torch.testing.assert_close(score[head], want)
        assert (r > 0.9) == (head == 1)


def stored(policy, row):
    """What a cache layer holds of one row after the policy: (columns, keys, values) per head."""
    layer = KVLayer()
    layer.update(row.keys[None], row.values[None])
    layer.compress(policy.compress(view_of(row)))
    by_row = {layer.exact.rows[i]: layer.exact.segment(i, torch.float32) for i in range(len(layer.exact))}
    return [(by_row[h][3].tolist(), by_row[h][1], by_row[h][2]) for h in range(len(by_row))]


def test_merged_vectors_are_stored_counted_and_cropped():
    gen = torch.Generator().manual_seed(0)
    keys, values, new = torch.randn(3, 1, 2, 20, 8, generator=gen)
    keep = [torch.tensor([0, 3, 19]), torch.arange(20)]
    merged = [(torch.randn(3, 8, generator=gen), torch.randn(3, 8, generator=gen)), None]
    layer = KVLayer()
    layer.update(keys, values)
    layer.compress(CompressedLayer(keep, merged=merged))
    assert layer.lengths().tolist() == [[3, 20]]
    assert layer.nbytes()["fast"] == 23 * (2 * 8 * 4 + 4) + 2 * 8
    query = torch.randn(1, 4, 1, 8, generator=gen)
    layer.update(new[:, :, :1], new[:, :, 1:2])
    got = layer.attend(query, 0.5)
    k, v = torch.cat([merged[0][0], new[0, 0, :1]]), torch.cat([merged[0][1], new[0, 0, 1:2]])
    torch.testing.assert_close(got[0, :2, 0], (query[0, :2, 0] @ k.T * 0.5).softmax(-1) @ v)
    layer.update(new[:, :, 2:5], new[:, :, 5:8])
    layer.crop(-4)
    layer.update(new[:, :, :1], new[:, :, 1:2])
    assert torch.equal(layer.attend(query, 0.5), got)
    layer.crop(-6)  # one decoded column and five of the prompt
    row, k, v, where = layer.exact.segment(0, torch.float32)
    assert row == 0 and where.tolist() == [0, 3] and torch.equal(k, merged[0][0][:2])


@pytest.mark.parametrize("merge", ["averaged", "pivotal", "weighted"])
def test_lookm_merges_pictures_into_what_stays(merge):
    row = example(n=14, visual=slice(3, 10))
    for head, (columns, keys, values) in enumerate(stored(p.LookM(budget=9, sinks=1, recent=2, merge=merge), row)):
        attention = row.window[2 * head : 2 * head + 2].mean((0, 1))
        pictures = sorted(range(3, 10), key=lambda i: -attention[i])[:2]
        assert columns == sorted([0, 1, 2, 10, 11, 12, 13, *pictures])
        cosine = torch.nn.functional.cosine_similarity(row.keys[head][:, None], row.keys[head][None], dim=-1)
        joined = {c: [] for c in columns}
        for e in set(range(14)) - set(columns):
            joined[max(columns, key=lambda c: cosine[e, c])].append(e)
        for got, own in ((keys, row.keys[head]), (values, row.values[head])):
            for i, c in enumerate(columns):
                moved = {
                    "averaged": [own[e] for e in joined[c]],
                    "pivotal": [(own[c] + own[e]) / 2 for e in joined[c]],
                    "weighted": [cosine[e, c] * own[e] for e in joined[c]],
                }[merge]
                torch.testing.assert_close(got[i], (own[c] + sum(moved)) / (1 + len(moved)))


def test_elasticcache_averages_around_anchors():
    row = example(n=16)
    for head, (columns, keys, values) in enumerate(stored(p.ElasticCache(budget=6, sinks=1, recent=2), row)):
        attention = row.window[2 * head : 2 * head + 2].mean((0, 1))
        assert columns == sorted([0, 14, 15, *sorted(range(1, 14), key=lambda i: -attention[i])[:3]])
        bucket = {c: [i for i in range(16) if min(columns, key=lambda a: (abs(a - i), a)) == c] for c in columns}
        for got, own in ((keys, row.keys[head]), (values, row.values[head])):
            want = torch.stack([own[bucket[c]].mean(0) for c in columns])
            torch.testing.assert_close(got, want)


def decoding(policy, n, tokens, seed=0):
    """A layer of one row and two heads after `n` columns and single tokens: yields (layer, query, key) per token."""
    row = example(n=n, dh=8, seed=seed)
    layer = policy.cache_layer()
    layer.update(row.keys[None], row.values[None])
    layer.compress(policy.compress(view_of(row)))
    gen = torch.Generator().manual_seed(seed + 1)
    for _ in range(tokens):
        query, (key, value) = torch.randn(1, 4, 1, 8, generator=gen), torch.randn(2, 1, 2, 1, 8, generator=gen)
        layer.update(key, value)
        layer.attend(query, 1.0)
        yield layer, query, key


def places(layer):
    """Logical columns each head of one row holds, exact store."""
    found = {layer.exact.rows[i]: layer.exact.segment(i, torch.float32)[3].tolist() for i in range(2)}
    return [found[0], found[1]]


def test_elasticcache_evicts_at_a_fixed_distance():
    policy = p.ElasticCache(budget=8, sinks=1, recent=3, distance=3)
    before = [k.tolist() for k in policy.compress(view_of(example(n=16, dh=8))).keep]
    for t, (layer, _, _) in enumerate(decoding(policy, 16, 40)):
        assert places(layer) == [[*kept[:5], *[*kept[5:], *range(16, 17 + t)][-3:]] for kept in before]
        store = layer.exact
        newest = store.keys[store.offsets[0] + store.lengths[0] - 1]
        assert torch.equal(newest, layer.exact.segment(0, torch.float32)[1][-1])
    assert layer.get_seq_length() == 56


def test_lazyeviction_drops_what_is_overdue():
    policy = p.LazyEviction(budget=12, sinks=1, recent=2, lag=4, alpha=0.08)
    held = [{i: [0, 0] for i in range(10)} for _ in range(2)]  # column -> [last use, longest gap], plainly
    keys = [list(example(n=10, dh=8).keys[h]) for h in range(2)]
    acted = 0
    for t, (layer, query, key) in enumerate(decoding(policy, 10, 30), 1):
        for h in range(2):
            if t > 1 and (t - 1) % 4 == 0 and len(held[h]) > 12:
                overdue = {i: (t - 1 - last) / max(1, gap) for i, (last, gap) in held[h].items()}
                free = sorted([*held[h]][1:-4], key=lambda i: overdue[i])[: 12 - 5]
                limit = sorted(overdue[i] for i in [*held[h]][1:-4])[6]
                assert all(i in held[h] for i in places(layer)[h][:-1])
                chosen = places(layer)[h][:-1]  # ties may fall either way
                assert len(chosen) == 12 and next(iter(held[h])) in chosen and set([*held[h]][-4:]) <= set(chosen)
                assert {i for i in free if overdue[i] < limit} <= set(chosen)
                assert all(overdue[i] <= limit for i in chosen[1:-4])
                held[h] = {i: held[h][i] for i in chosen}
                acted += 1
            held[h][9 + t] = [t, 0]
            keys[h].append(key[0, h, 0])
            columns = [*held[h]]
            assert places(layer)[h] == columns
            k = torch.stack([keys[h][i] for i in columns])
            weight = (query[0, 2 * h : 2 * h + 2, 0] @ k.T).softmax(-1).amax(0)
            for i, w in zip(columns, weight):
                if w >= 0.08:
                    held[h][i] = [t, max(held[h][i][1], t - held[h][i][0])]
    assert acted == 14 and max(map(len, places(layer))) <= 16 and layer.get_seq_length() == 40


def test_a_draft_is_refused_where_decoding_evicts():
    model, inputs = tiny.build("llava"), prompt("llava")
    plan = {"kv": p.LazyEviction(keep=0.5, sinks=2, recent=4, lag=2)}
    message = "refused tokens cannot be given back, a LaggedLayer evicts"
    drafting = Speculate(draft=PromptLookup())
    with vlmfast.accelerate(model, **plan, speculate=drafting), pytest.raises(Unsupported, match=message):
        generate(model, inputs, 8)
    with vlmfast.accelerate(model, **plan):
        want = generate(model, inputs, 8)
    with vlmfast.accelerate(model, **plan, speculate=Speculate()):
        assert torch.equal(generate(model, inputs, 8).sequences, want.sequences)


def test_kvmerger_merges_runs_of_similar_neighbours():
    row = example(n=12)
    for head, (columns, keys, values) in enumerate(stored(p.KVMerger(budget=7, sinks=1, recent=2, heavy=0.25), row)):
        attention, k = row.window[2 * head : 2 * head + 2].mean((0, 1)), row.keys[head]
        alone = [0, 10, 11, max(range(1, 10), key=lambda i: attention[i])]
        rest = [i for i in range(12) if i not in alone]
        alike = [float(k[a] @ k[b] / k[a].norm() / k[b].norm()) for a, b in itertools.pairwise(rest)]
        cuts = sorted(sorted(range(7), key=lambda i: alike[i])[:2])
        runs = [rest[: cuts[0] + 1], rest[cuts[0] + 1 : cuts[1] + 1], rest[cuts[1] + 1 :]]
        pivots = [max(run, key=lambda i: attention[i]) for run in runs]
        assert columns == sorted(alone + pivots)
        for run, pivot in zip(runs, pivots):
            far = [float((k[i] - k[pivot]).norm()) for i in run]
            d = sum(far) / max(1, len(run) - 1)
            weight = torch.tensor(
                [1.0 if i == pivot else float(torch.tensor(-(f**2) / d**2).exp()) for i, f in zip(run, far)]
            )
            weight = weight / weight.sum()
            at = columns.index(pivot)
            torch.testing.assert_close(keys[at], weight @ k[run])
            torch.testing.assert_close(values[at], weight @ row.values[head][run])
        assert all(torch.equal(keys[columns.index(i)], k[i]) for i in alone)


def test_razorattention_keeps_retrieval_heads_and_compensates_the_others():
    rows = [example(n=20, seed=i, layer=i, layers=3) for i in range(3)]
    policy = p.RazorAttention(budget=12, sinks=2, recent=3, share=0.34)
    reach = {
        (i, h): float(rows[i].window[2 * h : 2 * h + 2].mean((0, 1))[2:17].sum()) for i in range(3) for h in (0, 1)
    }
    far = sorted(reach, key=lambda place: -reach[place])[:2]
    views = [view_of(row) for row in rows]
    kept = policy.compress_all(views, [policy.rate(view) for view in views])
    other = (6 * 12 - 2 * 20) // 4
    for i, row in enumerate(rows):
        layer = KVLayer()
        layer.update(row.keys[None], row.values[None])
        layer.compress(kept[i])
        query, new = torch.randn(2, 1, 4, 1, 4, generator=torch.Generator().manual_seed(i))
        layer.update(new[:, :2], new[:, 2:])
        got = layer.attend(query, 0.5)[0, :, 0]
        for head in range(4):
            at = (i, head // 2)
            gone = slice(2, 2 if at in far else 20 - (other - 3))
            k, v = row.keys[at[1]], row.values[at[1]]
            k_all, v_all = (torch.cat([x, y[0]]) for x, y in ((k, new[:, at[1]]), (v, new[:, 2 + at[1]])))
            weight = (k_all @ query[0, head, 0] * 0.5).exp()
            if at not in far:  # the dropped columns weigh together what their mean would, as often as they are
                mean = (k[gone].mean(0) @ query[0, head, 0] * 0.5).exp()
                weight[gone], v_all[gone] = mean, v[gone].mean(0)
            torch.testing.assert_close(got[head], weight @ v_all / weight.sum())
        assert layer.lengths()[0].tolist() == [21 if (i, h) in far else other + 1 for h in (0, 1)]
    listed = p.RazorAttention(budget=10, sinks=2, recent=3, heads=((2, 1),))
    bare = [dataclasses.replace(view, window=None) for view in views]
    kept = listed.compress_all(bare, [listed.rate(view) for view in bare])
    assert [[len(k) for k in layer.keep] for layer in kept] == [[8, 8], [8, 8], [8, 20]]
    for heads, message in ((((9, 0),), "(9, 0) is not in this model"), (((0, 0), (0, 1), (1, 1)), "name at most 1")):
        with pytest.raises(UserError, match=re.escape(message)):
            wrong = dataclasses.replace(listed, heads=heads)
            wrong.compress_all(bare, [wrong.rate(view) for view in bare])


@pytest.mark.parametrize("q", [1, 3])
def test_quantised_keeps_what_it_does_not_choose_as_int8(q):
    row = example(n=14, dh=8)
    policy = p.Quantised(budget=6, sinks=1, recent=2, scorer=p.SnapKV(pool=1))
    kept = policy.compress(view_of(row))
    layer = KVLayer()
    layer.update(row.keys[None], row.values[None])
    layer.compress(kept)
    gen = torch.Generator().manual_seed(1)
    query, new = torch.randn(1, 4, q, 8, generator=gen), torch.randn(2, 1, 2, q, 8, generator=gen)
    layer.update(*new)
    got = layer.attend(query, 0.5)
    for head in range(4):
        attention = row.window[head // 2 * 2 : head // 2 * 2 + 2].mean((0, 1))
        exact = [0, 12, 13, *sorted(range(1, 12), key=lambda i: -attention[i])[:3]]
        assert kept.keep[head // 2].tolist() == sorted(exact)
        k, v = row.keys[head // 2].clone(), row.values[head // 2].clone()
        for x in (k, v):
            for i in set(range(14)) - set(exact):
                step = x[i].abs().max() / 127
                x[i] = (x[i] / step).round() * step
        k, v = torch.cat([k, new[0, 0, head // 2]]), torch.cat([v, new[1, 0, head // 2]])
        for t in range(q):
            want = (k[: 15 + t] @ query[0, head, t] * 0.5).softmax(0) @ v[: 15 + t]
            torch.testing.assert_close(got[0, head, t], want)
    layer.crop(-q - 12)
    assert layer.lengths().tolist() == [[2, 2]] and layer.attend(query[:, :, :1], 0.5).isfinite().all()


SPECIAL = [  # policies whose layers hold more than keys and values
    p.RazorAttention(budget=12, sinks=2, recent=3, heads=()),
    p.Quantised(budget=6, sinks=1, recent=2, scorer=p.SnapKV(pool=1)),
    p.ElasticCache(budget=8, sinks=1, recent=3, distance=3),
    p.ShadowKV(budget=12, sinks=1, recent=3, chunk=2, rank=6),
    p.LazyEviction(budget=8, sinks=1, recent=2, lag=2, alpha=0.08),
]
special = pytest.mark.parametrize("policy", SPECIAL, ids=lambda policy: policy.name)


@special
def test_rows_are_swapped_and_repeated_with_all_they_hold(policy):
    rows = [example(n=20, dh=8, seed=seed) for seed in range(2)]
    layer = policy.cache_layer()
    layer.update(torch.stack([r.keys for r in rows]), torch.stack([r.values for r in rows]))
    layer.compress(policy.compress(view_of(*rows)))
    gen = torch.Generator().manual_seed(0)

    def decode(layer, order, steps=5):
        gen.manual_seed(1)
        out = []
        for _ in range(steps):
            key, value = torch.randn(2, 2, 2, 1, 8, generator=gen)
            layer.update(key[order], value[order])
            out.append(layer.attend(torch.randn(2, 4, 1, 8, generator=gen)[order], 0.5))
        return torch.stack(out)

    decode(layer, [0, 1])
    swapped, repeated = layer.fork(), layer.fork()
    want = decode(layer, [0, 1])
    swapped.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(decode(swapped, [1, 0]), want[:, [1, 0]])
    repeated.batch_repeat_interleave(2)
    torch.testing.assert_close(decode(repeated, [0, 0, 1, 1]), want[:, [0, 0, 1, 1]])


@special
def test_special_layers_are_saved_and_loaded(policy, tmp_path):
    model, inputs = tiny.build("qwen2_5_vl"), prompt("qwen2_5_vl", text=24)
    ids = torch.randint(tiny.FIRST_TEXT, tiny.VOCAB, (1, 7), generator=torch.Generator().manual_seed(0))
    with Accelerated(model, policy), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        steps(model, cache, ids[:, :3])
        persist.save(cache, tmp_path / "kv.safetensors")
        want = steps(model, cache, ids[:, 3:])
        assert torch.equal(steps(model, persist.load(tmp_path / "kv.safetensors"), ids[:, 3:]), want)


def test_shadowkv_rebuilds_chunks_from_low_rank_keys():
    row = example(n=23, dh=8)
    policy, view = p.ShadowKV(budget=13, sinks=2, recent=3, chunk=2, rank=5), view_of(row)
    turn = torch.polar(torch.ones(23, 4), torch.arange(23)[:, None] * 100.0 ** (-torch.arange(4) / 4))
    bare = torch.complex(row.keys[..., :4], row.keys[..., 4:]) / turn  # keys before RoPE, as complex numbers
    flat = torch.cat([torch.cat([x.real, x.imag], -1) for x in bare], -1)  # (n, 2 heads of 8)
    u, s, vh = torch.linalg.svd(flat)
    low = (u[:, :5] * s[:5]) @ vh[:5]
    assert (low - flat).norm() > 0.1 * flat.norm()
    rebuilt = [torch.complex(x[:, :4], x[:, 4:]) * turn for x in (low[:, :8], low[:, 8:])]
    layer = KVLayer()
    layer.update(row.keys[None], row.values[None])
    layer.compress(policy.compress(view))
    gen = torch.Generator().manual_seed(3)
    query, new = torch.randn(1, 4, 1, 8, generator=gen), torch.randn(2, 1, 2, 1, 8, generator=gen)
    layer.update(*new)
    got = layer.attend(query, 0.5)
    store = layer.dynamic.store
    for h in range(2):
        chunks = [list(range(c, c + 2)) for c in range(2, 20, 2)]
        reach = [max(float(q @ row.keys[h, c].mean(0)) for q in query[0, 2 * h : 2 * h + 2, 0]) for c in chunks]
        best = sorted(range(9), key=lambda c: -reach[c])[:4]
        columns = sorted([0, 1, 20, 21, 22, *(i for c in best for i in chunks[c])])
        _, keys, values, where = store.segment(store.rows.index(h), torch.float32)
        order = where[:-1].argsort()
        assert where[:-1][order].tolist() == columns
        want = torch.cat([rebuilt[h].real, rebuilt[h].imag], -1)[columns]
        torch.testing.assert_close(keys[:-1][order], want, atol=1e-5, rtol=1e-4)
        assert torch.equal(values[:-1][order], row.values[h][columns])
        k, v = torch.cat([want, new[0, 0, h]]), torch.cat([row.values[h][columns], new[1, 0, h]])
        weight = (query[0, 2 * h : 2 * h + 2, 0] @ k.T * 0.5).softmax(-1)
        torch.testing.assert_close(got[0, 2 * h : 2 * h + 2, 0], weight @ v, atol=1e-5, rtol=1e-4)
    tiers = layer.nbytes()
    assert tiers["host"] == 2 * 23 * (8 * 4 + 4) + 2 * 4 * 8  # values, positions, slot tables; no keys
    factors = 4 * (23 * 5 + 5 * 16 + 2 * 23 * 8)
    assert tiers["fast"] == store.nbytes()[0] + 2 * 9 * 8 * 4 + factors
    with pytest.raises(Unsupported, match="needs the rotation of every column"):
        policy.compress(dataclasses.replace(view, rotation=None))


@pytest.mark.parametrize("int8", [False, True])
def test_parts_of_rows_read_alike_by_both_kernels(int8):
    gen = torch.Generator().manual_seed(0)
    segments = [(r, *torch.randn(2, n, 8, generator=gen), torch.arange(n)) for r, n in ((0, 5), (2, 7), (3, 5))]
    store = Store.build(segments, 4, int8=int8, mass=[torch.full((5,), 3.0), None, torch.ones(7), None])
    query = torch.randn(1, 8, 3, 8, generator=gen)
    for causal in (True, False):
        outs = [torch.zeros(1, 8, 3, 8) for _ in range(2)]
        sums = [torch.zeros(1, 8, 3) for _ in range(2)]
        kernels.reference.ragged_attention(query, store, 0.5, outs[0], sums[0], causal)
        kernels.ragged_attention(query, store, 0.5, outs[1], "cpu", sums[1], causal)
        torch.testing.assert_close(outs[0], outs[1])
        torch.testing.assert_close(sums[0], sums[1])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: p.H2O(heavy=1.2), "heavy=1.2 in h2o"),
        (lambda: p.PyramidKV(beta=0.5), "beta=0.5 in pyramidkv"),
        (lambda: p.CAKE(tau1=0), "tau1=0 in cake: tau1 must be a finite number above 0"),
        (lambda: p.CAKE(pool=4), "pool must be a whole number at least 1, odd"),
        (lambda: p.AdaKV(scorer=p.CAKE()), "over layers or single queries: use e.g. scorer=snapkv"),
        (lambda: p.MixKV(queries=0), "queries=0"),
        (lambda: p.RazorAttention(share=2), "share=2 in razorattention"),
        (lambda: p.RazorAttention(heads=((1,),)), "heads must be a list of pairs of numbers or none"),
        (lambda: p.Quantised(int8=True), "low tier is int8 already"),
        (lambda: p.Quantised(scorer=p.PrefixKV()), "over layers or single queries: use e.g. scorer=snapkv"),
        (lambda: p.LazyEviction(lag=0), "lag=0 in lazyeviction"),
        (lambda: p.LazyEviction(alpha=1), "alpha=1 in lazyeviction"),
        (lambda: p.LazyEviction(budget=30, recent=4), "cannot hold the 36 columns"),
        (lambda: p.ElasticCache(distance=0), "distance=0 in elasticcache"),
        (lambda: p.ShadowKV(rank=0), "rank=0 in shadowkv"),
        (lambda: p.ShadowKV(int8=True), "lower rank"),
        (lambda: p.LookM(merge="sum"), "must be one of averaged, pivotal, weighted"),
        (lambda: p.ElasticCache(queries=0), "queries=0 in elasticcache"),
        (lambda: p.KVMerger(heavy=1), "heavy=1 in kvmerger"),
        (lambda: p.KVMerger(budget=36), "cannot hold the 37 columns"),
    ],
)
def test_bad_fields_are_named(build, message):
    with pytest.raises(UserError, match=message):
        build()
