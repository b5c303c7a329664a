"""How far to draft: costs, worth, and what is remembered. Milliseconds here are made up; nothing is timed."""

from __future__ import annotations

import random

import pytest
from test_decode import pair, speak

from vlmfast.decode import Exact, ModelDraft, Speculate, loop
from vlmfast.decode.pace import Line, Pace


def test_a_line_finds_base_and_slope_and_shrugs_at_an_outlier() -> None:
    line = Line(0.04)
    assert not line.known and line.at(3) == 0 and line.each == 0
    line.saw(5, 10.0)
    assert line.each == pytest.approx(0.04 * 10 / 5)  # one length seen: the share it was told
    for n in (2, 9, 4, 6, 11, 3) * 5:
        line.saw(n, 3 + 0.5 * n)
    assert line.each == pytest.approx(0.5, rel=0.05) and line.at(0) == pytest.approx(3, rel=0.1)
    line.saw(2, 1000.0)
    assert line.at(2) < 5  # a pause of the machine counts as twice the expected, not as a thousand


def test_a_line_never_has_a_base_below_zero() -> None:
    line = Line(1.0)
    for n, ms in ((2, 1.0), (4, 9.0), (2, 1.0), (4, 9.0)):
        line.saw(n, ms)
    assert line.at(0) >= 0 and line.each <= line.y / line.x + 1e-9


def world(floor: float | None, seed: int = 0, rounds: int = 600) -> float:
    """Tokens per millisecond of a made-up pair; floor None: as `Pace` says, otherwise a fixed one.

    A drafted token is sure (0.99) or a coin (0.55), and passes with that probability. A verification of n tokens takes
    3 + 0.1 n ms, a draft of n tokens 0.5 + 0.25 n.
    """
    draw, pace = random.Random(seed), Pace("adaptive", 16)
    tokens, ms = 0.0, 0.0
    for _ in range(rounds):
        least = pace.floor() if floor is None else floor
        most = pace.length() if floor is None else 16
        sure: list[float] = []
        passes = 1.0
        while len(sure) < most and (not sure or passes >= least):
            sure.append(0.99 if draw.random() < 0.85 else 0.55)
            passes *= 1 - (pace.refusal if floor is None else 1.0) * (1 - sure[-1])
        n = len(sure)
        accepted = next((i for i, p in enumerate(sure) if draw.random() >= p), n)
        pace.saw(n, accepted, 0.5 + 0.25 * n if n else 0.0, 3 + 0.1 * (n + 1), sure)
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
    held = {entry[0](): entry[1] for entry in loop._PACES[target]}
    assert set(held) == set(plans)
    assert all(held[plan].most == plan.most and held[plan].draft.w > 1 for plan in plans)
    plans.clear()
    held.clear()
    del plan
    speak(target, batch, Speculate(ModelDraft(draft, None)), 4)
    assert len(loop._PACES[target]) == 1  # forgotten with the plan: it would keep the draft model in memory
