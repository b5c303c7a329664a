"""KVMerger: runs of neighbours with similar keys become one column, weighted by a Gaussian (arXiv 2407.08454)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vlmfast.fields import PositiveInt, Range
from vlmfast.kernels import highest, ranking
from vlmfast.prefill.base import Choice, KVPolicy, Row, best, protect
from vlmfast.prefill.merge import others


@dataclass(frozen=True)
class KVMerger(KVPolicy):
    """Sinks, recent columns and heavy hitters stay as they are; the others, in order, are cut into runs and merged.

    A run's pivot is its most attended column; column i weighs exp(-|k_i - k_p|^2 / d^2), d the mean distance from pivot
    to the others of the run (the bandwidth is ours), and the merged vectors stand at the pivot's place. The paper cuts
    where the cosine of neighbours falls below a threshold (0.75), so the number of runs follows the input; here the
    budget says how many, and the cuts are where the cosine is lowest. Heavy hitters do not cut a run.

    queries: text queries summed over, the last ones
    heavy: share of the budget beside sinks and recent columns that goes to heavy hitters, in [0, 1) (ours)
    """

    name: ClassVar[str] = "kvmerger"
    queries: PositiveInt = 64
    heavy: Annotated[float, Range(0, 1, "most")] = 0.5

    def least(self) -> int:
        """Sinks, recent columns, and one run."""
        return self.sinks + self.recent + 1

    def score(self, row: Row) -> Tensor:
        return row.relevance()

    def choose(self, row: Row) -> Choice:
        total, scores = self.allowance(row), self.score(row)
        exact = total - max(1, round((1 - self.heavy) * (total - self.sinks - self.recent)))
        choice = Choice([], merged=[])
        assert choice.merged is not None
        for keys, values, score in zip(row.keys, row.values, scores, strict=True):
            alone = best(protect(score, self.sinks, self.recent), exact)
            rest = others(alone, row.n)
            pivots, merged_keys, merged_values = merge_runs(keys[rest], values[rest], score[rest], total - exact)
            keep, order = torch.cat([alone, rest[pivots]]).sort()
            choice.keep.append(keep)
            both = torch.cat([keys[alone], merged_keys]), torch.cat([values[alone], merged_values])
            choice.merged.append((both[0][order], both[1][order]))
        return choice


def merge_runs(keys: Tensor, values: Tensor, score: Tensor, runs: int) -> tuple[Tensor, Tensor, Tensor]:
    """n columns cut into runs: pivots (runs,) int64 ascending, merged keys (runs, D) and values (runs, Dv)."""
    n = len(keys)
    wide = keys.float()
    alike = cosine_similarity(wide[1:], wide[:-1], dim=-1)
    run = torch.zeros(n, dtype=torch.int64, device=keys.device)
    run[highest(-alike, runs - 1) + 1] = 1
    run = run.cumsum(0)
    rank = ranking(score).argsort()
    top = rank.new_full((runs,), n).scatter_reduce(0, run, rank, "amin")
    pivots = (rank == top[run]).nonzero()[:, 0]
    distance = (wide - wide[pivots][run]).norm(dim=-1)
    size = run.bincount(minlength=runs)
    mean = wide.new_zeros(runs).index_add_(0, run, distance) / (size - 1).clamp(min=1)
    weight = torch.exp(-((distance / mean[run].clamp(min=1e-12)) ** 2))
    weight = weight / weight.new_zeros(runs).index_add_(0, run, weight)[run]
    out = []
    for x in (keys, values):
        total = torch.zeros(runs, x.shape[1], device=x.device)
        out.append(total.index_add_(0, run, x.float() * weight[:, None]).to(x.dtype))
    return pivots, out[0], out[1]
