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

    def _unlike(self, tokens: VisualTokens) -> tuple[Tensor, Tensor]:
        """(N,) distance-like score to the video's centre, and to the frame's."""
        features = tokens.features.float()
        num_channels = max(1, int(features.shape[-1] * self.channels))
        features = normalize(features[:, highest(-features.var(0, unbiased=False), num_channels)], dim=-1)
        video_centre = features.mean(0)
        frame_centre = frame_means(features, tokens.frame, tokens.frames)[tokens.frame]
        to_video, to_frame = ((features - centre).square().sum(-1) for centre in (video_centre, frame_centre))
        return -gaussians(to_video), -gaussians(to_frame)

    def score(self, tokens: VisualTokens) -> Tensor:
        return torch.stack(self._unlike(tokens)).sum(0)

    def select_body(self, tokens: VisualTokens, budget: int) -> Tensor:
        to_video, to_frame = self._unlike(tokens)
        frame_quota = None
        if tokens.frames > 1:
            uniqueness = frame_means(to_video[:, None], tokens.frame, tokens.frames)[:, 0]
            frame_share = (uniqueness / self.temperature).softmax(0)
            frame_quota = largest_remainder((1 + frame_share - frame_share.mean()).clamp(min=0), budget)
        return ranked(to_video + to_frame, tokens.frame, budget, self.floor, frame_quota)


def gaussians(distance: Tensor) -> Tensor:
    """Sum of exp(-d / (2 a)) over widths a = 2^-3 ... 2^1."""
    widths = torch.arange(-3.0, 2.0, device=distance.device).exp2_()
    return torch.exp(-distance[..., None] / (2 * widths)).sum(-1)
