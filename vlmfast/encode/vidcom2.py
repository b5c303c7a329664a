"""VidCom2: keep the outliers, and give unusual frames more."""

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
        x = tokens.features.float()
        kept = max(1, int(x.shape[-1] * self.channels))
        x = normalize(x[:, highest(-x.var(0, unbiased=False), kept)], dim=-1)
        video = x.mean(0)
        frame = frame_means(x, tokens.frame, tokens.frames)[tokens.frame]
        return -gaussians((x - video).square().sum(-1)), -gaussians((x - frame).square().sum(-1))

    def score(self, tokens: VisualTokens) -> Tensor:
        return torch.stack(self._unlike(tokens)).sum(0)

    def select_body(self, tokens: VisualTokens, budget: int) -> Tensor:
        to_video, to_frame = self._unlike(tokens)
        quota = None
        if tokens.frames > 1:
            unique = frame_means(to_video[:, None], tokens.frame, tokens.frames)[:, 0]
            share = (unique / self.temperature).softmax(0)
            quota = largest_remainder((1 + share - share.mean()).clamp(min=0), budget)
        return ranked(to_video + to_frame, tokens.frame, budget, self.floor, quota)


def gaussians(distance: Tensor) -> Tensor:
    """Sum of exp(-d / (2 a)) over widths a = 2^-3 ... 2^1."""
    widths = torch.arange(-3.0, 2.0, device=distance.device).exp2_()
    return torch.exp(-distance[..., None] / (2 * widths)).sum(-1)
