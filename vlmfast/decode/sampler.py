"""Tokens chosen on the device, a step ahead of the host: greedy or sampling, processors and stopping criteria included.

The host reads the tokens of a step while the next one runs. Of an answer that ended meanwhile, that next step is
surplus: its token goes nowhere and its random numbers are given back, so that what is drawn afterwards is what
transformers would draw.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmfast import engine
from vlmfast.engine.graphs import Readback
from vlmfast.runtime.devices import random_generator
from vlmfast.runtime.stepper import Stepper
from vlmfast.runtime.transfers import to_device


@dataclass
class Chosen:
    """One token of every row, read by the host. ended: has the answer ended with it or before? scores, logits: (B, V)
    float32 on the device, after the processors and before, where they are kept."""

    tokens: list[int]
    ended: list[bool]
    scores: Tensor | None = None
    logits: Tensor | None = None

    def kept(self) -> tuple[Tensor, Tensor]:
        """Scores and logits of a call that keeps one of them; what it does not keep is whatever there is."""
        scores = self.logits if self.scores is None else self.scores
        assert scores is not None
        return scores, scores if self.logits is None else self.logits


class Sampler:
    """How the tokens of all rows are chosen and ended, as `generate` does it; nothing in it is read by the host.

    ids (B, L) int64: prompt and what was emitted so far; room: tokens expected after them. ended (B,) bool: rows whose
    answer has ended. processors, criteria: those that `verification.host_work` lets pass. eos_ids: end a row, which
    goes on with pad; without any, a row that a criterion ended goes on unpadded until the last one ends. keeps: are
    scores, are logits kept?
    """

    def __init__(
        self, ids: Tensor, room: int, ended: Tensor, processors: Any, criteria: list[Any], sampling: bool,
        eos_ids: frozenset[int], pad: int, keeps: tuple[bool, bool] = (False, False),
    ) -> None:  # fmt: skip
        self.processors = processors if processors is not None and len(processors) else None
        self.criteria, self.sampling, self.keeps = criteria, sampling, keeps
        self.eos_ids, self.pad, self.ended, self.length = eos_ids, pad, ended, ids.shape[1]
        self._given, self._room = ids, max(1, room)
        self._buffer: Tensor | None = None
        self._eos: Tensor | None = None
        self._random_states: tuple[Tensor, Tensor] | None = None  # before the last draw and after it

    @property
    def in_step(self) -> bool:
        """May the step itself choose, in its graph: the highest logits, and nothing but some ids ends a row?"""
        asked = self.processors is not None or self.criteria or self.sampling or any(self.keeps)
        return not asked and (len(self._given) == 1 or len(self.eos_ids) <= engine.STOPS)

    @property
    def ids(self) -> Tensor:
        """(B, L) int64, a view: the prompt and all tokens chosen so far, also those that the host has not read."""
        return self._given if self._buffer is None else self._buffer[:, : self.length]

    def run(self, target: Stepper, most: int | None) -> Generator[Chosen, None, None]:
        """Feed the last of `ids`, then every token chosen, at most `most`; target: with the static step.

        When the caller stops, `target.length` counts every token fed: a surplus one may be among them.
        """
        return self._chosen_in_step(target, most) if self.in_step else self._chosen_behind_step(target, most)

    def _chosen_in_step(self, target: Stepper, most: int | None) -> Generator[Chosen, None, None]:
        ended = self.ended.tolist() if len(self._given) > 1 else [False]
        options = {"eos": self.eos_ids, "pad": self.pad, "ended": self.ended} if len(ended) > 1 else {}
        with closing(target.greedy(self._given[:, -1:].clone(), most, **options)) as choices:
            for chosen in choices:
                tokens = chosen[:, 0].tolist()
                ended = [before or token in self.eos_ids for before, token in zip(ended, tokens, strict=True)]
                yield Chosen(tokens, ended)

    def _chosen_behind_step(self, target: Stepper, most: int | None) -> Generator[Chosen, None, None]:
        tokens, num_fed, queued = self.ids[:, -1:], 0, deque[Chosen]()
        ahead = 1 if tokens.is_cuda else 0  # on a CPU a surplus step costs what a step costs
        readback: Readback | None = None
        with target.rows() as decoder:
            try:
                for num_read in itertools.count() if most is None else range(most):
                    wanted = num_read + 1 + ahead
                    while num_fed < (wanted if most is None else min(most, wanted)):
                        with torch.inference_mode():
                            logits = decoder.step_rows(tokens)[:, -1]
                        tokens, chosen = self._choose(logits.to(torch.float32, copy=True))
                        sent = torch.cat([tokens, self.ended[:, None]], 1)
                        readback = readback or Readback(sent)
                        readback.source = sent
                        readback.send(num_fed)
                        queued.append(chosen)
                        num_fed += 1
                    assert readback is not None
                    chosen, read_rows = queued.popleft(), readback.read(num_read).tolist()
                    chosen.tokens, chosen.ended = [row[0] for row in read_rows], [bool(row[1]) for row in read_rows]
                    yield chosen
            finally:
                self._take_back(len(queued))

    def _choose(self, logits: Tensor) -> tuple[Tensor, Chosen]:
        """logits (B, V) float32 -> the next token of every row (B, 1), and what is kept of it."""
        scores = logits if self.processors is None else self.processors(self.ids, logits)
        if self.sampling:
            generator = random_generator(logits.device)
            state_before = generator.get_state()
            tokens = torch.multinomial(scores.softmax(-1), 1)
            self._random_states = state_before, generator.get_state()
        else:
            tokens = scores.argmax(-1, keepdim=True)
        if self.eos_ids and len(tokens) > 1:
            tokens = tokens.where(~self.ended[:, None], self.pad)
        self._append(tokens)
        if self.eos_ids:
            if self._eos is None:
                self._eos = to_device(torch.tensor([sorted(self.eos_ids)]), tokens.device)
            self.ended = self.ended | (tokens == self._eos).any(1)
        for criterion in self.criteria:
            self.ended = self.ended | criterion(self.ids, None)
        keeps_scores, keeps_logits = self.keeps
        return tokens, Chosen([], [], scores if keeps_scores else None, logits if keeps_logits else None)

    def _append(self, tokens: Tensor) -> None:
        buffer, length = self._buffer, self.length
        if buffer is None or length == buffer.shape[1]:
            more = self._room if buffer is None else length
            buffer = torch.cat([self.ids, tokens.new_zeros(len(tokens), more)], 1)
        buffer[:, length : length + 1].copy_(tokens)
        self._buffer, self.length = buffer, length + 1

    def _take_back(self, surplus: int) -> None:
        """Give the random numbers of a surplus step back, unless someone else has drawn since."""
        generator = random_generator(self.ended.device)
        if surplus == 1 and self._random_states is not None:
            state_before, state_after = self._random_states
            if torch.equal(generator.get_state(), state_after):
                generator.set_state(state_before)
