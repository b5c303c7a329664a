"""Captured prefills: the same answers and caches, at the launches of a graph; anything unusual runs as before."""

from __future__ import annotations

from typing import Any

import budgets
import pytest
import tiny
import torch
from pretend_cuda import PretendCuda, to_cuda, to_host

import vlmfast
from vlmfast.encode import Uniform
from vlmfast.engine import prefill_graphs
from vlmfast.prefill import CAKE, AdaKV, Full, HybridKV, KeyDiff, ShadowKV, SnapKV

FAMILIES = [family for family in tiny.MROPE if family in ("qwen2_vl", "qwen2_5_vl")]


SMALL: dict[str, Any] = {"sinks": 1, "recent": 2}
PLANS: dict[str, dict[str, Any]] = {
    "plain": {"tower": "fast"},
    "pruned": {"prune": Uniform(keep=0.8)},
    "full": {"kv": Full()},
    "snapkv": {"kv": SnapKV(keep=0.4, **SMALL)},
    "hybridkv": {"kv": HybridKV(keep=0.4, split=0.5, **SMALL)},
    "adakv": {"kv": AdaKV(keep=0.4, **SMALL)},
    "wide window": {"kv": HybridKV(keep=0.4, **SMALL)},  # looks at more columns than some prompts have
    "cake": {"kv": CAKE(keep=0.4, **SMALL)},  # shares one budget among the layers
    "shadowkv": {"kv": ShadowKV(keep=0.4, **SMALL)},  # decodes by the model's own step
    "keydiff": {"kv": KeyDiff(keep=0.4, **SMALL)},  # looks at no window
    "pruned, kv": {"prune": Uniform(keep=0.8), "kv": SnapKV(keep=0.4, int8=True, **SMALL)},
    "inside, kv": {"prune": Uniform(keep=0.8, after_block=1), "kv": SnapKV(keep=0.4, **SMALL)},
}


def prompt(family: str, text: int, seed: int = 0) -> dict[str, Any]:
    inputs = tiny.inputs(family, media=("video",), frames=4, size=(24, 32), text=text, seed=seed)
    return {k: v.to(torch.bfloat16) if "pixel" in k else v for k, v in inputs.items()}


