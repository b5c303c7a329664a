"""A Plan says what each stage does. It is built from method objects, a preset's name, a spec string or JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vlmfast import spec
from vlmfast.core import UserError, shown, to_json
from vlmfast.fields import Options, unknown
from vlmfast.files import loads, read_text, write_text

PRESETS = ("safe", "balanced", "fast")
STAGES = ("prune", "kv", "speculate")
TOWERS = ("fast", "stock")


@dataclass(frozen=True)
class Plan:
    """prune: which visual tokens go on. kv: which keys/values stay. speculate: how tokens are guessed and verified.

    tower: "fast" (the vision tower without its loops, see `runtime.fast_tower`) or "stock" (as transformers has it);
    None is "fast" as soon as anything else is asked.
    """

    prune: Any = None
    kv: Any = None
    speculate: Any = None
    tower: str | None = None
    name: ClassVar[str] = "plan"

    def __post_init__(self) -> None:
        if self.tower is not None and self.tower not in TOWERS:
            raise UserError(f"tower={shown(self.tower)} is not known; use {' or '.join(map(repr, TOWERS))}")
        for stage in STAGES:
            value = getattr(self, stage)
            methods = methods_of(stage) if value is not None else {}
            if methods and not isinstance(value, tuple(methods.values())):
                draft = stage == "speculate" and hasattr(value, "generate")
                example = "Speculate(draft=ModelDraft(small_model))" if draft else _example(methods)
                raise UserError(
                    f"{stage}={shown(value)} is not a {stage} method; use one of {', '.join(sorted(methods))}, "
                    f"e.g. {stage}={example}"
                )
        drafts = None if self.speculate is None else self.speculate.draft
        drafted = None if drafts is None else drafts.pruner
        if isinstance(drafted, str):
            parse("prune", drafted)  # a draft's own pruner may be a spec: wrong ones are refused here, not later

    def __str__(self) -> str:
        """The stages asked for, with the fields that are not at their defaults: `prune vidcom2 keep=0.4`."""
        stages = [f"{stage} {_summary(value)}" for stage in STAGES if (value := getattr(self, stage)) is not None]
        stages += [] if self.tower is None else [f"tower {self.tower}"]
        return ", ".join(stages) or "nothing asked"

    def json(self) -> dict[str, Any]:
        """Plain-JSON form; `Plan.from_json` reads it back."""
        return {f.name: to_json(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @property
    def fast_tower(self) -> bool:
        """Does the fast tower run: asked for, or not refused where a stage is asked for?"""
        return self.tower == "fast" or (self.tower is None and any(getattr(self, stage) for stage in STAGES))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """Rebuild a plan from `json()`'s form. Raises UserError naming the unknown stage, method or field."""
        if not isinstance(data, dict):
            known = ", ".join((*STAGES, "tower"))
            raise UserError(f"a plan is a JSON object with the keys {known}, not {shown(data)}")
        return spec.build("plan", {"method": cls.name} | data, {cls.name: cls}, _nested)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_text(path, json.dumps(self.json(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file. Raises UserError when it is missing or not a plan."""
        text = read_text(path, "a plan file, as Plan.save or `vlmfast tune` writes it")
        return cls.from_json(loads(text, f"the plan file {shown(str(path))}"))


def preset(name: str) -> Plan:
    """The plan behind a preset's name.

    "safe" answers as the plain model does: it only looks words up that it may draft, and verifies them losslessly.
    "balanced" and "fast" keep two fifths and a fifth of the visual tokens besides, inside the tower where it allows,
    but 384 of an image or video at least: smaller ones have little to spare (see `docs/benchmarks.md`).
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
    raise unknown("preset", name, PRESETS)


def parse(stage: str, text: str) -> Any:
    """A method from `name:field=value,field=value`, e.g. parse("prune", "vidcom2:keep=0.25"); see `spec`."""
    return spec.read(f"{stage} method", text, methods_of(stage), _nested)


def build(stage: str, data: dict[str, Any]) -> Any:
    """A method from its JSON form, {"method": name, field: value, ...}."""
    return spec.build(f"{stage} method", data, methods_of(stage), _nested)


def parse_plan(text: str) -> Plan:
    """A plan from `plan:prune=(vidcom2:keep=0.4),kv=snapkv`; `spec.write` gives a plan this form."""
    plan: Plan = spec.read("plan", text, {Plan.name: Plan}, _nested)
    return plan


def resolve(plan: Plan | str | Path | dict | None, **stages: Any) -> Plan:
    """One Plan from a Plan, preset name, text, plan file or JSON object, with single stages replaced where given.

    stages: method objects, or their text or JSON form.
    """
    if isinstance(plan, (str, Path)):
        text, file = str(plan), isinstance(plan, Path) or plan.endswith(".json")
        name = text.partition(":")[0].strip()
        if text not in PRESETS and not file:
            _refuse_method(name, text)
        plan = Plan.load(plan) if file else parse_plan(text) if name == Plan.name else preset(text)
    elif isinstance(plan, dict):
        plan = Plan.from_json(plan)
    elif plan is None:
        plan = Plan()
    elif not isinstance(plan, Plan):
        _refuse_method(getattr(plan, "name", ""), None)
        raise UserError(
            f"plan={shown(plan)}: give a Plan, a preset's name ({', '.join(PRESETS)}), a plan file (.json) or a dict"
        )
    given = {k: _stage(k, v) for k, v in stages.items() if v is not None}
    return dataclasses.replace(plan, **given) if given else plan


def _stage(stage: str, value: Any) -> Any:
    if stage in STAGES and isinstance(value, str):
        return parse(stage, value)
    return build(stage, value) if stage in STAGES and isinstance(value, dict) else value


def _refuse_method(name: Any, spec: str | None) -> None:
    """Raise UserError where a method stands in the plan's place: it belongs to a stage. spec: its text, if any."""
    stages = [stage for stage in STAGES if name in methods_of(stage)]
    if stages:
        said = " or ".join(f"{stage}={spec!r}" if spec is not None else f"{stage}=..." for stage in stages)
        raise UserError(f"{name} is a method of one stage, not a plan: pass it as {said}")


def _summary(method: Any) -> str:
    """A method's name and the plain fields that differ from their defaults."""
    words = [str(getattr(method, "name", type(method).__name__))]
    for f in dataclasses.fields(method) if dataclasses.is_dataclass(method) else ():
        value = getattr(method, f.name, None)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if not f.init or value == default:
            continue
        if isinstance(value, (bool, int, float, str)):
            words.append(f"{f.name}={value}")
        elif isinstance(value, Options):
            words.append(f"{f.name}=({spec.write(value)})")
        elif isinstance(name := getattr(value, "name", None), str):
            words.append(f"{f.name}={name}")
    return " ".join(words)


def methods_of(field: str) -> dict[str, type]:
    """The methods that a stage, or a field of this name, may hold, by name."""
    if field in ("prune", "stills"):
        from vlmfast.encode import METHODS as pruners

        return dict(pruners)
    if field in ("kv", "scorer"):
        from vlmfast.prefill import CONTROLS
        from vlmfast.prefill import METHODS as policies

        return {**policies, **CONTROLS}
    from vlmfast import decode

    nested: dict[str, dict[str, type]] = {
        "speculate": {"speculate": decode.Speculate},
        "draft": decode.DRAFTS,
        "accept": decode.ACCEPT,
    }
    return nested.get(field, {})


def _nested(field: str) -> dict[str, type]:
    """The same inside another method: a draft's pruner may follow the target."""
    from vlmfast.decode import TargetAttention

    methods = methods_of(field)
    return methods | {TargetAttention.name: TargetAttention} if field == "prune" else methods


def _example(methods: dict[str, type]) -> str:
    return f"{next(iter(methods.values())).__name__}()"
