"""Facts of a call stand in its own `RequestState`: calls inside calls, a draft's prefill, and nothing in the hooks."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

import vlmfast
from vlmfast.decode import ModelDraft, PromptLookup, SelfDraft, Speculate
from vlmfast.encode import Uniform, VidCom2, VisionZip
from vlmfast.runtime.cache_state import cache_state
from vlmfast.runtime.request_state import Requests

NEW = {"max_new_tokens": 4, "do_sample": False}


class Caller:
    """A streamer that makes one more call of the model, in the middle of the call that it serves."""

    def __init__(self, fast: Any, inputs: dict[str, Any], fails: bool = False) -> None:
        self.fast, self.inputs, self.fails, self.seen = fast, inputs, fails, []

    def put(self, value: Any) -> None:
        if len(self.seen) == 0:
            outer = self.fast.request
            more = {"num_beams": 2} if self.fails else {}
            try:
                self.fast.model.generate(**self.inputs, **NEW, **more)
                self.seen.append((outer, dict(self.fast.report.encode)))
            except vlmfast.Unsupported:
                self.seen.append((outer, None))
            assert self.fast.request is outer

    def end(self) -> None:
        pass


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_inside_a_call_has_a_state_of_its_own(fails: bool) -> None:
    model = tiny.build("qwen2_5_vl")
    outer, inner = tiny.inputs("qwen2_5_vl"), tiny.inputs("qwen2_5_vl", media=("image", "image"), seed=1)
    plan = {"prune": VidCom2(keep=0.5), "speculate": Speculate(PromptLookup(), length=2)}
    with vlmfast.accelerate(model, **plan) as fast:
        expected = model.generate(**outer, **NEW)
        alone, kept = dict(fast.report.encode), {k: [x.tolist() for x in v] for k, v in fast.request.kept.items()}
        streamer = Caller(fast, inner, fails)
        out = model.generate(**outer, **NEW, streamer=streamer)
        ((state, nested),) = streamer.seen
        assert fast.request is state and not state.nested and state.cache is None and not state.running
        assert {k: [x.tolist() for x in v] for k, v in state.kept.items()} == kept
        counts = ("visual_tokens", "kept_tokens")
        assert [fast.report.encode[k] for k in counts] == [alone[k] for k in counts]
        assert nested is None if fails else nested["visual_tokens"] > alone["visual_tokens"]
    assert torch.equal(out, expected)


def test_the_second_prefill_of_a_draft_leaves_the_state_of_its_call_alone() -> None:
    model, batch = tiny.build("qwen3_vl"), tiny.inputs("qwen3_vl")
    speculate = Speculate(SelfDraft(prune=Uniform(keep=0.2)), length=3)
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5), speculate=speculate) as fast:
        out = model.generate(**batch, **NEW, return_dict_in_generate=True)
        (kept,) = fast.request.kept["image"]
        assert len(kept) == fast.request.kept_tokens == fast.report.encode["kept_tokens"]
        columns = cache_state(out.past_key_values).columns
        assert columns is not None and columns.kinds.shape[1] < batch["input_ids"].shape[1]


def test_hooks_keep_nothing_of_a_call() -> None:
    """What stands in an object that hooks a model is what `accelerate` put there."""
    model, draft = tiny.build("qwen2_5_vl"), tiny.build("qwen2_5_vl", 1)
    speculate = Speculate(ModelDraft(draft, prune="targetattention"), length=2)
    with vlmfast.accelerate(model, prune=VisionZip(keep=0.5), speculate=speculate) as fast:
        assert fast.draft is not None
        owners = [fast.columns, fast.meter, fast.columns.attention, fast.draft.columns, fast.draft.meter]
        before = [dict(vars(owner)) for owner in owners]
        model.generate(**tiny.inputs("qwen2_5_vl"), **NEW)
        for owner, held in zip(owners, before, strict=True):
            assert vars(owner).keys() == held.keys(), owner
            assert all(vars(owner)[name] is value for name, value in held.items()), owner
        assert fast.request.kept and fast.request.tower_maps and fast.request.text_attention.rows


def test_a_state_ends_with_its_call_and_the_next_one_is_fresh() -> None:
    requests = Requests(tiny.build("llava"), VidCom2(keep=0.5))
    with requests.call() as first:
        first.notes.append("said")
        with pytest.raises(KeyboardInterrupt), requests.call(Uniform(keep=0.1)) as second:
            assert second.nested and requests.current is second and second.pruner == Uniform(keep=0.1)
            raise KeyboardInterrupt
        assert requests.current is first and first.running and not second.running
    assert requests.current is first and not first.running  # what is asked afterwards is of the last call
    with requests.call() as third:
        assert third.notes == [] and third.pruner == VidCom2(keep=0.5)
