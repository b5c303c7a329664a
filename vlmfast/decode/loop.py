"""One draft-verify loop behind the ordinary `generate`: greedy or sampling, with or without a draft.

`generate` prepares everything and calls what `build` returned (its `custom_generate`). A round: the draft proposes
d_1..d_k; the target reads the last emitted token and the draft in one forward; the rule lets a prefix through and names
the token after it; both caches go back to exactly what was emitted. Without a draft k = 0: our own plain loop.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation import GenerateDecoderOnlyOutput, StopStringCriteria

from vlmfast import engine, families
from vlmfast.core import Draft, DraftStop
from vlmfast.decode import accept as rules
from vlmfast.decode import batch
from vlmfast.decode.counters import Counters
from vlmfast.decode.draft_length import controller_of
from vlmfast.decode.drafts import Request
from vlmfast.decode.output import Output, split
from vlmfast.decode.preconditions import check, tokenizer_for
from vlmfast.decode.relevance import collect
from vlmfast.decode.speculate import Speculate
from vlmfast.decode.strict_tokens import strict_tokens
from vlmfast.decode.verification import TokenChooser, VerifiedLogits
from vlmfast.runtime.cache_state import VisualMemory
from vlmfast.runtime.clock import clock
from vlmfast.runtime.compat import CACHE, cache_in
from vlmfast.runtime.request_state import Requests
from vlmfast.runtime.stepper import Stepper
from vlmfast.runtime.working_set_prompt import read_prompt

__all__ = ["build", "check"]

_KEPT: weakref.WeakKeyDictionary[Any, tuple[Any, Draft | None]] = weakref.WeakKeyDictionary()  # live drafts by cache


def build(
    model: Any,
    speculate: Speculate,
    *,
    streamer: Any = None,
    requests: Requests | None = None,
    draft: Requests | None = None,
    inputs: dict[str, Any] | None = None,
    sink: Callable[[dict[str, Any]], Any] | None = None,
    steps: str = "auto",
) -> Callable[..., Any]:
    """The `custom_generate` callable of one `generate` call.

    streamer: the one given to `generate` (transformers hands none to a callable); requests: the calls of the
    accelerated target, needed by SelfDraft; draft: those of an accelerated draft model (its hooks do the work); inputs:
    the keyword arguments of the call, for the draft's own encoder; sink: receives the numbers of the report; steps: the
    engine of target and draft, see `Stepper.prefill`. Also moves `stop_strings` out of `inputs` into
    `stopping_criteria`: transformers loses the tokenizer on the way to a callable. Several rows: see `batch`.
    """
    inputs = {} if inputs is None else inputs
    if inputs.get("stop_strings") is not None and inputs.get("tokenizer") is not None:
        criterion = StopStringCriteria(tokenizer=inputs["tokenizer"], stop_strings=inputs.pop("stop_strings"))
        inputs["stopping_criteria"] = [*(inputs.get("stopping_criteria") or []), criterion]
    tokenizer = tokenizer_for(model, speculate, inputs)
    media = {k: v for k, v in inputs.items() if isinstance(v, Tensor) or k == "mm_encoder_outputs"}

    def custom_generate(
        model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        goes_on = bool(generation_config.return_dict_in_generate) or cache_in(inputs) is not None
        if input_ids.shape[0] != 1:
            call = batch.Call(
                model, input_ids, logits_processor, stopping_criteria, generation_config, kwargs, streamer, sink, steps,
                goes_on,
            )  # fmt: skip

            def request_of(before: dict[str, Any], eos: frozenset[int]) -> Request:
                return Request(
                    model, input_ids, generation_config, before, media, requests, _fresh_cache, draft, eos, "static"
                )

            return batch.decode(call, speculate, tokenizer, request_of)
        config, (limit, eos, rest) = generation_config, split(stopping_criteria or [])
        kept = bool(config.return_dict_in_generate)
        scores, logits = kept and bool(config.output_scores), kept and bool(config.output_logits)
        out = Output(input_ids, limit, eos, rest, streamer, scores, logits)
        run = _Run(model, speculate, config, out, goes_on)
        run.steps = steps
        cache = run.go(
            TokenChooser(logits_processor, run.sampling, run.drawn, run.rule.graded()),
            tokenizer,
            (requests, draft),
            media,
            kwargs,
        )
        if streamer is not None:
            streamer.end()
        if sink is not None:
            sink(run.counters.numbers(None if speculate.draft is None else speculate.accept.name))
        ids = out.ids.clone()
        if not kept:
            return ids
        return GenerateDecoderOnlyOutput(sequences=ids, scores=out.scores, logits=out.logits, **{CACHE: cache})

    return custom_generate


class _Run:
    """One call of one row: the state of the loop. goes_on: the caller gets the cache, for another turn perhaps."""

    def __init__(self, model: Any, speculate: Speculate, config: Any, out: Output, goes_on: bool = False) -> None:
        self.model, self.speculate, self.config, self.out, self.goes_on = model, speculate, config, out, goes_on
        self.steps = "auto"
        self.rule = speculate.accept
        self.sampling = bool(config.do_sample)
        self.drawn = self.sampling and self.rule.draws
        self.counters = Counters()
        self.draft: Draft | None = None
        self.memory: VisualMemory | None = None
        self.past: list[Tensor] = []  # relevance of every position so far, where the rule asks for it
        self.strict: Tensor | None = None
        self.random: torch.Generator | None = None
        self.controller = None if speculate.draft is None else controller_of(model, speculate)

    def go(
        self,
        choice: TokenChooser,
        tokenizer: Any,
        hooks: tuple[Requests | None, Requests | None],
        media: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> Any:
        """Prefill, decode, and hand back the cache, cropped to what `generate` would leave."""
        out, self.choice = self.out, choice
        cache = cache_in(kwargs)
        continued = cache is not None and cache.get_seq_length() > 0
        before = dict(kwargs)
        room = 256 if out.limit is None else min(4096, out.limit - out.start + self.speculate.most + 2)
        target = None
        if self._layer() is None and self.steps == "auto":
            target = read_prompt(self.model, out.ids, kwargs, room, engine.open_static)
        if target is None:
            target = Stepper.prefill(
                self.model, out.ids, self.config, kwargs, self._layer(), self.steps, room, engine.open_static
            )
        try:
            rows = VerifiedLogits(choice, out.ids, None, target.logits)
            out.emit(rows.pick(0), partial(rows.kept, 0))  # the first token waits for no draft
            waiting, wait = self.controller is not None, 0
            if not out.done:
                self.counters.engine, self.counters.reason = target.engine, target.reason
            if self.controller is not None and not out.done:
                self._prepare(tokenizer, target)
                wait = 0 if self.goes_on or continued else self.controller.wait()
            start = time.perf_counter()
            while not out.done:
                if waiting and len(out.emitted) > wait:
                    self._open(*hooks, media, target.cache, before, continued)
                    waiting = False
                if self._chosen_by_step(target):
                    self._follow(target)
                else:
                    self._round(target)
            total, times = (time.perf_counter() - start) * 1e3, self.counters.times
            times["overhead_ms"] = total - times["draft_ms"] - times["verify_ms"] - times["draft_prefill_ms"]
            if self.controller is not None:
                self.controller.answered(len(out.emitted) - 1, times["draft_prefill_ms"])
            self.counters.captured(target.decoder, None if self.draft is None else self.draft.decoder)
            if wait:
                self.counters.notes.append(
                    f"speculate: drafts did not pay in recent answers, none for {wait + 1} tokens"
                )
        except BaseException:
            with suppress(Exception):  # what stopped us is what the caller must hear of
                self._settle(target)
            raise
        self._settle(target)
        return target.cache

    def _settle(self, target: Stepper) -> None:
        """Leave in the cache what `generate` would: everything emitted but the last token."""
        target.rewind(max(0, target.length - max(self.out.start, self.out.length - 1)))
        target.finish()

    # -- before the first token ------------------------------------------------------------------------------------

    def _layer(self) -> int | None:
        if self.speculate.draft is None or not self.rule.visual:
            return None
        return self.rule.seeing().layer % len(families.get(self.model).layers(self.model))

    def _prepare(self, tokenizer: Any, target: Stepper) -> None:
        """What the rule needs."""
        rule, ids, stop = self.rule, self.out.prompt, self.out.eos
        if rule.visual:
            visual = list(families.get(self.model).visual_ids(self.model).values())
            self.memory = collect(target.hidden, target.cache, ids, visual, rule.seeing().top, self._layer() or 0)
            if self.memory is None:
                self.counters.notes.append(f"speculate: no visual tokens, {rule.name} verified strictly")
        if rule.lossless:
            return
        eos = stop if rule.eos else frozenset()
        if rule.words() or eos:
            self.strict = strict_tokens(tokenizer, rule.words(), eos, target.logits.shape[-1]).to(ids.device)
        self.random = torch.Generator().manual_seed(rule.seed)

    def _open(
        self, requests: Requests | None, of_draft: Requests | None, media: dict[str, Any], cache: Any,
        kwargs: dict[str, Any], continued: bool,
    ) -> None:  # fmt: skip
        """Make the draft live; on a cache that is continued, the one of the turns before goes on."""
        config, start = self.speculate.draft, time.perf_counter()
        kept = _KEPT.get(cache)
        if continued and kept is not None and kept[0] is config:
            self.draft = kept[1]
            if any(v.is_floating_point() for v in media.values() if isinstance(v, Tensor)):
                self.counters.notes.append("speculate: the draft does not see the new media of this turn")
        elif continued and not config.blind:
            self.counters.notes.append("speculate: the draft did not see the turns before, decoded without it")
        else:
            request = Request(
                self.model, self.out.prompt, self.config, kwargs, media, requests, _fresh_cache, of_draft,
                self.out.eos, self.steps,
            )  # fmt: skip
            self.draft = config.open(request)
        _KEPT[cache] = (config, self.draft)
        self.counters.times["draft_prefill_ms"] = (time.perf_counter() - start) * 1e3

    # -- tokens ----------------------------------------------------------------------------------------------------

    def _propose(self) -> tuple[Tensor | None, Tensor | None]:
        """At most as many tokens as may still be said, the target's own last word excluded."""
        if self.draft is None or self.controller is None:
            return None, None
        k, left = self.controller.length(), self.out.left()
        if left is not None:
            k = min(k, left - 1)
        if k <= 0:
            return None, None
        stop = DraftStop(self.controller.floor(), self.controller.refusal, self.rule.fallback)
        tokens, q = self.draft.propose(self.out.ids, k, None if self.choice.plain else self.choice.for_draft, stop)
        return (tokens if tokens.shape[0] else None), q

    def _chosen_by_step(self, target: Stepper) -> bool:
        """May the step itself choose every token, the host only following it? Nothing but the ids is asked for then."""
        out = self.out
        asked = self.controller is not None or self.sampling or self.choice.processors is not None or out.criteria
        return target.engine == "static" and not asked and out.scores is None and out.logits is None

    def _follow(self, target: Stepper) -> None:
        """Say what the step chooses, until the answer ends; the step may then have run ahead."""
        out, start = self.out, time.perf_counter()
        with closing(target.greedy(out.emitted[-1], out.left())) as tokens:
            for token in map(int, tokens):
                now = time.perf_counter()
                self.counters.round(0, [], 0.0, (now - start) * 1e3)
                start = now
                if out.emit(token, _nothing):
                    break

    def _round(self, target: Stepper) -> None:
        out = self.out
        t0 = time.perf_counter()
        draft, q = self._propose()
        last = out.ids[:, -1:]
        t1 = time.perf_counter()
        logits = target.step(last if draft is None else torch.cat([last, draft[None]], 1))[0]
        if logits.is_cuda:
            clock(self.model)  # the choice would wait for the step in any case
        t2 = time.perf_counter()
        rows = VerifiedLogits(self.choice, out.ids, draft, logits)
        draft_ms, verify_ms = (t1 - t0) * 1e3, (t2 - t1) * 1e3
        if draft is None:
            out.emit(rows.pick(0), partial(rows.kept, 0))
            self.counters.round(0, [], draft_ms, verify_ms)
            if self.controller is not None:
                self.controller.record_round(0, 0, draft_ms, verify_ms)
            return
        k = draft.shape[0]
        verdict = self.rule.judge(self._view(rows, draft, q, target))
        accepted = len(verdict.kinds)
        for i, token in enumerate([*draft[:accepted].tolist(), verdict.next]):
            if out.emit(token, partial(rows.kept, i)):
                break
        self.counters.round(k, verdict.kinds, draft_ms, verify_ms)
        assert self.draft is not None and self.controller is not None
        self.controller.record_round(k, accepted, draft_ms, verify_ms, self.draft.certainty)
        self.draft.rewind(k - accepted)
        target.rewind(k - accepted)

    def _view(self, rows: VerifiedLogits, draft: Tensor, q: Tensor | None, target: Stepper) -> rules.Round:
        relevance: Any = None
        past = None
        k, size = draft.shape[0], rows.logits.shape[-1]
        if self.memory is not None and target.hidden is not None:
            first = 1 if self.rule.seeing().offset == "self" else 0
            relevance = partial(self.memory.score, target.hidden[0, first : first + k])
            if self.rule.seeing().scope == "running":
                relevance, past = relevance(), torch.cat(self.past) if self.past else None
                self.past.append(relevance)
        if q is not None and q.shape[-1] < size:
            q = torch.nn.functional.pad(q, (0, size - q.shape[-1]))
        return rules.Round(
            draft, rows.score, rows.pick, self.sampling, q, self.out.emitted, relevance, past, self.strict, self.random
        )


def _nothing() -> tuple[Tensor, Tensor]:
    raise AssertionError("scores were asked for of a step that keeps none")


def _fresh_cache(model: Any) -> Any:
    return DynamicCache(config=families.get(model).text(model).config)
