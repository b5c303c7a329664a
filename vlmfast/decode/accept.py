"""What an acceptance rule is, and the two lossless ones: which drafted tokens the target lets through.

Rules that change the output have a file each, with its paper: `loose`, `fly`, `bild`, `ensemble`, `random_relax`.

The pieces are pure functions on tensors (`decode.criteria`); a rule puts them together in `judge(verified)`. Letters:
``k`` drafted tokens d_1..d_k, ``V`` vocabulary. The target scores k + 1 positions: row i (from 0) predicts d_{i+1},
row k the token after the draft. A rule accepts a prefix of the draft; the loop then emits one more token of the target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from vlmfast.decode.criteria import residual, speculated
from vlmfast.fields import Method
from vlmfast.runtime.devices import random_generator

REFUSED, EXACT, LOOSE, SHIFT = 0, 1, 2, 3
Relevance = Tensor | Callable[[], Tensor]  # (k,) float32, or what computes it


@dataclass
class Round:
    """One verification, as a rule sees it. Scores are float32 after the logits processors, made on demand."""

    draft: Tensor  # (k,) int64 on the host
    score: Callable[[int], Tensor]  # row 0..k -> (V,) float32
    pick: Callable[[int], int]  # row 0..k -> the target's own choice there (argmax, or its sample)
    sampling: bool = False
    draft_probs: Tensor | None = None  # (k, V) float32, what the draft sampled from; None = it was certain
    committed: list[int] = field(default_factory=list)  # emitted text tokens before the draft, in order
    relevance: Relevance | None = None  # of each predicting position to the media
    past_relevance: Tensor | None = None  # (m,) float32, of earlier positions of this request
    strict: Tensor | None = None  # (V,) bool on the host, token ids never loosened
    random: torch.Generator | None = None
    all_scores: Tensor | None = None  # (k + 1, V) float32, where the scores of all rows are there without being made
    loosened: Tensor | None = None  # (k,) bool, made by a rule when it is first asked for
    # rounds of all rows that one step verified, this one among them: a rule reads a GPU for all of them at once
    together: list[Round] = field(default_factory=list)
    drawn: list[int] | None = None  # under sampling on a GPU, once it was read

    @property
    def on_device(self) -> bool:
        """Are tokens drawn on a GPU, so that every look at one would be waited for?"""
        return self.sampling and self.score(0).is_cuda

    def read(self, draw: Callable[[Round], Tensor]) -> list[int]:
        """What `draw` gives of a round (m,) int64, read from the device once for all rows."""
        if self.drawn is None:
            rounds = self.together or [self]
            parts = [draw(each) for each in rounds]
            values = iter(torch.cat(parts).tolist())
            for each, part in zip(rounds, parts, strict=True):
                each.drawn = list(islice(values, len(part)))
        assert self.drawn is not None
        return self.drawn

    def all_probs(self) -> Tensor:
        """(k + 1, V) float32: the target's distribution at every row."""
        scores = self.all_scores
        if scores is None:
            scores = torch.stack([self.score(position) for position in range(self.draft.shape[0] + 1)])
        return scores.softmax(-1)

    def relevance_scores(self) -> Tensor:
        """The relevance, computed once."""
        if callable(self.relevance):
            self.relevance = self.relevance()
        assert self.relevance is not None
        return self.relevance

    def picks(self) -> Tensor:
        """(k + 1,) int64 on the host, the target's choice at every row."""
        num_rows = self.draft.shape[0] + 1
        return torch.tensor([self.pick(row) for row in range(num_rows)], device=self.draft.device)

    def scores(self) -> Tensor:
        """(k, V) float32, the rows that the draft is compared with."""
        return torch.stack([self.score(position) for position in range(self.draft.shape[0])])


@dataclass
class Verdict:
    """kinds: one of EXACT, LOOSE, SHIFT per accepted token; next: the token to emit after them."""

    kinds: list[int]
    next: int


def leading(codes: list[int], verified: Round) -> Verdict:
    """The run of accepted codes from the start, then the target's own token."""
    num_accepted = next((position for position, code in enumerate(codes) if code == REFUSED), len(codes))
    return Verdict(codes[:num_accepted], verified.pick(num_accepted))


def passing(passes: list[bool], tokens: list[int]) -> Verdict:
    """passes (k,): which drafted tokens may stay; tokens (k + 1,): what follows where the first of them may not."""
    accepted = (*passes, False).index(False)
    return Verdict([EXACT] * accepted, tokens[accepted])


def guarded(verified: Round, target_picks: Tensor) -> Tensor:
    """(k,) bool: neither the drafted nor the target's token is one that is never loosened."""
    if verified.strict is None:
        return torch.ones_like(verified.draft, dtype=torch.bool)
    return ~(verified.strict[verified.draft] | verified.strict[target_picks[:-1]])


