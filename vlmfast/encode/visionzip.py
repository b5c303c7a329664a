"""VisionZip: keeps the tokens that the vision tower attends to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmfast.core import Unsupported, VisualTokens
from vlmfast.encode.base import Pruner, ranked, without_separators
from vlmfast.fields import Share
from vlmfast.kernels import ranking


@dataclass(frozen=True)
class VisionZip(Pruner):
    """VisionZip (arXiv 2412.04467): "dominant" tokens are those with the most tower attention (the CLS row where the
    tower has one, the mean received otherwise) in the last layer that the language model reads.

    contextual: share of the budget given to "contextual" tokens (0.16 in the paper, 0 here): evenly spaced among the
    rest, each gaining the mean of the dropped tokens most like it. That changes features and is refused under M-RoPE,
    where merged tokens drift from their positions. Likeness is of features here, of the layer's keys in the paper, and
    the even steps reach the end of the rest, where the authors' code takes every (rest // count)-th from the start.
    """

    contextual: Share = 0.0
    name: ClassVar[str] = "visionzip"
    needs: ClassVar[tuple[str, ...]] = ("features", "tower_attention")

    def check_model(self, layers: int, heads: int, axes: int) -> None:
        if self.merges and axes > 1:
            raise Unsupported(
                f"visionzip with contextual={self.contextual} merges tokens, and merged tokens drift from their M-RoPE "
                "positions: use contextual=0 with this model"
            )

    @property
    def merges(self) -> bool:
        """Does this pruner change the features of kept tokens?"""
        return self.contextual > 0

    def score(self, tokens: VisualTokens) -> Tensor:
        return self.need(tokens, "attention")

    def _dominant(self, tokens: VisualTokens, budget: int) -> Tensor:
        spare_budget = budget - max(1, self.floor * tokens.frames)
        num_contextual = max(0, min(round(self.contextual * budget), spare_budget))
        scores = self.score(tokens).float()
        return ranked(scores, tokens.frame, budget - num_contextual, self.floor, None, tokens.frame_size)

    def select_body(self, tokens: VisualTokens, budget: int) -> Tensor:
        self.check_model(0, 0, 1 if tokens.positions is None else tokens.positions.shape[0])
        dominant = self._dominant(tokens, budget)
        num_spaced = budget - len(dominant)
        others = rest_of(tokens.n, dominant)
        steps = torch.arange(num_spaced, device=others.device) * len(others)
        return torch.cat([dominant, others[steps.div(max(1, num_spaced), rounding_mode="floor")]])

    def merged(self, tokens: VisualTokens, kept: Tensor) -> Tensor:
        """(K, D) features of the kept tokens after every dropped one was added to the contextual token most like it."""
        unprotected, unprotected_indices = without_separators(tokens)
        features = tokens.features.clone()
        if unprotected_indices is None:
            unprotected_indices = torch.arange(tokens.n, device=features.device)
        dominant = unprotected_indices[self._dominant(unprotected, self.budget(unprotected))]
        roles = torch.zeros(tokens.n, dtype=torch.long, device=features.device)  # 0 elsewhere, 1 contextual, 2 dropped
        roles[unprotected_indices] = 2
        roles[kept] = torch.where(roles[kept] == 2, 1, 0)
        roles[dominant] = 0
        contextual, dropped = (roles == 1).nonzero()[:, 0], (roles == 2).nonzero()[:, 0]
        if len(contextual) == 0 or len(dropped) == 0:
            return features[kept]
        unit_features = normalize(tokens.features.float(), dim=-1)
        nearest = (unit_features[dropped] @ unit_features[contextual].T).argmax(1)
        dropped_sum = features.new_zeros(len(contextual), features.shape[1])
        dropped_sum.index_add_(0, nearest, tokens.features[dropped])
        num_dropped = torch.bincount(nearest, minlength=len(contextual)).clamp(min=1)
        features[contextual] += dropped_sum / num_dropped[:, None].to(dropped_sum)
        return features[kept]


def rest_of(num_tokens: int, chosen: Tensor) -> Tensor:
    """The indices in 0 ... num_tokens - 1 that are not in `chosen`, ascending int64."""
    unchosen = torch.ones(num_tokens, dtype=torch.int8, device=chosen.device).index_fill_(0, chosen, 0)
    return ranking(unchosen)[: num_tokens - len(chosen)]
