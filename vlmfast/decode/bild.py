"""BiLD: the draft proposes until its probability is low, the target takes back what it finds too unlikely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmfast.decode.accept import EXACT, LOOSE, REFUSED, Exact, Round, Rule, Verdict, guarded, leading
from vlmfast.fields import NonNegativeFloat, Share
from vlmfast.runtime.transfers import to_device


@dataclass(frozen=True)
class BiLD(Rule):
    """Big Little Decoder (Kim et al., arXiv 2302.07863). Changes the output, unless rollback=0 under greedy decoding.

    fallback: the draft hands over to the target, even at once, where its highest probability is below this, in [0, 1]
    (0 = never). rollback: a drafted token and all after it are taken back where the target's cross-entropy with it,
    -log p(d_i) in nats, exceeds this, 0 or more. The defaults are those of the authors' code for T5. eos: never loosen
    the end of the answer. The draft must know its own probabilities unless fallback=0.
    """

    fallback: Share = 0.6
    rollback: NonNegativeFloat = 5.0
    eos: bool = True
    name: ClassVar[str] = "bild"
    draws: ClassVar[bool] = True

    def graded(self) -> bool:
        return self.fallback > 0

    def judge(self, verified: Round) -> Verdict:
        if verified.draft.shape[0] == 0:
            return Exact().judge(verified)
        target_picks = verified.picks()
        scores = verified.scores()
        distance = -scores.log_softmax(-1).gather(1, to_device(verified.draft, scores.device)[:, None])[:, 0]
        likely_enough = (distance <= self.rollback).cpu() & guarded(verified, target_picks)
        codes = torch.where(verified.draft == target_picks[:-1], EXACT, torch.where(likely_enough, LOOSE, REFUSED))
        return leading(codes.tolist(), verified)
