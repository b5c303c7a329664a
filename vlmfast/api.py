"""`accelerate(model, ...)`: installs a plan on an unmodified transformers model and hands back the handle."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from vlmfast import families
from vlmfast.core import StageDidNotFire, Unsupported, UserError, parse_bytes
from vlmfast.plan import Plan, resolve
from vlmfast.report import Report
from vlmfast.runtime.columns import ColumnHooks
from vlmfast.runtime.compiled import checked, observed, refuse_compiled
from vlmfast.runtime.gaze import Gaze
from vlmfast.runtime.inner import InnerHooks
from vlmfast.runtime.meter import Meter, cache_counts
from vlmfast.runtime.names import cache_in
from vlmfast.runtime.nested import nested
from vlmfast.runtime.patch import Patch
from vlmfast.runtime.reuse import Reuse
from vlmfast.runtime.rewrite import Rewrite, needs
from vlmfast.runtime.tower import TowerHooks
from vlmfast.runtime.tower_attention import TowerAttention, wanted_layers

MARK = "_vlmfast"


def accelerate(
    model: nn.Module,
    plan: Plan | str | Path | dict | None = None,
    *,
    prune: Any = None,
    kv: Any = None,
    speculate: Any = None,
    reuse: int | str | None = None,
) -> Accelerated:
    """Make `model.generate(...)` follow a plan, in place.

    model: a transformers VLM (see `families.supported()`), or one wrapped by PEFT. plan: a Plan, a preset's name
    ("safe", "balanced", "fast"), a plan file, or JSON. prune, kv, speculate: method objects that replace the plan's.
    reuse: bytes (or "1GiB") for encoded media kept between calls: a second question about the same pixels skips the
    tower, and, where the prompt up to the media is the same too, their prefill (one row at a time).
    Nothing asked is the identity. Returns a handle: `.report`, `.remove()`, or use it in a `with`.
    Raises Unsupported (a ValueError) for an unknown family, a compiled model, or a second `accelerate`.
    """
    return Accelerated(model, resolve(plan, prune=prune, kv=kv, speculate=speculate), reuse)


class Accelerated:
    """What `accelerate` returns: owns every hook on the model until `remove()`."""

    def __init__(self, model: nn.Module, plan: Plan, reuse: int | str | None = None, always: bool = False) -> None:
        """always: hooks stay on also when nothing is asked (a draft, whose forwards are not its own `generate`)."""
        self.plan = plan
        self.hooked = always or plan != Plan() or reuse is not None
        self.report = Report()
        self.model = unwrap(model)
        self.family = families.get(self.model)
        if MARK in vars(self.model):
            raise Unsupported("this model is already accelerated: call .remove() on the first handle, then try again")
        limit = parse_bytes("reuse", reuse)
        self._reuse = Reuse(self.model, self.family, limit) if limit is not None else None
        self._patch = Patch()
        self._stage: dict[str, dict[str, Any]] = {"prefill": {}, "decode": {}}
        try:
            self._install()
        except BaseException:
            self._patch.remove()
            raise

    def _install(self) -> None:
        model, plan, patch = self.model, self.plan, self._patch
        patch.set(model, MARK, self)
        between = hasattr(plan.prune, "cuts")  # acts between layers of the language model; may hold a first pruner
        outer = plan.prune.prune if between else plan.prune
        self.columns = ColumnHooks(model, self.family, outer)
        self.columns.reuse = self._reuse
        self.meter = Meter(model, self.family)
        self.rewrite = Rewrite(model, self.family, self.columns, patch, self.meter)
        draft = getattr(plan.speculate, "draft", None)
        guide: Any = getattr(draft, "prune", None)
        if getattr(guide, "guided", False):
            if self._reuse is not None:
                raise Unsupported(
                    f"{guide.name} reads the prefill that reuse= may skip: leave reuse= away, or use another pruner"
                )
            self.columns.gaze = Gaze(model, self.family, self.columns, guide.queries)
            self.columns.gaze.watch(patch)
        if plan.kv is not None:
            from vlmfast.runtime.layers import KVHooks

            text = self.family.text(model)
            self.kv = KVHooks(text, text.config, plan.kv, self._stage["prefill"].update)
            self.kv.install(patch)
        if self.hooked:
            self.columns.install(patch)
        if self.columns.gaze is not None:
            self.columns.gaze.install(patch)
        if between:
            if plan.kv is not None or self._reuse is not None:
                raise Unsupported(
                    f"{plan.prune.name} leaves every layer with columns of its own, "
                    "which kv= and reuse= cannot follow: use one or the other"
                )
            InnerHooks(model, self.family, self.columns, plan.prune).install(patch)
        layers = wanted_layers(outer)
        if layers:
            self.columns.attention = TowerAttention(model, self.family, layers)
            self.columns.attention.install(patch)
        pruners = (outer, getattr(draft, "prune", None))
        blocks = [b for p in pruners if (b := getattr(p, "after_block", None)) is not None]
        if any(b != "auto" or self.family.tower_pruning for b in blocks):
            tower = TowerHooks(model, self.family, self.columns)
            tower.install(patch)
            tower.check()
        if self.hooked:
            self.meter.install(patch)
            refuse_compiled(model)
        self.draft = self._accelerate_draft(draft)
        states = [self.columns, self.meter, *self._stage.values()]
        states += [x for x in (self.columns.gaze, getattr(self.columns.attention, "maps", None)) if x is not None]
        inner: Any = model.generate
        inner = checked(model, inner) if self.hooked else observed(model, inner, self._observe, self._bare)
        patch.set(model, "generate", nested(self._wrap(inner), *states))

    def _observe(self, patch: Patch) -> None:
        """The hooks of the report alone."""
        self.columns.install(patch)
        self.meter.install(patch)

    def _bare(self, patch: Patch) -> None:
        """What can be told without hooks, which a compiled part could not be traced with."""
        self.meter.time_bare(patch)
        self.columns.notes.append("a part of the model is compiled: visual tokens and the cache were not counted")

    def _accelerate_draft(self, draft: Any) -> Accelerated | None:
        """A draft that is a model of its own gets its own pruner."""
        model = draft.load() if hasattr(draft, "load") else None
        if model is None:
            return None
        if unwrap(model) is self.model:
            raise Unsupported("the draft is the target itself: use SelfDraft(prune=...) instead of ModelDraft")
        guided = getattr(draft.prune, "guided", False)  # told what to keep by the target, prompt by prompt
        handle = Accelerated(model, resolve(None, prune=None if guided else draft.prune), always=True)
        self._patch.call(handle.remove)
        return handle

    # -- the call ----------------------------------------------------------------------------------------------------

    def _wrap(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def generate(*args: Any, **kwargs: Any) -> Any:
            option = functools.partial(_option, self.model, kwargs)
            why = needs(option, cache_in(kwargs))
            self._refuse(option, why, args, kwargs)
            rewritten = why is not None and self.columns.active
            if self._reuse is not None:
                self._reuse.find(kwargs, self.columns.pruner, features_only=rewritten)
            cache = cache_in(kwargs)
            past = int(cache.get_seq_length()) if cache is not None else 0
            self.columns.reset()
            self.columns.lay_out(kwargs)
            for stage in self._stage.values():
                stage.clear()
            self.meter.reset()
            ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
            self._speculate(args, kwargs, why if rewritten else None)
            try:
                if rewritten:
                    out = self.rewrite.run(inner, args, kwargs, option, str(why))
                else:
                    out = inner(*args, **kwargs)
                if self._reuse is not None:
                    self._reuse.store(self.columns.cache)
                    self.columns.notes += self._reuse.hits
                self._fill(ids, out, past)
            finally:
                self.columns.cache = None
            return out

        return generate

    def _speculate(self, args: tuple, kwargs: dict[str, Any], why: str | None) -> None:
        """Put our loop into the arguments of `generate`, unless the call cannot be drafted and the plan allows it.

        why: what makes this call one of rewritten inputs, which transformers' own loop decodes.
        """
        plan = self.plan.speculate
        if plan is None:
            return
        from vlmfast.decode import loop

        try:
            loop.check(self.model, plan, args, kwargs, self.plan.kv)
            if why is not None:
                raise Unsupported(f"{why} with prune= is decoded by transformers' own loop: drop {why} or speculate=")
        except Unsupported as e:
            if plan.otherwise == "refuse":
                raise
            self._stage["decode"]["notes"] = [f"speculate: not for this call ({e}), decoded by transformers"]
            return
        kwargs["custom_generate"] = loop.build(
            self.model,
            plan,
            streamer=kwargs.get("streamer"),
            columns=self.columns,
            draft=self.draft,
            inputs=kwargs,
            sink=self._stage["decode"].update,
        )

    def _refuse(self, option: Callable[[str], Any], why: str | None, args: tuple, kwargs: dict) -> None:
        if self.plan.prune is not None and self.plan.prune.keep < 1:
            self.columns.refuse_merged(kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds"))
            if option("assistant_model") is self.model:
                raise Unsupported(
                    "assistant_model is the model itself: transformers hands an assistant no pixels, and there would "
                    "be nothing to prune; use speculate=Speculate(SelfDraft(...))"
                )
        between = hasattr(self.plan.prune, "cuts")
        kv, prompt = self.plan.kv, _prompt(args, kwargs)
        if why is not None and (between or not (kv is None or prompt is None or kv.fits(int(prompt.shape[1])))):
            raise Unsupported(
                f"{why}: {self.plan.prune.name if between else 'kv='} lets layers differ in the columns they hold, "
                "which static caches and chunked prefill cannot: use the default dynamic cache in one prefill, or a "
                "pruner that acts before the language model"
            )
        if kv is not None:
            from vlmfast.prefill import refuse

            refuse.check(kv, option, prompt, cache_in(kwargs))

    def _fill(self, ids: Tensor | None, out: Any, past: int) -> None:
        """Write the report; raise when a stage had work and did not run."""
        stats = self.columns.stats
        notes = list(self.columns.notes)
        new_ids = ids[:, past:] if ids is not None and past and ids.shape[1] > past else ids
        has_media = new_ids is not None and any(bool((new_ids == t).any()) for t in self.columns.ids.values())
        if self.plan.prune is not None:
            if not has_media and not stats["visual_tokens"]:
                notes.append("prune: no new visual tokens in this call, bypassed")
            elif self.plan.prune.keep >= 1:
                notes += [] if stats["visual_tokens"] else ["prune: keep=1 keeps every visual token, bypassed"]
            elif not stats["visual_tokens"]:
                raise StageDidNotFire("visual tokens were in the prompt but the pruner never saw them")
            elif stats["kept_tokens"] == stats["visual_tokens"]:
                notes.append(f"prune: {self.plan.prune.name} kept every token of this media")
        sequences = getattr(out, "sequences", out)
        prompt = ids.shape[1] if ids is not None else 0
        prefill, decode = self.meter.timings(max(0, sequences.shape[1] - prompt))
        prefill |= cache_counts(self.columns.cache) | self._stage["prefill"]
        notes += prefill.pop("notes", [])  # type: ignore[arg-type]
        notes += self._stage["decode"].pop("notes", [])
        if stats["prefills"] > 1:
            notes.append("use_cache=False: every step is a prefill; times are of the first")
        shown = ("visual_tokens", "kept_tokens", "encode_ms", "select_ms", "tower_block")
        encode = {k: stats[k] for k in shown if k in stats}
        self.report = Report(encode, prefill, decode | self._stage["decode"], notes)

    # -- life --------------------------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Take every hook off the model; it is as it was. Safe to call twice."""
        self._patch.remove()

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.remove()


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper; refuses compiled wrappers."""
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise Unsupported("this model is compiled: hooks cannot follow a compiled graph; accelerate the plain model")
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # type: ignore[operator]
    if not isinstance(model, nn.Module) or not hasattr(model, "generate"):
        raise UserError(f"accelerate needs a transformers model with generate(), not {type(model).__name__}")
    return model


def _prompt(args: tuple, kwargs: dict) -> Any:
    """Ids (B, L) or embeddings (B, L, D) of a `generate` call, under whatever name they came; None without any."""
    named = (kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds"))
    return next((x for x in (*args[:1], *named) if x is not None), None)


def _option(model: nn.Module, kwargs: dict, name: str) -> Any:
    """A generation option as generate() would resolve it."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    for config in (kwargs.get("generation_config"), model.generation_config):
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None
