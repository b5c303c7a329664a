"""Names of methods as plans: the rows of every table.

`plan("vidcom2-25")` keeps a quarter of the visual tokens, `plan("hybridkv-10")` a tenth of the cache,
`plan("loose@lookup")` speculates, `plan("loose-30")` at a relax ratio of 0.3, `plan("balanced")` is a preset,
`plan("vidcom2-25+snapkv-10+lossless")` composes, `plan("plain")` is nothing. A pruner and a policy of one name are
told apart by a prefix: `prune.random-10`, `kv.random-10` (without one: the pruner).

These names are short for the text form (`vlmfast.spec`), which may stand in their place, of one stage's method or of a
whole plan: `plan("vidcom2:keep=0.25,least=384")`, `plan("plan:prune=(vidcom2:keep=0.25),kv=snapkv")`.
"""

from __future__ import annotations

from typing import Any

from vlmfast import spec
from vlmfast.core import UserError
from vlmfast.fields import unknown
from vlmfast.plan import PRESETS, STAGES, Plan, build, methods_of, parse, preset

DIALS = ("relax", "theta", "weight")  # what a percentage behind an acceptance rule's name sets


def plan(name: str, draft: str | None = None) -> Plan:
    """The plan behind a method's name, or its text. draft: folder or id of a draft model, for names that speculate
    with one."""
    if ":" in name:
        return _written(spec.parse(name))
    result, given = Plan(), set()
    for part in name.split("+"):
        for stage, method in _part(part.strip(), draft).items():
            if stage in given:
                raise UserError(f"method {name!r} sets {stage} twice: one pruner, one policy, one rule")
            if part.strip() not in PRESETS:  # what stands beside a preset replaces its stage
                given.add(stage)
            result = Plan(**{s: method if s == stage else getattr(result, s) for s in STAGES})
    return result


def listed(names: str | None, draft: str | None = None) -> dict[str, Plan]:
    """The plans of `a,b,(c:field=value,field=value)`, by name or text; what has several fields stands in brackets."""
    plans: dict[str, Plan] = {}
    for item in spec.items(names or ""):
        if isinstance(item, dict):
            made = _written(item)
            plans[_text(made)] = made
        else:
            plans[str(item)] = plan(str(item), draft)
    return plans


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
    plans |= listed(names, draft)
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


def _written(data: dict[str, Any]) -> Plan:
    """The plan of a text: a whole one, or one method, which belongs to the first stage that knows it."""
    name = data["method"]
    if name == Plan.name:
        return Plan.from_json(data)
    stage = next((s for s in STAGES if name in methods_of(s)), None)
    if stage is None:
        raise unknown("method", name, [Plan.name, *(n for s in STAGES for n in methods_of(s))])
    return Plan(**{stage: build(stage, data)})


def _text(plan: Plan) -> str:
    """The text of a plan; of its one stage where it has no more."""
    stages = [method for s in STAGES if (method := getattr(plan, s)) is not None]
    return spec.write(stages[0] if len(stages) == 1 and plan.tower is None else plan)


def _part(text: str, draft: str | None) -> dict[str, Any]:
    if text == "plain":
        return {}
    if text in PRESETS:
        chosen = preset(text)
        return {s: getattr(chosen, s) for s in STAGES if getattr(chosen, s) is not None}
    stage, dot, rest = text.partition(".")
    if not dot or stage not in STAGES:
        stage, rest = "", text
    rest, at, source = rest.partition("@")
    head, _, percent = rest.rpartition("-")
    name, share = (head, float(percent) / 100) if head and _number(percent) else (rest, None)
    first = ("prune", "kv") if share is not None else ("kv", "prune")  # without a percentage: by its own defaults
    for s in (stage,) if stage else first:
        if not at and s != "speculate" and name in methods_of(s):
            return {s: build(s, {"method": name} | ({} if share is None else {"keep": share}))}
    if stage in ("", "speculate") and (data := _speculation(name, share, source, draft, text)):
        return {"speculate": build("speculate", {"method": "speculate"} | data)}
    known = [f"{n}-25" for n in methods_of("prune")] + [f"{n}-10" for n in methods_of("kv")]
    raise unknown("method (any percentage, joined by +)", text, [*known, *methods_of("accept"), *PRESETS])


def _speculation(name: str, share: float | None, source: str, draft: str | None, text: str) -> dict[str, Any]:
    """The fields of `speculate` that a rule's name and a draft's ask for; {} where the name is no rule's."""
    rules = methods_of("accept")
    if name == "plain_loop" and share is None:
        return {"draft": None}
    if name not in rules:
        return {}
    source = source or ("model" if draft else "lookup")
    drafts: dict[str, dict[str, Any]] = {
        "model": {"method": "modeldraft", "model": draft},
        "both": {"method": "lookupthenmodel", "model": draft},
        "self": {"method": "selfdraft", "prune": {"method": "uniform", "keep": 0.1}},
        "lookup": {"method": "promptlookup"},
    }
    if source not in drafts:
        raise unknown("draft", source, drafts, text)
    if "model" in drafts[source] and not draft:
        raise UserError(f"{text!r} drafts with a model: name it with --draft FOLDER_OR_ID, or use @lookup or @self")
    dial = next((d for d in DIALS if d in rules[name].__dataclass_fields__), None)  # type: ignore[attr-defined]
    if share is not None and dial is None:
        raise UserError(f"{text!r}: {name} has no ratio to set; name it without a percentage")
    return {"draft": drafts[source], "accept": {"method": name} | ({} if share is None else {str(dial): share})}


def _number(text: str) -> bool:
    try:
        return 0 < float(text) <= 100
    except ValueError:
        return False
