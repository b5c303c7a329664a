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
        num_kept, scores = self.allowance(row), self.score(row)
        num_exact = num_kept - max(1, round((1 - self.heavy) * (num_kept - self.sinks - self.recent)))
        choice = Choice([], merged=[])
        assert choice.merged is not None
        for head_keys, head_values, head_scores in zip(row.keys, row.values, scores, strict=True):
            exact_columns = best(protect(head_scores, self.sinks, self.recent), num_exact)
            other_columns = others(exact_columns, row.n)
            pivots, merged_keys, merged_values = merge_runs(
                head_keys[other_columns], head_values[other_columns], head_scores[other_columns], num_kept - num_exact
            )
            kept_columns, column_order = torch.cat([exact_columns, other_columns[pivots]]).sort()
            choice.keep.append(kept_columns)
            stored_vectors = (
                torch.cat([head_keys[exact_columns], merged_keys]),
                torch.cat([head_values[exact_columns], merged_values]),
            )
            choice.merged.append((stored_vectors[0][column_order], stored_vectors[1][column_order]))
        return choice


def merge_runs(keys: Tensor, values: Tensor, score: Tensor, runs: int) -> tuple[Tensor, Tensor, Tensor]:
    """n columns cut into runs: pivots (runs,) int64 ascending, merged keys (runs, D) and values (runs, Dv)."""
    num_columns = len(keys)
    float_keys = keys.float()
    similarity = cosine_similarity(float_keys[1:], float_keys[:-1], dim=-1)
    run_index = torch.zeros(num_columns, dtype=torch.int64, device=keys.device)
    run_index.index_fill_(0, highest(-similarity, runs - 1) + 1, 1)
    run_index = run_index.cumsum(0)
    score_rank = ranking(score).argsort()
    best_rank = score_rank.new_full((runs,), num_columns).scatter_reduce(0, run_index, score_rank, "amin")
    is_other = score_rank != best_rank[run_index]
    pivots = is_other.to(torch.uint8).argsort(stable=True)[:runs]
    distance = (float_keys - float_keys[pivots][run_index]).norm(dim=-1)
    run_sizes = run_index.new_zeros(runs).index_add_(0, run_index, torch.ones_like(run_index))
    mean_distance = float_keys.new_zeros(runs).index_add_(0, run_index, distance) / (run_sizes - 1).clamp(min=1)
    merge_weights = torch.exp(-((distance / mean_distance[run_index].clamp(min=1e-12)) ** 2))
    merge_weights = merge_weights / merge_weights.new_zeros(runs).index_add_(0, run_index, merge_weights)[run_index]
    merged_vectors = []
    for vectors in (keys, values):
        run_sums = torch.zeros(runs, vectors.shape[1], device=vectors.device)
        merged_vectors.append(
            run_sums.index_add_(0, run_index, vectors.float() * merge_weights[:, None]).to(vectors.dtype)
        )
    return pivots, merged_vectors[0], merged_vectors[1]
