"""Acceptance rules: which drafted tokens the target lets through. One class per rule, each with its paper.

The pieces are pure functions on tensors (`decode.criteria`); a rule puts them together in `judge(verified)`. Letters:
``k`` drafted tokens d_1..d_k, ``V`` vocabulary. The target scores k + 1 positions: row i (from 0) predicts d_{i+1},
row k the token after the draft. A rule accepts a prefix of the draft; the loop then emits one more token of the target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmfast.core import Unsupported
from vlmfast.decode.criteria import (
    below_quantile,
    least_relevant,
    normalised_entropy,
    repeats_bigram,
    residual,
    shifted,
    within_ratio,
    within_top,
)
from vlmfast.fields import Method, NonNegativeInt, Options, PositiveInt, Share
from vlmfast.runtime.transfers import to_device

REFUSED, EXACT, LOOSE, SHIFT = 0, 1, 2, 3


@dataclass
class Round:
    """One verification, as a rule sees it. Scores are float32 after the logits processors, made on demand."""

    draft: Tensor  # (k,) int64 on the host
    score: Callable[[int], Tensor]  # row 0..k -> (V,) float32
    pick: Callable[[int], int]  # row 0..k -> the target's own choice there (argmax, or its sample)
    sampling: bool = False
    draft_probs: Tensor | None = None  # (k, V) float32, what the draft sampled from; None = it was certain
    committed: list[int] = field(default_factory=list)  # emitted text tokens before the draft, in order
    # (k,) float32, relevance of each predicting position to the media; or a function that computes it
    relevance: Tensor | Callable[[], Tensor] | None = None
    past_relevance: Tensor | None = None  # (m,) float32, of earlier positions of this request
    strict: Tensor | None = None  # (V,) bool on the host, token ids never loosened
    random: torch.Generator | None = None
    all_scores: Tensor | None = None  # (k + 1, V) float32, where the scores of all rows are there without being made
    loosened: Tensor | None = None  # (k,) bool, made by a rule when it is first asked for

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


def guarded(verified: Round, target_picks: Tensor) -> Tensor:
    """(k,) bool: neither the drafted nor the target's token is one that is never loosened."""
    if verified.strict is None:
        return torch.ones_like(verified.draft, dtype=torch.bool)
    return ~(verified.strict[verified.draft] | verified.strict[target_picks[:-1]])


# ---------------------------------------------------------------- rules


@dataclass(frozen=True)
class LooseAdvanced(Options):
    """What changes nothing measurable in `Loose` on pocket captions (`evals/results/cpu-decode.json`).

    top: cosines that are averaged. layer: whose hidden states; offset: "predict" = the position that predicts the
    token, "self" = the token's own. scope: "window" ranks inside the round, "running" against all positions of this
    request, "threshold" loosens below `threshold`. shift: position-shift tolerance, rows to either side (0 = off).
    Guards beyond the paper: bigram (nothing that makes a bigram repeat), within (the draft token is among the target's
    `within` best; 0 = off).
    """

    title: ClassVar[str] = "loose:advanced"
    top: PositiveInt = 10
    layer: int = -1
    offset: Literal["predict", "self"] = "predict"
    scope: Literal["window", "running", "threshold"] = "window"
    threshold: float = 0.3
    shift: NonNegativeInt = 3
    bigram: bool = True
    within: NonNegativeInt = 5


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

    def relevance_options(self) -> LooseAdvanced:
        """How relevance to the media is measured, for rules that are `visual`."""
        return LooseAdvanced()


@dataclass(frozen=True)
class Exact(Rule):
    """A drafted token passes when it is the target's own choice (Leviathan et al., arXiv 2211.17192, greedy case).

    Under sampling the target draws at every position and the draft must match the draw: exact in distribution, and
    token for token what plain `generate` gives from the same random state, at a lower acceptance than `Lossless`.
    """

    name: ClassVar[str] = "exact"
    lossless: ClassVar[bool] = True

    def judge(self, verified: Round) -> Verdict:
        for position, drafted_token in enumerate(verified.draft.tolist()):
            target_token = verified.pick(position)
            if target_token != drafted_token:
                return Verdict([EXACT] * position, target_token)
        num_drafted = verified.draft.shape[0]
        return Verdict([EXACT] * num_drafted, verified.pick(num_drafted))


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