def answers(family: str, plan: dict[str, Any], lengths: list[int]) -> tuple[list[Any], list[Any], Any]:
    """Logits of two tokens of calls with texts of these lengths, the reports' prefills, the handle."""
    model = to_cuda(tiny.build(family).to(torch.bfloat16))
    logits, reports = [], []
    with vlmfast.accelerate(model, **plan) as handle:
        for number, length in enumerate(lengths):
            out = model.generate(
                **to_cuda(prompt(family, length, number)), max_new_tokens=2, do_sample=False, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
            logits.append(torch.stack([to_host(step) for step in out.logits]).float())
            reports.append(handle.report.json()["prefill"])
    return logits, reports, handle


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", PLANS, ids=list(PLANS))
def test_replayed_prefills_answer_alike(family: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token comes from the replayed prefill, the second reads the cache that it filled."""
    lengths = [20, 21, 19, 20, 21]
    with PretendCuda(capability=budgets.CARD):
        got, reports, _ = answers(family, PLANS[plan], lengths)
        monkeypatch.setattr(prefill_graphs, "MOST", 0)
        want, launched, _ = answers(family, PLANS[plan], lengths)
    assert ["graph" in report for report in reports] == [False, False, True, True, True]
    assert not any("graph" in report for report in launched)
    for replayed, stepped in zip(got, want, strict=True):
        assert float((replayed - stepped).norm() / stepped.norm()) < 2e-2
        assert float((replayed - stepped).norm() / stepped.norm()) < float((got[0] - got[2]).norm() / got[0].norm()) / 5


def test_a_replayed_prefill_costs_the_launches_of_a_graph() -> None:
    """One more layer adds nothing but what is copied out of the graph."""
    counts = []
    for layers in (2, 4):
        with PretendCuda(capability=budgets.CARD) as device:
            model = budgets.model_of(layers, torch.bfloat16)
            marks: list[Any] = []
            with vlmfast.accelerate(model, tower="fast"):
                for number in range(3):
                    marks.append(budgets.counted(device))
                    model.generate(**to_cuda(prompt("qwen2_5_vl", 20, number)), max_new_tokens=1, do_sample=False)
                marks.append(budgets.counted(device))
        counts.append(budgets.totals(budgets.less(marks[3], marks[2])))
    assert counts[1]["launches"] == counts[0]["launches"] and counts[1]["graphed"] > counts[0]["graphed"]
    assert counts[1]["waits"] == counts[0]["waits"]


@pytest.mark.parametrize("plan", ["pruned", "pruned, kv"])
def test_a_launched_prefill_is_not_called_captured(plan: str) -> None:
    """Another length after a replayed one."""
    with PretendCuda(capability=budgets.CARD):
        _, reports, _ = answers("qwen2_5_vl", PLANS[plan], [20, 20, 20, 60])
    assert ["graph" in report for report in reports] == [False, False, True, False]


def test_a_cache_stays_its_own() -> None:
    """A later replay does not change the cache of an earlier call."""
    with PretendCuda(capability=budgets.CARD):
        model = to_cuda(tiny.build("qwen2_5_vl").to(torch.bfloat16))
        with vlmfast.accelerate(model, tower="fast"):
            kept = None
            for number in range(4):
                out = model.generate(
                    **to_cuda(prompt("qwen2_5_vl", 20, number)), max_new_tokens=2, do_sample=False,
                    return_dict_in_generate=True,
                )  # fmt: skip
                if number == 2:
                    kept = out.past_key_values if hasattr(out, "past_key_values") else out.cache
                    before = [to_host(layer.keys).clone() for layer in kept.layers]
        assert kept is not None
        assert all(torch.equal(to_host(layer.keys), keys) for layer, keys in zip(kept.layers, before, strict=True))


def test_what_sits_on_a_layer_is_run() -> None:
    """A hook that comes later, or other weights: the graph is not replayed past them."""
    with PretendCuda(capability=budgets.CARD):
        model = to_cuda(tiny.build("qwen2_5_vl").to(torch.bfloat16))
        inputs = prompt("qwen2_5_vl", 20)
        with vlmfast.accelerate(model, tower="fast") as handle:
            for _ in range(3):
                model.generate(**to_cuda(dict(inputs)), max_new_tokens=2, do_sample=False)
            assert "graph" in handle.report.json()["prefill"]
            seen: list[int] = []
            hook = model.model.language_model.layers[0].register_forward_hook(lambda *a: seen.append(1))
            model.generate(**to_cuda(dict(inputs)), max_new_tokens=2, do_sample=False)
            assert seen and "graph" not in handle.report.json()["prefill"]
            hook.remove()
            for _ in range(2):
                model.generate(**to_cuda(dict(inputs)), max_new_tokens=2, do_sample=False)
            model.generate(**to_cuda(dict(inputs)), max_new_tokens=2, do_sample=False)
            assert "graph" in handle.report.json()["prefill"]
        assert "forward" not in vars(model.model.language_model)


@pytest.mark.parametrize("by", ["call", "config"])
def test_hidden_states_are_given_where_they_are_asked_for(by: str) -> None:
    with PretendCuda(capability=budgets.CARD):
        model = to_cuda(tiny.build("qwen2_5_vl").to(torch.bfloat16))
        inputs = prompt("qwen2_5_vl", 20)
        with vlmfast.accelerate(model, tower="fast") as handle:
            for _ in range(3):
                model.generate(**to_cuda(dict(inputs)), max_new_tokens=1, do_sample=False)
            assert "graph" in handle.report.json()["prefill"]
            options: dict[str, Any] = {"output_hidden_states": True} if by == "call" else {}
            text = model.model.language_model
            text.config.output_hidden_states = by == "config"
            model.generate(**to_cuda(dict(inputs)), max_new_tokens=1, do_sample=False, **options)
            assert "graph" not in handle.report.json()["prefill"]


def test_a_graph_that_differs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    body = prefill_graphs.PrefillGraphs._body
    monkeypatch.setattr(prefill_graphs.PrefillGraphs, "_body", lambda self, *a: body(self, *a) * 1.5)
    with PretendCuda(capability=budgets.CARD):
        _, reports, handle = answers("qwen2_5_vl", {"tower": "fast"}, [20] * 4)
    assert not any("graph" in report for report in reports)
    assert any("differs from the model's" in note for note in handle.report.json()["notes"])


@pytest.mark.parametrize(
    ("columns", "padded"), [(32, 32), (33, 48), (255, 256), (257, 288), (1000, 1024), (1100, 1152)]
)
def test_padded_lengths(columns: int, padded: int) -> None:
    assert prefill_graphs.bucket(columns) == padded and padded % 16 == 0
