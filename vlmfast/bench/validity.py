"""Checks that decide whether a speed may be reported: the laws of a plan, on the model and question that are timed,
and whether the timed run used what its plan claims."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlmfast.bench.runner import Runner
from vlmfast.bench.task import Sample
from vlmfast.plan import Plan


def laws(
    runner: Runner, sample: Sample, plans: dict[str, Plan], tokens: int, stop: Callable[[], bool] = lambda: False
) -> dict[str, str]:
    """Method -> the law it breaks on this question; methods that keep all of them are not listed.

    Checked: removing a plan restores the model bit for bit; a plan with an exact acceptance rule says the same
    tokens as the same plan without it.
    """
    import torch

    if sample.error:
        return dict.fromkeys(plans, "law: not checked, the first question has no media")
    broken: dict[str, str] = {}
    inputs = runner.inputs([sample])
    with torch.no_grad():
        logits_before = runner.model(**inputs).logits
    for method, plan in plans.items():
        if stop():
            broken[method] = "law: not checked, out of time"
            continue
        try:
            generated = _tokens(runner, inputs, plan, tokens)
            with torch.no_grad():
                logits_after = runner.model(**inputs).logits
            if not torch.equal(logits_before, logits_after):
                broken[method] = "law: removing it does not restore the model"
            elif plan.speculate is not None and plan.speculate.accept.lossless:
                expected_ids = _tokens(runner, inputs, Plan(prune=plan.prune, kv=plan.kv), tokens)
                if not torch.equal(generated, expected_ids):
                    broken[method] = "law: an exact acceptance rule changed the tokens"
        except Exception as problem:  # a failing question is the runner's business: it is recorded there
            broken[method] = f"law: not checked, the first question failed ({type(problem).__name__})"
    return broken


def without_host_heads(plan: dict[str, Any], metrics: dict[str, Any]) -> str:
    """Why a row says nothing of its policy: the plan (JSON) keeps heads in host memory, and the row held none. "" = it
    did, or the plan claims none."""
    policy = Plan.from_json({"kv": plan["kv"]}).kv if (plan or {}).get("kv") else None
    if policy is None or policy.retrieval() is None or metrics.get("kv_host_bytes"):
        return ""
    return f"{policy.name} reads heads from host memory by chunk, and no head was dynamic: ask with split=0.5"


def other_share(speed: dict[str, Any], quality: dict[str, Any], within: float = 0.01) -> str:
    """Why two rows are not one operating point: pruned by other rules, or keeping other shares of the visual tokens.

    speed, quality: rows of records, one with times and one with answers. "" = they are.
    """
    rules, shares = [], []
    for record_row in (speed, quality):
        prune, metrics = (record_row["plan"] or {}).get("prune") or {}, record_row["metrics"]
        rules.append((prune.get("method"), prune.get("after_block")))
        shares.append(metrics["kept_tokens"] / metrics["visual_tokens"])
    if rules[0] != rules[1]:
        return f"{speed['name']} prunes by {rules[0][0]} after block {rules[0][1]}, {quality['name']} by {rules[1][0]}"
    if abs(shares[0] - shares[1]) > within:
        return f"{speed['name']} was timed at {shares[0]:.0%} of the tokens and asked at {shares[1]:.0%}"
    return ""


def _tokens(runner: Runner, inputs: dict[str, Any], plan: Plan, tokens: int) -> Any:
    import vlmfast

    generate_options = {"tokenizer": runner.processor.tokenizer} if plan.speculate is not None else {}
    with vlmfast.accelerate(runner.model, plan):
        return runner.model.generate(**inputs, **generate_options, max_new_tokens=tokens, do_sample=False)