@dataclass(frozen=True)
class Loose(Rule):
    """LVSpec (Ji et al., arXiv 2604.05650): strict only where a token is about the media. Changes the output.

    Relevance of a position = mean of the highest cosines between its hidden state in the target and the prompt's visual
    hidden states. The `relax` share of positions with the lowest relevance passes whatever was drafted.
    Guards beyond the paper: ratio (the drafted token's probability is at least this share of the best one's; 0 = off;
    it keeps most facts, see `docs/benchmarks.md`), eos, digits, negation, comparison (words
    never loosened, found through the tokenizer). advanced: everything else, see `LooseAdvanced`; relax=0 and there
    shift=0 is `Exact`. A prompt without visual tokens is verified strictly, and the report notes it.
    """

    relax: Share = 0.7
    ratio: Share = 0.3
    eos: bool = True
    digits: bool = True
    negation: bool = True
    comparison: bool = True
    advanced: LooseAdvanced = LooseAdvanced()
    name: ClassVar[str] = "loose"
    visual: ClassVar[bool] = True

    def check_model(self, layers: int, heads: int, axes: int) -> None:
        read_layer = self.advanced.layer
        if not -layers <= read_layer < layers:
            raise Unsupported(
                f"loose: layer={read_layer}, but this model has layers 0 to {layers - 1} (-1 is the last, and so on)"
            )

    def relevance_options(self) -> LooseAdvanced:
        return self.advanced

    def word_classes(self) -> tuple[str, ...]:
        return tuple(word_class for word_class in ("digits", "negation", "comparison") if getattr(self, word_class))

    def judge(self, verified: Round) -> Verdict:
        if verified.relevance is None:
            return Exact().judge(verified)
        codes: list[int] = []
        for position, drafted_token in enumerate(verified.draft.tolist()):
            code = EXACT if drafted_token == verified.pick(position) else self.judge_mismatch(verified, position)
            if code == REFUSED:
                break
            codes.append(code)
        return Verdict(codes, verified.pick(len(codes)))

    def judge_mismatch(self, verified: Round, position: int) -> int:
        """LOOSE, SHIFT or REFUSED for the token drafted at `position`, not the target's own. Cheap guards first."""
        drafted_token = verified.draft[position : position + 1]
        strict = verified.strict
        if strict is not None and bool(strict[drafted_token] | strict[verified.pick(position)]):
            return REFUSED
        if self.advanced.bigram and bool(repeats_bigram(verified.draft[: position + 1], verified.committed)[position]):
            return REFUSED
        if self._loosened(verified, position):
            return LOOSE
        max_shift = self.advanced.shift
        if max_shift and bool(shifted(verified.draft, verified.picks(), verified.committed, max_shift)[position]):
            return SHIFT
        return REFUSED

    def _loosened(self, verified: Round, position: int) -> bool:
        """Is the token drafted at `position` likely enough, and the position not about the media?

        Where all scores are there, all positions are decided at once, so that a GPU is read once a round. Processors
        that read the ids are asked row by row, and no further than needed.
        """
        draft = verified.draft
        if verified.all_scores is None:
            likely = self._likely(verified.score(position)[None], draft[position : position + 1])
            return bool(likely) and bool(self._free(verified.relevance_scores().cpu(), verified)[position])
        if verified.loosened is None:
            scores, relevance = verified.all_scores[: draft.shape[0]], verified.relevance_scores()
            likely, relevance = torch.stack([self._likely(scores, draft).float(), relevance.float()]).cpu()
            verified.loosened = (likely > 0) & self._free(relevance, verified)
        return bool(verified.loosened[position])

    def _likely(self, scores: Tensor, draft: Tensor) -> Tensor:
        """scores (n, V), draft (n,) on the host -> (n,) bool: do `within` and `ratio` let it pass?"""
        draft = to_device(draft, scores.device)
        passes = torch.ones_like(draft, dtype=torch.bool)
        if self.advanced.within:
            passes = within_top(scores, draft, self.advanced.within)
        return passes & within_ratio(scores, draft, self.ratio) if self.ratio else passes

    def _free(self, relevance: Tensor, verified: Round) -> Tensor:
        """relevance (k,) float32 on the host -> (k,) bool: positions that are not about the media."""
        if self.advanced.scope == "window":
            return least_relevant(relevance, self.relax)
        if self.advanced.scope == "running":
            return below_quantile(relevance, verified.past_relevance, self.relax)
        return relevance < self.advanced.threshold


@dataclass(frozen=True)
class FLy(Rule):
    """FLy (arXiv 2511.22972): a mismatch passes where the target is unsure and the tokens after it match again. Lossy.

    Entropy gate: the target's normalised entropy there is at least `theta`. Deferred window: the next `window` drafted
    tokens all match, and lie within the draft. eos: never loosen the end of the answer.
    """

    theta: Share = 0.3
    window: NonNegativeInt = 6
    eos: bool = True
    name: ClassVar[str] = "fly"

    def judge(self, verified: Round) -> Verdict:
        num_drafted = verified.draft.shape[0]
        if num_drafted == 0:
            return Exact().judge(verified)
        target_picks = verified.picks()
        matching = verified.draft == target_picks[:-1]
        if bool(matching.all()):
            return leading([EXACT] * num_drafted, verified)
        unsure = (normalised_entropy(verified.scores()) >= self.theta).cpu() & guarded(verified, target_picks)
        matches = matching.tolist()
        codes = [EXACT if is_match else REFUSED for is_match in matches]
        for position, is_unsure in enumerate(unsure.tolist()):
            following = matches[position + 1 : position + 1 + self.window]
            if not matches[position] and is_unsure and position + self.window < num_drafted and all(following):
                codes[position] = LOOSE
        return leading(codes, verified)


@dataclass(frozen=True)
class RandomRelax(Rule):
    """Every mismatch passes with probability `relax`, drawn from `seed`: the baseline of every loose rule
    (survey arXiv 2604.05546, App. D.2). Changes the output. eos: never loosen the end of the answer."""

    relax: Share = 0.5
    seed: NonNegativeInt = 0
    eos: bool = True
    name: ClassVar[str] = "randomrelax"

    def judge(self, verified: Round) -> Verdict:
        num_drafted = verified.draft.shape[0]
        if num_drafted == 0:
            return Exact().judge(verified)
        target_picks = verified.picks()
        drawn = torch.rand(num_drafted, generator=verified.random) < self.relax
        loosened = drawn.to(verified.draft.device) & guarded(verified, target_picks)
        codes = torch.where(verified.draft == target_picks[:-1], EXACT, torch.where(loosened, LOOSE, REFUSED))
        return leading(codes.tolist(), verified)
