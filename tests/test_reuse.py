"""Several questions about the same media: nothing is encoded twice, and the answers are those of a fresh call."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from test_laws import logits, run

import vlmfast
from vlmfast.decode import PromptLookup, Speculate
from vlmfast.encode import CDPruner, VidCom2
from vlmfast.prefill import SnapKV


def questions(family: str) -> tuple[dict, dict]:
    """Two prompts about the same media that differ in their last four tokens."""
    first = tiny.inputs(family, media=media(family))
    second = {k: v.clone() for k, v in first.items()}
    second["input_ids"][:, -4:] = torch.tensor([50, 60, 70, 80])
    return first, second


def media(family: str) -> tuple[str, ...]:
    return ("image", "video") if family in tiny.VIDEO_FAMILIES else ("image", "image")


@pytest.mark.parametrize("prune", [None, VidCom2(keep=0.5)], ids=["plain", "pruned"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_second_question_equals_a_fresh_call(family: str, prune: Any) -> None:
    model = tiny.build(family)
    first, second = questions(family)
    with vlmfast.accelerate(model, prune=prune):
        fresh = [run(model, q) for q in (first, second)]
    with vlmfast.accelerate(model, prune=prune, reuse="64MiB") as fast:
        a = run(model, first)
        assert fast.report.encode["visual_tokens"] > 0
        b = run(model, second)
        assert any("neither encoded nor prefilled" in n for n in fast.report.notes)
        assert fast.report.encode["encode_ms"] == 0
        again = run(model, first)
    for got, want in zip((a, b, again), (*fresh, fresh[0]), strict=True):
        assert torch.equal(got.sequences, want.sequences)
        torch.testing.assert_close(logits(got), logits(want), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("block", [None, 1])
def test_features_alone_are_reused_when_the_prompt_before_them_changed(block: int | None) -> None:
    model = tiny.build("qwen2_5_vl")
    first, second = questions("qwen2_5_vl")
    second["input_ids"][:, 1] = 99  # another system prompt
    prune = VidCom2(keep=0.5, after_block=block)
    with vlmfast.accelerate(model, prune=prune):
        fresh = run(model, second)
    with vlmfast.accelerate(model, prune=prune, reuse="64MiB") as fast:
        run(model, first)
        got = run(model, second)
        assert sum("tower skipped" in n for n in fast.report.notes) == 2
    torch.testing.assert_close(logits(got), logits(fresh), rtol=1e-5, atol=1e-5)


def test_other_pixels_are_other_media() -> None:
    model = tiny.build("qwen2_5_vl")
    first, second = questions("qwen2_5_vl")
    second["pixel_values"] = second["pixel_values"] + 1
    with vlmfast.accelerate(model):
        fresh = run(model, second)
    with vlmfast.accelerate(model, reuse="64MiB") as fast:
        run(model, first)
        got = run(model, second)
        assert not any("neither" in n for n in fast.report.notes)
    assert torch.equal(logits(got), logits(fresh))


def test_a_kv_policy_reuses_features_only_and_answers_as_a_fresh_call() -> None:
    model = tiny.build("qwen2_5_vl")
    first, second = questions("qwen2_5_vl")
    plan = {"prune": VidCom2(keep=0.7), "kv": SnapKV(keep=0.3, sinks=1, recent=2)}
    with vlmfast.accelerate(model, **plan):
        fresh = run(model, second)
    with vlmfast.accelerate(model, **plan, reuse="64MiB") as fast:
        run(model, first)
        got = run(model, second)
        assert any("a KV policy keeps other columns" in n for n in fast.report.notes)
        assert sum("tower skipped" in n for n in fast.report.notes) == 2
    torch.testing.assert_close(logits(got), logits(fresh), rtol=1e-5, atol=1e-5)


def test_with_speculation_over_a_stored_prefix() -> None:
    model = tiny.build("qwen2_5_vl")
    first, second = questions("qwen2_5_vl")
    outs = []
    for speculate in (None, Speculate(draft=PromptLookup())):
        with vlmfast.accelerate(model, prune=VidCom2(keep=0.7), speculate=speculate, reuse="64MiB") as fast:
            run(model, first)
            outs.append(run(model, second))
            assert any("neither encoded nor prefilled" in n for n in fast.report.notes)
    assert torch.equal(outs[0].sequences, outs[1].sequences)


def test_the_limit_is_obeyed_and_the_oldest_goes_first() -> None:
    model = tiny.build("qwen2_5_vl")
    first, _ = questions("qwen2_5_vl")
    with vlmfast.accelerate(model, reuse=200_000) as fast:
        store = fast._reuse
        for i in range(6):
            run(model, first | {"pixel_values": first["pixel_values"] + i})
            assert store.held <= store.limit
            assert store.held == sum(n for n, _ in store.entries.values())
        assert len(store.entries) < 18
    with vlmfast.accelerate(model, reuse=1000) as fast:
        run(model, first)
        assert any("do not fit the limit" in n for n in fast.report.notes)
    with pytest.raises(vlmfast.UserError, match="not a size"):
        vlmfast.accelerate(model, reuse="a lot")


def test_a_pruner_that_reads_the_question_reuses_features_only() -> None:
    model = tiny.build("qwen2_5_vl")
    first, second = questions("qwen2_5_vl")
    prune = CDPruner(keep=0.3)
    with vlmfast.accelerate(model, prune=prune):
        fresh = run(model, second)
    with vlmfast.accelerate(model, prune=prune, reuse="64MiB") as fast:
        run(model, first)
        got = run(model, second)
        assert any("reads the question" in n for n in fast.report.notes)
    torch.testing.assert_close(logits(got), logits(fresh), rtol=1e-5, atol=1e-5)


def test_batches_run_as_before() -> None:
    model = tiny.build("qwen2_5_vl")
    inputs = tiny.inputs("qwen2_5_vl", batch=2)
    with vlmfast.accelerate(model):
        fresh = run(model, inputs)
    with vlmfast.accelerate(model, reuse="64MiB"):
        run(model, inputs)
        assert torch.equal(logits(run(model, inputs)), logits(fresh))
