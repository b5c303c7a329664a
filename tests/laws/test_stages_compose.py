"""Stages together: pruner x policy x speculation. Lossless speculation on a plan equals greedy on that plan, padded
rows equal rows alone, the report is the cache's, and removal restores. Every family, one pairing; all pairings slow."""

from __future__ import annotations

import itertools
from typing import Any

import heads
import methods
import pytest
import tiny
import torch
from generation import logits, run, state

import vlmfast
from vlmfast.decode import Exact, HeadDraft, PromptLookup, SelfDraft, Speculate
from vlmfast.encode import Uniform, VidCom2
from vlmfast.prefill import HybridAdvanced, HybridKV, SnapKV

DRAFTS = {
    "plain_loop": Speculate(),
    "lookup": Speculate(draft=PromptLookup(), accept=Exact(), length=3),
    "self": Speculate(draft=SelfDraft(prune=Uniform(keep=0.3)), accept=Exact(), length=3),
    "head": Speculate(draft=HeadDraft(heads.for_every_family()), accept=Exact(), length=3),
}
SMALL = {"sinks": 1, "recent": 2}
PAIRS = [
    (VidCom2(keep=0.6), None),
    (None, SnapKV(keep=0.5, **SMALL)),
    (VidCom2(keep=0.6), SnapKV(keep=0.5, **SMALL)),
    (VidCom2(keep=0.6), HybridKV(keep=0.5, advanced=HybridAdvanced(chunk=2), **SMALL)),
]


def media(family: str) -> tuple[str, ...]:
    return ("image", "video") if family in tiny.VIDEO_FAMILIES else ("image", "image")


def check_lossless(family: str, prune: Any, kv: Any, speculate: Any) -> None:
    model, inputs = tiny.build(family), tiny.inputs(family, media=media(family))
    run(model, inputs)
    before = state(model)
    with vlmfast.accelerate(model, prune=prune, kv=kv) as fast:
        greedy = run(model, inputs)
        bytes_held = fast.report.prefill["kv_fast_bytes"], fast.report.prefill["kv_host_bytes"]
    with vlmfast.accelerate(model, prune=prune, kv=kv, speculate=speculate) as fast:
        guessed = run(model, inputs)
        assert fast.report.decode["verify_rounds"] >= 1
    assert torch.equal(greedy.sequences, guessed.sequences)
    torch.testing.assert_close(logits(greedy), logits(guessed), rtol=2e-4, atol=2e-4)
    assert guessed.past_key_values.get_seq_length() == greedy.past_key_values.get_seq_length()
    tiers = [layer.nbytes() for layer in greedy.past_key_values.layers if hasattr(layer, "nbytes")]
    if tiers:
        assert bytes_held == (sum(t["fast"] for t in tiers), sum(t["host"] for t in tiers))
    assert state(model) == before


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_lossless_on_a_full_plan(family: str, draft: str) -> None:
    check_lossless(
        family, VidCom2(keep=0.6), HybridKV(keep=0.5, advanced=HybridAdvanced(chunk=2), **SMALL), DRAFTS[draft]
    )


@pytest.mark.slow
@pytest.mark.parametrize(("family", "pair", "draft"), itertools.product(tiny.FAMILIES, range(3), DRAFTS))
def test_lossless_on_every_pair(family: str, pair: int, draft: str) -> None:
    check_lossless(family, *PAIRS[pair], DRAFTS[draft])


@pytest.mark.parametrize("pair", range(1, 4))
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_padded_rows_equal_rows_alone(family: str, pair: int) -> None:
    prune, kv = PAIRS[pair]
    model = tiny.build(family)
    together, alone = (f(family, media=media(family), batch=2) for f in (tiny.inputs, tiny.rows))
    with vlmfast.accelerate(model, prune=prune, kv=kv):
        batch = run(model, together)
        for row, single in enumerate(alone):
            torch.testing.assert_close(logits(batch)[row], logits(run(model, single))[0], rtol=5e-4, atol=5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("policy", methods.CROPPABLE, ids=repr)
@pytest.mark.parametrize("prune", methods.OUTER[::2], ids=repr)
def test_every_pruner_with_every_policy(prune: Any, policy: Any) -> None:
    for family in ("qwen2_5_vl", "llava_onevision"):
        if methods.carries(prune, family, media(family)):
            check_lossless(family, prune, policy, DRAFTS["lookup"])
