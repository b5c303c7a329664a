"""MaxMin: the most diverse set, by farthest-point selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmfast.core import VisualTokens
from vlmfast.encode.base import Pruner


@dataclass(frozen=True)
class MaxMin(Pruner):
    """The rule of DivPrune (arXiv 2503.02175), re-implemented from the paper: greedily add the token whose smallest
    cosine distance to the chosen set is largest; the first is the token farthest from its own nearest neighbour.

    K sequential steps of one (N,) update each; the distances are one N x N product. Every frame's floor is met by
    giving its farthest tokens first place when the greedy set has left it out.
    """

    name: ClassVar[str] = "maxmin"

    def select_body(self, tokens: VisualTokens, budget: int) -> Tensor:
        x = normalize(tokens.features.float(), dim=-1).nan_to_num_()
        distance = gram(x).neg_().add_(1)
        n = tokens.n
        nearest_other = (distance + torch.eye(n, device=x.device) * 4).min(1).values
        chosen = torch.empty(budget, dtype=torch.long, device=x.device)
        chosen[0] = nearest_other.argmax()
        gap = distance[chosen[0]].clone()
        gap[chosen[0]] = -1
        for i in range(1, budget):
            best = gap.argmax()
            chosen[i] = best
            torch.minimum(gap, distance.index_select(0, best[None])[0], out=gap)
            gap.index_fill_(0, best[None], -1)
        return with_floor(chosen, gap, tokens.frame, tokens.frames, self.floor)


def gram(x: Tensor, blocks: int = 8) -> Tensor:
    """x @ x.T of x (N, D), each pair of rows multiplied once: little more than half the work of the plain product."""
    n = len(x)
    if x.is_cuda or n < 64 * blocks:
        return x @ x.T
    out, step = x.new_empty(n, n), -(-n // blocks)
    for a in range(0, n, step):
        b = min(n, a + step)
        torch.mm(x[a:b], x[a:].T, out=out[a:b, a:])
        out[b:, a:b] = out[a:b, b:].T
    return out


def with_floor(chosen: Tensor, gap: Tensor, frame: Tensor, t: int, floor: int) -> Tensor:
    """Swap the last chosen tokens of rich frames for the best unchosen ones of frames below the floor.

    chosen: (K,) in the order of choice; gap: (N,) remaining distance of unchosen tokens, negative for chosen ones.
    """
    if floor == 0:
        return chosen
    counts = torch.bincount(frame[chosen], minlength=t)
    sizes = torch.bincount(frame, minlength=t)
    lacking = (torch.minimum(sizes, torch.full_like(sizes, floor)) - counts).clamp(min=0)
    if not bool(lacking.any()):
        return chosen
    kept, gap = chosen.tolist(), gap.clone()
    for f in lacking.nonzero()[:, 0].tolist():
        for _ in range(int(lacking[f])):
            best = int(gap.masked_fill(frame != f, -2).argmax())
            for position in range(len(kept) - 1, -1, -1):
                g = int(frame[kept[position]])
                if counts[g] > floor:
                    counts[g] -= 1
                    kept[position] = best
                    break
            gap[best] = -1
            counts[f] += 1
    return torch.tensor(kept, device=chosen.device)
