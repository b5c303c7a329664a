"""V-CAST: more tokens where the video turns, and in each frame the unusual and the strong ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from vlmfast.core import VisualTokens
from vlmfast.encode.base import Pruner, frame_means, largest_remainder
from vlmfast.fields import PositiveFloat


@dataclass(frozen=True)
class VCast(Pruner):
    """V-CAST (2026): the mean features of the frames are a path; a frame where it bends (1 - cosine between the step
    into it and the step out of it; 1 at both ends) gets more of the budget, by softmax(curvature / temperature).
    In a frame, tokens far from its mean (1 - cosine) and of large norm (scaled to [0, 1]) stay.
    """

    temperature: PositiveFloat = 0.7
    name: ClassVar[str] = "vcast"

    def score(self, tokens: VisualTokens) -> Tensor:
        x, frame, t = tokens.features.float(), tokens.frame, tokens.frames
        unlike = 1 - cosine_similarity(x, frame_means(x, frame, t)[frame], dim=-1, eps=1e-6)
        norm = x.norm(dim=-1)
        low = norm.new_zeros(t).scatter_reduce_(0, frame, norm, "amin", include_self=False)[frame]
        high = norm.new_zeros(t).scatter_reduce_(0, frame, norm, "amax", include_self=False)[frame]
        return unlike + (norm - low) / (high - low + 1e-6)

    def frame_budgets(self, tokens: VisualTokens, budget: int) -> Tensor | None:
        t = tokens.frames
        if t == 1:
            return None
        path = normalize(frame_means(tokens.features.float(), tokens.frame, t), dim=-1, eps=1e-6)
        share = (curvature(path) / self.temperature).softmax(0)
        least = min(self.floor, budget // t)
        return least + largest_remainder(share, budget - least * t)


def curvature(path: Tensor) -> Tensor:
    """path (t, D) -> (t,): 1 - cosine between consecutive steps, 1 at the ends."""
    out = path.new_ones(path.shape[0])
    step = path[1:] - path[:-1]
    out[1:-1] = 1 - cosine_similarity(step[:-1], step[1:], dim=-1, eps=1e-6)
    return torch.nan_to_num(out, nan=1.0)
