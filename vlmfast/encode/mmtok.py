"""MMTok: keeps the tokens that best cover the question and the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmfast.core import VisualTokens
from vlmfast.encode.base import Pruner
from vlmfast.encode.greedy import cosines, kept_set, unit_rows
from vlmfast.fields import NonNegativeFloat, PositiveFloat
from vlmfast.kernels import greedy


@dataclass(frozen=True)
class MMTok(Pruner):
    """Multimodal coverage (ICLR 2026): greedily add the token that most raises
    mean over question tokens of their best match + `alpha` * mean over visual tokens of their best match,
    where a match is the softmax over visual tokens of cosine / temperature (0.02 from text, 0.2 from vision).

    Similarities are taken between embeddings as the language model reads them; a token's gain is summed in whole units
    of 2**-58, so that every device picks the same of the same matches. A pick costs the rows that it covers better.
    Where no token adds anything, the rest goes by relevance to the question, then evenly over time
    (`encode/greedy.py`).
    """

    alpha: NonNegativeFloat = 0.5
    text_temperature: PositiveFloat = 0.02
    vision_temperature: PositiveFloat = 0.2
    name: ClassVar[str] = "mmtok"
    needs: ClassVar[tuple[str, ...]] = ("features", "question")

    def matches(self, tokens: VisualTokens) -> Tensor:
        """(Q + N, N): how well each visual token (column) stands for each question or visual token (row), weighted."""
        question_matches, vision_matches = self._matches(tokens)
        return torch.cat([question_matches, vision_matches])

    def _matches(self, tokens: VisualTokens) -> tuple[Tensor, Tensor]:
        unit_features = unit_rows(tokens.features)
        similarity = cosines(tokens.features, unit_features)
        text_similarity = normalize(self.need(tokens, "question").to(unit_features.dtype), dim=-1) @ unit_features.T
        question_matches = text_similarity.div_(self.text_temperature).softmax(-1).div_(len(text_similarity))
        return question_matches, similarity.div_(self.vision_temperature).softmax(-1).mul_(self.alpha / len(similarity))

    def select_body(self, tokens: VisualTokens, budget: int) -> Tensor:
        question_matches, vision_matches = self._matches(tokens)
        matches = torch.cat([question_matches, vision_matches]).T.contiguous()  # (N, Q + N): one candidate per row
        if self.alpha > 16:  # sums stay below 32, the largest that is counted
            matches *= 16 / self.alpha
        relevance = question_matches.sum(0)
        remaining = greedy.coverage(matches, budget)
        return kept_set(remaining, tokens.frame, relevance / relevance.max(), budget, self.floor)
