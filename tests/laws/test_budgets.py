"""No stage costs a GPU more launches, host waits or copies than its budget allows; see `budgets.py`."""

from __future__ import annotations

import json
from collections import Counter

import budgets
import methods
import pytest
import torch
from pretend_cuda import PretendCuda, to_cuda

from vlmfast.encode import METHODS

BUDGET = json.loads(budgets.FILE.read_text())


def over(name: str, counts: budgets.Counts, budget: dict[str, float] | None) -> list[str]:
    """What is above its budget, with the lines that ask most often."""
    if budget is None:
        return [f"{name} has no budget: run PYTHONPATH=. python tests/support/budgets.py"]
    found = []
    for kind, n in budgets.totals(counts).items():
        if n > budget[kind]:
            most = ", ".join(f"{line} {k:g}" for line, k in counts[kind].most_common(5))
            found.append(f"{name}: {n:g} {kind}, the budget is {budget[kind]:g}; most by {most}")
    return found


@pytest.mark.parametrize("group", budgets.GROUPS)
def test_within_budget(group: str) -> None:
    cases = dict(budgets.GROUPS[group]())
    assert len(cases) >= 4
    assert not [line for name, counts in cases.items() for line in over(name, counts, BUDGET[group].get(name))]


def test_what_is_over_is_named_with_its_lines() -> None:
    launches, copies = Counter({"a.py:1": 3.0, "b.py:2": 4.0}), Counter({"c.py:3": 0.5})
    counts = {"launches": launches, "waits": Counter(), "copies": copies, "graphed": Counter()}
    budget = {"launches": 6, "waits": 0, "copies": 0.5}
    assert over("x", counts, budget) == ["x: 7 launches, the budget is 6; most by b.py:2 4, a.py:1 3"]
    assert over("x", counts, budget | {"launches": 7}) == [] and "no budget" in over("x", counts, None)[0]


def test_budgets_are_only_lowered(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {
        "launches": Counter({"a.py:1": 5}),
        "waits": Counter({"a.py:1": 2}),
        "copies": Counter(),
        "graphed": Counter(),
    }
    file = tmp_path / "budgets.json"
    file.write_text(json.dumps({"group": {"known": {"launches": 4, "waits": 3, "copies": 1}, "gone": {"launches": 1}}}))
    monkeypatch.setattr(budgets, "FILE", file)
    monkeypatch.setattr(budgets, "GROUPS", {"group": lambda: iter([("known", counts), ("new", counts)])})
    budgets.main()
    written = json.loads(file.read_text())["group"]
    assert written["known"] == {"launches": 4, "waits": 2, "copies": 0} and written["gone"] == {"launches": 1}
    assert written["new"] == {"launches": 5, "waits": 2, "copies": 0}


def test_copies_are_counted_either_way() -> None:
    with PretendCuda() as device:
        x = to_cuda(torch.ones(3))
        there = torch.ones(3).to("cuda")
        _ = there.cpu(), torch.tensor([1, 2], device="cuda"), x[torch.tensor([0])], x + there, x.to("cuda")
    assert sum(device.copies.values()) == 4 == sum(device.waits.values())


def test_a_policy_adds_few_launches_a_layer_and_at_most_two_waits_in_all() -> None:
    none, layers = BUDGET["prefill, a layer"]["loop"], BUDGET["prefill under every policy, a layer"]
    in_all = BUDGET["prefill under every policy, in all"]
    assert layers.keys() == in_all.keys() >= {policy.name for policy in methods.POLICIES}
    assert max(counts["launches"] for counts in layers.values()) <= none["launches"] + 25
    assert max(counts["waits"] for counts in layers.values()) == 0
    assert max(counts["waits"] for counts in in_all.values()) <= 2


def test_choosing_takes_few_launches_and_only_a_threshold_makes_the_host_wait() -> None:
    """How many tokens a threshold leaves is the length of what follows, which the host has to know."""
    choices = BUDGET["chooser call"] | BUDGET["cut between layers"]
    assert choices.keys() == METHODS.keys() - {"downsample"}  # which makes an ordinary call of fewer pixels
    assert max(counts["launches"] for counts in choices.values()) <= 64
    assert {name: counts["waits"] for name, counts in choices.items() if counts["waits"]} == {"dtd": 1, "pixelprune": 1}
