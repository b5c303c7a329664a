"""VidCom2: keeps tokens unlike the rest of the video and gives unusual frames more of the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmfast.core import VisualTokens
from vlmfast.encode.base import Pruner, frame_means, largest_remainder, ranked
from vlmfast.kernels import highest


@dataclass(frozen=True)
class VidCom2(Pruner):
    """Video Compression Commander (arXiv 2505.14454), re-implemented from the rule.

    On the `channels` share of channels with the least variance, a token's similarity to the centre of the video and
    to the centre of its frame is a sum of Gaussians over several widths; tokens unlike both are kept. Frames whose
    tokens are unlike the video get more: budget * (1 + softmax(uniqueness / temperature) - mean).
    """

    channels: float = 0.5
    temperature: float = 0.01
    name: ClassVar[str] = "vidcom2"

    def _like(self, tokens: VisualTokens) -> Tensor:
        """(2, N) likeness to the video's centre, and to the frame's."""
        features, frame_size = tokens.features.float(), tokens.frame_size
        num_channels = max(1, int(features.shape[-1] * self.channels))
        features = normalize(features[:, highest(-features.var(0, unbiased=False), num_channels)], dim=-1)
        video_centre = features.mean(0)
        frame_centre = frame_means(features, tokens.frame, tokens.frames, frame_size)[tokens.frame]
        distances = [(features - centre).square().sum(-1) for centre in (video_centre, frame_centre)]
        return gaussians(torch.stack(distances))

    def score(self, tokens: VisualTokens) -> Tensor:
        return -self._like(tokens).sum(0)

    def select_body(self, tokens: VisualTokens, budget: int) -> Tensor:
        return self.select_bodies(tokens, [budget])[0]

    def select_bodies(self, tokens: VisualTokens, budgets: list[int]) -> list[Tensor]:
        like = self._like(tokens)
        quotas: dict[int, Tensor | None] = dict.fromkeys(budgets)
        if tokens.frames > 1:
            likeness = frame_means(like[0][:, None], tokens.frame, tokens.frames, tokens.frame_size)[:, 0]
            frame_share = (likeness / -self.temperature).softmax(0)
            frame_share = (1 + frame_share - frame_share.mean()).clamp(min=0)
            quotas = {budget: largest_remainder(frame_share, budget) for budget in budgets}
        scores, frame, frame_size = -like.sum(0), tokens.frame, tokens.frame_size
        return [ranked(scores, frame, budget, self.floor, quotas[budget], frame_size) for budget in budgets]


def gaussians(distance: Tensor) -> Tensor:
    """Sum of exp(-d / (2 a)) over widths a = 2^-3 ... 2^1."""
    widths = torch.arange(-2.0, 3.0, device=distance.device).exp2_().neg_()  # -2 a
    return torch.exp(distance[..., None] / widths).sum(-1)
