"""No speed figure on a red gate: the laws of a plan, checked on the very model and question that are timed, and
whether what was timed had what its plan claims."""

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
        before = runner.model(**inputs).logits
    for method, plan in plans.items():
        if stop():
            broken[method] = "law: not checked, out of time"
            continue
        try:
            said = _tokens(runner, inputs, plan, tokens)
            with torch.no_grad():
                after = runner.model(**inputs).logits
            if not torch.equal(before, after):
                broken[method] = "law: removing it does not restore the model"
            elif plan.speculate is not None and plan.speculate.accept.lossless:
                base = _tokens(runner, inputs, Plan(prune=plan.prune, kv=plan.kv), tokens)
                if not torch.equal(said, base):
                    broken[method] = "law: an exact acceptance rule changed the tokens"
        except Exception as e:  # a failing question is the runner's business: it is recorded there
            broken[method] = f"law: not checked, the first question failed ({type(e).__name__})"
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
    for row in (speed, quality):
        prune, m = (row["plan"] or {}).get("prune") or {}, row["metrics"]
        rules.append((prune.get("method"), prune.get("after_block")))
        shares.append(m["kept_tokens"] / m["visual_tokens"])
    if rules[0] != rules[1]:
        return f"{speed['name']} prunes by {rules[0][0]} after block {rules[0][1]}, {quality['name']} by {rules[1][0]}"
    if abs(shares[0] - shares[1]) > within:
        return f"{speed['name']} was timed at {shares[0]:.0%} of the tokens and asked at {shares[1]:.0%}"
    return ""


def _tokens(runner: Runner, inputs: dict[str, Any], plan: Plan, tokens: int) -> Any:
    import vlmfast

    extra = {"tokenizer": runner.processor.tokenizer} if plan.speculate is not None else {}
    with vlmfast.accelerate(runner.model, plan):
        return runner.model.generate(**inputs, **extra, max_new_tokens=tokens, do_sample=False)
