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
from vlmfast.decode.draft_method import DraftMethod
from vlmfast.decode.drafts import ModelDraft
from vlmfast.decode.target_attention import TargetAttention
from vlmfast.decode_loop import put_loop
from vlmfast.encode.base import Pruner
from vlmfast.encode.between import LayerPruner
from vlmfast.encode.downsample import Downsample
from vlmfast.fields import check_methods
from vlmfast.plan import Plan, resolve
from vlmfast.preconditions import MARK, decoder_sizes, refuse_call, refuse_copy, unwrap
from vlmfast.report import Report, why_all_kept
from vlmfast.runtime.clock import in_milliseconds
from vlmfast.runtime.compat import cache_in, option
from vlmfast.runtime.compiled import checked, observed, refuse_compiled
from vlmfast.runtime.downsample import Downsampled
from vlmfast.runtime.early_features import VideoPieces
from vlmfast.runtime.fast_tower import FastTower, fast_modules, fresh_lengths
from vlmfast.runtime.media_cache import MediaCache
from vlmfast.runtime.model_lock import lock_functions, model_lock, streamed
from vlmfast.runtime.patch import Patch
from vlmfast.runtime.prune_between_layers import BetweenLayerPruning
from vlmfast.runtime.prune_in_tower import InTowerPruning
from vlmfast.runtime.prune_input import InputPruning
from vlmfast.runtime.reading import reading_of
from vlmfast.runtime.request_state import Requests, RequestState, tower_layers
from vlmfast.runtime.shorten_prompt import PromptShortening, needs
from vlmfast.runtime.stage_timer import StageTimer, cache_counts
from vlmfast.runtime.text_attention import TextAttentionRecorder
from vlmfast.runtime.tower_attention import TowerAttention


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
    """What `accelerate` returns: owns every hook on the model until `remove()`, by call or at the end of a `with`.

    report: what each stage of the last call did, see `Report`. model, plan: what was accelerated, and how.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, reuse: int | str | None = None, replace: bool = False, always: bool = False
    ) -> None:
        """always: hooks stay on also when nothing is asked (a draft, whose forwards are not its own `generate`)."""
        self.plan, self.always = plan, always
        self.hooked = always or plan != Plan() or reuse is not None
        self.report = Report()
        self.model = unwrap(model)
        self.family = families.get(self.model)
        check_methods([plan], *decoder_sizes(self.model))
        limit = parse_bytes("reuse", reuse)
        if MARK in vars(self.model):
            if not replace:
                raise Unsupported(
                    "this model is already accelerated: call .remove() on the first handle, or pass replace=True"
                )
            vars(self.model)[MARK].remove()
        self._reuse = MediaCache(self.model, self.family, limit) if limit is not None else None
        self._patch = Patch()
        self.kv: Any = None
        self.prefills: engine.PrefillGraphs | None = None
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
        layer_pruner = plan.prune if isinstance(plan.prune, LayerPruner) else None  # may hold a first pruner
        resizes = isinstance(plan.prune, Downsample)
        self.smaller = Downsampled.of(model, self.family, plan.prune, self.always) if resizes else None
        media_pruner = None if self.smaller is not None else plan.prune
        media_pruner = media_pruner if layer_pruner is None else layer_pruner.prune
        self.requests = requests = Requests(model, media_pruner)
        self.columns = InputPruning(model, self.family, requests)
        self.columns.reuse = self._reuse
        self.columns.host_grids = self.tower is not None
        self.meter = StageTimer(model, self.family, requests)
        self.rewrite = PromptShortening(model, self.family, self.columns, patch, self.meter)
        recorder: TextAttentionRecorder | None = None
        draft: DraftMethod | None = None if plan.speculate is None else plan.speculate.draft
        draft_pruner = None if draft is None else draft.pruner
        if isinstance(draft_pruner, TargetAttention):
            if self._reuse is not None:
                raise Unsupported(
                    f"{draft_pruner.name} reads the prefill that reuse= may skip: drop reuse=, or use another pruner"
                )
            recorder = TextAttentionRecorder(model, self.family, requests, draft_pruner.queries)
            recorder.watch(patch)
        if plan.kv is not None:
            from vlmfast.runtime.kv_hooks import KVHooks

            text = self.family.text(model)
            self.kv = KVHooks(text, text.config, plan.kv, lambda numbers: requests.current.prefill.update(numbers))
            self.kv.install(patch)
        if self.hooked:
            self.columns.install(patch)
        if recorder is not None:
            recorder.install(patch)
        if layer_pruner is not None:
            if plan.kv is not None or self._reuse is not None:
                raise Unsupported(
                    f"{layer_pruner.name} leaves every layer with columns of its own, "
                    "which kv= and reuse= cannot follow: use one or the other"
                )
            BetweenLayerPruning(model, self.family, requests, layer_pruner).install(patch)
        second_pruner = None if isinstance(draft, ModelDraft) else draft_pruner  # of a second prefill of this model
        attention_layers = tuple(sorted({*tower_layers(media_pruner), *tower_layers(second_pruner)}))
        if attention_layers:
            self.columns.attention = TowerAttention(model, self.family, requests, attention_layers)
            self.columns.attention.install(patch)
        tower_block = None if media_pruner is None else media_pruner.after_block
        self.columns.pieces = VideoPieces(self.columns, plan.fast_tower, resizes)
        if tower_block is not None and (tower_block != "auto" or self.family.tower_pruning):
            tower = InTowerPruning(model, self.family, requests, self.tower)
            tower.install(patch)
            tower.check()
        if self.hooked:
            self.meter.install(patch)
            refuse_compiled(model)
            patch.call(functools.partial(engine.release, model))
            engine.prepare(model)
            text_model, output_head = engine.decoder(model)
            if plan.fast_tower and text_model is not None:
                self.prefills = engine.PrefillGraphs(text_model, output_head, self.family.rope_axes, self.kv)
                self.prefills.install(patch)
        self.draft = self._accelerate_draft(draft)
        own: Any = model.generate
        original = checked(model, own) if self.hooked else observed(model, own, self._observe, self._bare)
        patch.set(model, "generate", self._wrap(original))

    def _observe(self, patch: Patch) -> None:
        """The hooks of the report alone."""
        self.columns.install(patch)
        self.meter.install(patch)

    def _bare(self, patch: Patch) -> None:
        """What can be told without hooks, which a compiled part could not be traced with."""
        self.meter.time_bare(patch)
        self.request.notes.append("a part of the model is compiled: visual tokens and the cache were not counted")

    def _accelerate_draft(self, draft: DraftMethod | None) -> Accelerated | None:
        """A draft that is a model of its own gets its own pruner."""
        if not isinstance(draft, ModelDraft):
            return None
        draft_model = draft.load()
        if unwrap(draft_model) is self.model:
            raise Unsupported("the draft is the target itself: use SelfDraft(prune=...) instead of ModelDraft")
        guided = isinstance(draft.pruner, TargetAttention)  # told what to keep by the target, prompt by prompt
        handle = Accelerated(draft_model, resolve(None, prune=None if guided else draft.prune), always=True)
        self._patch.call(handle.remove)
        return handle

    # -- the call ----------------------------------------------------------------------------------------------------

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as contexts:
                contexts.enter_context(model_lock(self.model))
                if vars(self.model).get(MARK) is not self:  # removed while this thread waited for its turn
                    return self.model.generate(*args, **kwargs)  # type: ignore[operator]
                if self.draft is not None:
                    contexts.enter_context(model_lock(self.draft.model))
                request = contexts.enter_context(self._call())
                request.reading = reading_of(kwargs.get("input_ids"))
                self.meter.begin()  # the clock of the first token
                if self.plan.fast_tower:
                    contexts.enter_context(fresh_lengths(next(self.model.parameters()).device))
                run_call = self._generate if self.smaller is None else self.smaller.around(self)
                return run_call(request, original, args, kwargs)

        return generate

    @contextmanager
    def _call(self) -> Iterator[RequestState]:
        """Around one call: its own state, also for a call made by a streamer or processor of another one."""
        with self.requests.call() as request:
            try:
                yield request
            except BaseException:
                if self.kv is not None:  # torch calls no hook after a KeyboardInterrupt
                    self.kv.abandon()
                raise

    def _generate(
        self, request: RequestState, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        option_of = functools.partial(option, self.model, kwargs)
        rewrite_reason, plan = needs(option_of, cache_in(kwargs)), self.plan
        refuse_call(
            self.model, self.columns, option_of, rewrite_reason, args, kwargs, kv=plan.kv,
            prunes=plan.prune is not None and plan.prune.keep < 1,
            layer_pruner=plan.prune.name if isinstance(plan.prune, LayerPruner) else None,
        )  # fmt: skip
        rewritten = rewrite_reason is not None and request.active
        if self._reuse is not None:
            self._reuse.find(request, kwargs, option_of, plan.kv)
        cache = cache_in(kwargs)
        num_cached = int(cache.get_seq_length()) if cache is not None else 0
        self.columns.lay_out(kwargs)
        input_ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        request.read_prompt(input_ids, kwargs.get("attention_mask"))
        put_loop(
            self.model, plan.speculate, self.requests, args, kwargs, kv=plan.kv,
            asked=plan.asks or self._reuse is not None, rewritten=rewrite_reason if rewritten else None,
            draft=None if self.draft is None else self.draft.requests,
        )  # fmt: skip
        if rewritten:
            generated = self.rewrite.run(original, args, kwargs, option_of, str(rewrite_reason))
        else:
            generated = original(*args, **kwargs)
        if self._reuse is not None:
            self._reuse.store(request)
            request.notes += request.lookup.notes
        self._fill(request, input_ids, generated, num_cached)
        return generated

    def _fill(self, request: RequestState, input_ids: Tensor | None, generated: Any, num_cached: int) -> None:
        """Write the report; raise when a stage had work and did not run."""
        encode_numbers, notes = request.encode_report(), list(request.notes)
        num_visual, num_kept = request.visual_tokens, request.kept_tokens
        prompt_length = 0 if input_ids is None else input_ids.shape[1]
        new_ids = input_ids[:, num_cached:] if input_ids is not None and 0 < num_cached < prompt_length else input_ids
        media_ids = self.columns.ids.values()
        has_media = new_ids is not None and any(bool((new_ids == media_id).any()) for media_id in media_ids)
        if self.plan.prune is not None:
            if not has_media and not num_visual:
                notes.append("prune: no new visual tokens in this call, bypassed")
            elif self.plan.prune.keep >= 1:
                notes += [] if num_visual else ["prune: keep=1 keeps every visual token, bypassed"]
            elif not num_visual:
                raise StageDidNotFire("visual tokens were in the prompt but the pruner never saw them")
            elif num_kept == num_visual and self.smaller is None:
                least_kept = self.plan.prune.least if isinstance(self.plan.prune, Pruner) else 0
                notes.append(why_all_kept(self.plan.prune.name, least_kept, request.media, num_visual))
        num_generated = getattr(generated, "sequences", generated).shape[1] - prompt_length
        prefill_numbers, decode_numbers = self.meter.timings(max(0, num_generated))
        prefill_numbers |= cache_counts(request.cache) | in_milliseconds(request.prefill)
        notes += prefill_numbers.pop("notes", [])  # type: ignore[arg-type]
        notes += request.decode.pop("notes", [])
        if request.prefills > 1:
            notes.append("use_cache=False: every step is a prefill; times are of the first")
        if self.plan.fast_tower and next(self.model.parameters()).is_cuda:
            prefill_numbers["attention"] = "without cuDNN, which plans every new length"
        if self.prefills is not None:
            prefill_numbers |= self.prefills.report()
            notes += self.prefills.notes()
        if self.tower is not None and encode_numbers["encode_ms"]:
            encode_numbers |= self.tower.report()
            notes += self.tower.notes()
        elif self.plan.tower == "fast" and not self.family.tower_loops:
            notes.append("tower: one call a layer already, left as it is")
        read_numbers: dict[str, Any] = {}
        if request.reading is not None:
            read_numbers, notes = request.reading.json(), request.reading.notes + notes
            read_numbers["first_token_ms"] = request.reading.milliseconds() + prefill_numbers["ttft_ms"]
        self.report = Report(encode_numbers, prefill_numbers, decode_numbers | request.decode, notes, read_numbers)

    @property
    def request(self) -> RequestState:
        """The call that runs, else the last one: which media came, what was kept of it."""
        return self.requests.current

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
