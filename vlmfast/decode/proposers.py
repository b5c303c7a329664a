"""Live drafts: what `open` of a draft configuration returns. Each follows the protocol `core.Draft`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmfast.core import NO_STOP, DraftStop
from vlmfast.runtime.stepper import Stepper

Pick = Callable[[Tensor, Tensor], tuple[int, Tensor | None]]


class ModelProposer:
    """A live model draft: one token after the other."""

    def __init__(self, stepper: Stepper, fed: int, stop: frozenset[int], vocab: int, confidence: float) -> None:
        self.stepper, self.fed, self.stop, self.vocab, self.confidence = stepper, fed, stop, vocab, confidence
        self.rows = stepper.embed.weight.shape[0]  # a target may have a few more, unused by the tokenizer
        self.certainty: list[float] = []  # the model's own probability of each token of the last proposal
        self.last = self.fed_tokens = 0  # tokens of the last proposal, and how many of them the model was fed

    def propose(
        self, ids: Tensor, k: int, pick: Pick | None = None, stop: DraftStop = NO_STOP
    ) -> tuple[Tensor, Tensor | None]:
        """See `core.Draft`. Stops early at an end-of-answer token, or where it is not certain enough."""
        self._back(self.fed - (ids.shape[1] - 1))  # an answer may end inside an accepted draft
        new = ids[:, self.fed :].clamp(max=self.rows - 1)
        logits = self.stepper.step(new)[:, -1, : self.vocab]
        self.fed = ids.shape[1]
        tokens: list[int] = []
        probs: list[Tensor] = []
        grown, passes = ids, 1.0
        self.certainty = []
        graded = bool(self.confidence or stop.floor or stop.fallback)
        while True:
            token, q = (int(logits.argmax()), None) if pick is None else pick(grown, logits)
            if graded:
                own = logits[0].softmax(-1)
                sure = float(own[token])
                if stop.fallback and float(own.max()) < stop.fallback:
                    break
                if tokens and sure < self.confidence:
                    break
                self.certainty.append(sure)
                passes *= max(0.0, 1 - stop.refusal * (1 - sure))
            tokens.append(token)
            if q is not None:
                probs.append(q)
            if len(tokens) == k or token in self.stop or passes < stop.floor:
                break
            step = ids.new_full((1, 1), token)  # no copy that a GPU would wait for
            logits = self.stepper.step(step)[:, -1, : self.vocab]
            self.fed += 1
            if pick is not None:
                grown = torch.cat([grown, step], 1)
        self.last = len(tokens)
        self.fed_tokens = self.fed - ids.shape[1]
        return torch.tensor(tokens, dtype=torch.long, device=ids.device), torch.stack(probs) if probs else None

    @property
    def decoder(self) -> Any:
        return self.stepper.decoder

    def rewind(self, n: int) -> None:
        """Forget the last n proposed tokens; the very last was never fed to the model."""
        self._back(self.fed_tokens - (self.last - n))

    def _back(self, n: int) -> None:
        self.stepper.rewind(max(0, n))
        self.fed -= max(0, n)


class NgramProposer:
    """A live prompt lookup: remembers where every n-gram of prompt and output last stood. Host only."""

    decoder = None  # it runs no model

    def __init__(self, ids: list[int], longest: int, shortest: int, banned: frozenset[int]) -> None:
        self.ids: list[int] = []
        self.certainty: list[float] = []
        self.longest, self.shortest, self.banned = longest, shortest, banned
        self.where: dict[tuple[int, ...], int] = {}
        self._extend(ids)

    def _extend(self, new: list[int]) -> None:
        for token in new:
            end = len(self.ids)  # n-grams that end right before this token now have a continuation
            for n in range(self.shortest, min(self.longest, end) + 1):
                gram = tuple(self.ids[end - n :])
                if not self.banned.intersection(gram):
                    self.where[gram] = end
            self.ids.append(token)

    def propose(
        self, ids: Tensor, k: int, pick: Pick | None = None, stop: DraftStop = NO_STOP
    ) -> tuple[Tensor, Tensor | None]:
        """What followed the latest earlier occurrence of the longest n-gram at the end; empty when there is none."""
        self._extend(ids[0, len(self.ids) :].tolist())
        for n in range(min(self.longest, len(self.ids)), self.shortest - 1, -1):
            at = self.where.get(tuple(self.ids[-n:]))
            if at is not None:
                found = self.ids[at : at + k]
                n_allowed = next((i for i, t in enumerate(found) if t in self.banned), len(found))
                if n_allowed:
                    return torch.tensor(found[:n_allowed], device=ids.device), None
        return ids.new_empty(0), None

    def rewind(self, n: int) -> None:
        """Only emitted tokens are remembered: nothing to forget."""


class LookupOrModel:
    """Lookup where it finds something, the model otherwise."""

    def __init__(self, first: NgramProposer, second: ModelProposer) -> None:
        self.first, self.second, self.used = first, second, True

    @property
    def certainty(self) -> list[float]:
        return self.second.certainty if self.used else []

    @property
    def decoder(self) -> Any:
        return self.second.decoder

    def propose(
        self, ids: Tensor, k: int, pick: Pick | None = None, stop: DraftStop = NO_STOP
    ) -> tuple[Tensor, Tensor | None]:
        """The lookup's tokens; the model's when it has none."""
        tokens, probs = self.first.propose(ids, k, pick)
        self.used = tokens.shape[0] == 0
        return self.second.propose(ids, k, pick, stop) if self.used else (tokens, probs)

    def rewind(self, n: int) -> None:
        """Rewind the model when it made the last proposal."""
        if self.used:
            self.second.rewind(n)
