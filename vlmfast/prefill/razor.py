"""RazorAttention: retrieval heads keep all columns, others a window and one compensation (arXiv 2407.15891)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfast.core import Unsupported, UserError, shown
from vlmfast.fields import Fraction, PositiveInt, Share
from vlmfast.kernels import ranking
from vlmfast.prefill.across import AcrossLayers, Rated
from vlmfast.prefill.base import Choice, Row
from vlmfast.runtime.transfers import to_device


@dataclass(frozen=True)
class RazorAttention(AcrossLayers):
    """Heads that look far keep every column; the rest keep sinks, recent columns, and the mean of what they drop.

    The mean key and value stand where the first dropped column was and count as many columns as were dropped: their
    score gets the log of that number. The paper finds retrieval heads (echo and induction heads) offline, on a repeated
    random prompt; here they are this prompt's heads with the most attention outside sinks and recent columns, ranked
    over all layers, or a list. Of the ranked ones only as many as the budget can hold whole are taken.

    keep: 15 % of the heads whole and a fifth of the columns elsewhere, as in the paper
    share: fraction of all heads taken as retrieval heads (paper 0.15)
    heads: (layer, key head) pairs to take instead, however they look; needs no attention
    queries: text queries whose attention ranks the heads, the last ones
    """

    name: ClassVar[str] = "razorattention"
    keep: Fraction = 0.32
    share: Share = 0.15
    heads: tuple[tuple[int, int], ...] | None = None
    queries: PositiveInt = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(min(head_pair) < 0 for head_pair in self.heads or ()):
            raise UserError(
                f"heads={shown(self.heads)} in {self.name}: give (layer, key head) pairs, e.g. ((0, 1), (3, 0))"
            )

    def window(self) -> int:
        return 0 if self.heads is not None else self.queries

    def check_model(self, layers: int, heads: int, axes: int) -> None:
        for layer_index, head_index in self.heads or ():
            if layer_index >= layers or head_index >= heads:
                raise Unsupported(
                    f"{self.name}: head ({layer_index}, {head_index}), but this model has layers 0 to {layers - 1} "
                    f"with key heads 0 to {heads - 1} each"
                )

    def least(self) -> int:
        """Sinks, recent columns, and the compensation column."""
        return self.sinks + self.recent + 1

    def score(self, row: Row) -> Tensor:
        if self.heads is not None:
            return torch.zeros(row.keys.shape[:2], device=row.keys.device)
        return row.relevance()

    def weigh(self, row: Row, scores: Tensor) -> list[Any]:
        """Each layer, and how far its heads look: (Hk,) attention outside sinks and recent columns."""
        head_reach = scores[:, self.sinks : row.n - self.recent].sum(1)
        return list(zip(row.numbers or (row.layer,), head_reach.view(row.stacked, -1), strict=True))

    def spread(self, weights: list[Any], n: int) -> list[list[int]]:
        """Columns of every head of every layer: n for retrieval heads, the rest of the budget for the others alike."""
        reach = torch.stack([head_reach for _, head_reach in weights]).cpu()  # the one wait
        weights = [(layer_index, layer_reach) for (layer_index, _), layer_reach in zip(weights, reach, strict=True)]
        head_pairs = [
            (layer_index, head_index) for layer_index, head_reach in weights for head_index in range(len(head_reach))
        ]
        total_columns, full_head_extra = self.total(n) * len(head_pairs), n - self.least()
        max_whole_heads = (total_columns - self.least() * len(head_pairs)) // full_head_extra
        if self.heads is None:
            reach_order = ranking(torch.cat([head_reach for _, head_reach in weights])).tolist()
            retrieval_heads = {
                head_pairs[pair_index]
                for pair_index in reach_order[: min(max_whole_heads, round(self.share * len(head_pairs)))]
            }
        else:
            retrieval_heads = {(layer_index, head_index) for layer_index, head_index in self.heads}
            if not retrieval_heads <= set(head_pairs):
                raise UserError(
                    f"heads={self.heads} in {self.name}: {min(retrieval_heads - set(head_pairs))} is not in this model"
                )
            if len(retrieval_heads) > max_whole_heads:
                raise UserError(
                    f"{len(retrieval_heads)} heads of {n} columns do not fit {self.name} with {self.total(n)} columns "
                    f"per head: raise keep or budget, or name at most {max_whole_heads}"
                )
        other_columns = (total_columns - n * len(retrieval_heads)) // (len(head_pairs) - len(retrieval_heads))
        return [
            [
                n if (layer_index, head_number) in retrieval_heads else other_columns
                for head_number in range(len(head_reach))
            ]
            for layer_index, head_reach in weights
        ]

    def pick(self, row: Row, rated: Rated, shares: list[Any]) -> Choice:
        head_counts = [num_kept for share in shares for num_kept in share]
        all_columns = torch.arange(row.n, device=row.keys.device)
        choice = Choice([all_columns] * len(head_counts), merged=[None] * len(head_counts))
        choice.mass = [None] * len(head_counts)
        statistics = [{"retrieval": [num_kept == row.n for num_kept in share]} for share in shares]
        choice.stats = statistics if row.stacked > 1 else statistics[0]
        cut_heads = [head_index for head_index, num_kept in enumerate(head_counts) if num_kept < row.n]
        if not cut_heads:
            return choice
        num_kept = head_counts[cut_heads[0]]  # the same for all that are cut
        first_recent = row.n - (num_kept - self.sinks - 1)  # the first of the recent columns
        kept_columns = torch.cat([all_columns[: self.sinks + 1], all_columns[first_recent:]])
        head_index = to_device(torch.tensor(cut_heads), row.keys.device)
        new_vectors = []
        for vectors in (row.keys[head_index], row.values[head_index]):
            new_vectors.append(vectors[:, kept_columns])
            mean_vector = vectors[:, self.sinks : first_recent].float().mean(1)
            new_vectors[-1][:, self.sinks] = mean_vector.to(vectors.dtype)
        column_mass = torch.ones(num_kept, device=row.keys.device)
        column_mass[self.sinks : self.sinks + 1].fill_(first_recent - self.sinks)
        assert choice.merged is not None
        for head, *vector_pair in zip(cut_heads, *new_vectors, strict=True):
            choice.keep[head], choice.mass[head] = kept_columns, column_mass
            choice.merged[head] = (vector_pair[0], vector_pair[1])
        return choice
