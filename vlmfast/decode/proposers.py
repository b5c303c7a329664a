"""Proposers: what `open` of a draft configuration returns. Each follows the protocol `core.Draft`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmfast.core import NO_STOP, DraftStop
from vlmfast.runtime.draft_head import HeadStepper
from vlmfast.runtime.early_exit import EarlyExit
from vlmfast.runtime.stepper import Stepper
from vlmfast.runtime.transfers import to_device

Pick = Callable[[Tensor, Tensor], tuple[int, Tensor | None]]


def _never() -> bool:
    return False


@dataclass
class Drafted:
    """Tokens as they are drafted, what each was chosen from, and the model's own probability of each.

    unsure: it ended because the model was not certain enough of the next one.
    """

    tokens: list[int] = field(default_factory=list)
    probs: list[Tensor] = field(default_factory=list)
    certainty: list[float] = field(default_factory=list)
    unsure: bool = False

    def part(self, start: int, end: int) -> Drafted:
        """The tokens from `start` on, before `end`."""
        span, cut = slice(start, end), end < len(self.tokens)
        return Drafted(self.tokens[span], self.probs[span], self.certainty[span], self.unsure and not cut)


class ModelProposer:
    """Proposes by a model, one token after the other.

    ahead: what `draft_ahead` drafted, and how many tokens of text stood before it; reused: tokens of the last proposal
    that came from there.
    """

    def __init__(
        self, stepper: Stepper | EarlyExit | HeadStepper, fed: int, stop: frozenset[int], vocab: int, confidence: float
    ) -> None:
        self.stepper, self.fed, self.stop, self.vocab, self.confidence = stepper, fed, stop, vocab, confidence
        self.rows = stepper.embed.weight.shape[0]  # a target may have a few more, unused by the tokenizer
        self.certainty: list[float] = []  # the model's own probability of each token of the last proposal
        self.start, self.last = fed, 0  # tokens of text before the last proposal, and of the proposal
        self.ahead: tuple[int, Drafted] | None = None
        self.reused = 0

    def propose(
        self, ids: Tensor, max_tokens: int, pick_token: Pick | None = None, draft_stop: DraftStop = NO_STOP
    ) -> tuple[Tensor, Tensor | None]:
        """See `core.Draft`. Stops early at an end-of-answer token, or where it is not certain enough."""
        drafted = self._drafted_ahead(ids, max_tokens)
        self.reused = len(drafted.tokens)
        self._draft(ids, drafted, max_tokens, pick_token, draft_stop)
        self.start, self.last = ids.shape[1], len(drafted.tokens)
        self.certainty = drafted.certainty if len(drafted.certainty) == self.last else []
        proposed = torch.tensor(drafted.tokens, dtype=torch.long)
        return proposed, torch.stack(drafted.probs) if drafted.probs else None

    def draft_ahead(
        self, ids: Tensor, max_tokens: int, pick_token: Pick | None, draft_stop: DraftStop, stopped: Callable[[], bool]
    ) -> None:
        """Draft what the next `propose` will be asked, after ids that end with the last proposal: the target's own next
        token first, which is a guess, then `max_tokens`. stopped: asked before every step."""
        drafted = Drafted()
        self.ahead = ids.shape[1], drafted
        self._draft(ids, drafted, max_tokens + 1, pick_token, draft_stop, stopped)

    def drop_ahead(self) -> None:
        """Forget what was drafted ahead."""
        if self.ahead is not None:
            self._back(self.fed - self.ahead[0])
            self.ahead = None

    def _drafted_ahead(self, ids: Tensor, max_tokens: int) -> Drafted:
        """What was drafted ahead and goes on where ids end, at most `max_tokens`; nothing where other tokens came."""
        if self.ahead is not None:
            start, drafted = self.ahead
            came = ids[0, start:].tolist()
            if came and drafted.tokens[: len(came)] == came:
                self.ahead = None
                return drafted.part(len(came), len(came) + max_tokens)
            self.drop_ahead()
        return Drafted()

    def _draft(
        self, ids: Tensor, drafted: Drafted, max_tokens: int, pick_token: Pick | None, draft_stop: DraftStop,
        stopped: Callable[[], bool] = _never,
    ) -> None:  # fmt: skip
        """Add to `drafted`, which follows ids, up to `max_tokens` in all."""
        tokens, pass_probability = drafted.tokens, 1.0
        for probability in drafted.certainty:
            pass_probability *= max(0.0, 1 - draft_stop.refusal * (1 - probability))

        def ended() -> bool:
            return len(tokens) >= max_tokens or tokens[-1] in self.stop or pass_probability < draft_stop.floor

        if (tokens and ended()) or (drafted.unsure and (tokens or draft_stop.fallback)):
            return
        device = self.stepper.logits.device
        text = torch.cat([ids, torch.tensor([tokens])], 1) if tokens else ids
        self._back(self.fed - (text.shape[1] - 1))  # an answer may end inside an accepted draft
        next_ids = to_device(text[:, self.fed :].clamp(max=self.rows - 1), device)
        extended_ids = text if pick_token is None else to_device(text, device)
        needs_certainty = bool(self.confidence or draft_stop.floor or draft_stop.fallback)
        while not stopped():
            logits = self.stepper.step(next_ids)[:, -1, : self.vocab]
            self.fed += next_ids.shape[1]
            distribution: Tensor | None = None
            if pick_token is None:
                token = int(logits.argmax())
            else:
                token, distribution = pick_token(extended_ids, logits)
            if needs_certainty:
                own_probs = logits[0].softmax(-1)
                probability = float(own_probs[token])
                unsure = draft_stop.fallback and float(own_probs.max()) < draft_stop.fallback
                if unsure or (tokens and probability < self.confidence):
                    drafted.unsure = True
                    break
                drafted.certainty.append(probability)
                pass_probability *= max(0.0, 1 - draft_stop.refusal * (1 - probability))
            tokens.append(token)
            if distribution is not None:
                drafted.probs.append(distribution)
            if ended():
                break
            next_ids = torch.full((1, 1), token, device=device)  # no copy that a GPU would wait for
            if pick_token is not None:
                extended_ids = torch.cat([extended_ids, next_ids], 1)

    @property
    def decoder(self) -> Any:
        return self.stepper.decoder

    def rewind(self, num_refused: int) -> None:
        """Forget the last `num_refused` proposed tokens; the very last was never fed to the model, but by
        `draft_ahead`, whose tokens stay where nothing was refused."""
        if num_refused:
            self.drop_ahead()
        if self.ahead is None:
            self._back(self.fed - (self.start + self.last - num_refused))

    def _back(self, num_tokens: int) -> None:
        self.stepper.rewind(max(0, num_tokens))
        self.fed -= max(0, num_tokens)


class EarlyProposer(ModelProposer):
    """Proposes by what follows the target's own steps and so holds the text so far: its first layers, or a head."""

    def __init__(
        self, early_exit: EarlyExit | HeadStepper, stop: frozenset[int], vocab: int, confidence: float
    ) -> None:
        super().__init__(early_exit, early_exit.target.length, stop, vocab, confidence)
        self.early_exit = early_exit

    @property
    def decoder(self) -> Any:
        """The target's is counted as the target's."""
        return None

    def propose(
        self, ids: Tensor, max_tokens: int, pick_token: Pick | None = None, draft_stop: DraftStop = NO_STOP
    ) -> tuple[Tensor, Tensor | None]:
        """See `core.Draft`. Leaves the target as it was."""
        self.fed = ids.shape[1] - 1
        try:
            return super().propose(ids, max_tokens, pick_token, draft_stop)
        finally:
            self.early_exit.rewind(self.early_exit.fed)

    def rewind(self, num_refused: int) -> None:
        """Everything was taken back."""


