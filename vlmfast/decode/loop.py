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
from dataclasses import replace
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
from vlmfast.decode.ahead import COUNTS, AheadProposer, open_ahead
from vlmfast.decode.counters import Counters
from vlmfast.decode.draft_length import controller_of
from vlmfast.decode.draft_method import Request
from vlmfast.decode.output import Output, split
from vlmfast.decode.preconditions import check, constrain, tokenizer_for
from vlmfast.decode.relevance import Relevances, layers_of, open_relevances
from vlmfast.decode.sampler import Sampler
from vlmfast.decode.speculate import Speculate
from vlmfast.decode.strict_tokens import strict_tokens
from vlmfast.decode.verification import TokenChooser, VerifiedLogits, host_work, note_host_work
from vlmfast.runtime.clock import clock
from vlmfast.runtime.compat import CACHE, cache_in
from vlmfast.runtime.request_state import Requests
from vlmfast.runtime.stepper import Stepper
from vlmfast.runtime.transfers import to_device
from vlmfast.runtime.working_set_prompt import read_prompt

__all__ = ["build", "check", "constrain"]

_KEPT: weakref.WeakKeyDictionary[Any, tuple[Any, Draft | None]] = weakref.WeakKeyDictionary()  # opened drafts by cache


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
    media = {name: value for name, value in inputs.items() if isinstance(value, Tensor) or name == "mm_encoder_outputs"}

    def custom_generate(
        model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        goes_on = bool(generation_config.return_dict_in_generate) or cache_in(inputs) is not None
        request = Request(
            model, input_ids, generation_config, {}, media, requests, _fresh_cache, draft, steps=steps,
            processors=logits_processor, tokenizer=tokenizer,
        )  # fmt: skip
        if input_ids.shape[0] != 1:
            call = batch.Call(
                model, input_ids, logits_processor, stopping_criteria, generation_config, kwargs, streamer, sink, steps,
                goes_on,
            )  # fmt: skip

            def request_of(before: dict[str, Any], eos: frozenset[int]) -> Request:
                return replace(request, model_kwargs=before, stop=eos, steps="static")

            return batch.decode(call, speculate, tokenizer, request_of)
        generation, (length_limit, eos_ids, other_criteria) = generation_config, split(stopping_criteria or [])
        returns_dict = bool(generation.return_dict_in_generate)
        keep_scores = returns_dict and bool(generation.output_scores)
        keep_logits = returns_dict and bool(generation.output_logits)
        output = Output(input_ids, length_limit, eos_ids, other_criteria, streamer, keep_scores, keep_logits)
        row_loop = _Run(model, speculate, generation, output, goes_on)
        row_loop.steps = steps
        chooser = TokenChooser(logits_processor, row_loop.sampling, row_loop.drawn, row_loop.rule.graded())
        cache = row_loop.go(chooser, replace(request, model_kwargs=dict(kwargs), stop=eos_ids), kwargs)
        if streamer is not None:
            streamer.end()
        if sink is not None:
            sink(row_loop.counters.numbers(None if speculate.draft is None else speculate.accept.name))
        output_ids = output.ids.clone()
        if not returns_dict:
            return output_ids
        return GenerateDecoderOnlyOutput(
            sequences=output_ids, scores=output.scores, logits=output.logits, **{CACHE: cache}
        )

    return custom_generate


class _Run:
    """One call of one row: the state of the loop. goes_on: the caller gets the cache, to continue it."""

    def __init__(self, model: Any, speculate: Speculate, config: Any, out: Output, goes_on: bool = False) -> None:
        self.model, self.speculate, self.config, self.out, self.goes_on = model, speculate, config, out, goes_on
        self.steps = "auto"
        self.rule = speculate.accept
        self.sampling = bool(config.do_sample)
        self.drawn = self.sampling and self.rule.draws
        self.counters = Counters()
        self.counters.ahead = dict(COUNTS) if speculate.ahead else {}
        self.draft: Draft | None = None
        self.ahead: AheadProposer | None = None  # the draft, where it drafts ahead
        self.relevances: Relevances | None = None
        self.strict: Tensor | None = None
        self.random: torch.Generator | None = None
        self.controller = None if speculate.draft is None else controller_of(model, speculate)

    def go(self, choice: TokenChooser, request: Request, kwargs: dict[str, Any]) -> Any:
        """Prefill, decode, and hand back the cache, cropped to what `generate` would leave."""
        output, self.choice = self.out, choice
        cache = cache_in(kwargs)
        continued = cache is not None and cache.get_seq_length() > 0
        max_tokens = 256 if output.limit is None else min(4096, output.limit - output.start + self.speculate.most + 2)
        target, draft_config = None, self.speculate.draft
        layers = () if draft_config is None else layers_of(self.model, self.rule)
        log = None if draft_config is None else draft_config.log(self.model)
        if not layers and log is None and self.steps == "auto":
            target = read_prompt(self.model, output.ids, kwargs, max_tokens, engine.open_static)
        if target is None:
            target = Stepper.prefill(
                self.model, output.ids, self.config, kwargs, layers, self.steps, max_tokens, engine.open_static,
                log=log,
            )  # fmt: skip
        try:
            first_logits = VerifiedLogits(choice, output.ids, None, target.logits)
            output.emit(first_logits.pick(0), partial(first_logits.kept, 0))  # the first token waits for no draft
            draft_waits, num_waited = self.controller is not None, 0
            if not output.done:
                self.counters.engine, self.counters.reason = target.engine, target.reason
                if self.controller is None:
                    note_host_work(self.counters.notes, self._host_work(), target.engine, target.logits)
            if self.controller is not None and not output.done:
                self._prepare(request.tokenizer, target)
                num_waited = 0 if self.goes_on or continued else self.controller.wait()
            start = time.perf_counter()
            while not output.done:
                if draft_waits and len(output.emitted) > num_waited:
                    self._open(replace(request, target=target), target.cache, continued)
                    draft_waits = False
                if self._chosen_on_device(target):
                    self._follow(target)
                else:
                    self._round(target)
            if self.ahead is not None:
                self.ahead.join()
            total_ms, times = (time.perf_counter() - start) * 1e3, self.counters.times
            times["overhead_ms"] = total_ms - times["draft_ms"] - times["verify_ms"] - times["draft_prefill_ms"]
            if self.controller is not None:
                self.controller.answered(len(output.emitted) - 1, times["draft_prefill_ms"])
                self.speculate.draft.ended(request, output.emitted)
            self.counters.captured(target.decoder, None if self.draft is None else self.draft.decoder)
            if num_waited:
                self.counters.notes.append(
                    f"speculate: drafts did not pay in recent answers, none for {num_waited + 1} tokens"
                )
        except BaseException:
            with suppress(Exception):  # the caller must get the error that ended the loop
                self._settle(target)
            raise
        self._settle(target)
        return target.cache

    def _settle(self, target: Stepper) -> None:
        """Leave in the cache what `generate` would: everything emitted but the last token."""
        if self.ahead is not None:
            self.ahead.close()
        target.rewind(max(0, target.length - max(self.out.start, self.out.length - 1)))
        target.finish()

    # -- before the first token ------------------------------------------------------------------------------------

    def _prepare(self, tokenizer: Any, target: Stepper) -> None:
        """Make what the rule needs: relevance to the media, tokens never loosened, random numbers."""
        accept_rule, eos_ids = self.rule, self.out.eos
        self.relevances = open_relevances(self.model, accept_rule, self.out.prompt, target, self.counters.notes)
        if accept_rule.lossless:
            return
        guarded_eos = eos_ids if accept_rule.eos else frozenset()
        if accept_rule.word_classes() or guarded_eos:
            vocabulary_size = target.logits.shape[-1]
            self.strict = strict_tokens(tokenizer, accept_rule.word_classes(), guarded_eos, vocabulary_size)
        self.random = torch.Generator().manual_seed(accept_rule.seed)

    def _open(self, request: Request, cache: Any, continued: bool) -> None:
        """Open the draft; on a cache that is continued, take the one opened in the turns before."""
        draft_config, start = self.speculate.draft, time.perf_counter()
        kept_draft = None if draft_config.of_one_answer else _KEPT.get(cache)
        if continued and kept_draft is not None and kept_draft[0] is draft_config:
            self.draft = kept_draft[1]
            if any(value.is_floating_point() for value in request.inputs.values() if isinstance(value, Tensor)):
                self.counters.notes.append("speculate: the draft does not see the new media of this turn")
        elif continued and not (draft_config.blind or draft_config.of_one_answer):
            self.counters.notes.append("speculate: the draft did not see the turns before, decoded without it")
        else:
            self.draft = draft_config.open(request)
        if continued and request.target is not None and request.target.log is not None:
            self.counters.notes.append("speculate: the head reads the states of this turn, not of those before")
        if not draft_config.of_one_answer:
            _KEPT[cache] = (draft_config, self.draft)
        if self.speculate.ahead:
            self.ahead = open_ahead(self.draft, self.counters)
            self.draft = self.ahead or self.draft
        self.counters.times["draft_prefill_ms"] = (time.perf_counter() - start) * 1e3

    # -- tokens ----------------------------------------------------------------------------------------------------

    def _propose(self) -> tuple[Tensor | None, Tensor | None]:
        """At most as many tokens as may still be emitted, less the one that the target itself adds."""
        if self.draft is None or self.controller is None:
            return None, None
        if self.ahead is not None:
            self.ahead.join()
        max_tokens, tokens_left = self.controller.length(), self.out.left()
        if tokens_left is not None:
            max_tokens = min(max_tokens, tokens_left - 1)
        if max_tokens <= 0:
            return None, None
        draft_stop = DraftStop(self.controller.floor(), self.controller.refusal, self.rule.fallback)
        pick_token = None if self.choice.plain else self.choice.for_draft
        tokens, draft_probs = self.draft.propose(self.out.host_ids, max_tokens, pick_token, draft_stop)
        return (tokens.cpu() if tokens.shape[0] else None), draft_probs

    def _chosen_on_device(self, target: Stepper) -> bool:
        """May the device choose every token, the host only following it?"""
        return target.engine == "static" and self.controller is None and self._host_work() is None

    def _host_work(self) -> str | None:
        """What the host is asked for at every token."""
        return host_work(self.choice.processors, self.out.criteria)

    def _follow(self, target: Stepper) -> None:
        """Emit what the device chooses, until the answer ends; it may then have run ahead."""
        output, step_start = self.out, time.perf_counter()
        sampler = Sampler(
            output.ids, output.left() or 256, torch.zeros(1, dtype=torch.bool, device=output.ids.device),
            self.choice.processors, output.criteria, self.sampling, output.eos, 0,
            (output.scores is not None, output.logits is not None),
        )  # fmt: skip
        with closing(sampler.run(target, output.left())) as choices:
            for chosen in choices:
                step_end = time.perf_counter()
                self.counters.round(0, [], 0.0, (step_end - step_start) * 1e3)
                step_start = step_end
                if output.emit(chosen.tokens[0], chosen.kept, chosen.ended[0]):
                    break

    def _round(self, target: Stepper) -> None:
        output = self.out
        round_start = time.perf_counter()
        draft, draft_probs = self._propose()
        last_id = output.ids[:, -1:]
        proposed_at = time.perf_counter()
        drafted_ids = None if draft is None else to_device(draft, last_id.device)
        ahead = None if draft is None else self.ahead
        if ahead is not None and self.controller is not None:
            ahead.begin(self.controller.next_length(), output.left())
        logits = target.step(last_id if drafted_ids is None else torch.cat([last_id, drafted_ids[None]], 1))[0]
        if ahead is not None:
            ahead.launched()
        verified = VerifiedLogits(self.choice, output.ids, drafted_ids, logits)  # reads the best tokens, in greedy
        drawn_on_device = verified.drawn_by(self.rule)
        if logits.is_cuda and not verified.picked and not drawn_on_device:
            clock(self.model)  # the choice would wait for the step in any case
        if ahead is not None:
            ahead.verified()
        stepped_at = time.perf_counter()
        if draft is None:
            verdict = rules.Verdict([], verified.pick(0))
        else:
            verdict = self.rule.judge(self._view(verified, draft, draft_probs, target))
        if drawn_on_device:  # the choice has waited for the step
            stepped_at = time.perf_counter()
        draft_ms, verify_ms = (proposed_at - round_start) * 1e3, (stepped_at - proposed_at) * 1e3
        num_drafted, accepted = 0 if draft is None else draft.shape[0], len(verdict.kinds)
        passed = [] if draft is None else draft[:accepted].tolist()
        for position, token in enumerate([*passed, verdict.next]):
            if output.emit(token, partial(verified.kept, position)):
                break
        self.counters.round(num_drafted, verdict.kinds, draft_ms, verify_ms)
        if draft is None or self.draft is None or self.controller is None:
            if self.controller is not None:
                self.controller.record_round(0, 0, draft_ms, verify_ms)
            return
        hidden_ms = 0.0 if ahead is None else ahead.hidden_ms
        self.controller.record_round(num_drafted, accepted, draft_ms, verify_ms, self.draft.certainty, hidden_ms)
        self.draft.rewind(num_drafted - accepted)
        target.rewind(num_drafted - accepted)

    def _view(
        self, verified: VerifiedLogits, draft: Tensor, draft_probs: Tensor | None, target: Stepper
    ) -> rules.Round:
        relevance, past_relevance = None, None
        if self.relevances is not None:
            ((relevance, past_relevance),) = self.relevances.of(target.hidden, [draft.shape[0]])
        return rules.Round(
            draft, verified.score, verified.pick, self.sampling, verified.widened(draft_probs), self.out.emitted,
            relevance, past_relevance, self.strict, self.random, verified.batch,
        )  # fmt: skip


def _fresh_cache(model: Any) -> Any:
    return DynamicCache(config=families.get(model).text(model).config)
