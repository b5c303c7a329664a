"""How far to draft: costs, worth, and what is remembered. Milliseconds here are made up; nothing is timed."""

from __future__ import annotations

import gc
import random

import pytest
import torch
from drafting import pair, speak
from transformers import DynamicCache

import vlmfast
from vlmfast.decode import (
    Exact,
    LookupThenModel,
    Loose,
    LooseAdvanced,
    ModelDraft,
    PromptLookup,
    SelfDraft,
    Speculate,
    draft_length,
)
from vlmfast.decode.draft_length import FEW, DraftLengthController, LinearCost
from vlmfast.encode import Uniform
from vlmfast.runtime.compat import cache_in


def test_a_line_finds_base_and_slope_and_shrugs_at_an_outlier() -> None:
    line = LinearCost(0.04)
    assert not line.known and line.at(3) == 0 and line.each == 0
    line.record_round(5, 10.0)
    assert line.each == pytest.approx(0.04 * 10 / 5)  # one length seen: the share it was told
    for n in (2, 9, 4, 6, 11, 3) * 5:
        line.record_round(n, 3 + 0.5 * n)
    assert line.each == pytest.approx(0.5, rel=0.05) and line.at(0) == pytest.approx(3, rel=0.1)
    line.record_round(2, 1000.0)
    assert line.at(2) < 5  # a pause of the machine counts as twice the expected, not as a thousand


def test_a_line_never_has_a_base_below_zero() -> None:
    line = LinearCost(1.0)
    for n, ms in ((2, 1.0), (4, 9.0), (2, 1.0), (4, 9.0)):
        line.record_round(n, ms)
    assert line.at(0) >= 0 and line.each <= line.y / line.x + 1e-9


def world(floor: float | None, seed: int = 0, rounds: int = 600) -> float:
    """Tokens per millisecond of a made-up pair; floor None: as `DraftLengthController` says, otherwise a fixed one.

    A drafted token is sure (0.99) or a coin (0.55), and passes with that probability. A verification of n tokens takes
    3 + 0.1 n ms, a draft of n tokens 0.5 + 0.25 n.
    """
    draw, controller = random.Random(seed), DraftLengthController("adaptive", 16)
    tokens, ms = 0.0, 0.0
    for _ in range(rounds):
        least = controller.floor() if floor is None else floor
        most = controller.length() if floor is None else 16
        sure: list[float] = []
        passes = 1.0
        while len(sure) < most and (not sure or passes >= least):
            sure.append(0.99 if draw.random() < 0.85 else 0.55)
            passes *= 1 - (controller.refusal if floor is None else 1.0) * (1 - sure[-1])
        n = len(sure)
        accepted = next((i for i, p in enumerate(sure) if draw.random() >= p), n)
        controller.record_round(n, accepted, 0.5 + 0.25 * n if n else 0.0, 3 + 0.1 * (n + 1), sure)
        tokens += accepted + 1
        ms += 3 + 0.1 * (n + 1) + (0.5 + 0.25 * n if n else 0.0)
    return tokens / ms


def test_the_floor_is_as_good_as_the_best_fixed_one() -> None:
    fixed = {f: sum(world(f, s) for s in range(4)) / 4 for f in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)}
    ours = sum(world(None, s) for s in range(4)) / 4
    assert ours >= 0.97 * max(fixed.values())
    assert max(fixed.values()) > 1.1 * min(fixed.values())  # it matters where the floor lies


def test_plans_that_take_turns_keep_their_own_pace() -> None:
    target, draft, batch = pair()
    plans = [Speculate(ModelDraft(draft, None), Exact(), most=most) for most in (4, 6)]
    for _ in range(2):
        for plan in plans:
            speak(target, batch, plan, 12)
    held = {entry[0](): entry[1] for entry in draft_length._KEPT[target]}
    assert set(held) == set(plans)
    assert all(held[plan].most == plan.most and list(held[plan].lengths) == [11, 11] for plan in plans)
    plans.clear()
    held.clear()
    del plan
    gc.collect()
    speak(target, batch, Speculate(ModelDraft(draft, None)), 4)
    assert len(draft_length._KEPT[target]) == 1  # forgotten with the plan: it would keep the draft model in memory


COSTS = {  # milliseconds of verifying n tokens, where a plain step takes 10
    "flat": lambda n: 9.9 + 0.1 * n,  # memory-bound: a GPU, or a CPU that multiplies its dtype fast
    "half": lambda n: 6 + 4 * n,
    "linear": lambda n: 10 * n,  # compute-bound: bfloat16 on a CPU without instructions for it
    "jump": lambda n: 10 if n == 1 else 10 + 9 * n,  # another kernel for one row than for several
}


def answered(verify, drafting: float, certainty: float, length: int | None, tokens: int = 400, seed: int = 0) -> float:
    """Milliseconds per token; length None: as `DraftLengthController` says, else always that many drafted tokens."""
    draw, controller = random.Random(seed), DraftLengthController("adaptive", 16)
    said, ms = 0, 0.0
    while said < tokens:
        most, least = (controller.length(), controller.floor()) if length is None else (length, 0.0)
        n, passes = 0, 1.0
        while n < most and (n == 0 or passes >= least):
            n, passes = n + 1, passes * (1 - controller.refusal * (1 - certainty))
        accepted = next((i for i in range(n) if draw.random() >= certainty), n)
        controller.record_round(n, accepted, drafting * n, verify(n + 1), [certainty] * n)
        said, ms = said + accepted + 1, ms + drafting * n + verify(n + 1)
    return ms / said


