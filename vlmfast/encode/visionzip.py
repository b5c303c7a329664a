"""VisionZip: keep what the tower itself looks at."""

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
        spare = budget - max(1, self.floor * tokens.frames)
        contextual = max(0, min(round(self.contextual * budget), spare))
        return ranked(self.score(tokens).float(), tokens.frame, budget - contextual, self.floor, None)

    def select_body(self, tokens: VisualTokens, budget: int) -> Tensor:
        self.check_model(0, 0, 1 if tokens.positions is None else tokens.positions.shape[0])
        dominant = self._dominant(tokens, budget)
        spaced = budget - len(dominant)
        rest = rest_of(tokens.n, dominant)
        steps = (torch.arange(spaced, device=rest.device) * len(rest)).div(max(1, spaced), rounding_mode="floor")
        return torch.cat([dominant, rest[steps]])

    def merged(self, tokens: VisualTokens, kept: Tensor) -> Tensor:
        """(K, D) features of the kept tokens after every dropped one was added to the contextual token most like it."""
        inner, body = without_separators(tokens)
        out = tokens.features.clone()
        body = torch.arange(tokens.n, device=out.device) if body is None else body
        dominant = body[self._dominant(inner, self.budget(inner))]
        role = torch.zeros(tokens.n, dtype=torch.long, device=out.device)  # 0 elsewhere, 1 contextual, 2 dropped
        role[body] = 2
        role[kept] = torch.where(role[kept] == 2, 1, 0)
        role[dominant] = 0
        target, dropped = (role == 1).nonzero()[:, 0], (role == 2).nonzero()[:, 0]
        if len(target) == 0 or len(dropped) == 0:
            return out[kept]
        x = normalize(tokens.features.float(), dim=-1)
        nearest = (x[dropped] @ x[target].T).argmax(1)
        total = out.new_zeros(len(target), out.shape[1]).index_add_(0, nearest, tokens.features[dropped])
        count = torch.bincount(nearest, minlength=len(target)).clamp(min=1)
        out[target] += total / count[:, None].to(total)
        return out[kept]


def rest_of(n: int, chosen: Tensor) -> Tensor:
    """The indices in 0 ... n - 1 that are not in `chosen`, ascending."""
    free = torch.ones(n, dtype=torch.int8, device=chosen.device).index_fill_(0, chosen, 0)
    return ranking(free)[: n - len(chosen)]
