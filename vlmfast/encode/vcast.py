"""V-CAST: more tokens for frames where the video changes direction; in each frame the unusual and the strong ones."""

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
        features, frame_index, num_frames = tokens.features.float(), tokens.frame, tokens.frames
        means = frame_means(features, frame_index, num_frames)[frame_index]
        unlike = 1 - cosine_similarity(features, means, dim=-1, eps=1e-6)
        norms = features.norm(dim=-1)
        lowest, highest = norms.new_zeros(num_frames), norms.new_zeros(num_frames)
        lowest.scatter_reduce_(0, frame_index, norms, "amin", include_self=False)
        highest.scatter_reduce_(0, frame_index, norms, "amax", include_self=False)
        return unlike + (norms - lowest[frame_index]) / ((highest - lowest)[frame_index] + 1e-6)

    def frame_budgets(self, tokens: VisualTokens, budget: int) -> Tensor | None:
        num_frames = tokens.frames
        if num_frames == 1:
            return None
        frame_path = normalize(frame_means(tokens.features.float(), tokens.frame, num_frames), dim=-1, eps=1e-6)
        frame_share = (curvature(frame_path) / self.temperature).softmax(0)
        min_per_frame = min(self.floor, budget // num_frames)
        return min_per_frame + largest_remainder(frame_share, budget - min_per_frame * num_frames)


def curvature(path: Tensor) -> Tensor:
    """path (t, D) -> (t,): 1 - cosine between consecutive steps, 1 at the ends."""
    bends = path.new_ones(path.shape[0])
    steps = path[1:] - path[:-1]
    bends[1:-1] = 1 - cosine_similarity(steps[:-1], steps[1:], dim=-1, eps=1e-6)
    return torch.nan_to_num(bends, nan=1.0)
