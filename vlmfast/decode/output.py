"""What was said so far: ids, streamer, stopping. Every emitted token passes here once, in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria


class Output:
    """The growing sequence of one row.

    limit: total length at which to stop; eos: ids that end the answer; criteria: the other stopping criteria, called
    as `generate` calls them, with ids (1, L) and the scores kept so far. keep_scores, keep_logits: record per token.
    """

    def __init__(
        self, prompt: Tensor, limit: int | None, eos: frozenset[int], criteria: list[Any], streamer: Any,
        keep_scores: bool, keep_logits: bool,
    ) -> None:  # fmt: skip
        self.start = self.length = prompt.shape[1]
        room = 256 if limit is None else max(1, min(limit - self.start, 4096))
        self.buffer = torch.cat([prompt, prompt.new_zeros(1, room)], 1)
        self.limit, self.eos, self.criteria, self.streamer = limit, eos, criteria, streamer
        self.scores: tuple[Tensor, ...] | None = () if keep_scores else None
        self.logits: tuple[Tensor, ...] | None = () if keep_logits else None
        self.emitted: list[int] = []
        self.done = False

    @property
    def ids(self) -> Tensor:
        """(1, L) int64, prompt and everything emitted; a view."""
        return self.buffer[:, : self.length]

    @property
    def prompt(self) -> Tensor:
        """(1, L) int64; a view."""
        return self.buffer[:, : self.start]

    def left(self) -> int | None:
        """Tokens that may still be emitted."""
        return None if self.limit is None else self.limit - self.length

    def emit(self, token: int, kept: Callable[[], tuple[Tensor, Tensor]]) -> bool:
        """Say one token; returns (and keeps) whether the answer ends with it. kept: scores and logits, (1, V) each."""
        if self.length == self.buffer.shape[1]:
            self.buffer = torch.cat([self.buffer, self.buffer.new_zeros(1, self.length)], 1)
        self.buffer[0, self.length].fill_(token)  # a kernel: an assignment would copy, and wait on a GPU
        self.length += 1
        self.emitted.append(token)
        if self.scores is not None or self.logits is not None:
            score, logits = kept()
            self.scores = None if self.scores is None else (*self.scores, score)
            self.logits = None if self.logits is None else (*self.logits, logits)
        stop = token in self.eos or (self.limit is not None and self.length >= self.limit)
        for criterion in self.criteria:
            stop = bool(torch.as_tensor(criterion(self.ids, self.scores)).all()) or stop
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token]))
        self.done = stop
        return stop


def split(criteria: Any) -> tuple[int | None, frozenset[int], list[Any]]:
    """(length limit, end-of-answer ids, other criteria): the first two need no tensor per token."""
    limit: int | None = None
    eos: set[int] = set()
    rest = []
    for c in criteria:
        if type(c) is MaxLengthCriteria:
            limit = c.max_length if limit is None else min(limit, c.max_length)
        elif type(c) is EosTokenCriteria:
            eos |= set(c.eos_token_id.reshape(-1).tolist())
        else:
            rest.append(c)
    return limit, frozenset(eos), rest