END = -1  # stands behind an earlier answer, where nothing follows


class NgramProposer:
    """Proposes what followed an n-gram before: knows where every n-gram of prompt and output last stood. Host only.

    earlier: answers of earlier calls, oldest first; the text of this call goes before them.
    """

    decoder = None  # it runs no model

    def __init__(
        self, ids: list[int], longest: int, shortest: int, banned: frozenset[int],
        earlier: Iterable[list[int]] = (),
    ) -> None:  # fmt: skip
        self.ids: list[int] = []
        self.certainty: list[float] = []
        self.longest, self.shortest, self.banned = longest, shortest, banned | {END}
        self.where: dict[tuple[int, ...], int] = {}
        for answer in earlier:
            self._extend([*answer, END])
        self.before = len(self.ids)  # tokens that are not of this call
        self._extend(ids)

    def _extend(self, new_tokens: list[int]) -> None:
        for token in new_tokens:
            end_index = len(self.ids)  # n-grams that end right before this token now have a continuation
            for size in range(self.shortest, min(self.longest, end_index) + 1):
                ngram = tuple(self.ids[end_index - size :])
                if not self.banned.intersection(ngram):
                    self.where[ngram] = end_index
            self.ids.append(token)

    def propose(
        self, ids: Tensor, max_tokens: int, pick_token: Pick | None = None, draft_stop: DraftStop = NO_STOP
    ) -> tuple[Tensor, Tensor | None]:
        """What followed the latest earlier occurrence of the longest n-gram at the end; empty when there is none.

        Where less than `max_tokens` follows, the text repeats itself, and the proposal goes on repeating it.
        """
        self._extend(ids[0, len(self.ids) - self.before :].tolist())
        for size in range(min(self.longest, len(self.ids)), self.shortest - 1, -1):
            continuation = self.where.get(tuple(self.ids[-size:]))
            if continuation is not None:
                proposed = self.ids[continuation : continuation + max_tokens]
                followed = len(proposed)
                proposed += [proposed[index % followed] for index in range(followed, max_tokens)]
                banned_at = (index for index, token in enumerate(proposed) if token in self.banned)
                num_allowed = next(banned_at, len(proposed))
                if num_allowed:
                    return torch.tensor(proposed[:num_allowed]), None
        return ids.new_empty(0), None

    def rewind(self, num_refused: int) -> None:
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
        self, ids: Tensor, max_tokens: int, pick_token: Pick | None = None, draft_stop: DraftStop = NO_STOP
    ) -> tuple[Tensor, Tensor | None]:
        """The lookup's tokens; the model's when it has none."""
        tokens, token_probs = self.first.propose(ids, max_tokens, pick_token)
        self.used = tokens.shape[0] == 0
        return self.second.propose(ids, max_tokens, pick_token, draft_stop) if self.used else (tokens, token_probs)

    def rewind(self, num_refused: int) -> None:
        """Rewind the model when it made the last proposal."""
        if self.used:
            self.second.rewind(num_refused)
