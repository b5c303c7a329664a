"""Several rows decoded together: the plain loop of `generate` stepped by the engine, or the drafted one.

Rows that have ended go on with padding until the last one ends, as in transformers' own loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from vlmfast import engine
from vlmfast.core import Unsupported
from vlmfast.decode import drafted_rows
from vlmfast.decode.counters import Counters
from vlmfast.decode.drafts import Request
from vlmfast.decode.output import Output, split
from vlmfast.decode.speculate import Speculate
from vlmfast.decode.verification import TokenChooser, of_row
from vlmfast.runtime.compat import CACHE, cache_in
from vlmfast.runtime.stepper import Stepper


@dataclass
class Call:
    """One `generate` call of several rows, as transformers hands it to a `custom_generate`; ids (B, L) int64.

    goes_on: does the caller get the cache? sink, steps: see `loop.build`.
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
        """The id that rows go on with which have ended."""
        pad = getattr(self.config, "_pad_token_tensor", None)
        return 0 if pad is None else int(pad)

    def prefill(self, room: int) -> Stepper:
        """Run the prompts; room: tokens expected after them."""
        start = self.ids.shape[1]
        limit, _, _ = split(self.criteria or [])
        tokens = 256 if limit is None else min(4096, limit - start + room)
        return Stepper.prefill(
            self.model, self.ids, self.config, self.kwargs, None, self.steps, tokens, engine.open_everywhere
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
    _, eos, rest = split(call.criteria or [])
    reason, target = drafted_rows.why_not(call.processors, rest, eos), None
    if reason is None:
        cache = cache_in(call.kwargs)
        continued = cache is not None and cache.get_seq_length() > 0
        request: Request | None = request_of(dict(call.kwargs), eos)
        target = call.prefill(speculate.most + 2)
        if target.engine == "static" and reads_host_memory(target):
            reason = "heads that read host memory choose for all rows at the same token"
        elif target.engine == "static":
            if continued and not speculate.draft.blind:
                counters.notes.append("speculate: the draft did not see the turns before, decoded without it")
                request = None
            return _drafted(call, speculate, tokenizer, target, counters, request, continued)
        else:
            reason = f"no static step, which takes several rows: {target.reason}"
    if speculate.otherwise == "refuse":
        raise Unsupported(
            f"{len(call.ids)} rows cannot be drafted together ({reason}): call generate per row, drop speculate=, or "
            "decode such calls without drafts, with Speculate(..., otherwise='plain')"
        )
    counters.notes.append(f"speculate: not for these rows ({reason}), decoded without drafts")
    return _plain(call, target or call.prefill(2), counters)


def reads_host_memory(target: Stepper) -> bool:
    """Do dynamic heads of the static step choose chunks in host memory?"""
    target.open()
    return target.decoder.choices is not None


def _drafted(
    call: Call, speculate: Speculate, tokenizer: Any, target: Stepper, counters: Counters, request: Request | None,
    continued: bool,
) -> Any:  # fmt: skip
    """Draft and verify; target: after the prefill, with the static step."""
    limit, eos, rest = split(call.criteria or [])
    rule, sampling = speculate.accept, bool(call.config.do_sample)
    choices = [
        TokenChooser(of_row(call.processors, row), sampling, sampling and rule.draws, rule.graded())
        for row in range(len(call.ids))
    ]
    outputs = [Output(ids[None], limit, eos, rest, None, False, False) for ids in call.ids.cpu()]
    pad = call.pad if eos else 0
    run = drafted_rows.DraftedRows(call.model, speculate, choices, outputs, target, counters, pad, call.streamer)
    try:
        run.guard(tokenizer, eos)
        run.first()
        if not run.done:
            counters.engine = target.engine
            run.go(speculate, request, patient=not (call.goes_on or continued))
    except BaseException:
        with suppress(Exception):  # what stopped us is what the caller must hear of
            target.finish()
        raise
    if call.goes_on:
        run.fill()
    target.finish()
    sequences = torch.cat([call.ids, run.tokens().to(call.ids.device)], 1)
    return call.result(target, counters, rule.name, sequences, scores=None, logits=None)


def _plain(call: Call, target: Stepper, counters: Counters) -> Any:
    """One token of every row after the other; target: after the prefill."""
    limit, eos, rest = split(call.criteria or [])
    run, start = _Rows(call, eos), call.ids.shape[1]
    try:
        run.say(target.logits)
        if not run.done:
            counters.engine, counters.reason = target.engine, target.reason
        asked = rest or run.processors or run.sampling or run.scores is not None or run.logits is not None
        if counters.engine == "static" and not asked and len(eos) <= engine.STOPS:
            _follow(run, target, counters, eos, limit)
        while not run.done:
            began = time.perf_counter()
            logits = target.step(run.ids[:, -1:])[:, -1]
            counters.round(0, [], 0.0, (time.perf_counter() - began) * 1e3)
            run.say(logits)
        counters.captured(target.decoder)
    except BaseException:
        with suppress(Exception):  # what stopped us is what the caller must hear of
            _settle(target, start, run)
        raise
    _settle(target, start, run)
    return call.result(target, counters, None, run.ids, scores=run.scores, logits=run.logits)


class _Rows:
    """What was said so far: ids (B, L), which rows go on, scores and logits where they are kept."""

    def __init__(self, call: Call, eos: frozenset[int]) -> None:
        ids, config = call.ids, call.config
        self.ids, self.criteria, self.streamer, self.sampling = (
            ids,
            call.criteria,
            call.streamer,
            bool(config.do_sample),
        )
        self.processors = call.processors if call.processors is not None and len(call.processors) else None
        kept = bool(config.return_dict_in_generate)
        self.scores: tuple[Tensor, ...] | None = () if kept and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if kept and config.output_logits else None
        self.pad = call.pad if eos else 0
        self.ends = bool(eos)
        self.going = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        self.done = False

    def say(self, logits: Tensor) -> None:
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


def _follow(run: _Rows, target: Stepper, counters: Counters, eos: frozenset[int], limit: int | None) -> None:
    """Say what the step chooses, until every row has ended; the step may then have run ahead."""
    if run.done:
        return
    start, said = time.perf_counter(), []
    going = run.going.tolist()
    left = None if limit is None else limit - run.ids.shape[1]
    feed = run.ids[:, -1:].clone()
    with closing(target.greedy(feed, left, eos=eos, pad=run.pad, ended=~run.going)) as choices:
        for chosen in choices:
            now = time.perf_counter()
            counters.round(0, [], 0.0, (now - start) * 1e3)
            start = now
            said.append(chosen.clone())
            if run.streamer is not None:
                run.streamer.put(chosen[:, 0].clone())
            going = [on and token not in eos for on, token in zip(going, chosen[:, 0].tolist(), strict=True)]
            if not any(going):
                break
    run.ids = torch.cat([run.ids, torch.cat(said, 1).to(run.ids.device)], 1)
    run.done = True


def _settle(target: Stepper, start: int, run: _Rows) -> None:
    """Leave in the cache what `generate` would: everything said but the last token."""
    target.rewind(max(0, target.length - max(start, run.ids.shape[1] - 1)))
    target.finish()
