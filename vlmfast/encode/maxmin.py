"""MaxMin: the most diverse set, by farthest-point selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmfast.core import VisualTokens
from vlmfast.encode.base import Pruner
from vlmfast.encode.greedy import cosines, kept_set, unit_rows
from vlmfast.kernels import greedy


@dataclass(frozen=True)
class MaxMin(Pruner):
    """The rule of DivPrune (arXiv 2503.02175), re-implemented from the paper: greedily add the token whose smallest
    cosine distance to the chosen set is largest; the first is the token farthest from its own nearest neighbour.

    The distances are one N x N product, a pick is one (N,) update; on CUDA one launch makes all of them. A frame below
    its floor gives its farthest tokens first place. Where no token is 1e-5 away from the chosen set, the rest is spread
    evenly over time (`encode/greedy.py`).
    """

    name: ClassVar[str] = "maxmin"

    def select_body(self, tokens: VisualTokens, budget: int) -> Tensor:
        similarity = cosines(tokens.features, unit_rows(tokens.features))
        weights = similarity.diagonal().round()  # 0: points nowhere, and is never new
        distance = similarity.neg_().add_(1).fill_diagonal_(4)
        initial_distance = distance.amin(1).clamp_(min=greedy.SPENT).mul_(weights)
        remaining = greedy.farthest(distance[None], initial_distance[None], weights[None], budget)[0]
        return kept_set(remaining, tokens.frame, None, budget, self.floor)
