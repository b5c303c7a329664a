"""Nothing waits for the vision tower before the first token is read: the prefill is launched while it still runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import budgets
import pytest
import tiny
import torch
from pretend_cuda import PretendCuda, to_cuda

import vlmfast
from vlmfast.encode import CDPruner, MaxMin, Uniform, VidCom2
from vlmfast.prefill import HybridKV, RazorAttention, ShadowKV, SnapKV

PLANS: dict[str, dict[str, Any]] = {
    "tower": {"tower": "fast"},
    "uniform": {"prune": Uniform(keep=0.25)},
    "vidcom2": {"prune": VidCom2(keep=0.25)},
    "vidcom2 inside": {"prune": VidCom2(keep=0.25, after_block=1)},
    "maxmin": {"prune": MaxMin(keep=0.25)},
    "cdpruner": {"prune": CDPruner(keep=0.25)},
    "snapkv": {"kv": SnapKV(keep=0.3, sinks=1, recent=2)},
}


def waits(plan: dict[str, Any], padded: bool = False) -> Counter[str]:
    """Lines that wait between the tower's last launch and the end of the language model's first forward, in a third
    call (earlier ones compare fused modules and a captured prefill with the model's own)."""
    marks: list[Any] = []
    with PretendCuda(capability=budgets.CARD) as device:
        model = budgets.model_of(dtype=torch.bfloat16)
        with vlmfast.accelerate(model, **plan):
            batch = 2 if padded else 1
            for _ in range(3):
                inputs = tiny.inputs(
                    "qwen2_5_vl", media=("video",), text=8, batch=batch, **budgets.CLIPS["8 frames of 32 x 48"]
                )
                inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(torch.bfloat16)
                marks.clear()
                hooks = [
                    model.model.visual.register_forward_hook(lambda *a: marks.append(budgets.counted(device))),
                    model.model.language_model.register_forward_hook(lambda *a: marks.append(budgets.counted(device))),
                ]
                model.generate(**to_cuda(inputs), max_new_tokens=1, do_sample=False)
                for hook in hooks:
                    hook.remove()
    return budgets.less(marks[1], marks[0])["waits"]


@pytest.mark.parametrize("name", PLANS)
def test_nothing_waits_for_the_tower(name: str) -> None:
    assert waits(PLANS[name]) == Counter()


@pytest.mark.parametrize(
    "policy",
    [
        HybridKV(keep=0.3, **budgets.SMALL), HybridKV(keep=0.3, split=0.5, **budgets.SMALL),
        ShadowKV(keep=0.3, rank=8, **budgets.SMALL), RazorAttention(keep=0.4, share=0.3, **budgets.SMALL),
    ],
    ids=lambda policy: policy.name,
)  # fmt: skip
def test_a_policy_that_must_read_waits_once(policy: Any) -> None:
    """For budgets of heads, or for factors; what goes to host memory is not waited for."""
    assert sum(waits({"kv": policy}).values()) == 1


def test_a_mismatch_is_still_found() -> None:
    """Placeholders that do not fit the features: the error of transformers, or ours under a pruner."""
    with PretendCuda(capability=budgets.CARD):
        model = budgets.model_of()
        inputs = tiny.inputs("qwen2_5_vl", media=("video",), text=8)
        place = inputs["input_ids"][0] == model.config.video_token_id
        inputs["input_ids"][0, place.nonzero()[0]] = 7
        inputs["mm_token_type_ids"][0, place.nonzero()[0]] = 0
        for plan in ({"tower": "fast"}, {"prune": Uniform(keep=0.5)}):
            with vlmfast.accelerate(model, **plan), pytest.raises(Exception, match=r"match|token"):
                model.generate(**to_cuda(inputs), max_new_tokens=1, do_sample=False)


def test_penalties_of_the_prompt_still_see_it() -> None:
    inputs = tiny.inputs("qwen2_5_vl", media=("video",), text=8)
    answers = []
    for accelerated in (False, True):
        with PretendCuda(capability=budgets.CARD):
            model = to_cuda(tiny.build("qwen2_5_vl"))
            handle = vlmfast.accelerate(model, tower="fast") if accelerated else None
            out = model.generate(**to_cuda(inputs), max_new_tokens=6, do_sample=False, encoder_repetition_penalty=5.0)
            answers.append(out.tolist())
            if handle is not None:
                handle.remove()
    assert answers[0] == answers[1]
