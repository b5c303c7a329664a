"""CDPruner: a set that is diverse and relevant to the question, by a determinantal point process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from vlmfast.core import VisualTokens
from vlmfast.encode.base import Pruner
from vlmfast.encode.greedy import cosines, kept_set, unit_rows
from vlmfast.fields import NonNegativeFloat
from vlmfast.kernels import greedy


@dataclass(frozen=True)
class CDPruner(Pruner):
    """Conditional diversity (arXiv 2506.10967): the kernel is relevance_i * cos_ij * relevance_j, and the kept set is
    its greedy most probable one (each step adds the token that raises the determinant most; incremental Cholesky).

    Relevance is the mean cosine of a token to the question's embeddings in the language model, scaled to [0, 1] and
    raised to `theta` (0 = diversity alone). The paper takes the text tower that belongs to CLIP; embeddings of the
    language model, which every family has, are how OpenVINO carries the rule to Qwen. On CUDA the picks are a launch
    for every 512, on a CPU blocks with exact repair. Past the rank of the features no token adds anything: the rest
    goes by relevance, then evenly over time (`encode/greedy.py`).
    """

    theta: NonNegativeFloat = 1.0
    name: ClassVar[str] = "cdpruner"
    needs: ClassVar[tuple[str, ...]] = ("features", "question")

    def relevance(self, tokens: VisualTokens) -> Tensor:
        """(N,) in [0.01, 1]."""
        return self._relevance(tokens, unit_rows(tokens.features))

    def _relevance(self, tokens: VisualTokens, unit_features: Tensor) -> Tensor:
        similarity = unit_features @ normalize(self.need(tokens, "question").to(unit_features.dtype), dim=-1).mean(0)
        lowest, highest = similarity.aminmax()
        relevance = ((similarity - lowest) / (highest - lowest).clamp(min=1e-12)).clamp(min=0.01)
        return relevance if self.theta == 1 else relevance**self.theta

    def select_body(self, tokens: VisualTokens, budget: int) -> Tensor:
        unit_features = unit_rows(tokens.features)
        relevance = self._relevance(tokens, unit_features)
        if tokens.features.is_cuda:
            similarity = cosines(tokens.features, unit_features)
            similarity.diagonal().round_()  # exactly one, so that equal tokens tie; 0 where a token points nowhere
            remaining = greedy.most_probable(similarity.mul_(relevance[:, None]).mul_(relevance), budget)
        else:
            initial_gain = relevance.square() * unit_features.square().sum(-1).round()
            remaining = greedy.most_probable_rows(relevance[:, None] * unit_features, initial_gain, budget)
        return kept_set(remaining, tokens.frame, relevance, budget, self.floor)
