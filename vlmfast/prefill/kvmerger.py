"""KVMerger: runs of neighbours with similar keys become one column, weighted by a Gaussian (arXiv 2407.08454)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vlmfast.fields import PositiveInt, Range
from vlmfast.kernels import highest, ranking, ranks
from vlmfast.prefill.base import Choice, KVPolicy, Row, best, protect
from vlmfast.prefill.merge import add_to, others, taken


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
    stacks: ClassVar[bool] = True
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
        exact_columns = best(protect(scores, self.sinks, self.recent), num_exact)
        other_columns = others(exact_columns, row.n)
        other_keys, other_values, other_scores = (taken(x, other_columns) for x in (row.keys, row.values, scores))
        pivots, *merged_runs = merge_runs(other_keys, other_values, other_scores, num_kept - num_exact)
        kept_columns, column_order = torch.cat([exact_columns, other_columns.gather(1, pivots)], 1).sort()
        stored_vectors = [
            taken(torch.cat([taken(x, exact_columns), merged_run], 1), column_order)
            for x, merged_run in zip((row.keys, row.values), merged_runs, strict=True)
        ]
        return Choice(list(kept_columns), merged=list(zip(*stored_vectors, strict=True)))


def merge_runs(keys: Tensor, values: Tensor, score: Tensor, runs: int) -> tuple[Tensor, Tensor, Tensor]:
    """n columns of H heads cut into runs: pivots (H, runs) int64 ascending, merged keys (H, runs, D) and values.

    keys (H, n, D), values (H, n, Dv), score (H, n) float32.
    """
    num_heads, num_columns = score.shape
    float_keys = keys.float()
    similarity = cosine_similarity(float_keys[:, 1:], float_keys[:, :-1], dim=-1)
    run_index = torch.zeros(num_heads, num_columns, dtype=torch.int64, device=keys.device)
    run_index.scatter_(1, highest(-similarity, runs - 1) + 1, 1)
    run_index = run_index.cumsum(1)
    score_rank = ranks(ranking(score))
    best_rank = score_rank.new_full((num_heads, runs), num_columns).scatter_reduce(1, run_index, score_rank, "amin")
    is_other = score_rank != best_rank.gather(1, run_index)
    pivots = is_other.to(torch.uint8).argsort(dim=1, stable=True)[:, :runs]
    distance = (float_keys - taken(float_keys, pivots.gather(1, run_index))).norm(dim=-1)
    run_sizes = torch.zeros_like(best_rank).scatter_add_(1, run_index, torch.ones_like(run_index))
    run_totals = float_keys.new_zeros(num_heads, runs)
    mean_distance = add_to(run_totals.clone(), run_index, distance) / (run_sizes - 1).clamp(min=1)
    merge_weights = torch.exp(-((distance / mean_distance.gather(1, run_index).clamp(min=1e-12)) ** 2))
    merge_weights = merge_weights / add_to(run_totals, run_index, merge_weights).gather(1, run_index)
    merged_keys, merged_values = (
        add_to(vectors.new_zeros(num_heads, runs, vectors.shape[2], dtype=torch.float32), run_index,
               vectors.float() * merge_weights[..., None]).to(vectors.dtype)
        for vectors in (keys, values)
    )  # fmt: skip
    return pivots, merged_keys, merged_values
