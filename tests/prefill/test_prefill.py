"""Laws of the compressed cache: every policy x family, padded batches, crop, turns, bytes, removal."""

import copy
import dataclasses

import pytest
import tiny
import torch
from compressed import (
    SMALL,
    Accelerated,
    doubled,
    every_family,
    generate,
    policies,
    prompt,
    same_row,
    state,
    steps,
    under,
    walk,
)

from vlmfast.core import UserError
from vlmfast.prefill import AdaKV, Full, HybridAdvanced, HybridKV, KVLayer, SnapKV
from vlmfast.runtime.cache_state import cache_state

# ---------------------------------------------------------------- law 1: identity


@policies
@every_family
def test_keep_one_is_bypassed_and_bit_identical(policy, family):
    model, inputs = tiny.build(family), prompt(family, batch=2, pad=1)
    plain = generate(model, inputs, 3)
    got, reports = under(dataclasses.replace(policy, keep=1.0), model, inputs, 3)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, plain.logits))
    assert not any(isinstance(layer, KVLayer) for layer in got.past_key_values.layers)
    assert "kv: the context fits the budget, bypassed" in reports[0]["notes"]


@every_family
def test_full_contents_through_our_attention(family):
    model, inputs = tiny.build(family), prompt(family, batch=2, pad=2)
    reference = copy.deepcopy(model).double()
    if family == "qwen3_vl_moe":
        reference.set_experts_implementation("eager")  # the grouped products take no float64
    exact = generate(reference, doubled(inputs), 6)
    plain = generate(model, inputs, 6)
    got, _ = under(Full(), model, inputs, 6)
    assert torch.equal(got.sequences, plain.sequences) and torch.equal(exact.sequences, plain.sequences)
    error = [torch.stack([a - b for a, b in zip(x.logits, exact.logits)]).norm() for x in (got, plain)]
    assert error[0] <= 2 * error[1]
    assert all(isinstance(layer, KVLayer) for layer in got.past_key_values.layers)


# ---------------------------------------------------------------- laws 3, 6, 7: lengths, rows, bytes


@policies
@every_family
def test_lengths_are_as_predicted_and_rows_equal_single_rows(policy, family):
    model = tiny.build(family)
    args = {"media": ("image", "image") if family != "llava" else ("image",), "text": 14, "batch": 2}
    inputs = tiny.inputs(family, **args, pad=2)
    out, _ = under(policy, model, inputs, 5)
    for i, row in enumerate(tiny.rows(family, **args)):
        n = row["input_ids"].shape[1]
        single, reports = under(policy, model, row, 5)
        for j, (both, alone) in enumerate(zip(out.past_key_values.layers, single.past_key_values.layers)):
            lengths = alone.lengths()[0]
            assert torch.equal(both.lengths()[i], lengths)
            total = policy.total(n)
            if isinstance(policy, HybridKV):
                stats = reports[0]["kv_layers"][j]["rows"][0]
                for h, dynamic in enumerate(stats["dynamic"]):
                    held = int(lengths[h]) - 4
                    assert (
                        held == stats["budget"][h]
                        if not dynamic
                        else 0 <= stats["budget"][h] - held < policy.advanced.chunk
                    )
                assert sum(stats["budget"]) <= total * len(lengths)
            elif isinstance(policy, AdaKV):
                assert int(lengths.sum()) == (total + 4) * len(lengths)
            else:
                assert (lengths == total + 4).all()
        same_row(policy, model, row, out, i, single)


@policies
def test_bytes_are_those_of_the_tensors(policy):
    out, _ = under(policy, tiny.build("qwen2_5_vl"), prompt("qwen2_5_vl", batch=2, media=("image", "image")), 3)
    for layer in out.past_key_values.layers:
        tiers = layer.nbytes()
        assert tiers["resident"] == sum(walk(layer))
        d, width = 16, 1 if policy.int8 else 4
        slot = 2 * d * width + 4 + (8 if policy.int8 else 0)
        extra = sum(g.representatives.numel() * 4 for g in layer.dynamic.groups) if layer.dynamic else 0
        extra += 8 * sum(len(x) for x in layer.stores() if x.rows != list(range(x.total)))  # the order of its rows
        assert tiers["fast"] == slot * int(layer.lengths().sum()) + 8 * layer.lengths().numel() + extra
        assert tiers["fast"] <= tiers["fast_allocated"]
        assert (tiers["host"] > 0) == (layer.dynamic is not None)


