"""What was emitted so far: ids, streamer, stopping. Every emitted token passes here once, in order."""

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
        self._on_host: Tensor | None = None  # the prompt and what was emitted since, once it is asked for
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
    def host_ids(self) -> Tensor:
        """`ids` on the host, where drafts read them: only the first time waits for a GPU. A view on a CPU."""
        if not self.buffer.is_cuda:
            return self.ids
        if self._on_host is None:
            self._on_host = self.ids.cpu()
        missing = self.length - self._on_host.shape[1]
        if missing:
            self._on_host = torch.cat([self._on_host, torch.tensor([self.emitted[-missing:]])], 1)
        return self._on_host

    @property
    def prompt(self) -> Tensor:
        """(1, L) int64; a view."""
        return self.buffer[:, : self.start]

    def left(self) -> int | None:
        """Tokens that may still be emitted."""
        return None if self.limit is None else self.limit - self.length

    def emit(
        self, token: int, scores_and_logits: Callable[[], tuple[Tensor, Tensor]], ended: bool | None = None
    ) -> bool:
        """Add one token; returns (and keeps) whether the answer ends with it.

        scores_and_logits: gives the token's scores and logits, (1, V) each; called where one of them is kept. ended: do
        ids or criteria end the answer? None = they are asked.
        """
        if self.length == self.buffer.shape[1]:
            self.buffer = torch.cat([self.buffer, self.buffer.new_zeros(1, self.length)], 1)
        self.buffer[0, self.length].fill_(token)  # a kernel: an assignment would copy, and wait on a GPU
        self.length += 1
        self.emitted.append(token)
        if self.scores is not None or self.logits is not None:
            token_scores, logits = scores_and_logits()
            self.scores = None if self.scores is None else (*self.scores, token_scores)
            self.logits = None if self.logits is None else (*self.logits, logits)
        is_last = bool(ended) or token in self.eos or (self.limit is not None and self.length >= self.limit)
        for criterion in self.criteria if ended is None else ():
            is_last = bool(torch.as_tensor(criterion(self.ids, self.scores)).all()) or is_last
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token]))
        self.done = is_last
        return is_last


def split(criteria: Any) -> tuple[int | None, frozenset[int], list[Any]]:
    """(length limit, end-of-answer ids, other criteria): the first two need no tensor per token."""
    length_limit: int | None = None
    eos_ids: set[int] = set()
    other_criteria = []
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            length_limit = criterion.max_length if length_limit is None else min(length_limit, criterion.max_length)
        elif type(criterion) is EosTokenCriteria:
            eos_ids |= set(criterion.eos_token_id.reshape(-1).tolist())
        else:
            other_criteria.append(criterion)
    return length_limit, frozenset(eos_ids), other_criteria
