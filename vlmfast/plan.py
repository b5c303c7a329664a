"""A Plan holds one method per stage. It is built from method objects, a preset's name, a spec string or JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from vlmfast import spec
from vlmfast.core import UserError, shown, to_json
from vlmfast.fields import Method, Options, unknown
from vlmfast.files import loads, read_text, write_text

PRESETS = ("safe", "balanced", "fast")
STAGES = ("prune", "kv", "speculate")
TOWERS = ("fast", "stock")


@dataclass(frozen=True)
class Plan:
    """prune: which visual tokens go on. kv: which keys/values stay. speculate: how tokens are drafted and verified.

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
        for stage, method in self.stages.items():
            methods = methods_of(stage)
            if not isinstance(method, tuple(methods.values())):
                is_model = stage == "speculate" and isinstance(method, nn.Module)
                example = "Speculate(draft=ModelDraft(small_model))" if is_model else _example(methods)
                raise UserError(
                    f"{stage}={shown(method)} is not a {stage} method; use one of {', '.join(sorted(methods))}, "
                    f"e.g. {stage}={example}"
                )
        draft_method = None if self.speculate is None else self.speculate.draft
        draft_pruner = None if draft_method is None else draft_method.pruner
        if isinstance(draft_pruner, str):
            parse("prune", draft_pruner)  # a draft's own pruner may be a spec: wrong ones are refused here, not later

    def __str__(self) -> str:
        """The stages asked for, with the fields that are not at their defaults: `prune vidcom2 keep=0.4`."""
        described = [f"{stage} {_summary(method)}" for stage, method in self.stages.items()]
        described += [] if self.tower is None else [f"tower {self.tower}"]
        return ", ".join(described) or "nothing asked"

    def json(self) -> dict[str, Any]:
        """Plain-JSON form; `Plan.from_json` reads it back."""
        return {field.name: to_json(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @property
    def stages(self) -> dict[str, Any]:
        """The methods that are asked for, by stage."""
        every_stage = {"prune": self.prune, "kv": self.kv, "speculate": self.speculate}
        return {stage: method for stage, method in every_stage.items() if method is not None}

    @property
    def asks(self) -> bool:
        """Is a stage or the fast tower asked for?"""
        return self.tower == "fast" or bool(self.stages)

    @property
    def fast_tower(self) -> bool:
        """Does the fast tower run: asked for, or not refused where a stage is asked for?"""
        return self.asks and self.tower != "stock"

    @classmethod
    def from_json(cls, plain_data: dict[str, Any]) -> Plan:
        """Rebuild a plan from `json()`'s form. Raises UserError naming the unknown stage, method or field."""
        if not isinstance(plain_data, dict):
            known_keys = ", ".join((*STAGES, "tower"))
            raise UserError(f"a plan is a JSON object with the keys {known_keys}, not {shown(plain_data)}")
        return spec.build("plan", {"method": cls.name} | plain_data, {cls.name: cls}, _nested)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_text(path, json.dumps(self.json(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file. Raises UserError when it is missing or not a plan."""
        plan_text = read_text(path, "a plan file, as Plan.save or `vlmfast tune` writes it")
        return cls.from_json(loads(plan_text, f"the plan file {shown(str(path))}"))


def preset(preset_name: str) -> Plan:
    """The plan behind a preset's name.

    "safe" answers as the plain model does: it only drafts by prompt lookup, and verifies losslessly.
    "balanced" and "fast" keep two fifths and a fifth of the visual tokens besides, inside the tower where it allows,
    but 384 of an image or video at least: smaller ones have little to spare (see `docs/benchmarks.md`).
    """
    from vlmfast.decode import Lossless, PromptLookup, Speculate
    from vlmfast.encode import VidCom2

    prompt_lookup = Speculate(PromptLookup(), Lossless(), otherwise="plain")
    if preset_name == "safe":
        return Plan(speculate=prompt_lookup)
    if preset_name == "balanced":
        return Plan(prune=VidCom2(keep=0.4, after_block="auto", least=384), speculate=prompt_lookup)
    if preset_name == "fast":
        return Plan(prune=VidCom2(keep=0.2, after_block="auto", least=384), speculate=prompt_lookup)
    raise unknown("preset", preset_name, PRESETS)


def parse(stage: str, spec_text: str) -> Any:
    """A method from `name:field=value,field=value`, e.g. parse("prune", "vidcom2:keep=0.25"); see `spec`."""
    return spec.read(f"{stage} method", spec_text, methods_of(stage), _nested)


def build(stage: str, plain_data: dict[str, Any]) -> Any:
    """A method from its JSON form, {"method": name, field: value, ...}."""
    return spec.build(f"{stage} method", plain_data, methods_of(stage), _nested)


def parse_plan(spec_text: str) -> Plan:
    """A plan from `plan:prune=(vidcom2:keep=0.4),kv=snapkv`; `spec.write` gives a plan this form."""
    plan: Plan = spec.read("plan", spec_text, {Plan.name: Plan}, _nested)
    return plan


def resolve(plan: Plan | str | Path | dict | None, **stages: Any) -> Plan:
    """One Plan from a Plan, preset name, text, plan file or JSON object, with single stages replaced where given.

    stages: method objects, or their text or JSON form.
    """
    if isinstance(plan, (str, Path)):
        plan_text, is_file = str(plan), isinstance(plan, Path) or plan.endswith(".json")
        method_name = plan_text.partition(":")[0].strip()
        if plan_text not in PRESETS and not is_file:
            _refuse_method(method_name, plan_text)
        plan = Plan.load(plan) if is_file else parse_plan(plan_text) if method_name == Plan.name else preset(plan_text)
    elif isinstance(plan, dict):
        plan = Plan.from_json(plan)
    elif plan is None:
        plan = Plan()
    elif not isinstance(plan, Plan):
        if isinstance(plan, Method):
            _refuse_method(plan.name, None)
        raise UserError(
            f"plan={shown(plan)}: give a Plan, a preset's name ({', '.join(PRESETS)}), a plan file (.json) or a dict"
        )
    replacements = {stage: _stage(stage, method) for stage, method in stages.items() if method is not None}
    return dataclasses.replace(plan, **replacements) if replacements else plan


def _stage(stage: str, method: Any) -> Any:
    if stage in STAGES and isinstance(method, str):
        return parse(stage, method)
    return build(stage, method) if stage in STAGES and isinstance(method, dict) else method


def _refuse_method(name: Any, spec_text: str | None) -> None:
    """Raise UserError where a method stands in the plan's place: it belongs to a stage. spec_text: its text, if any."""
    stages = [stage for stage in STAGES if name in methods_of(stage)]
    if stages:
        shown_method = "..." if spec_text is None else repr(spec_text)
        arguments = " or ".join(f"{stage}={shown_method}" for stage in stages)
        raise UserError(f"{name} is a method of one stage, not a plan: pass it as {arguments}")


def _summary(method: Method) -> str:
    """A method's name and the plain fields that differ from their defaults."""
    summary = [method.name]
    for field in dataclasses.fields(method):  # type: ignore[arg-type]
        value = getattr(method, field.name)
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if not field.init or value == default:
            continue
        if isinstance(value, (bool, int, float, str)):
            summary.append(f"{field.name}={value}")
        elif isinstance(value, Options):
            summary.append(f"{field.name}=({spec.write(value)})")
        elif isinstance(value, Method):
            summary.append(f"{field.name}={value.name}")
    return " ".join(summary)


def methods_of(field_name: str) -> dict[str, type]:
    """The methods that a stage, or a field of this name, may hold, by name."""
    if field_name in ("prune", "stills"):
        from vlmfast.encode import METHODS as pruners

        return dict(pruners)
    if field_name in ("kv", "scorer"):
        from vlmfast.prefill import CONTROLS
        from vlmfast.prefill import METHODS as policies

        return {**policies, **CONTROLS}
    from vlmfast import decode

    decode_methods: dict[str, dict[str, type]] = {
        "speculate": {"speculate": decode.Speculate},
        "draft": decode.DRAFTS,
        "accept": decode.ACCEPT,
    }
    return decode_methods.get(field_name, {})


def _nested(field_name: str) -> dict[str, type]:
    """The same inside another method: a draft's pruner may follow the target."""
    from vlmfast.decode import TargetAttention

    methods = methods_of(field_name)
    return methods | {TargetAttention.name: TargetAttention} if field_name == "prune" else methods


def _example(methods: dict[str, type]) -> str:
    return f"{next(iter(methods.values())).__name__}()"
