"""Composition has no holes: whatever stages are asked for together, over budgets that fit and budgets that do not, on
any family: a call works as its stages do alone, is bypassed as they are, or is refused in one line."""

from __future__ import annotations

import dataclasses
from typing import Any

import heads
import methods
import pytest
import tiny
import torch
from generation import state
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vlmfast
from vlmfast.decode import Exact, HeadDraft, PromptLookup, SelfDraft, Speculate
from vlmfast.encode import Uniform
from vlmfast.plan import preset

ALL = [*tiny.FAMILIES, *tiny.HYBRID, *tiny.TILED]
LOSSLESS = [
    None,
    Speculate(),
    Speculate(PromptLookup(), length=3),
    Speculate(SelfDraft(prune=Uniform(keep=0.3)), accept=Exact(), length=3),
    Speculate(HeadDraft(heads.for_every_family()), length=3, otherwise="plain"),
    preset("safe").speculate,
]
OPTIONS: list[dict[str, Any]] = [
    {}, {}, {"use_cache": False}, {"num_beams": 2}, {"cache_implementation": "static"}, {"prefill_chunk_size": 8},
    {"num_return_sequences": 2, "num_beams": 2},
]  # fmt: skip
# what two stages together refuse though each is served alone; said in the support table
PAIRWISE = (
    "lets layers differ", "leaves every layer with columns of its own", "refused tokens cannot be given back",
    "reads the prefill that reuse= may skip", "decoded by transformers' own loop", "cannot be drafted together",
    "cannot take", "needs a window", "no drafts",
)  # fmt: skip


@st.composite
def policies(draw: Any) -> Any:
    policy = draw(st.sampled_from(methods.POLICIES))
    how = draw(st.sampled_from(["as it is", "keep=1", "small budget", "budget that fits", "border"]))
    if how == "keep=1":
        return dataclasses.replace(policy, keep=1.0)
    if how != "as it is":
        fields = {f.name for f in dataclasses.fields(policy)}
        if "budget" not in fields:
            return policy
        budget = {"small budget": 12, "budget that fits": 512, "border": draw(st.integers(14, 40))}[how]
        try:
            return dataclasses.replace(policy, budget=budget, **({"keep": None} if _either(policy) else {}))
        except vlmfast.UserError:
            return policy
    return policy


def _either(policy: Any) -> bool:
    return next(f for f in dataclasses.fields(policy) if f.name == "keep").default is None


@st.composite
def calls(draw: Any) -> dict[str, Any]:
    family = draw(st.sampled_from(ALL))
    kinds = ["image"] + ["video"] * (family in tiny.VIDEO_FAMILIES + tiny.HYBRID)
    batch = draw(st.sampled_from([1, 1, 1, 2]))
    media = [tuple(draw(st.lists(st.sampled_from(kinds), max_size=3))) for _ in range(batch)]
    inside = st.sampled_from(methods.PRUNERS)
    return {
        "family": family,
        "media": media,
        "text": draw(st.integers(1, 12)),
        "pad": draw(st.sampled_from([0, 0, 3])),
        "seed": draw(st.integers(0, 5)),
        "prune": draw(st.one_of(st.none(), inside, inside.map(lambda p: dataclasses.replace(p, keep=1.0)))),
        "kv": draw(st.one_of(st.none(), policies())),
        "speculate": draw(st.sampled_from(LOSSLESS)),
        "reuse": draw(st.sampled_from([None, None, "64MiB"])),
        "new": draw(st.integers(1, 6)),
        "option": draw(st.sampled_from(OPTIONS)),
    }  # fmt: skip


def outcome(model: Any, inputs: dict[str, Any], new: int, option: dict[str, Any], **stages: Any) -> tuple[Any, Any]:
    """(what generate returned, the report), or (the one-line refusal, None)."""
    torch.manual_seed(0)
    try:
        with vlmfast.accelerate(model, **stages) as fast:
            out = model.generate(
                **{k: v.clone() for k, v in inputs.items()}, max_new_tokens=new, do_sample=False, output_logits=True,
                return_dict_in_generate=True, **option,
            )  # fmt: skip
            return out, fast.report
    except vlmfast.UserError as e:
        refusal = str(e)
    assert "\n" not in refusal and len(refusal) < 400, refusal
    return refusal, None


def same(got: Any, want: Any) -> None:
    assert torch.equal(got.sequences, want.sequences)
    if got.logits is not None:
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=5e-4, atol=5e-4)


def check(call: dict[str, Any]) -> None:
    family, option, new = call["family"], call["option"], call["new"]
    model = tiny.build(family)
    media = call["media"]
    inputs = tiny.inputs(
        family, media if len(media) > 1 else media[0], text=call["text"], pad=call["pad"], seed=call["seed"]
    )
    try:
        plain = model.generate(
            **inputs, max_new_tokens=new, do_sample=False, output_logits=True, return_dict_in_generate=True, **option
        )
    except Exception:  # transformers itself does not serve this call
        return
    before = state(model)
    stages = {k: call[k] for k in ("prune", "kv", "speculate", "reuse") if call[k] is not None}
    together, report = outcome(model, inputs, new, option, **stages)
    assert state(model) == before
    alone = {name: outcome(model, inputs, new, option, **{name: value}) for name, value in stages.items()}
    if report is None:
        refused = [r for r, _ in alone.values() if isinstance(r, str)]
        assert refused or any(part in together for part in PAIRWISE), f"{together}; each alone is served"
        return
    for name, (result, _) in alone.items():
        if isinstance(result, str):
            assert name == "speculate" and call["speculate"].otherwise == "plain", f"{name} alone is refused: {result}"
    # lossless speculation and reuse change nothing
    lossy = {k: v for k, v in stages.items() if k in ("prune", "kv")}
    if set(stages) - set(lossy):
        want, _ = outcome(model, inputs, new, option, **lossy)
        same(together, want)
    notes = " ".join(report.notes)
    whole = "prune" not in stages or report.encode["kept_tokens"] == report.encode["visual_tokens"]
    if "kv" in stages and "fits the budget" in notes:
        want, _ = outcome(model, inputs, new, option, **{k: v for k, v in lossy.items() if k == "prune"})
        same(together, want)
    if whole and ("kv" not in stages or "fits the budget" in notes or option.get("use_cache") is False):
        same(together, plain)
    if "kv" in stages and whole and not isinstance(alone["kv"][0], str):
        same(together, alone["kv"][0])
    out, _ = outcome(model, inputs, new, option)
    same(out, plain)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(calls())
def test_stages_together(call: dict[str, Any]) -> None:
    check(call)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(calls())
def test_stages_together_a_thousand_plans(call: dict[str, Any]) -> None:
    check(call)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("budget", [8, 512])
def test_pruning_before_a_budget_that_fits_or_not(family: str, budget: int) -> None:
    model, inputs = tiny.build(family), tiny.inputs(family, ("image", "image"))
    kv = vlmfast.plan.parse("kv", f"snapkv:budget={budget},sinks=1,recent=2")
    prune = Uniform(keep=0.5)
    pruned, _ = outcome(model, inputs, 5, {}, prune=prune)
    both, report = outcome(model, inputs, 5, {}, prune=prune, kv=kv)
    assert not isinstance(both, str), both
    if budget == 512:
        assert any("fits the budget" in n for n in report.notes)
        same(both, pruned)
        assert both.past_key_values.get_seq_length() == pruned.past_key_values.get_seq_length()
    else:
        assert report.prefill["cached_tokens"] < 20
