"""VidCom2: keeps tokens unlike the rest of the video and gives unusual frames more of the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmfast.core import VisualTokens
from vlmfast.encode.base import Pruner, frame_means, largest_remainder, ranked_for_each
from vlmfast.kernels import by_parts, lowest_first


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

    @torch.no_grad()
    def _like(self, tokens: VisualTokens) -> Tensor:
        """(2, N) likeness to the video's centre, and to the frame's."""
        features, frame_size = tokens.features.float(), tokens.frame_size
        num_channels = max(1, int(features.shape[-1] * self.channels))
        channels = steady_channels(features, num_channels)
        features = by_parts(lambda some: normalize(some.index_select(1, channels), dim=-1), features)
        frame_centre = frame_means(features, tokens.frame, tokens.frames, frame_size)
        if frame_size is None:
            rows, row_centre = features[:, None], frame_centre[tokens.frame][:, None]
        else:
            rows, row_centre = features.view(tokens.frames, frame_size, -1), frame_centre[:, None]
        centre = features.mean(0)

        def distances(rows: Tensor, row_centre: Tensor) -> Tensor:
            differences = rows.new_empty(*rows.shape[:-1], 2, rows.shape[-1])
            torch.sub(rows, centre, out=differences[..., 0, :])
            torch.sub(rows, row_centre, out=differences[..., 1, :])
            return differences.square_().sum(-1)

        return gaussians(by_parts(distances, rows, row_centre).view(-1, 2).T)

    def score(self, tokens: VisualTokens) -> Tensor:
        return -self._like(tokens).sum(0)

    def select_body(self, tokens: VisualTokens, budget: int) -> Tensor:
        return self.select_bodies(tokens, [budget])[0]

    def select_bodies(self, tokens: VisualTokens, budgets: list[int]) -> list[Tensor]:
        like, quotas = self._like(tokens), None
        if tokens.frames > 1:
            likeness = frame_means(like[0][:, None], tokens.frame, tokens.frames, tokens.frame_size)[:, 0]
            frame_share = (likeness / -self.temperature).softmax(0)
            frame_share = (1 + frame_share - frame_share.mean()).clamp(min=0)
            totals = torch.linspace(budgets[0], budgets[-1], len(budgets), device=like.device)[:, None]
            quotas = largest_remainder(frame_share, totals)
        return ranked_for_each(lowest_first(like.sum(0)), tokens.frame, budgets, self.floor, quotas, tokens.frame_size)


def steady_channels(features: Tensor, num_channels: int) -> Tensor:
    """(num_channels,) int64: the channels of float features (N, D) with the least variance, in any order."""
    if features.device.type != "cpu":
        return lowest_first(features.var(0, unbiased=False))[:num_channels]
    # torch's own variance of columns is slower there, and channels are read faster in the order of memory
    variance = (features - features.mean(0)).square_().mean(0)
    return lowest_first(variance)[:num_channels].sort().values


def gaussians(distance: Tensor) -> Tensor:
    """Sum of exp(-d / (2 a)) over widths a = 2^-3 ... 2^1."""
    widths = torch.arange(-2.0, 3.0, device=distance.device).exp2_().neg_()  # -2 a
    return torch.exp(distance[..., None] / widths).sum(-1)
