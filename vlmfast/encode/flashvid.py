"""FlashVID: keeps attended and diverse tokens of each frame, then the first token of each chain that repeats."""

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
        num_frames, frame_size = tokens.frames, tokens.n // tokens.frames
        unit_features = unit_rows(tokens.features).view(num_frames, frame_size, -1)
        picks_per_frame = max(min(self.floor, budget // num_frames), int(self.alpha * budget) // num_frames)
        attention = self.need(tokens, "attention").float().view(num_frames, frame_size)
        selected = attended_and_diverse(unit_features, attention, picks_per_frame)
        priority = self._roots_first(unit_features, selected, tokens)
        priority = torch.where(selected, priority.new_full((), 4.0), priority)
        return highest(priority.flatten(), budget)

    def _roots_first(self, unit_features: Tensor, selected: Tensor, tokens: VisualTokens) -> Tensor:
        """(t, n) rank of the tokens left over: roots by density peak (1 ... 2), then linked ones, least alike first."""
        frame_size, unselected = unit_features.shape[1], ~selected
        similarity = unit_features[1:] @ unit_features[:-1].transpose(1, 2)
        similarity = similarity.masked_fill(~(unselected[1:, :, None] & unselected[:-1, None, :]), -1)
        similarity = similarity.masked_fill(self._starts(tokens)[1:, None, None], -1)
        best_match = torch.cat([similarity.new_full((1, frame_size), -1.0), similarity.amax(-1)])
        is_root = (best_match <= self.threshold) & unselected
        peak_score = density_peaks(unit_features, is_root).masked_fill(~is_root, -1)
        peak_rank = ranking(peak_score).argsort(dim=1)
        peak_rank = peak_rank / is_root.sum(1, keepdim=True).clamp(min=1)
        return torch.where(is_root, 2 - peak_rank, -best_match)

    def _starts(self, tokens: VisualTokens) -> Tensor:
        """(t,) bool: does a segment begin at this frame?"""
        num_frames = tokens.frames
        mean_features = normalize(frame_means(tokens.features.float(), tokens.frame, num_frames), dim=-1)
        similarity = (mean_features[1:] * mean_features[:-1]).sum(-1)
        cut_order = similarity.argsort(stable=True).argsort()  # the least alike neighbours are cut first
        return torch.cat([similarity.new_ones(1).bool(), (similarity < self.cut) | (cut_order < self.segments - 1)])


def attended_and_diverse(unit_features: Tensor, attention: Tensor, num_selected: int) -> Tensor:
    """(t, n) bool: `num_selected` tokens of every frame by farthest-point selection, gaps weighted by attention.

    unit_features: (t, n, D), of length one; attention: (t, n). The first token of a frame is the most attended; where
    nothing new is left, the rest goes by attention, then evenly over the frame (`encode/greedy.py`).
    """
    frame_size = unit_features.shape[1]
    weights = attention / attention.amax(1, keepdim=True).clamp(min=1e-12)
    remaining = greedy.farthest(1 - unit_features @ unit_features.transpose(1, 2), weights, weights, num_selected)
    device = remaining.device
    if device.type == "cpu" and bool(((remaining < 0).sum(1) == num_selected).all()):  # reading costs nothing there
        return remaining < 0
    spread = torch.arange(frame_size, device=device, dtype=torch.float64).mul_(LATTICE[1]).frac_()
    best_first = in_order(remaining, weights, spread)[:, :num_selected]
    return torch.zeros(remaining.shape, dtype=torch.bool, device=device).scatter_(1, best_first, True)


def density_peaks(unit_features: Tensor, candidates: Tensor, num_neighbours: int = 7) -> Tensor:
    """(t, n) density-peak score of the `candidates` (t, n) bool: local density * distance to the nearest denser one.

    unit_features: (t, n, D).
    """
    far_distance = 1e3
    distance = (2 - 2 * (unit_features @ unit_features.transpose(1, 2))).clamp(min=0)
    distance = distance.masked_fill(~candidates[:, None, :], far_distance)
    nearest = distance.topk(min(num_neighbours, unit_features.shape[1]), -1, largest=False).values
    density = torch.exp(-nearest.clamp(max=4).mean(-1)).masked_fill(~candidates, 0)
    denser = density[:, None, :] > density[:, :, None]
    return distance.masked_fill(~denser, far_distance).amin(-1).clamp(max=4) * density
