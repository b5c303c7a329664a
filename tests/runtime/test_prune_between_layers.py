"""Methods between layers of the language model: equal to a full-length run whose later layers are masked, in every
family, padded or not, over decode, verification and later turns; exact lengths per layer; refusals."""

from __future__ import annotations

import copy
from typing import Any

import methods
import pytest
import tiny
import torch
from between_layers import entering, equals_masked, kept_columns, masked_reference
from generation import CASES, NEW, Heard, logits, run, state

import vlmfast
from vlmfast.core import Kind, UserError
from vlmfast.encode import AdaptInfer, FastV, FlashVID, PyramidDrop, Random, V2Drop, VidCom2
from vlmfast.encode.between import stage_layers, staged
from vlmfast.plan import Plan, parse
from vlmfast.runtime.cache_state import cache_state

MIXED = {f: ("image", "video") if f in tiny.VIDEO_FAMILIES else ("image", "image") for f in tiny.FAMILIES}
HARSH = methods.BETWEEN[1::2]


# -- equal to the masked run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("method", HARSH, ids=repr)
def test_equals_the_masked_run(family: str, method: Any) -> None:
    equals_masked(family, MIXED[family], method)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "media"), CASES)
@pytest.mark.parametrize("method", methods.BETWEEN, ids=repr)
def test_equals_the_masked_run_everywhere(family: str, media: tuple, method: Any) -> None:
    equals_masked(family, media, method)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(
    "method",
    [PyramidDrop(keep=0.3, layers=(2, 3), prune=VidCom2(keep=0.6)), AdaptInfer(keep=0.2, layers=(2,))],
    ids=repr,
)
def test_padded_rows_equal_rows_alone(family: str, method: Any) -> None:
    """Rows of one image, two images and none, so that the counts are ragged; a first pruner before the cuts too."""
    media = [("image", "image"), (), ("image",)]
    model = tiny.build(family)
    with vlmfast.accelerate(model, prune=method) as fast:
        batch = run(model, tiny.inputs(family, media=media, pad=2))
        kept, total = fast.report.encode["kept_tokens"], 0
        for row, single in enumerate(tiny.rows(family, media=media)):
            torch.testing.assert_close(logits(batch)[row], logits(run(model, single))[0], rtol=2e-4, atol=2e-4)
            total += fast.report.encode["kept_tokens"]
    assert kept == total


