"""Names of methods as plans: the rows of every table.

`plan("vidcom2-25")` keeps a quarter of the visual tokens, `plan("hybridkv-10")` a tenth of the cache,
`plan("loose@lookup")` speculates, `plan("loose-30")` at a relax ratio of 0.3, `plan("balanced")` is a preset,
`plan("vidcom2-25+snapkv-10+lossless")` composes, `plan("plain")` is nothing. A pruner and a policy of one name are
told apart by a prefix: `prune.random-10`, `kv.random-10` (without one: the pruner).
"""

from __future__ import annotations

from typing import Any

from vlmfast.core import UserError
from vlmfast.plan import PRESETS, STAGES, Plan, parse, preset

DRAFTS = ("model", "self", "lookup", "both")
DIALS = ("relax", "theta", "weight")  # what a percentage behind an acceptance rule's name sets


def plan(name: str, draft: str | None = None) -> Plan:
    """The plan behind a method's name. draft: folder or id of a draft model, for names that speculate with one."""
    result, given = Plan(), set()
    for part in name.split("+"):
        for stage, method in _part(part.strip(), draft).items():
            if stage in given:
                raise UserError(f"method {name!r} sets {stage} twice: one pruner, one policy, one rule")
            if part.strip() not in PRESETS:  # what stands beside a preset replaces its stage
                given.add(stage)
            result = Plan(**{s: method if s == stage else getattr(result, s) for s in STAGES})
    return result


def named(
    names: str | None,
    prune: str | None = None,
    kv: str | None = None,
    speculate: str | None = None,
    draft: str | None = None,
    extra: dict[str, Plan] | None = None,
) -> dict[str, Plan]:
    """The methods of one run, plain first: `a,b,c`, and one more from SPECs (`name:field=value`) where given."""
    plans = {"plain": Plan()}
    for name in filter(None, (n.strip() for n in (names or "").split(","))):
        plans[name] = plan(name, draft)
    specs = {"prune": prune, "kv": kv, "speculate": speculate}
    given = {stage: parse(stage, spec) for stage, spec in specs.items() if spec}
    if given:
        plans["+".join(label(stage, method) for stage, method in given.items())] = Plan(**given)
    return plans | (extra or {})


def label(stage: str, method: Any) -> str:
    """The name of one stage's method: with the kept percentage, or the acceptance rule's name."""
    if stage == "speculate":
        return str(method.accept.name) if method.draft is not None else "plain_loop"
    keep = getattr(method, "keep", None)
    return str(method.name) if keep is None else f"{method.name}-{100 * keep:g}"


def keep(plan: Plan) -> dict[str, Any]:
    """What a table says about a plan beside its name: kept fractions and the acceptance rule."""
    params: dict[str, Any] = {}
    if getattr(plan.prune, "keep", None) is not None:
        params["keep"] = params["prune_keep"] = plan.prune.keep
    if getattr(plan.kv, "keep", None) is not None:
        params["keep"] = params["kv_keep"] = plan.kv.keep
    if plan.speculate is not None:
        params["accept"] = plan.speculate.accept.name
    return params


def _part(text: str, draft: str | None) -> dict[str, Any]:
    if text == "plain":
        return {}
    if text in PRESETS:
        chosen = preset(text)
        return {s: getattr(chosen, s) for s in STAGES if getattr(chosen, s) is not None}
    stage, dot, rest = text.partition(".")
    if not dot or stage not in STAGES:
        stage, rest = "", text
    name, dash, percent = rest.rpartition("-")
    tables = _tables()
    if dash and _number(percent):
        for s in (stage,) if stage else ("prune", "kv"):
            if name in tables.get(s, {}):
                return {s: _kept(tables[s][name], float(percent) / 100, text)}
    for s in ("kv", "prune"):  # without a percentage: as the method's own defaults have it
        if stage in ("", s) and rest in tables[s]:
            return {s: tables[s][rest]()}
    if stage in ("", "speculate"):
        rule, _, source = rest.partition("@")
        head, dash, percent = rule.rpartition("-")
        share = float(percent) / 100 if dash and _number(percent) else None
        rule = rule if share is None else head
        if (rule == "plain_loop" and share is None) or rule in tables["speculate"]:
            return {"speculate": _speculate(rule, share, source, draft, text)}
    known = [f"{n}-25" for n in tables["prune"]] + [f"{n}-10" for n in tables["kv"]] + [*tables["speculate"], *PRESETS]
    raise UserError(f"unknown method {text!r}; known (any percentage, joined by +): {', '.join(known)}")


def _tables() -> dict[str, dict[str, Any]]:
    from vlmfast.decode import ACCEPT
    from vlmfast.encode import METHODS as pruners
    from vlmfast.prefill import METHODS as policies

    return {"prune": dict(pruners), "kv": dict(policies), "speculate": dict(ACCEPT)}


def _kept(method: Any, fraction: float, text: str) -> Any:
    try:
        return method(keep=fraction)
    except TypeError:
        raise UserError(f"{text!r}: {method.name} has no field 'keep'; name it without a percentage") from None


def _speculate(rule: str, share: float | None, source: str, draft: Any, text: str) -> Any:
    from vlmfast import decode
    from vlmfast.encode import Uniform

    if rule == "plain_loop":
        return decode.Speculate(draft=None)
    source = source or ("model" if draft else "lookup")
    if source not in DRAFTS:
        raise UserError(f"{text!r}: unknown draft {source!r}; after @ stands one of {', '.join(DRAFTS)}")
    if source in ("model", "both") and not draft:
        raise UserError(f"{text!r} drafts with a model: name it with --draft FOLDER_OR_ID, or use @lookup or @self")
    made: dict[str, Any] = {
        "model": lambda: decode.ModelDraft(draft),
        "both": lambda: decode.LookupThenModel(draft),
        "self": lambda: decode.SelfDraft(prune=Uniform(keep=0.1)),
        "lookup": decode.PromptLookup,
    }
    accept = decode.ACCEPT[rule]
    dial = next((d for d in DIALS if d in accept.__dataclass_fields__), None)
    if share is not None and dial is None:
        raise UserError(f"{text!r}: {rule} has no ratio to set; name it without a percentage")
    return decode.Speculate(
        draft=made[source](), accept=accept() if share is None or dial is None else accept(**{dial: share})
    )


def _number(text: str) -> bool:
    try:
        return 0 < float(text) <= 100
    except ValueError:
        return False
