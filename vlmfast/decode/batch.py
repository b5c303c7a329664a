"""Several rows decoded together: the plain loop of `generate` stepped by the engine, or the drafted one.

Rows that have ended are padded until the last one ends, as in transformers' own loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from vlmfast import engine
from vlmfast.core import Unsupported
from vlmfast.decode.counters import Counters
from vlmfast.decode.draft_method import Request
from vlmfast.decode.drafted_rows import DraftedRows, why_not
from vlmfast.decode.drafts import PromptLookup
from vlmfast.decode.output import Output, split
from vlmfast.decode.relevance import layers_of
from vlmfast.decode.sampler import Sampler
from vlmfast.decode.self_draft import SelfDraft
from vlmfast.decode.speculate import Speculate
from vlmfast.decode.verification import TokenChooser, host_work, note_host_work, of_row
from vlmfast.runtime.compat import CACHE, cache_in
from vlmfast.runtime.fast_decoder import Layers
from vlmfast.runtime.stepper import Stepper


@dataclass
class Call:
    """One `generate` call of several rows, as transformers hands it to a `custom_generate`; ids (B, L) int64.

    goes_on: does the caller get the cache, to continue it? sink, steps: see `loop.build`.
    """

    model: Any
    ids: Tensor
    processors: Any
    criteria: Any
    config: Any
    kwargs: dict[str, Any]
    streamer: Any = None
    sink: Any = None
    steps: str = "auto"
    goes_on: bool = False

    @property
    def pad(self) -> int:
        """The id that pads rows which have ended."""
        pad_id = getattr(self.config, "_pad_token_tensor", None)
        return 0 if pad_id is None else int(pad_id)

    def prefill(self, room: int, hidden_layers: Layers = ()) -> Stepper:
        """Run the prompts; room: tokens expected after them; hidden_layers: as of `Stepper.prefill`."""
        prompt_length = self.ids.shape[1]
        length_limit, _, _ = split(self.criteria or [])
        max_tokens = 256 if length_limit is None else min(4096, length_limit - prompt_length + room)
        return Stepper.prefill(
            self.model,
            self.ids,
            self.config,
            self.kwargs,
            hidden_layers,
            self.steps,
            max_tokens,
            engine.open_everywhere,
        )

    def result(self, target: Stepper, counters: Counters, rule: str | None, sequences: Tensor, **kept: Any) -> Any:
        """End the streamer, report, and give what `generate` returns."""
        if self.streamer is not None:
            self.streamer.end()
        if self.sink is not None:
            self.sink(counters.numbers(rule))
        if not self.config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(sequences=sequences, **kept, **{CACHE: target.cache})


def decode(
    call: Call, speculate: Speculate, tokenizer: Any, request_of: Callable[[dict[str, Any], frozenset[int]], Request]
) -> Any:
    """What `generate` returns for several rows, drafted where speculate= drafts.

    request_of: of the draft, from the arguments as they are before the prefill and the ids that end an answer. Raises
    Unsupported where rows cannot be drafted; with otherwise="plain" they are decoded without drafts, and it is noted.
    """
    counters = Counters()
    if speculate.draft is None:
        return _plain(call, call.prefill(2), counters)
    _, eos_ids, other_criteria = split(call.criteria or [])
    reason, target = why_not(call.processors, other_criteria, eos_ids), None
    if reason is None:
        cache = cache_in(call.kwargs)
        continued = cache is not None and cache.get_seq_length() > 0
        request: Request | None = request_of(dict(call.kwargs), eos_ids)
        target = call.prefill(speculate.most + 2, layers_of(call.model, speculate.accept))
        reason = _why_not_in_step(target, speculate)
        if reason is None:
            if continued and not (speculate.draft.blind or speculate.draft.of_one_answer):
                counters.notes.append("speculate: the draft did not see the turns before, decoded without it")
                request = None
            request = None if request is None else replace(request, target=target)
            return _drafted(call, speculate, tokenizer, target, counters, request, continued)
    if speculate.otherwise == "refuse":
        raise Unsupported(
            f"{len(call.ids)} rows cannot be drafted together ({reason}): call generate per row, drop speculate=, or "
            "decode such calls without drafts, with Speculate(..., otherwise='plain')"
        )
    counters.notes.append(f"speculate: not for these rows ({reason}), decoded without drafts")
    if target is not None:
        target.hidden, target.hidden_layers = {}, ()
    return _plain(call, target or call.prefill(2), counters)


def _why_not_in_step(target: Stepper, speculate: Speculate) -> str | None:
    """Why rows cannot be drafted over this cache, as a phrase. Where its heads read host memory, all rows hold equally
    many tokens: a round may end before what a row accepted."""
    if target.engine != "static":
        return f"no static step, which takes several rows: {target.reason}"
    if target.decoder.choices is None:
        return None
    if not speculate.accept.lossless:
        return f"heads that read host memory keep rows in step, where {speculate.accept.name} says other tokens"
    if isinstance(speculate.draft, SelfDraft):
        return f"heads that read host memory keep rows in step, and those of {speculate.draft.name} are not"
    return None


def _drafted(
    call: Call, speculate: Speculate, tokenizer: Any, target: Stepper, counters: Counters, request: Request | None,
    continued: bool,
) -> Any:  # fmt: skip
    """Draft and verify; target: after the prefill, with the static step."""
    length_limit, eos_ids, other_criteria = split(call.criteria or [])
    if isinstance(speculate.draft, PromptLookup) and speculate.draft.answers:
        counters.notes.append("speculate: earlier answers are searched for one row alone; these look in their own text")
    accept_rule, sampling = speculate.accept, bool(call.config.do_sample)
    choices = [
        TokenChooser(of_row(call.processors, batch_row), sampling, sampling and accept_rule.draws, accept_rule.graded())
        for batch_row in range(len(call.ids))
    ]
    ends = length_limit, eos_ids, other_criteria
    outputs = [Output(row_ids[None], *ends, None, False, False) for row_ids in call.ids.cpu()]
    pad_id = call.pad if eos_ids else 0
    rows_loop = DraftedRows(call.model, speculate, choices, outputs, target, counters, pad_id, call.streamer)
    try:
        rows_loop.guard(tokenizer, eos_ids, call.ids)
        rows_loop.first()
        if not rows_loop.done:
            counters.engine = target.engine
            rows_loop.go(speculate, request, patient=not (call.goes_on or continued))
    except BaseException:
        with suppress(Exception):  # the caller must get the error that ended the loop
            target.finish()
        raise
    if call.goes_on:
        rows_loop.fill()
    target.finish()
    sequences = torch.cat([call.ids, rows_loop.tokens().to(call.ids.device)], 1)
    return call.result(target, counters, accept_rule.name, sequences, scores=None, logits=None)


def _plain(call: Call, target: Stepper, counters: Counters) -> Any:
    """One token of every row after the other; target: after the prefill."""
    length_limit, eos_ids, other_criteria = split(call.criteria or [])
    rows, prompt_length = _Rows(call, eos_ids), call.ids.shape[1]
    try:
        rows.emit(target.logits)
        if not rows.done:
            counters.engine, counters.reason = target.engine, target.reason
        work = host_work(rows.processors, other_criteria)
        note_host_work(counters.notes, work, counters.engine, target.logits)
        if counters.engine == "static" and work is None and not rows.done:
            tokens_left = None if length_limit is None else length_limit - rows.ids.shape[1]
            sampler = Sampler(
                rows.ids, tokens_left or 256, ~rows.going, rows.processors, other_criteria, rows.sampling, eos_ids,
                rows.pad, (rows.scores is not None, rows.logits is not None),
            )  # fmt: skip
            _follow(rows, sampler, target, counters, tokens_left)
        while not rows.done:
            step_start = time.perf_counter()
            logits = target.step(rows.ids[:, -1:])[:, -1]
            counters.round(0, [], 0.0, (time.perf_counter() - step_start) * 1e3)
            rows.emit(logits)
        counters.captured(target.decoder)
    except BaseException:
        with suppress(Exception):  # the caller must get the error that ended the loop
            _settle(target, prompt_length, rows)
        raise
    _settle(target, prompt_length, rows)
    return call.result(target, counters, None, rows.ids, scores=rows.scores, logits=rows.logits)


class _Rows:
    """What was emitted so far: ids (B, L), which rows have not ended, scores and logits where they are kept."""

    def __init__(self, call: Call, eos_ids: frozenset[int]) -> None:
        input_ids, config = call.ids, call.config
        self.ids, self.criteria, self.streamer = input_ids, call.criteria, call.streamer
        self.sampling = bool(config.do_sample)
        self.processors = call.processors if call.processors is not None and len(call.processors) else None
        returns_dict = bool(config.return_dict_in_generate)
        self.scores: tuple[Tensor, ...] | None = () if returns_dict and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if returns_dict and config.output_logits else None
        self.pad = call.pad if eos_ids else 0
        self.ends = bool(eos_ids)
        self.going = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        self.done = False

    def emit(self, logits: Tensor) -> None:
        """Choose the next token of every row from logits (B, V) float32, as transformers chooses it."""
        scores = logits if self.processors is None else self.processors(self.ids, logits.clone())
        if self.scores is not None:
            self.scores = (*self.scores, scores)
        if self.logits is not None:
            self.logits = (*self.logits, logits)
        if self.sampling:
            tokens = torch.multinomial(scores.softmax(-1), 1)
        else:
            tokens = scores.argmax(-1, keepdim=True)
        if self.ends:
            tokens = tokens.where(self.going[:, None], self.pad)
        self.add(tokens)

    def add(self, tokens: Tensor) -> None:
        """One token (B, 1) of every row."""
        self.ids = torch.cat([self.ids, tokens], 1)
        if self.streamer is not None:
            self.streamer.put(tokens[:, 0].cpu())
        if self.criteria:
            self.going = self.going & ~self.criteria(self.ids, self.scores)
        self.done = not bool(self.going.any())


def _follow(rows: _Rows, sampler: Sampler, target: Stepper, counters: Counters, tokens_left: int | None) -> None:
    """Emit what the device chooses, until every row has ended; it may then have run ahead."""
    step_start, step_tokens = time.perf_counter(), []
    with closing(sampler.run(target, tokens_left)) as choices:
        for chosen in choices:
            step_end = time.perf_counter()
            counters.round(0, [], 0.0, (step_end - step_start) * 1e3)
            step_start = step_end
            step_tokens.append(chosen.tokens)
            if rows.scores is not None:
                rows.scores = (*rows.scores, chosen.kept()[0])
            if rows.logits is not None:
                rows.logits = (*rows.logits, chosen.kept()[1])
            if rows.streamer is not None:
                rows.streamer.put(torch.tensor(chosen.tokens))
            if all(chosen.ended):
                break
    rows.ids = torch.cat([rows.ids, torch.tensor(step_tokens).T.to(rows.ids.device)], 1)
    rows.done = True


def _settle(target: Stepper, prompt_length: int, rows: _Rows) -> None:
    """Leave in the cache what `generate` would: everything emitted but the last token."""
    target.rewind(max(0, target.length - max(prompt_length, rows.ids.shape[1] - 1)))
    target.finish()
