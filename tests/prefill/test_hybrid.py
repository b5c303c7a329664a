"""Families whose layers partly keep a recurrent state (Qwen3.5): the laws that they share, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import methods
import pytest
import tiny
import torch
from compressed import under, walk
from generation import NEW, logits, run
from pruning_laws import (
    identity_is_bit_identical,
    inside_the_tower,
    padded_row_equals_the_row_alone,
    pruned_equals_short,
    removal_restores,
    second_turn_over_a_kept_cache,
    streamer_and_stopping_work,
    text_survives_and_frames_keep_their_floor,
)
from transformers.cache_utils import CacheLayerMixin
from typer.testing import CliRunner

import vlmfast
from vlmfast import cli, roofline
from vlmfast import prefill as p
from vlmfast.core import Unsupported, UserError
from vlmfast.decode import ModelDraft, PromptLookup, Speculate
from vlmfast.encode import FastV, Uniform, VidCom2
from vlmfast.prefill import KVLayer
from vlmfast.stream import StreamSession

MEDIA = [("image",), ("image", "image"), ("video",), ("image", "video")]
hybrids = pytest.mark.parametrize("family", tiny.HYBRID)
every_media = pytest.mark.parametrize("media", MEDIA, ids="+".join)
FULL = [1, 3]  # the tiny models' layers with full attention
ROWS = [row for row in methods.POLICIES if not isinstance(row, p.ShadowKV)]
every_policy = pytest.mark.parametrize("policy", ROWS, ids=repr)


def full_layers(out: Any) -> list[Any]:
    layers = out.past_key_values.layers
    assert [i for i, layer in enumerate(layers) if isinstance(layer, CacheLayerMixin)] == FULL
    return [layers[i] for i in FULL]


# ---------------------------------------------------------------- pruning


@hybrids
@every_media
def test_identity(family: str, media: tuple) -> None:
    identity_is_bit_identical(family, media, VidCom2(keep=1.0), 2)


@hybrids
def test_removal_restores(family: str) -> None:
    removal_restores(family)


@hybrids
@every_media
@pytest.mark.parametrize("method", methods.FIRST, ids=repr)
def test_pruned_equals_a_hand_built_short_sequence(family: str, media: tuple, method: Any) -> None:
    pruned_equals_short(family, media, method)


@hybrids
@every_media
def test_text_survives_and_frames_keep_their_floor(family: str, media: tuple) -> None:
    text_survives_and_frames_keep_their_floor(family, media)


@hybrids
@every_media
def test_padded_rows_equal_single_rows(family: str, media: tuple) -> None:
    padded_row_equals_the_row_alone(family, media, VidCom2(keep=0.2))


@hybrids
@every_media
@pytest.mark.parametrize("block", [0, 1])
def test_inside_the_tower(family: str, media: tuple, block: int) -> None:
    inside_the_tower(family, media, block)


@hybrids
def test_streamer_and_stopping(family: str) -> None:
    streamer_and_stopping_work(family)


@hybrids
def test_a_second_turn(family: str) -> None:
    second_turn_over_a_kept_cache(family)


@pytest.mark.parametrize("method", methods.BREADTH[1::2], ids=repr)
def test_every_other_pruner_equals_short(method: Any) -> None:
    pruned_equals_short("qwen3_5", ("image", "video"), method)


@hybrids
def test_the_report_counts_keys_and_values(family: str) -> None:
    model, inputs = tiny.build(family), tiny.inputs(family, media=("image", "image"))
    with vlmfast.accelerate(model, prune=Uniform(keep=0.5)) as fast:
        layers = full_layers(run(model, inputs))
    held = sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))
    assert fast.report.prefill["kv_fast_bytes"] == held
    assert fast.report.prefill["cached_tokens"] == layers[0].keys.shape[-2]
    assert fast.report.encode["kept_tokens"] < fast.report.encode["visual_tokens"]


# ---------------------------------------------------------------- KV policies: full attention only


@every_policy
def test_a_context_within_the_budget_is_bit_identical(policy: Any) -> None:
    model, inputs = tiny.build("qwen3_5"), tiny.inputs("qwen3_5", batch=2, pad=1)
    plain = run(model, inputs)
    with vlmfast.accelerate(model, kv=dataclasses.replace(policy, keep=1.0)) as fast:
        got = run(model, inputs)
    assert torch.equal(logits(got), logits(plain))
    assert not any(isinstance(layer, KVLayer) for layer in got.past_key_values.layers)
    assert "kv: the context fits the budget, bypassed" in fast.report.notes


@hybrids
@every_policy
def test_padded_rows_equal_single_rows_and_the_states_are_left_alone(family: str, policy: Any) -> None:
    model = tiny.build(family)
    args: dict[str, Any] = {"media": ("image", "image"), "text": [20, 14], "batch": 2}
    with vlmfast.accelerate(model, kv=policy) as fast:
        batch = run(model, tiny.inputs(family, **args, pad=2))
        for i, row in enumerate(tiny.rows(family, **args)):
            single = run(model, row)
            for a, b in zip(full_layers(batch), full_layers(single)):
                assert torch.equal(a.lengths()[i], b.lengths()[0])
            torch.testing.assert_close(logits(batch)[i], logits(single)[0], rtol=2e-4, atol=3e-4)
            if not isinstance(policy, (p.Quantised, p.LazyEviction)) and not getattr(policy, "distance", None):
                mean = torch.stack([layer.lengths().double() for layer in full_layers(single)]).mean()
                total = policy.total(row["input_ids"].shape[1])
                spare = policy.advanced.chunk if isinstance(policy, p.HybridKV) else 1  # it reads whole chunks
                assert total - spare < float(mean) - (NEW - 1) <= total
        layers = single.past_key_values.layers
        assert fast.report.prefill["kv_fast_bytes"] == sum(layers[i].nbytes()["fast"] for i in FULL)
        assert all(sum(walk(layers[i])) == layers[i].nbytes()["resident"] for i in FULL)
        assert [stats["layer"] for stats in fast.report.prefill["kv_layers"]] == FULL
        assert any("layers 0, 2 (LinearAttentionLayer) were left alone" in note for note in fast.report.notes)


@hybrids
def test_all_contents_through_our_attention(family: str) -> None:
    model, inputs = tiny.build(family), tiny.inputs(family, batch=2, pad=2)
    plain = run(model, inputs)
    got, _ = under(p.Full(), model, inputs, NEW)
    assert all(isinstance(layer, KVLayer) for layer in full_layers(got))
    torch.testing.assert_close(logits(got), logits(plain), rtol=2e-4, atol=2e-4)


def test_the_window_is_what_the_layer_attends_with() -> None:
    """The queries that policies rate by are the gated projection's own: weights equal eager attention's."""
    model, inputs = tiny.build("qwen3_5"), tiny.inputs("qwen3_5", text=12)
    model.set_attn_implementation("eager")
    maps = model(**inputs, output_attentions=True).attentions
    seen: list[Any] = []

    class Watch(p.CAKE):
        def rate(self, view: Any) -> Any:
            seen.append(view.window)
            return super().rate(view)

    with vlmfast.accelerate(model, kv=Watch(keep=0.5, sinks=1, recent=2, queries=4)):
        model(**inputs, use_cache=True)
    assert len(seen) == len(FULL)
    found = [m for m in maps if m is not None and m.ndim == 4]
    for window, attention in zip(seen, found, strict=True):
        torch.testing.assert_close(window, attention[:, :, -4:], rtol=1e-4, atol=1e-5)


def test_a_pyramid_is_built_on_the_layers_that_are_compressed() -> None:
    model, inputs = tiny.build("qwen3_5"), tiny.inputs("qwen3_5", media=("image", "image"), text=20)
    policy = p.PyramidKV(keep=0.5, sinks=1, recent=2, beta=4)
    with vlmfast.accelerate(model, kv=policy):
        layers = full_layers(run(model, inputs))
    first, last = (int(layer.lengths()[0, 0]) - (NEW - 1) for layer in layers)
    assert first > last and first + last == 2 * policy.total(inputs["input_ids"].shape[1])


@hybrids
def test_both_stages_and_a_second_turn(family: str) -> None:
    model, inputs = tiny.build(family), tiny.inputs(family, media=("image", "image"), text=20)
    more = torch.tensor([[30, 31, 32, 33]])
    outs = []
    for kv in (p.SnapKV(keep=0.5, sinks=1, recent=2), p.KeyDiff(keep=0.5, sinks=1, recent=2)):
        with vlmfast.accelerate(model, prune=VidCom2(keep=0.5), kv=kv) as fast:
            first = run(model, inputs)
            before = [layer.lengths() for layer in full_layers(first)]
            ids = torch.cat([first.sequences, more], 1)
            second = run(model, {"input_ids": ids}, past_key_values=first.past_key_values)
            assert any("no new visual tokens" in note for note in fast.report.notes)
        grown = [layer.lengths() for layer in full_layers(second)]
        assert all(torch.equal(a + 1 + 4 + NEW - 1, b) for a, b in zip(before, grown))
        outs.append(second)
    assert not torch.equal(logits(outs[0]), logits(outs[1]))


# ---------------------------------------------------------------- reuse: features, not a prefix


def test_reuse_keeps_features_alone() -> None:
    model, inputs = tiny.build("qwen3_5"), tiny.inputs("qwen3_5")
    plain = run(model, inputs)
    with vlmfast.accelerate(model, reuse="1GiB") as fast:
        run(model, inputs)
        again = run(model, inputs)
    assert torch.equal(logits(again), logits(plain))
    assert any("features found, tower skipped" in note for note in fast.report.notes)
    assert any("cannot be cut behind the media" in note for note in fast.report.notes)


# ---------------------------------------------------------------- refusals


@hybrids
@pytest.mark.parametrize("plan", [Speculate(), Speculate(draft=PromptLookup())], ids=["no draft", "lookup"])
def test_speculation_is_refused(family: str, plan: Any) -> None:
    model, inputs = tiny.build(family), tiny.inputs(family)
    with (
        vlmfast.accelerate(model, speculate=plan),
        pytest.raises(Unsupported, match=f"a {family} keep a recurrent state that cannot give back refused tokens"),
    ):
        run(model, inputs)
    plain = run(model, inputs)
    with vlmfast.accelerate(model, speculate=dataclasses.replace(plan, otherwise="plain")) as fast:
        assert torch.equal(logits(run(model, inputs)), logits(plain))
    assert any("decoded by transformers" in note for note in fast.report.notes)


def test_as_a_draft_it_is_refused() -> None:
    model, inputs = tiny.build("qwen3_vl"), tiny.inputs("qwen3_vl")
    plan = Speculate(draft=ModelDraft(tiny.build("qwen3_5")))
    with (
        vlmfast.accelerate(model, speculate=plan),
        pytest.raises(Unsupported, match="of the draft, a qwen3_5, keep a recurrent state"),
    ):
        run(model, inputs)


@hybrids
def test_a_stream_is_refused(family: str) -> None:
    with pytest.raises(Unsupported, match="out of which no frame can be taken"):
        StreamSession(tiny.build(family), tiny.processor("qwen3_vl"))


def test_cuts_between_layers_low_rank_keys_and_a_floor_are_refused(tmp_path: Path) -> None:
    model, inputs = tiny.build("qwen3_5"), tiny.inputs("qwen3_5", text=30)
    with pytest.raises(Unsupported, match="fastv drops columns between layers"):
        vlmfast.accelerate(model, prune=FastV(keep=0.5))
    with (
        vlmfast.accelerate(model, kv=p.ShadowKV(keep=0.5, sinks=1, recent=2, rank=4)),
        pytest.raises(Unsupported, match="rotates 8 of 16 channels"),
    ):
        run(model, inputs)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="layers with a recurrent state"):
        roofline.shape_of(str(tmp_path))


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"prefill_chunk_size": 4}], ids=str)
def test_rewritten_inputs_are_refused(options: dict[str, Any]) -> None:
    model, inputs = tiny.build("qwen3_5"), tiny.inputs("qwen3_5")
    with (
        vlmfast.accelerate(model, prune=VidCom2(keep=0.5)),
        pytest.raises(Unsupported, match="served over the default dynamic cache in one prefill only"),
    ):
        run(model, inputs, **options)


def test_check_holds(tmp_path: Path) -> None:
    """The command finds it in a folder, its laws hold, and every method works or is refused in words."""
    folder = tiny.save("qwen3_5", tmp_path)
    result = CliRunner().invoke(cli.build(), ["check", "--model", str(folder), "--rounds", "1", "--json"])
    record = json.loads(result.stdout)
    assert result.exit_code == 0, [law for law in record["laws"] if not law["ok"]]
    states = {name: m["state"] for name, m in record["methods"].items()}
    between = {f"prune {name}" for name in ("fastv", "pyramiddrop", "v2drop", "adaptinfer")}
    assert "broke" not in states.values()
    assert {"speculate", "kv shadowkv"} | between <= {name for name, state in states.items() if state == "refused"}
    assert states["prune inside the tower"] == states["kv hybridkv"] == "works"
