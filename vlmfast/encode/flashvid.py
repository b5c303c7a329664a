"""FlashVID: attended and diverse tokens of each frame, then one token for every thing that moves through the scene."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmfast.core import VisualTokens
from vlmfast.encode.base import Pruner, frame_means
from vlmfast.encode.greedy import LATTICE, in_order, unit_rows
from vlmfast.fields import Fraction
from vlmfast.kernels import greedy, highest, ranking


@dataclass(frozen=True)
class FlashVID(Pruner):
    """The rule of FlashVID (ICLR 2026) in pruning form. `alpha` of the budget goes to farthest-point selection in every
    frame, distances weighted by tower attention. Each token left over is linked to its best match anywhere in the
    previous frame of its segment when their cosine exceeds `threshold`; the tree that links make is represented by its
    root, the earliest token. Roots compete by density peaks. Video only: images pass unpruned.

    The paper averages each tree and each density cluster and prunes once more inside the language model; here nothing
    is merged, so that positions stay true (M-RoPE), and the second pruning is `FastV(prune=FlashVID(...))`.
    segments: a new one begins where neighbouring frame means are less alike than `cut`; at least `segments` of them.
    """

    alpha: Fraction = 0.7
    threshold: float = 0.8
    cut: float = 0.9
    segments: int = 8
    name: ClassVar[str] = "flashvid"
    needs: ClassVar[tuple[str, ...]] = ("features", "tower_attention")
    video_only: ClassVar[bool] = True

    def select_body(self, tokens: VisualTokens, budget: int) -> Tensor:
        t, n = tokens.frames, tokens.n // tokens.frames
        x = unit_rows(tokens.features).view(t, n, -1)
        each = max(min(self.floor, budget // t), int(self.alpha * budget) // t)
        taken = attended_and_diverse(x, self.need(tokens, "attention").float().view(t, n), each)
        rank = self._roots_first(x, taken, tokens)
        rank = torch.where(taken, rank.new_full((), 4.0), rank)
        return highest(rank.flatten(), budget)

    def _roots_first(self, x: Tensor, taken: Tensor, tokens: VisualTokens) -> Tensor:
        """(t, n) rank of the tokens left over: roots by density peak (1 ... 2), then linked ones, least alike first."""
        n, free = x.shape[1], ~taken
        alike = x[1:] @ x[:-1].transpose(1, 2)
        alike = alike.masked_fill(~(free[1:, :, None] & free[:-1, None, :]), -1)
        alike = alike.masked_fill(self._starts(tokens)[1:, None, None], -1)
        best = torch.cat([alike.new_full((1, n), -1.0), alike.amax(-1)])
        root = (best <= self.threshold) & free
        peak = density_peaks(x, root).masked_fill(~root, -1)
        place = ranking(peak).argsort(dim=1)
        place = place / root.sum(1, keepdim=True).clamp(min=1)
        return torch.where(root, 2 - place, -best)

    def _starts(self, tokens: VisualTokens) -> Tensor:
        """(t,) bool: does a segment begin at this frame?"""
        t = tokens.frames
        mean = normalize(frame_means(tokens.features.float(), tokens.frame, t), dim=-1)
        alike = (mean[1:] * mean[:-1]).sum(-1)
        order = alike.argsort(stable=True).argsort()  # the least alike neighbours are cut first
        return torch.cat([alike.new_ones(1).bool(), (alike < self.cut) | (order < self.segments - 1)])


def attended_and_diverse(x: Tensor, attention: Tensor, k: int) -> Tensor:
    """(t, n) bool: k tokens of every frame by farthest-point selection, gaps weighted by attention.

    x: (t, n, D) unit rows; attention: (t, n). The first token of a frame is the most attended; where nothing new is
    left, the rest goes by attention, then evenly over the frame (`encode/greedy.py`).
    """
    t, n, _ = x.shape
    weight = attention / attention.amax(1, keepdim=True).clamp(min=1e-12)
    left = greedy.farthest(1 - x @ x.transpose(1, 2), weight, weight, k)
    if left.device.type == "cpu" and bool(((left < 0).sum(1) == k).all()):  # where looking costs nothing
        return left < 0
    order = in_order(left, weight, torch.arange(n, device=x.device, dtype=torch.float64).mul_(LATTICE[1]).frac_())
    return torch.zeros(t, n, dtype=torch.bool, device=x.device).scatter_(1, order[:, :k], True)


def density_peaks(x: Tensor, among: Tensor, k: int = 7) -> Tensor:
    """(t, n) density-peak score (local density * distance to the nearest denser token) of the tokens `among`."""
    far = 1e3
    distance = (2 - 2 * (x @ x.transpose(1, 2))).clamp(min=0)
    distance = distance.masked_fill(~among[:, None, :], far)
    near = distance.topk(min(k, x.shape[1]), -1, largest=False).values
    density = torch.exp(-near.clamp(max=4).mean(-1)).masked_fill(~among, 0)
    denser = density[:, None, :] > density[:, :, None]
    return distance.masked_fill(~denser, far).amin(-1).clamp(max=4) * density