# ---------------------------------------------------------------- rules


class RelevanceOptions(Protocol):
    """How relevance to the media is measured, see `loose.LooseAdvanced`."""

    @property
    def top(self) -> int: ...

    @property
    def layer(self) -> int: ...

    @property
    def offset(self) -> Literal["predict", "self"]: ...

    @property
    def scope(self) -> Literal["window", "running", "threshold"]: ...


class Rule(Method):
    """What the loop asks of an acceptance rule; fields of a rule are its configuration.

    The settings below are read by the loop, of every rule; a rule that can be told otherwise has them as fields.
    """

    eos: bool = True  # never loosen the end of the answer
    seed: int = 0  # of the random numbers that a rule draws
    fallback: float = 0.0  # the draft hands over where its highest probability is below this
    name: ClassVar[str]
    lossless: ClassVar[bool] = False
    visual: ClassVar[bool] = False  # does it need relevance to the media?
    draws: ClassVar[bool] = False  # under sampling: does the draft draw its tokens, or take its best?

    def judge(self, verified: Round) -> Verdict:
        """Which of the drafted tokens are let through, and what follows them."""
        raise NotImplementedError

    def graded(self) -> bool:
        """Does it read the draft's own probabilities, also in greedy decoding? Prompt lookup has none to give."""
        return False

    def word_classes(self) -> tuple[str, ...]:
        """Classes of words (`decode.strict_tokens`) that are never loosened; non-empty means a tokenizer is needed."""
        return ()

    def relevance_options(self) -> RelevanceOptions:
        """How relevance to the media is measured; asked of rules that are `visual`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Exact(Rule):
    """A drafted token passes when it is the target's own choice (Leviathan et al., arXiv 2211.17192, greedy case).

    Under sampling the target draws at every position and the draft must match the draw: exact in distribution, and
    token for token what plain `generate` gives from the same random state, at a lower acceptance than `Lossless`.
    """

    name: ClassVar[str] = "exact"
    lossless: ClassVar[bool] = True

    def judge(self, verified: Round) -> Verdict:
        if verified.on_device:
            return self._on_device(verified)
        for position, drafted_token in enumerate(verified.draft.tolist()):
            target_token = verified.pick(position)
            if target_token != drafted_token:
                return Verdict([EXACT] * position, target_token)
        num_drafted = verified.draft.shape[0]
        return Verdict([EXACT] * num_drafted, verified.pick(num_drafted))

    def _on_device(self, verified: Round) -> Verdict:
        """Every position is drawn before the host looks; the random numbers of those behind the answer are given back,
        unless rows share them."""
        generator = random_generator(verified.score(0).device)
        states: list[Tensor] = []

        def draw(judged: Round) -> Tensor:
            tokens = []
            for probs in judged.all_probs():
                tokens.append(torch.multinomial(probs, 1))
                states.append(generator.get_state())
            return torch.cat(tokens)

        drawn = verified.read(draw)
        verdict = passing([token == draft for token, draft in zip(drawn, verified.draft.tolist(), strict=False)], drawn)
        if not verified.together and torch.equal(generator.get_state(), states[-1]):
            generator.set_state(states[len(verdict.kinds)])
        return verdict


@dataclass(frozen=True)
class Lossless(Rule):
    """Speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).

    d_i passes with probability min(1, p(d_i) / q(d_i)), else the token is drawn from max(p - q, 0): the output has the
    target's distribution under the same processors. Greedy decoding: the same as `Exact`.
    """

    name: ClassVar[str] = "lossless"
    lossless: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    def judge(self, verified: Round) -> Verdict:
        if not verified.sampling:
            return Exact().judge(verified)
        if verified.on_device:
            drawn, num_drafted = verified.read(_speculated), verified.draft.shape[0]
            return passing([bool(passes) for passes in drawn[:num_drafted]], drawn[num_drafted:])
        for position, token in enumerate(verified.draft.tolist()):
            target_probs = verified.score(position).softmax(-1)
            draft_probs = None if verified.draft_probs is None else verified.draft_probs[position]
            ratio = target_probs[token] if draft_probs is None else target_probs[token] / draft_probs[token]
            if float(torch.rand((), device=target_probs.device)) < float(ratio):
                continue
            if draft_probs is None:
                draft_probs = torch.zeros_like(target_probs)
                draft_probs[token] = 1
            return Verdict([EXACT] * position, int(torch.multinomial(residual(target_probs, draft_probs), 1)))
        num_drafted = verified.draft.shape[0]
        return Verdict([EXACT] * num_drafted, verified.pick(num_drafted))


def _speculated(verified: Round) -> Tensor:
    """`criteria.speculated` of a round: (2 k + 1,) int64."""
    passes, tokens = speculated(verified.all_probs(), verified.draft.tolist(), verified.draft_probs)
    return torch.cat([passes.long(), tokens])