# ---------------------------------------------------------------- crop, turns, pruners, removal


@policies
@every_family
def test_crop_after_compression_is_exact(policy, family):
    model, inputs = tiny.build(family), prompt(family, batch=2, pad=1, media=("image",), text=24)
    ids = torch.randint(tiny.FIRST_TEXT, tiny.VOCAB, (2, 11), generator=torch.Generator().manual_seed(3))
    with Accelerated(model, policy), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        fork = copy.deepcopy(cache)
        want = steps(model, fork, ids[:, :3])
        length = cache.get_seq_length()
        steps(model, cache, ids[:, 3:8])
        model(input_ids=ids[:, 8:], past_key_values=cache)  # three at once, as a verification does
        cache.crop(-8)
        assert cache.get_seq_length() == length
        assert all(torch.equal(a.lengths() + 3, b.lengths()) for a, b in zip(cache.layers, fork.layers))
        got = steps(model, cache, ids[:, :3])
        for layer in cache.layers:
            layer.crop(length)  # the older convention: an absolute length
        again = steps(model, cache, ids[:, :3])
    exact = isinstance(policy, HybridKV)  # chunks come back in other slots: same columns, another order of summation
    torch.testing.assert_close(got, want, atol=2e-5 if exact else 0, rtol=1e-4 if exact else 0)
    torch.testing.assert_close(again, want, atol=2e-5 if exact else 0, rtol=1e-4 if exact else 0)


@pytest.mark.parametrize("refresh", [1, 3])
def test_several_tokens_at_once_read_what_one_by_one_would(refresh):
    model, inputs = tiny.build("qwen3_vl"), prompt("qwen3_vl", text=24)
    ids = torch.randint(tiny.FIRST_TEXT, tiny.VOCAB, (1, 20), generator=torch.Generator().manual_seed(5))
    policy = HybridKV(split=1.0, advanced=HybridAdvanced(chunk=4, refresh=refresh), **SMALL)
    with Accelerated(model, policy), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        want = steps(model, copy.deepcopy(cache), ids)
        for layer in cache.layers:
            layer.verifying = True
        got = model(input_ids=ids, past_key_values=cache).logits
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("refresh", [1, 4])
def test_a_new_turn_reads_every_column_of_dynamic_heads(refresh):
    """And its last token chooses what the answer starts from; taking the turn back takes that back too."""
    model, inputs = tiny.build("qwen3_vl"), prompt("qwen3_vl", text=24)
    ids = torch.randint(tiny.FIRST_TEXT, tiny.VOCAB, (1, 6), generator=torch.Generator().manual_seed(5))
    with (
        Accelerated(model, HybridKV(split=1.0, advanced=HybridAdvanced(chunk=4, refresh=refresh), **SMALL)),
        torch.no_grad(),
    ):
        cache = model(**inputs, use_cache=True).past_key_values
        got = model(input_ids=ids, past_key_values=cache).logits
        group = cache.layers[-1].dynamic.groups[0]
        chosen, moved = group.held.clone(), group.moved
        cache.crop(-6)
        again = model(input_ids=ids, past_key_values=cache).logits
    with torch.no_grad():
        whole = model(**inputs, use_cache=True).past_key_values
        want = model(input_ids=ids, past_key_values=whole).logits
    assert 0 < group.slots < group.chunks and moved > 0 and torch.equal(chosen.sort().values, group.held.sort().values)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(again, got, atol=2e-5, rtol=1e-4)


@policies
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_second_turn_on_the_compressed_cache(policy, family):
    model, inputs = tiny.build(family), prompt(family, text=20)
    question = torch.randint(tiny.FIRST_TEXT, tiny.VOCAB, (1, 19), generator=torch.Generator().manual_seed(1))
    results = []
    for kv in (Full(), policy):
        with Accelerated(model, kv) as a:
            first = generate(model, inputs, 4)
            cache = first.past_key_values
            before = [layer.lengths() for layer in cache.layers]
            ids = torch.cat([first.sequences, question], 1)
            later = {k: v for k, v in inputs.items() if "mm_token" not in k} | {
                "input_ids": ids, "attention_mask": torch.ones_like(ids)}  # fmt: skip
            for key in [k for k in later if "pixel" in k or "grid" in k or "image" in k]:
                later.pop(key)
            second = generate(model, later, 5, past_key_values=cache)
            new = 1 + 19 + 4  # the token not yet fed, the question, and all but the last answer token
            assert all(torch.equal(x + new, layer.lengths()) for x, layer in zip(before, cache.layers))
            assert any("appended whole" in n for r in a.reports for n in r["notes"])
            results.append(second)
    plain = generate(model, inputs, 4)
    want = generate(model, later | {"input_ids": torch.cat([plain.sequences, question], 1)}, 5,
                    past_key_values=plain.past_key_values)  # fmt: skip
    assert torch.equal(results[0].sequences, want.sequences)
    torch.testing.assert_close(torch.stack(results[0].logits), torch.stack(want.logits), atol=1e-4, rtol=1e-4)
    assert not torch.equal(torch.stack(results[1].logits), torch.stack(want.logits))  # it did read less


