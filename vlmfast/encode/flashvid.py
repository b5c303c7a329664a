"""FlashVID: keeps attended and diverse tokens of each frame, then the first token of each chain that repeats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmfast.core import VisualTokens
from vlmfast.encode.base import Pruner
from vlmfast.encode.greedy import LATTICE, in_order, unit_rows
from vlmfast.fields import Fraction
from vlmfast.kernels import greedy, ranking


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
        distance = 1 - unit_features @ unit_features.transpose(1, 2)
        picks_per_frame = max(min(self.floor, budget // num_frames), int(self.alpha * budget) // num_frames)
        attention = self.need(tokens, "attention").float().view(num_frames, frame_size)
        selected = attended_and_diverse(distance, attention, picks_per_frame)
        order = self._roots_first(unit_features, distance, selected, tokens).masked_fill(selected, -4.0)
        return order.flatten().argsort(stable=True)[:budget]

    def _roots_first(self, unit_features: Tensor, distance: Tensor, selected: Tensor, tokens: VisualTokens) -> Tensor:
        """(t, n), the least goes first: roots by density peak (-2 ... -1), then linked tokens, the least alike first.

        distance (t, n, n): 1 - cosine inside each frame.
        """
        frame_size = unit_features.shape[1]
        to_previous = unit_features[1:] @ unit_features[:-1].transpose(1, 2)
        best_match = to_previous.masked_fill(selected[:-1, None, :], -1).amax(-1)
        best_match = best_match.masked_fill(self._cuts(tokens)[:, None], -1)
        best_match = torch.cat([best_match.new_full((1, frame_size), -1.0), best_match])
        is_other = (best_match > self.threshold) | selected
        peak_score = density_peaks(distance, is_other).masked_fill(is_other, -1)
        peak_rank = ranking(peak_score).argsort(dim=1) / (~is_other).sum(1, keepdim=True)
        return torch.where(is_other, best_match, peak_rank - 2)

    def _cuts(self, tokens: VisualTokens) -> Tensor:
        """(t - 1,) bool: does a segment begin at the second, third ... frame?"""
        mean_features = normalize(tokens.features.float().unflatten(0, (tokens.frames, -1)).mean(1), dim=-1)
        similarity = (mean_features[1:] * mean_features[:-1]).sum(-1)
        cut_order = similarity.argsort(stable=True).argsort()  # the least alike neighbours are cut first
        return (similarity < self.cut) | (cut_order < self.segments - 1)


def attended_and_diverse(distance: Tensor, attention: Tensor, num_selected: int) -> Tensor:
    """(t, n) bool: `num_selected` tokens of every frame by farthest-point selection, gaps weighted by attention.

    distance: (t, n, n) 1 - cosine inside each frame; attention: (t, n). The first token of a frame is the most
    attended; where nothing new is left, the rest goes by attention, then evenly over the frame (`encode/greedy.py`).
    """
    frame_size = distance.shape[1]
    weights = attention / attention.amax(1, keepdim=True).clamp(min=1e-12)
    remaining = greedy.farthest(distance, weights, weights, num_selected)
    device = remaining.device
    if device.type == "cpu" and bool(((remaining < 0).sum(1) == num_selected).all()):  # reading costs nothing there
        return remaining < 0
    step = LATTICE[1]
    spread = torch.arange(0, (frame_size - 0.5) * step, step, device=device, dtype=torch.float64).frac_()
    best_first = in_order(remaining, weights, spread)[:, :num_selected]
    return torch.zeros(remaining.shape, dtype=torch.bool, device=device).scatter_(1, best_first, True)


def density_peaks(distance: Tensor, left_out: Tensor, num_neighbours: int = 7) -> Tensor:
    """(t, n) density-peak score of a frame's tokens: local density * distance to the nearest denser one.

    distance: (t, n, n) 1 - cosine inside each frame; left_out: (t, n) bool, tokens that are nobody's neighbour, and
    whose own score means nothing.
    """
    distance = distance.clamp(0, 2).masked_fill(left_out[:, None, :], 2)
    nearest = distance.topk(min(num_neighbours, distance.shape[1]), -1, largest=False).values
    density = torch.exp(-2 * nearest.mean(-1))
    no_denser = density[:, None, :] <= density[:, :, None]
    return distance.masked_fill(no_denser, 2).amin(-1) * density
