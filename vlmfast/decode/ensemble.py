"""Ensemble: drafted tokens are judged by a mixture of the target's and the draft's distributions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmfast.core import UserError
from vlmfast.decode.accept import EXACT, LOOSE, Exact, Lossless, Round, Rule, Verdict
from vlmfast.decode.criteria import residual
from vlmfast.fields import Fraction


@dataclass(frozen=True)
class Ensemble(Rule):
    """Static ensemble verification (DIVERSE, arXiv 2604.07622), as transformers' `assistant_ensemble_weight` has it.
    Changes the output unless weight=1, which is `Lossless`.

    With p of the target, q of the draft and v = weight p + (1 - weight) q, under the request's processors. Greedy: a
    token passes when it is the best of v, and the best of v follows a refused one. Sampling: it passes with probability
    min(1, v / q), else the token is drawn from max(v - q, 0), which is max(p - q, 0) up to scale. After a whole draft
    the target chooses. weight in (0, 1]. The draft must know its own probabilities: not prompt lookup.
    """

    weight: Fraction = 0.5
    name: ClassVar[str] = "ensemble"
    draws: ClassVar[bool] = True

    def graded(self) -> bool:
        return self.weight < 1

    def judge(self, verified: Round) -> Verdict:
        if self.weight == 1:
            return Lossless().judge(verified)
        if verified.draft.shape[0] == 0:
            return Exact().judge(verified)
        if verified.draft_probs is None:
            raise UserError("ensemble: the draft gave no probabilities to mix; use ModelDraft or SelfDraft")
        kinds: list[int] = []
        for position, token in enumerate(verified.draft.tolist()):
            target_probs, draft_probs = verified.score(position).softmax(-1), verified.draft_probs[position]
            if verified.sampling:
                ratio = float(target_probs[token] / draft_probs[token])
                uniform_draw = float(torch.rand((), device=target_probs.device))
                exact_match, accepted = uniform_draw < ratio, uniform_draw < 1 - self.weight + self.weight * ratio
                mixture_token = 0 if accepted else int(torch.multinomial(residual(target_probs, draft_probs), 1))
            else:
                mixture_token = int((self.weight * target_probs + (1 - self.weight) * draft_probs).argmax())
                exact_match, accepted = verified.pick(position) == token, mixture_token == token
            if not accepted:
                return Verdict(kinds, mixture_token)
            kinds.append(EXACT if exact_match else LOOSE)
        return Verdict(kinds, verified.pick(len(kinds)))
