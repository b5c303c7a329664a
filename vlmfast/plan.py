"""A Plan says what each stage does. It is built from method objects, a preset's name, a spec string or JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmfast.core import UserError, to_json

PRESETS = ("safe", "balanced", "fast")
STAGES = ("prune", "kv", "speculate")


@dataclass(frozen=True)
class Plan:
    """prune: which visual tokens go on. kv: which keys/values stay. speculate: how tokens are guessed and verified."""

    prune: Any = None
    kv: Any = None
    speculate: Any = None

    def __post_init__(self) -> None:
        for stage in STAGES:
            value = getattr(self, stage)
            methods = _methods(stage) if value is not None else {}
            if methods and not isinstance(value, tuple(methods.values())):
                raise UserError(
                    f"{stage}={value!r} is not a {stage} method; use one of {', '.join(sorted(methods))}, "
                    f"e.g. {stage}={_example(methods)}"
                )

    def json(self) -> dict[str, Any]:
        """Plain-JSON form; `Plan.from_json` reads it back."""
        return {f.name: to_json(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """Rebuild a plan from `json()`'s form. Raises UserError naming the unknown stage, method or field."""
        if not isinstance(data, dict):
            raise UserError(f"a plan is a JSON object with the keys prune, kv, speculate, not {type(data).__name__}")
        unknown = set(data) - set(STAGES)
        if unknown:
            raise UserError(f"unknown plan field {sorted(unknown)[0]!r}; known: {', '.join(STAGES)}")
        return cls(**{stage: _build(stage, value) for stage, value in data.items()})

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        text = json.dumps(self.json(), indent=2)
        Path(path).write_text(text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file. Raises UserError when it is missing or not a plan."""
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except FileNotFoundError:
            raise UserError(f"no plan file at {path}: write one with Plan.save or `vlmfast tune`") from None
        except json.JSONDecodeError as e:
            raise UserError(
                f"{path} is not JSON ({e.msg}, line {e.lineno}): a plan file is what Plan.save writes"
            ) from None


def preset(name: str) -> Plan:
    """The plan behind a preset's name.

    "safe" answers as the plain model does: it only looks words up that it may draft, and verifies them losslessly.
    "balanced" and "fast" keep two fifths and a fifth of the visual tokens besides, inside the tower where it allows,
    but 384 of an image or video at least: smaller ones have little to spare (see `evals/README.md`).
    """
    from vlmfast.decode import Lossless, PromptLookup, Speculate
    from vlmfast.encode import VidCom2

    lookup = Speculate(PromptLookup(), Lossless(), otherwise="plain")
    if name == "safe":
        return Plan(speculate=lookup)
    if name == "balanced":
        return Plan(prune=VidCom2(keep=0.4, after_block="auto", least=384), speculate=lookup)
    if name == "fast":
        return Plan(prune=VidCom2(keep=0.2, after_block="auto", least=384), speculate=lookup)
    raise UserError(f"unknown preset {name!r}; presets: {', '.join(PRESETS)}")


def parse(stage: str, spec: str) -> Any:
    """A method from `name:field=value,field=value`, e.g. parse("prune", "vidcom2:keep=0.25")."""
    name, _, rest = spec.partition(":")
    fields: dict[str, Any] = {"method": name.strip()}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"{part!r} in --{stage} {spec!r} is not field=value")
        fields[key.strip()] = _literal(value.strip())
    return _build(stage, fields)


def resolve(plan: Plan | str | Path | dict | None, **stages: Any) -> Plan:
    """One Plan from a Plan, preset name, plan file or JSON object, with single stages replaced where given."""
    if isinstance(plan, (str, Path)):
        plan = preset(str(plan)) if str(plan) in PRESETS or not str(plan).endswith(".json") else Plan.load(plan)
    elif isinstance(plan, dict):
        plan = Plan.from_json(plan)
    plan = plan or Plan()
    given = {k: parse(k, v) if isinstance(v, str) else v for k, v in stages.items() if v is not None}
    return dataclasses.replace(plan, **given) if given else plan


def _methods(field: str) -> dict[str, type]:
    """The methods a field of this name may hold (method objects nest: a draft has its own pruner)."""
    if field in ("prune", "stills"):
        from vlmfast.encode import METHODS as pruners

        return dict(pruners)
    if field in ("kv", "base", "scorer"):
        from vlmfast.prefill import METHODS as policies
        from vlmfast.prefill import Full

        return {**policies, Full.name: Full}  # no compression: what the others are compared with
    from vlmfast import decode

    nested: dict[str, dict[str, type]] = {
        "speculate": {"speculate": decode.Speculate},
        "draft": decode.DRAFTS,
        "accept": decode.ACCEPT,
    }
    return nested.get(field, {})


def _build(field: str, data: Any) -> Any:
    if isinstance(data, dict) and "method" in data:
        methods = _methods(field)
        if field == "prune":  # a draft's pruner may follow the target
            from vlmfast.decode import TargetAttention

            methods |= {TargetAttention.name: TargetAttention}
        name = str(data["method"])
        if name not in methods:
            raise UserError(f"unknown {field} method {name!r}; known: {', '.join(sorted(methods))}")
        kind = methods[name]
        known = {f.name for f in dataclasses.fields(kind) if f.init}
        for key in data:
            if key != "method" and key not in known:
                raise UserError(f"{name} has no field {key!r}; its fields: {', '.join(sorted(known))}")
        try:
            return kind(**{k: _build(k, v) for k, v in data.items() if k != "method"})
        except TypeError as e:
            raise UserError(f"{name}: {e}") from None
    if (
        field in ("draft", "accept", "base", "scorer", "prune", "stills")
        and isinstance(data, str)
        and data in _methods(field)
    ):
        return _build(field, {"method": data})
    return data


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"none": None, "true": True, "false": False}.get(text.lower(), text)


def _example(methods: dict[str, type]) -> str:
    return f"{next(iter(methods.values())).__name__}()"