def test_a_prompt_is_cropped_back_into_the_prefill():
    model, inputs = tiny.build("llava"), prompt("llava", text=24)
    with Accelerated(model, HybridKV(split=0.5, advanced=HybridAdvanced(chunk=4), **SMALL)), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        layer = cache.layers[0]
        kept = [s.positions[o : o + n] for s in [layer.exact] for o, n in zip(s.offsets, s.lengths)]
        n = cache.get_seq_length() - 10
        cache.crop(-10)
        assert cache.get_seq_length() == n
        assert layer.exact.lengths == [int((p < n).sum()) for p in kept]
        group = layer.dynamic.groups[0]
        assert group.n == n and int(group.host_positions.max()) == n - 1
        steps(model, cache, torch.tensor([[9, 10, 11]]))


class Half:
    """Every other visual token."""

    keep, after_block, needs, name = 0.5, None, (), "half"

    def select(self, tokens):
        return torch.arange(0, tokens.n, 2)


@policies
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_next"])
def test_with_a_pruner(policy, family):
    model, inputs = tiny.build(family), prompt(family, media=("image", "image"), text=20)
    with Accelerated(model, policy, Half()) as a:
        out = generate(model, inputs, 3)
    cache = out.past_key_values
    visual = inputs["input_ids"].eq(tiny.IMAGE).sum().item()
    entered = cache_state(cache).columns.kinds.shape[1]
    assert visual // 2 <= inputs["input_ids"].shape[1] - entered <= visual // 2 + 1
    assert cache.get_seq_length() == out.sequences.shape[1] - 1
    for layer in cache.layers:
        mean = float(layer.lengths().double().mean()) - 2
        assert policy.total(entered) - 4 <= mean <= policy.total(entered)
    assert not any("bypassed" in n for r in a.reports for n in r["notes"])


@policies
def test_removal_restores(policy):
    model, other = tiny.build("qwen2_vl"), tiny.build("qwen2_vl")
    inputs = prompt("qwen2_vl")
    before, plain = state(model), generate(other, inputs, 3)
    with Accelerated(model, policy):
        generate(model, inputs, 3)
        untouched = generate(other, inputs, 3)
        assert model.config.text_config._attn_implementation == "sdpa"  # ours only while a compressed cache is read
    assert state(model) == before
    for out in (untouched, generate(model, inputs, 3)):
        assert all(torch.equal(a, b) for a, b in zip(out.logits, plain.logits))


def test_an_error_in_the_middle_leaves_the_users_attention():
    model, inputs = tiny.build("llava"), prompt("llava")
    config = model.config.text_config

    class Broken(SnapKV):
        def choose(self, row):
            raise UserError("this policy fails on purpose")

    with Accelerated(model, Broken(keep=0.1, sinks=1, recent=2)):
        with pytest.raises(UserError, match="fails on purpose"):
            generate(model, inputs)
        assert config._attn_implementation == "sdpa"
    generate(model, inputs)


def test_a_fraction_of_a_short_prompt_never_falls_below_what_must_stay():
    """keep=0.1 serves short prompts too: sinks and recent stay, and a prompt no longer than they is bypassed."""
    model, inputs = tiny.build("llava"), prompt("llava")
    with Accelerated(model, SnapKV(keep=0.1, sinks=2, recent=3)):
        out = generate(model, inputs)
    lengths = out.past_key_values.layers[0].lengths()
    assert int(lengths.max()) - (out.sequences.shape[1] - inputs["input_ids"].shape[1] - 1) == 5
    with Accelerated(model, SnapKV(keep=0.1, sinks=4, recent=500)):
        bypassed = generate(model, inputs)
    assert type(bypassed.past_key_values.layers[0]).__name__ != "KVLayer"
