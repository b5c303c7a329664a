"""MMTok: cover the question and the picture with as few tokens as possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmfast.core import UserError, VisualTokens
from vlmfast.encode.base import Pruner
from vlmfast.encode.maxmin import with_floor


@dataclass(frozen=True)
class MMTok(Pruner):
    """Multimodal coverage (ICLR 2026): greedily add the token that most raises
    mean over question tokens of their best match + `alpha` * mean over visual tokens of their best match,
    where a match is the softmax over visual tokens of cosine / temperature (0.02 from text, 0.2 from vision).

    Similarities are taken between embeddings as the language model reads them. K steps of one (Q + N, N) maximum: the
    dearest of the attention-free rules at thousands of tokens.
    """

    alpha: float = 0.5
    text_temperature: float = 0.02
    vision_temperature: float = 0.2
    name: ClassVar[str] = "mmtok"
    needs: ClassVar[tuple[str, ...]] = ("features", "question")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0 or self.text_temperature <= 0 or self.vision_temperature <= 0:
            raise UserError("mmtok: alpha must be 0 or more and both temperatures above 0")

    def matches(self, tokens: VisualTokens) -> Tensor:
        """(Q + N, N): how well each visual token (column) stands for each question or visual token (row), weighted."""
        x = normalize(tokens.features.float(), dim=-1)
        q = normalize(self.need(tokens, "question").float(), dim=-1)
        text = (q @ x.T / self.text_temperature).softmax(-1) / len(q)
        vision = (x @ x.T / self.vision_temperature).softmax(-1) / len(x)
        return torch.cat([text, self.alpha * vision])

    def select_body(self, tokens: VisualTokens, budget: int) -> Tensor:
        matches = self.matches(tokens).T.contiguous()  # (N, Q + N): one candidate per row
        covered = matches.new_zeros(matches.shape[1])
        taken = torch.zeros(tokens.n, dtype=torch.bool, device=matches.device)
        chosen = torch.empty(budget, dtype=torch.long, device=matches.device)
        gain = matches.sum(1)
        for i in range(budget):
            if i:
                gain = (matches - covered).clamp_(min=0).sum(1)
            best = gain.masked_fill(taken, -1).argmax()[None]
            chosen[i : i + 1] = best
            taken.index_fill_(0, best, True)
            covered = torch.maximum(covered, matches.index_select(0, best)[0])
        return with_floor(chosen, gain.masked_fill(taken, -1), tokens.frame, tokens.frames, self.floor)
