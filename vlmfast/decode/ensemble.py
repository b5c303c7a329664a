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
    the target speaks. weight in (0, 1]. The draft must know its own probabilities: not prompt lookup.
    """

    weight: Fraction = 0.5
    name: ClassVar[str] = "ensemble"
    draws: ClassVar[bool] = True

    def graded(self) -> bool:
        return self.weight < 1

    def judge(self, r: Round) -> Verdict:
        if self.weight == 1:
            return Lossless().judge(r)
        if r.draft.shape[0] == 0:
            return Exact().judge(r)
        if r.draft_probs is None:
            raise UserError("ensemble: the draft gave no probabilities to mix; use ModelDraft or SelfDraft")
        kinds: list[int] = []
        for i, token in enumerate(r.draft.tolist()):
            p, q = r.score(i).softmax(-1), r.draft_probs[i]
            if r.sampling:
                ratio, u = float(p[token] / q[token]), float(torch.rand((), device=p.device))
                exact, passes = u < ratio, u < 1 - self.weight + self.weight * ratio
                other = 0 if passes else int(torch.multinomial(residual(p, q), 1))
            else:
                other = int((self.weight * p + (1 - self.weight) * q).argmax())
                exact, passes = r.pick(i) == token, other == token
            if not passes:
                return Verdict(kinds, other)
            kinds.append(EXACT if exact else LOOSE)
        return Verdict(kinds, r.pick(len(kinds)))
