"""V-CAST: more tokens for frames where the video changes direction; in each frame the unusual and the strong ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmfast.core import VisualTokens
from vlmfast.encode.base import Pruner, frame_means, largest_remainder, ranked
from vlmfast.fields import PositiveFloat

EPSILON = 1e-6  # lengths and spans count as this at least


@dataclass(frozen=True)
class VCast(Pruner):
    """V-CAST (2026): the mean features of the frames are a path; a frame where it bends (1 - cosine between the step
    into it and the step out of it; 1 at both ends) gets more of the budget, by softmax(curvature / temperature).
    In a frame, tokens far from its mean (1 - cosine) and of large norm (scaled to [0, 1]) stay.
    """

    temperature: PositiveFloat = 0.7
    name: ClassVar[str] = "vcast"

    def score(self, tokens: VisualTokens) -> Tensor:
        return self._score(tokens, self._unit_means(tokens))

    def select_body(self, tokens: VisualTokens, budget: int) -> Tensor:
        unit_means, num_frames, frame_quota = self._unit_means(tokens), tokens.frames, None
        if num_frames > 1:
            frame_share = (curvature(unit_means) / self.temperature).softmax(0)
            min_per_frame = min(self.floor, budget // num_frames)
            frame_quota = min_per_frame + largest_remainder(frame_share, budget - min_per_frame * num_frames)
        scores = self._score(tokens, unit_means)
        return ranked(scores, tokens.frame, budget, self.floor, frame_quota, tokens.frame_size)

    def _unit_means(self, tokens: VisualTokens) -> Tensor:
        """(t, D) mean feature of each frame, at length one."""
        means = frame_means(tokens.features.float(), tokens.frame, tokens.frames, tokens.frame_size)
        return normalize(means, dim=-1, eps=EPSILON)

    def _score(self, tokens: VisualTokens, unit_means: Tensor) -> Tensor:
        features, frame_index, num_frames = tokens.features.float(), tokens.frame, tokens.frames
        norms = features.norm(dim=-1)
        unit_features = features / norms[:, None].clamp(min=EPSILON)
        unlike = 1 - (unit_features * unit_means[frame_index]).sum(-1)
        lowest, highest = norms.new_zeros(2, num_frames)
        lowest.scatter_reduce_(0, frame_index, norms, "amin", include_self=False)
        highest.scatter_reduce_(0, frame_index, norms, "amax", include_self=False)
        return unlike + (norms - lowest[frame_index]) / ((highest - lowest)[frame_index] + EPSILON)


def curvature(path: Tensor) -> Tensor:
    """path (t, D) -> (t,): 1 - cosine between consecutive steps, 1 at the ends."""
    bends = path.new_ones(path.shape[0])
    steps = normalize(path[1:] - path[:-1], dim=-1, eps=EPSILON)
    bends[1:-1] = 1 - (steps[:-1] * steps[1:]).sum(-1)
    return torch.nan_to_num(bends, nan=1.0)