@pytest.mark.parametrize("certainty", [0.6, 0.8, 0.95])
@pytest.mark.parametrize("drafting", [0.2, 2.5, 6.0])
@pytest.mark.parametrize("machine", list(COSTS))
def test_on_no_machine_does_drafting_cost_much_where_it_cannot_pay(machine, drafting, certainty) -> None:
    verify = COSTS[machine]
    ours = sum(answered(verify, drafting, certainty, None, seed=s) for s in range(6)) / 6
    best = min(sum(answered(verify, drafting, certainty, k, seed=s) for s in range(6)) / 6 for k in range(8))
    assert ours <= 1.08 * best
    if machine in ("linear", "jump"):
        assert ours <= 1.04 * verify(1)  # plain decoding, but for a look now and then


# ---------------------------------------------------------------- answers too short for a draft


def told(lengths: list[int], opening: float = 6.0) -> DraftLengthController:
    """A controller that knows plain steps of 2 ms, drafted tokens of 0.8 ms, and these answers."""
    controller = DraftLengthController("adaptive", 16)
    for _ in range(40):
        controller.record_round(0, 0, 0.0, 2.0)
        controller.record_round(6, 5, 2.0, 2.8, [0.95] * 6)
    for n in lengths:
        controller.answered(n, opening)
    return controller


def test_the_draft_waits_where_answers_end_before_it_pays() -> None:
    assert told([1, 2, 1]).wait() == 0  # too few to know
    assert told([1, 2, 1, 2]).wait() == 2  # an answer that goes on after two tokens would be a new kind
    assert told([1, 2, 1, 2], opening=0.02).wait() == 0  # lookup costs nothing to open
    useless = told([9, 9, 9, 9], opening=0.02)
    for _ in range(60):
        useless.record_round(6, 0, 2.0, 2.8, [0.95] * 6)
    assert useless.length() == 0 and useless.wait() == 0  # open, it is left idle, and looked at within the answer
    assert told([9, 9, 9, 9], opening=20.0).wait() == 9
    assert told([40, 43, 50, 45]).wait() == 0
    mixed = told([1, 1, 1, 60] * 4)
    assert mixed.wait() == 1  # one plain token tells the kinds apart
    calls = [mixed.wait() for _ in range(32)]
    assert calls.count(0) == 2  # a look now and then, in case opening has become cheaper
    assert DraftLengthController(4, 16).wait() == 0


def test_a_draft_that_waits_changes_no_token_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft, batch = pair()
    start = batch["input_ids"].shape[1]
    strict = Loose(relax=0.0, advanced=LooseAdvanced(shift=0), digits=False, negation=False, comparison=False)
    for rule in (Exact(), strict):
        plan = Speculate(ModelDraft(draft, None), rule)
        once, _ = speak(target, batch, plan, 24)
        monkeypatch.setattr(DraftLengthController, "wait", lambda self: 5)
        got, numbers = speak(target, batch, plan, 24)
        assert torch.equal(got, once) and numbers["draft_prefill_ms"] > 0
        assert any("did not pay" in note for note in numbers["notes"])
        short, numbers = speak(target, batch, plan, 4)
        assert torch.equal(short, once[:, : start + 4]) and numbers["drafted"] == numbers["draft_prefill_ms"] == 0
        held = DynamicCache(config=target.config.get_text_config())
        _, numbers = speak(target, batch, plan, 4, past_key_values=held)
        assert numbers["draft_prefill_ms"] > 0  # the next turn on this cache finds a draft that record_round this one
        monkeypatch.undo()


def test_short_answers_are_noticed_and_long_ones_too() -> None:
    target, draft, batch = pair()
    plan = Speculate(ModelDraft(draft, None))
    for _ in range(FEW + 1):
        speak(target, batch, plan, 2)
    (controller,) = (p for ref, p in draft_length._KEPT[target] if ref() is plan)
    assert list(controller.lengths) == [1] * (FEW + 1) and len(controller.opened) == FEW
    speak(target, batch, plan, 20)
    assert controller.lengths[-1] == 19


def test_what_reaches_the_caller_is_ordinary_tensors() -> None:
    target, _, batch = pair()
    out, _ = speak(
        target, batch, Speculate(), 300, return_dict_in_generate=True, output_logits=True, output_scores=True
    )
    cache = cache_in(out)
    for tensor in (out.sequences, *out.logits, *out.scores, *(x for c in cache.layers for x in (c.keys, c.values))):
        assert not tensor.is_inference()
        tensor.add_(0)


@pytest.mark.parametrize("draft", ["promptlookup", "lookupthenmodel", "selfdraft", "targetattention"])
def test_any_draft_may_open_late(monkeypatch: pytest.MonkeyPatch, draft: str) -> None:
    target, small, batch = pair()
    made = {
        "promptlookup": PromptLookup, "lookupthenmodel": lambda: LookupThenModel(small, None),
        "selfdraft": lambda: SelfDraft(Uniform(keep=0.5)),
        "targetattention": lambda: ModelDraft(small, "targetattention"),
    }[draft]()  # fmt: skip
    expected = target.generate(**batch, max_new_tokens=24, do_sample=False)
    monkeypatch.setattr(DraftLengthController, "wait", lambda self: 5)
    with vlmfast.accelerate(target, speculate=Speculate(made)) as fast:
        assert torch.equal(target.generate(**batch, max_new_tokens=24, do_sample=False), expected)
        assert fast.report.decode["draft_prefill_ms"] > 0
