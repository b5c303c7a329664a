"""What the report's times include: the first token from `generate`'s entry to behind the output head, and choosing with
what the tower does again for it. Clocks are made to jump, so that nothing depends on the machine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

import vlmfast
from vlmfast.encode import HiRED, Uniform, VisionZip
from vlmfast.runtime import clock as clocks
from vlmfast.runtime import media_cache, tower_attention


class Jumping:
    """A clock that stands still but for the seconds that named work is said to take."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def slow(self, function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return function(*args, **kwargs)

        return run


@pytest.fixture
def jumping(monkeypatch: pytest.MonkeyPatch) -> Jumping:
    clock = Jumping()
    monkeypatch.setattr(clocks.time, "perf_counter", clock)
    return clock


def test_the_first_token_counts_from_the_entry_to_the_output_head(
    jumping: Jumping, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashing and copying for `reuse` (1 and 2 s) and the output head (4 s) are part of the first token's time."""
    model, inputs = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")
    head = model.lm_head.forward
    hashing = jumping.slow(media_cache.MediaCache.find, 1.0)
    monkeypatch.setattr(media_cache.MediaCache, "find", hashing)
    monkeypatch.setattr(media_cache, "copy", SimpleNamespace(copy=copy.copy, deepcopy=jumping.slow(copy.deepcopy, 2.0)))
    model.lm_head.forward = jumping.slow(head, 4.0)
    with torch.no_grad(), vlmfast.accelerate(model, reuse="64MiB") as fast:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        assert fast.report.prefill["ttft_ms"] == pytest.approx(5000)
        jumping.now += 50  # between two questions
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert any("found" in note for note in fast.report.notes)
        assert fast.report.prefill["ttft_ms"] == pytest.approx(7000)
        assert fast.report.decode["total_ms"] == pytest.approx(7000 + 2 * 4000)
        assert fast.report.decode["decode_ms_per_token"] == pytest.approx(4000)


@pytest.mark.parametrize("pruner", [VisionZip(keep=0.5), HiRED(keep=0.5), Uniform(keep=0.5)], ids=lambda p: p.name)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_choosing_includes_what_the_tower_does_again(
    jumping: Jumping, monkeypatch: pytest.MonkeyPatch, pruner: Any, family: str
) -> None:
    """A map of attention takes 3 s of the tower's time, and carrying it to the columns once more through the model 5 s:
    both are choosing's, encoding is what is left."""
    slow = jumping.slow(tower_attention._mean_received, 3.0)
    monkeypatch.setattr(tower_attention, "_mean_received", slow)
    carried = jumping.slow(tower_attention.TowerAttention.collect, 5.0)
    monkeypatch.setattr(tower_attention.TowerAttention, "collect", carried)
    model, inputs = tiny.build(family), tiny.inputs(family, media=("image",))
    with torch.no_grad(), vlmfast.accelerate(model, prune=pruner) as fast:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    encode, maps = fast.report.encode, len(getattr(pruner, "attention_layers", (-1,)))
    assert encode["encode_ms"] == pytest.approx(0)
    if isinstance(pruner, Uniform):
        assert encode["select_ms"] == 0
    else:
        assert encode["select_ms"] >= 5000 + 3000 * maps - 1
