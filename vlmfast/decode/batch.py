"""Several rows decoded together, without a draft: the plain loop of `generate`, stepped by the engine.

Rows that have ended go on with padding until the last one ends, as in transformers' own loop.
"""

from __future__ import annotations

import time
from contextlib import closing, suppress
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from vlmfast import engine
from vlmfast.decode.counters import Counters
from vlmfast.decode.output import split
from vlmfast.runtime.compat import CACHE
from vlmfast.runtime.stepper import Stepper


def decode(
    model: Any, ids: Tensor, processors: Any, criteria: Any, config: Any, streamer: Any, sink: Any, steps: str,
    kwargs: dict[str, Any],
) -> Any:  # fmt: skip
    """ids (B, L) int64 -> what `generate` returns. Arguments as transformers hands them to a `custom_generate`; sink,
    steps: see `loop.build`."""
    limit, eos, rest = split(criteria or [])
    room = 256 if limit is None else min(4096, limit - ids.shape[1] + 2)
    counters, start = Counters(), ids.shape[1]
    target = Stepper.prefill(model, ids, config, kwargs, None, steps, room, engine.open_static)
    run = _Rows(ids, processors, criteria, config, streamer, eos)
    try:
        run.say(target.logits)
        if not run.done:
            counters.engine, counters.reason = target.engine, target.reason
        asked = rest or run.processors or config.do_sample or run.scores is not None or run.logits is not None
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
    if streamer is not None:
        streamer.end()
    if sink is not None:
        sink(counters.numbers(None))
    if not config.return_dict_in_generate:
        return run.ids
    return GenerateDecoderOnlyOutput(sequences=run.ids, scores=run.scores, logits=run.logits, **{CACHE: target.cache})


class _Rows:
    """What was said so far: ids (B, L), which rows go on, scores and logits where they are kept."""

    def __init__(
        self, ids: Tensor, processors: Any, criteria: Any, config: Any, streamer: Any, eos: frozenset[int]
    ) -> None:
        self.ids, self.criteria, self.streamer, self.sampling = ids, criteria, streamer, bool(config.do_sample)
        self.processors = processors if processors is not None and len(processors) else None
        kept = bool(config.return_dict_in_generate)
        self.scores: tuple[Tensor, ...] | None = () if kept and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if kept and config.output_logits else None
        pad = getattr(config, "_pad_token_tensor", None)
        self.pad = int(pad) if eos and pad is not None else 0
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