def test_equal_prompts_with_ragged_counts_are_padded_after_the_cut() -> None:
    """No padding enters, but one row holds more visual columns than the other: padding begins at the cut."""
    model = tiny.build("llava")
    media = [("image", "image"), ("image",)]
    inputs = tiny.inputs("llava", media=media, text=[6, 23])
    assert inputs["attention_mask"].all()
    with vlmfast.accelerate(model, prune=FastV(keep=0.25)):
        batch = run(model, inputs)
        held = cache_state(batch.past_key_values).cuts[2]
        assert held.padded
        for row, single in enumerate(tiny.rows("llava", media=media, text=[6, 23])):
            torch.testing.assert_close(logits(batch)[row], logits(run(model, single))[0], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_eager_attention_gives_the_same(family: str) -> None:
    inputs = tiny.inputs(family, media=("image",), batch=2)
    both = []
    for attention in ("sdpa", "eager"):
        model = tiny.build(family)
        model.set_attn_implementation(attention)
        with vlmfast.accelerate(model, prune=PyramidDrop(keep=0.3, layers=(1, 3))):
            both.append(logits(run(model, inputs)))
    torch.testing.assert_close(*both, rtol=2e-4, atol=2e-4)


# -- the rules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "llava_onevision"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_fastv_keeps_what_the_last_token_attends_to(family: str, use_cache: bool) -> None:
    """Against the attention weights that the eager model itself returns."""
    model, inputs = tiny.build(family), tiny.inputs(family)
    eager = tiny.build(family)
    eager.set_attn_implementation("eager")
    weights = eager(**inputs, output_attentions=True).attentions[1][0, :, -1].mean(0)
    visual = (inputs["input_ids"][0] == tiny.IMAGE).nonzero()[:, 0]
    if family == "llava_onevision":
        embeds = entering(model, inputs)["inputs_embeds"][0, visual]
        visual = visual[~(embeds == model.model.image_newline).all(-1)]
    k = round(0.4 * len(visual))
    best = visual[weights[visual].topk(k).indices].sort().values
    with vlmfast.accelerate(model, prune=FastV(keep=0.4)):
        if use_cache:
            kept = kept_columns(run(model, inputs).past_key_values, 0)[2]
            assert torch.equal(kept[torch.isin(kept, visual)], best)
        else:
            short = model(**inputs, use_cache=False).logits
            dropped = len(visual) - k
            assert short.shape[1] == inputs["input_ids"].shape[1] - dropped


def test_v2drop_keeps_what_changed_most() -> None:
    model, inputs = tiny.build("llava"), tiny.inputs("llava")
    states = model(**inputs, output_hidden_states=True).hidden_states
    visual = (inputs["input_ids"][0] == tiny.IMAGE).nonzero()[:, 0]
    change = (states[2] - states[1])[0, visual].norm(dim=-1)
    with vlmfast.accelerate(model, prune=V2Drop(keep=0.25, layers=(2,))):
        kept = kept_columns(run(model, inputs).past_key_values, 0)[2]
    assert torch.equal(kept[torch.isin(kept, visual)], visual[change.topk(4).indices].sort().values)


def test_adaptinfer_weighs_raters_by_the_attention_they_receive() -> None:
    model, inputs = tiny.build("llava"), tiny.inputs("llava")
    eager = tiny.build("llava")
    eager.set_attn_implementation("eager")
    weights = eager(**inputs, output_attentions=True).attentions[1][0].mean(0)
    ids = inputs["input_ids"][0]
    visual = (ids == tiny.IMAGE).nonzero()[:, 0]
    text = torch.arange(int(visual[-1]) + 1, len(ids))
    score = weights[text][:, text].sum(0) @ weights[text][:, visual]
    with vlmfast.accelerate(model, prune=AdaptInfer(keep=0.25, layers=(2,))):
        kept = kept_columns(run(model, inputs).past_key_values, 0)[2]
    assert torch.equal(kept[torch.isin(kept, visual)], visual[score.topk(4).indices].sort().values)


def test_stages() -> None:
    assert stage_layers(None, (0.25, 0.5, 0.75), 32) == (8, 16, 24)
    assert [round(f, 4) for _, f in staged(0.125, (8, 16, 24))] == [0.5, 0.25, 0.125]
    assert PyramidDrop().cuts(28) == ((7, 0.5), (14, 0.25), (21, 0.125))
    assert stage_layers(None, (0.1, 0.5, 0.7), 4) == (1, 2, 3)


# -- decode, verification, later turns ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_next"])
def test_second_turn_over_a_cut_cache(family: str) -> None:
    """Several new columns over layers of different length: the same as one prompt that holds both turns. (V2Drop rates
    a token by what stands before it, so that the second turn does not change the first one's choice.)"""
    model, inputs = tiny.build(family), tiny.inputs(family)
    with vlmfast.accelerate(model, prune=V2Drop(keep=0.4, layers=(2, 3))):
        first = run(model, inputs)
        ids = torch.cat([first.sequences, torch.tensor([[30, 31, 32, 33]])], 1)
        second = run(
            model,
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            past_key_values=copy.deepcopy(first.past_key_values),
        )
        whole = dict(inputs, input_ids=ids, attention_mask=torch.ones_like(ids))
        if "mm_token_type_ids" in inputs:
            more = torch.zeros_like(ids[:, inputs["input_ids"].shape[1] :])
            whole["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], more], 1)
        torch.testing.assert_close(logits(second), logits(run(model, whole)), rtol=2e-4, atol=2e-4)


def test_second_turn_with_a_new_image() -> None:
    """The new image is cut by itself; what the first cut kept stays; all of it equals the masked run."""
    model = tiny.build("llava")
    a, b = tiny.inputs("llava", seed=1), tiny.inputs("llava", seed=2)
    with vlmfast.accelerate(model, prune=FastV(keep=0.5)):
        first = run(model, a)
        n = first.sequences.shape[1]
        ids = torch.cat([first.sequences, b["input_ids"]], 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": b["pixel_values"]}
        before = kept_columns(first.past_key_values, 0)[2]
        second = run(model, turn, past_key_values=first.past_key_values)
    held = kept_columns(second.past_key_values, 0)[2]
    assert torch.equal(held[: len(before)], before)
    assert torch.equal(
        held[len(before) : len(before) + n - a["input_ids"].shape[1]], torch.arange(a["input_ids"].shape[1], n)
    )
    assert (held >= n).sum() == b["input_ids"].shape[1] - 8
    assert {layer.get_seq_length() for layer in second.past_key_values.layers} == {ids.shape[1] + NEW - 1}
    whole = dict(turn, pixel_values=torch.cat([a["pixel_values"], b["pixel_values"]]))
    reference = masked_reference(model, whole, {2: held}, NEW)
    torch.testing.assert_close(logits(second)[0], reference, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_verified_drafts_equal_plain_decoding(family: str) -> None:
    """Multi-token verification and crops over cut layers change nothing."""
    from vlmfast.decode import Exact, PromptLookup, Speculate

    model, inputs = tiny.build(family), tiny.inputs(family)
    with vlmfast.accelerate(model, prune=FastV(keep=0.3)):
        plain = run(model, inputs).sequences
    with vlmfast.accelerate(model, prune=FastV(keep=0.3), speculate=Speculate(draft=PromptLookup(), accept=Exact())):
        guessed = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(plain, guessed)


def test_beams_returns_sampling_and_streamers() -> None:
    model, inputs = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl", batch=2)
    alone = tiny.rows("qwen2_5_vl", batch=2)
    with vlmfast.accelerate(model, prune=FastV(keep=0.3)):
        together = model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=3)
        for row, single in enumerate(alone):
            one = model.generate(**single, max_new_tokens=4, do_sample=False, num_beams=3)
            assert torch.equal(together[row, -4:], one[0, -4:])
        once = run(model, alone[0])
        many = model.generate(**alone[0], max_new_tokens=NEW, do_sample=True, top_k=1, num_return_sequences=3)
        assert torch.equal(many, once.sequences.expand(3, -1))
        heard = Heard()
        run(model, alone[0], streamer=heard)
        assert torch.equal(torch.cat(heard.puts), once.sequences[0])


def test_a_model_without_cache_gives_the_same_first_token() -> None:
    for family in ("llava", "qwen3_vl"):
        model, inputs = tiny.build(family), tiny.inputs(family, batch=2)
        with vlmfast.accelerate(model, prune=FastV(keep=0.3)):
            cached = logits(run(model, inputs))[:, 0]
            plain = logits(run(model, inputs, use_cache=False))[:, 0]
        torch.testing.assert_close(cached, plain, rtol=2e-4, atol=2e-4)


# -- identity, removal, refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_onevision"])
def test_keep_one_is_bypassed_and_removal_restores(family: str) -> None:
    model, inputs = tiny.build(family), tiny.inputs(family, batch=2)
    plain = logits(run(model, inputs))
    before = state(model)
    with vlmfast.accelerate(model, prune=FastV(keep=1.0)) as fast:
        assert torch.equal(logits(run(model, inputs)), plain)
        assert any("bypassed" in note for note in fast.report.notes)
    with vlmfast.accelerate(model, prune=V2Drop(keep=0.3, layers=(2,))):
        assert not torch.equal(logits(run(model, inputs)), plain)
    assert state(model) == before
    assert torch.equal(logits(run(model, inputs)), plain)


def test_text_only_is_bypassed() -> None:
    model, inputs = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl", media=())
    plain = logits(run(model, inputs))
    with vlmfast.accelerate(model, prune=FastV()) as fast:
        assert torch.equal(logits(run(model, inputs)), plain)
    assert any("no new visual tokens" in note for note in fast.report.notes)


def test_refusals_name_the_way_out() -> None:
    deep = tiny.build("qwen3_vl")
    before = state(deep)
    with pytest.raises(vlmfast.Unsupported, match=r"DeepStack.*before layer 2 or later"):
        vlmfast.accelerate(deep, prune=FastV(after_layer=1))
    assert state(deep) == before
    model = tiny.build("llava")
    with pytest.raises(vlmfast.Unsupported, match="layers 0 to 3"):
        vlmfast.accelerate(model, prune=FastV(after_layer=4))
    with pytest.raises(UserError, match="after_layer=0"):
        FastV(after_layer=0)
    for layers in ([], [3, 2], [0], [1.5], "8"):
        with pytest.raises(UserError, match=r"layers=.*(ascending layer numbers|a list of whole numbers)"):
            PyramidDrop(layers=layers)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="must be a Pruner or none"):
        FastV(prune=FastV())  # type: ignore[arg-type]
    with pytest.raises(vlmfast.Unsupported, match="between layers"):
        FastV().select(None)  # type: ignore[arg-type]
    from vlmfast.prefill import SnapKV

    with pytest.raises(vlmfast.Unsupported, match="kv="):
        vlmfast.accelerate(model, prune=FastV(), kv=SnapKV(keep=0.5))
    with vlmfast.accelerate(model, prune=FastV()), pytest.raises(vlmfast.Unsupported, match="labels"):
        model(**tiny.inputs("llava"), labels=tiny.inputs("llava")["input_ids"])
    with vlmfast.accelerate(model, prune=FastV()), pytest.raises(vlmfast.Unsupported, match=r"static|Static"):
        model.generate(**tiny.inputs("llava"), max_new_tokens=2, cache_implementation="static")


@pytest.mark.parametrize(
    "method", [*methods.BETWEEN, FastV(prune=FlashVID(keep=0.4)), V2Drop(prune=Random())], ids=repr
)
def test_a_plan_with_it_goes_to_json_and_back(method: Any) -> None:
    plan = Plan(prune=method)
    assert Plan.from_json(plan.json()) == plan


def test_a_first_pruner_is_named_in_a_spec() -> None:
    method = parse("prune", "fastv:keep=0.4,after_layer=3,prune=vidcom2")
    assert method == FastV(keep=0.4, after_layer=3, prune=VidCom2())


def test_a_first_pruner_that_reads_the_tower_works_too() -> None:
    model, inputs = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl", media=("video",))
    with vlmfast.accelerate(model, prune=FastV(keep=0.5, prune=FlashVID(keep=0.75))) as fast:
        out = run(model, inputs)
    columns = cache_state(out.past_key_values).columns
    entered = int((columns.kinds == Kind.VISUAL).sum())
    assert entered < fast.report.encode["visual_tokens"]
    assert fast.report.encode["kept_tokens"] == round(entered * 0.5)
