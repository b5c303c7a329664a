"""Turns a method's name, such as `vidcom2-25`, into a plan.

`plan("vidcom2-25")` keeps a quarter of the visual tokens, `plan("hybridkv-10")` a tenth of the cache,
`plan("loose@lookup")` speculates, `plan("loose-30")` at a relax ratio of 0.3, `plan("balanced")` is a preset,
`plan("vidcom2-25+snapkv-10+lossless")` composes, `plan("plain")` is the empty plan. A pruner and a policy of one name
are told apart by a prefix: `prune.random-10`, `kv.random-10` (without one: the pruner).

These names are short for the text form (`vlmfast.spec`), which may stand in their place, of one stage's method or of a
whole plan: `plan("vidcom2:keep=0.25,least=384")`, `plan("plan:prune=(vidcom2:keep=0.25),kv=snapkv")`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlmfast import spec
from vlmfast.core import UserError
from vlmfast.fields import unknown
from vlmfast.plan import PRESETS, STAGES, Plan, build, methods_of, parse, preset

DIALS = ("relax", "theta", "weight")  # the field that a percentage behind an acceptance rule's name sets


def plan(name: str, draft: str | None = None) -> Plan:
    """The plan behind a method's name, or its text. draft: folder or id of a draft model, for names that speculate
    with one."""
    if ":" in name:
        return _written(spec.parse(name))
    result, given_stages = Plan(), set()
    for part in name.split("+"):
        for stage, method in _part(part.strip(), draft).items():
            if stage in given_stages:
                raise UserError(f"method {name!r} sets {stage} twice: one pruner, one policy, one rule")
            if part.strip() not in PRESETS:  # what stands beside a preset replaces its stage
                given_stages.add(stage)
            result = replace(result, **{stage: method})
    return result


def listed(names: str | None, draft: str | None = None) -> dict[str, Plan]:
    """The plans of `a,b,(c:field=value,field=value)`, by name or text; what has several fields stands in brackets."""
    plans: dict[str, Plan] = {}
    for item in spec.items(names or ""):
        if isinstance(item, dict):
            built_plan = _written(item)
            plans[_text(built_plan)] = built_plan
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
    given_methods = {stage: parse(stage, spec) for stage, spec in specs.items() if spec}
    if given_methods:
        plans["+".join(label(stage, method) for stage, method in given_methods.items())] = Plan(**given_methods)
    return plans | (extra or {})


def label(stage: str, method: Any) -> str:
    """The name of one stage's method: with the kept percentage, or the acceptance rule's name."""
    if stage == "speculate":
        return str(method.accept.name) if method.draft is not None else "plain_loop"
    return f"{method.name}-{100 * method.keep:g}"


def keep(plan: Plan) -> dict[str, Any]:
    """What a table says about a plan beside its name: kept fractions and the acceptance rule."""
    params: dict[str, Any] = {}
    if plan.prune is not None:
        params["keep"] = params["prune_keep"] = plan.prune.keep
    if plan.kv is not None:
        params["keep"] = params["kv_keep"] = plan.kv.keep
    if plan.speculate is not None:
        params["accept"] = plan.speculate.accept.name
    return params


def _written(plain_data: dict[str, Any]) -> Plan:
    """The plan of a text: a whole one, or one method, which belongs to the first stage that knows it."""
    method_name = plain_data["method"]
    if method_name == Plan.name:
        return Plan.from_json(plain_data)
    stage = next((known_stage for known_stage in STAGES if method_name in methods_of(known_stage)), None)
    if stage is None:
        raise unknown(
            "method",
            method_name,
            [Plan.name, *(known_name for known_stage in STAGES for known_name in methods_of(known_stage))],
        )
    return Plan(**{stage: build(stage, plain_data)})


def _text(plan: Plan) -> str:
    """The text of a plan; of its one stage where it has no more."""
    stage_methods = list(plan.stages.values())
    return spec.write(stage_methods[0] if len(stage_methods) == 1 and plan.tower is None else plan)


def _part(text: str, draft: str | None) -> dict[str, Any]:
    if text == "plain":
        return {}
    if text in PRESETS:
        return preset(text).stages
    stage, stage_mark, remainder = text.partition(".")
    if not stage_mark or stage not in STAGES:
        stage, remainder = "", text
    remainder, draft_mark, source = remainder.partition("@")
    before_percent, _, percent = remainder.rpartition("-")
    method_name, fraction = (
        (before_percent, float(percent) / 100) if before_percent and _number(percent) else (remainder, None)
    )
    default_stages = (
        ("prune", "kv") if fraction is not None else ("kv", "prune")
    )  # without a percentage: by its own defaults
    for candidate_stage in (stage,) if stage else default_stages:
        if not draft_mark and candidate_stage != "speculate" and method_name in methods_of(candidate_stage):
            return {
                candidate_stage: build(
                    candidate_stage, {"method": method_name} | ({} if fraction is None else {"keep": fraction})
                )
            }
    if stage in ("", "speculate") and (speculation := _speculation(method_name, fraction, source, draft, text)):
        return {"speculate": build("speculate", {"method": "speculate"} | speculation)}
    known_names = [f"{known_name}-25" for known_name in methods_of("prune")] + [
        f"{known_name}-10" for known_name in methods_of("kv")
    ]
    raise unknown("method (any percentage, joined by +)", text, [*known_names, *methods_of("accept"), *PRESETS])


def _speculation(rule_name: str, fraction: float | None, source: str, draft: str | None, text: str) -> dict[str, Any]:
    """The fields of `speculate` that a rule's name and a draft's ask for; {} where the name is no rule's."""
    rules = methods_of("accept")
    if rule_name == "plain_loop" and fraction is None:
        return {"draft": None}
    if rule_name not in rules:
        return {}
    source = source or ("model" if draft else "lookup")
    draft_methods: dict[str, dict[str, Any]] = {
        "model": {"method": "modeldraft", "model": draft},
        "both": {"method": "lookupthenmodel", "model": draft},
        "self": {"method": "selfdraft", "prune": {"method": "uniform", "keep": 0.1}},
        "lookup": {"method": "promptlookup"},
    }
    if source not in draft_methods:
        raise unknown("draft", source, draft_methods, text)
    if "model" in draft_methods[source] and not draft:
        raise UserError(f"{text!r} drafts with a model: name it with --draft FOLDER_OR_ID, or use @lookup or @self")
    rule_fields = rules[rule_name].__dataclass_fields__  # type: ignore[attr-defined]
    ratio_field = next((field_name for field_name in DIALS if field_name in rule_fields), None)
    if fraction is not None and ratio_field is None:
        raise UserError(f"{text!r}: {rule_name} has no ratio to set; name it without a percentage")
    return {
        "draft": draft_methods[source],
        "accept": {"method": rule_name} | ({} if fraction is None else {str(ratio_field): fraction}),
    }


def _number(text: str) -> bool:
    try:
        return 0 < float(text) <= 100
    except ValueError:
        return False
