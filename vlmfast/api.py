"""`accelerate(model, ...)`: installs a plan on an unmodified transformers model and hands back the handle."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from vlmfast import engine, families
from vlmfast.core import StageDidNotFire, Unsupported, parse_bytes
from vlmfast.decode_loop import put_loop
from vlmfast.plan import Plan, resolve
from vlmfast.preconditions import MARK, check_model, refuse_call, refuse_copy, unwrap
from vlmfast.report import Report, why_all_kept
from vlmfast.runtime.compat import cache_in, option
from vlmfast.runtime.compiled import checked, observed, refuse_compiled
from vlmfast.runtime.downsample import Downsampled
from vlmfast.runtime.fast_tower import FastTower, fast_modules, fresh_lengths
from vlmfast.runtime.media_cache import MediaCache
from vlmfast.runtime.model_lock import lock_functions, model_lock, streamed
from vlmfast.runtime.patch import Patch
from vlmfast.runtime.prune_between_layers import BetweenLayerPruning
from vlmfast.runtime.prune_in_tower import InTowerPruning
from vlmfast.runtime.prune_input import InputPruning
from vlmfast.runtime.shorten_prompt import PromptShortening, needs
from vlmfast.runtime.stage_timer import StageTimer, cache_counts
from vlmfast.runtime.text_attention import TextAttentionRecorder
from vlmfast.runtime.tower_attention import TowerAttention, wanted_layers


def accelerate(
    model: nn.Module,
    plan: Plan | str | Path | dict | None = None,
    *,
    prune: Any = None,
    kv: Any = None,
    speculate: Any = None,
    tower: str | None = None,
    reuse: int | str | None = None,
    replace: bool = False,
) -> Accelerated:
    """Make `model.generate(...)` follow a plan, in place.

    model: a transformers VLM (see `families.supported()`), or one wrapped by PEFT. plan: a Plan, a preset's name
    ("safe", "balanced", "fast"), a plan file, or JSON. prune, kv, speculate: method objects that replace the plan's.
    tower: "fast" or "stock", see `Plan`; with anything asked it is fast.
    reuse: bytes (or "1GiB") for encoded media kept between calls: a second question about the same pixels skips the
    tower, and, where the prompt up to the media is the same too, their prefill (one row at a time).
    replace: take an earlier handle off this model first, as a notebook cell that runs twice must.
    Nothing asked is the identity. Returns a handle: `.report`, `.remove()`, or use it in a `with`.
    Raises Unsupported (a ValueError) for an unknown family, a compiled model, or a second `accelerate`.
    """
    if streamed(unwrap(model)):
        raise Unsupported(
            "an open StreamSession uses this model, and would run through the hooks: give the session plan=..., or "
            "close it first"
        )
    return Accelerated(model, resolve(plan, prune=prune, kv=kv, speculate=speculate, tower=tower), reuse, replace)


class Accelerated:
    """What `accelerate` returns: owns every hook on the model until `remove()`."""

    def __init__(
        self, model: nn.Module, plan: Plan, reuse: int | str | None = None, replace: bool = False, always: bool = False
    ) -> None:
        """always: hooks stay on also when nothing is asked (a draft, whose forwards are not its own `generate`)."""
        self.plan, self.always = plan, always
        self.hooked = always or plan != Plan() or reuse is not None
        self.report = Report()
        self.model = unwrap(model)
        self.family = families.get(self.model)
        check_model(self.model, self.family, plan)
        limit = parse_bytes("reuse", reuse)
        if MARK in vars(self.model):
            if not replace:
                raise Unsupported(
                    "this model is already accelerated: call .remove() on the first handle, or pass replace=True"
                )
            vars(self.model)[MARK].remove()
        self._reuse = MediaCache(self.model, self.family, limit) if limit is not None else None
        self._patch = Patch()
        self._stage: dict[str, dict[str, Any]] = {"prefill": {}, "decode": {}}
        self._calls = 0  # `generate` calls now running: one, or more inside it
        self.kv: Any = None
        try:
            self._install()
        except BaseException:
            self._patch.remove()
            raise

    def _install(self) -> None:
        model, plan, patch = self.model, self.plan, self._patch
        patch.set(model, MARK, self)
        for name in ("__deepcopy__", "__reduce_ex__"):
            patch.set(model, name, refuse_copy)
        if self.hooked:
            patch.call(lock_functions(model))
        self.tower: FastTower | None = fast_modules(model, self.family, patch) if plan.fast_tower else None
        between = hasattr(plan.prune, "cuts")  # acts between layers of the language model; may hold a first pruner
        self.smaller = Downsampled.of(model, self.family, plan.prune, self.always)
        outer = plan.prune.prune if between else None if self.smaller is not None else plan.prune
        self.columns = InputPruning(model, self.family, outer)
        self.columns.reuse, self.columns.drafts = self._reuse, self.always
        self.columns.host_grids = self.tower is not None
        self.meter = StageTimer(model, self.family)
        self.rewrite = PromptShortening(model, self.family, self.columns, patch, self.meter)
        draft = getattr(plan.speculate, "draft", None)
        guide: Any = getattr(draft, "prune", None)
        if getattr(guide, "guided", False):
            if self._reuse is not None:
                raise Unsupported(
                    f"{guide.name} reads the prefill that reuse= may skip: leave reuse= away, or use another pruner"
                )
            self.columns.text_attention = TextAttentionRecorder(model, self.family, self.columns, guide.queries)
            self.columns.text_attention.watch(patch)
        if plan.kv is not None:
            from vlmfast.runtime.kv_hooks import KVHooks

            text = self.family.text(model)
            self.kv = KVHooks(text, text.config, plan.kv, self._stage["prefill"].update)
            self.kv.install(patch)
        if self.hooked:
            self.columns.install(patch)
        if self.columns.text_attention is not None:
            self.columns.text_attention.install(patch)
        if between:
            if plan.kv is not None or self._reuse is not None:
                raise Unsupported(
                    f"{plan.prune.name} leaves every layer with columns of its own, "
                    "which kv= and reuse= cannot follow: use one or the other"
                )
            BetweenLayerPruning(model, self.family, self.columns, plan.prune).install(patch)
        second = None if hasattr(draft, "load") else getattr(draft, "prune", None)  # a second prefill of this model
        layers = tuple(sorted({*wanted_layers(outer), *wanted_layers(second)}))
        if layers:
            self.columns.attention = TowerAttention(model, self.family, layers)
            self.columns.attention.install(patch)
        pruners = (outer, getattr(draft, "prune", None))
        blocks = [b for p in pruners if (b := getattr(p, "after_block", None)) is not None]
        if any(b != "auto" or self.family.tower_pruning for b in blocks):
            tower = InTowerPruning(model, self.family, self.columns, self.tower)
            tower.install(patch)
            tower.check()
        if self.hooked:
            self.meter.install(patch)
            refuse_compiled(model)
            patch.call(functools.partial(engine.release, model))
            engine.prepare(model)
        self.draft = self._accelerate_draft(draft)
        inner: Any = model.generate
        inner = checked(model, inner) if self.hooked else observed(model, inner, self._observe, self._bare)
        patch.set(model, "generate", self._wrap(inner))

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
            with ExitStack() as held:
                held.enter_context(model_lock(self.model))
                if vars(self.model).get(MARK) is not self:  # removed while this thread waited for its turn
                    return self.model.generate(*args, **kwargs)  # type: ignore[operator]
                if self.draft is not None:
                    held.enter_context(model_lock(self.draft.model))
                held.enter_context(self._call())
                self.meter.reset()  # the clock of the first token
                if self.plan.fast_tower:
                    held.enter_context(fresh_lengths(next(self.model.parameters()).device))
                return (self._generate if self.smaller is None else self.smaller.around(self))(inner, args, kwargs)

        return generate

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Around one call: its own state, also for a call made by a streamer or processor of another one."""
        held: list[Any] = [
            self.columns,
            self.meter,
            self.columns.text_attention,
            self.columns.attention,
            self._reuse,
            self.tower,
        ]
        before = [
            (owner, {name: _held(getattr(owner, name)) for name in owner.per_call})
            for owner in held
            if owner is not None and self._calls
        ]
        stages = {name: dict(stage) for name, stage in self._stage.items()}
        self._calls += 1
        try:
            yield
        except BaseException:
            if self.kv is not None:  # torch calls no hook after a KeyboardInterrupt
                self.kv.abandon()
            raise
        finally:
            self._calls -= 1
            self.columns.cache, self.columns.in_call = None, False
            for owner, state in before:
                vars(owner).update(state)
            if before:
                for name, stage in self._stage.items():
                    stage.clear()
                    stage.update(stages[name])

    def _generate(self, inner: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        asked = functools.partial(option, self.model, kwargs)
        why = needs(asked, cache_in(kwargs))
        refuse_call(self.model, self.plan, self.columns, asked, why, args, kwargs)
        rewritten = why is not None and self.columns.active
        if self._reuse is not None:
            self._reuse.find(kwargs, asked, self.columns.pruner, self.plan.kv)
        cache = cache_in(kwargs)
        past = int(cache.get_seq_length()) if cache is not None else 0
        self.columns.reset()
        self.columns.lay_out(kwargs)
        self.columns.in_call = True
        for stage in self._stage.values():
            stage.clear()
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        put_loop(
            self.model, self.plan, self._stage["decode"], args, kwargs, why if rewritten else None,
            columns=self.columns, draft=self.draft, reuse=self._reuse is not None, nested=self._calls > 1,
        )  # fmt: skip
        if rewritten:
            out = self.rewrite.run(inner, args, kwargs, asked, str(why))
        else:
            out = inner(*args, **kwargs)
        if self._reuse is not None:
            self._reuse.store(self.columns.cache)
            self.columns.notes += self._reuse.hits
        self._fill(ids, out, past)
        return out

    def _fill(self, ids: Tensor | None, out: Any, past: int) -> None:
        """Write the report; raise when a stage had work and did not run."""
        stats = self.columns.timed()
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
            elif stats["kept_tokens"] == stats["visual_tokens"] and self.smaller is None:
                notes.append(why_all_kept(self.plan.prune, self.columns.media, stats["visual_tokens"]))
        new = getattr(out, "sequences", out).shape[1] - (0 if ids is None else ids.shape[1])
        prefill, decode = self.meter.timings(max(0, new))
        prefill |= cache_counts(self.columns.cache) | self._stage["prefill"]
        notes += prefill.pop("notes", [])  # type: ignore[arg-type]
        notes += self._stage["decode"].pop("notes", [])
        if stats["prefills"] > 1:
            notes.append("use_cache=False: every step is a prefill; times are of the first")
        if self.plan.fast_tower and next(self.model.parameters()).is_cuda:
            prefill["attention"] = "without cuDNN, which plans every new length"
        shown = ("visual_tokens", "kept_tokens", "encode_ms", "select_ms", "tower_block")
        encode = {k: stats[k] for k in shown if k in stats}
        if self.tower is not None and stats["encode_ms"]:
            encode |= self.tower.report()
            notes += self.tower.notes()
        elif self.plan.tower == "fast" and not self.family.tower_loops:
            notes.append("tower: one call a layer already, left as it is")
        self.report = Report(encode, prefill, decode | self._stage["decode"], notes)

    # -- life --------------------------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Take every hook off the model; it is as it was. Safe to call twice."""
        self._patch.remove()

    def __repr__(self) -> str:
        state = "on" if vars(self.model).get(MARK) is self else "removed"
        kind = getattr(self.model.config, "model_type", "")
        return f"<vlmfast {state}: {type(self.model).__name__} ({kind}), {self.plan}>"

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.remove()


def _held(value: Any) -> Any:
    """A value to put back later: containers that are changed in place are copied, anything else is itself."""
    return type(value)(value) if type(value) in (dict, list) else value
