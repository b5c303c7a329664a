"""Base class of policies that share one budget among all layers: all layers are scored, then all are compressed.

The whole prefill stays in memory until the last layer has been scored, as it would without a policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vlmfast.core import CompressedLayer, LayerView
from vlmfast.prefill.base import Choice, KVPolicy, Row, best_of_heads, protect, real_columns, row_of


@dataclass
class Rated:
    """Scores of one batch row in the layers of a view, stored until the budgets are known."""

    scores: Tensor  # (Hk, n) float32, protected columns +inf
    tiebreak: Tensor | None  # (Hk, n), orders columns of equal score
    weights: list[Any]  # the input of `spread` for each layer


@dataclass(frozen=True)
class AcrossLayers(KVPolicy):
    """Base of policies that decide for all layers together. Subclasses implement `score`, `weigh` and `spread`."""

    spans: ClassVar[bool] = True
    stacks: ClassVar[bool] = True

    def weigh(self, row: Row, scores: Tensor) -> list[Any]:
        """What `spread` needs to know of each layer in the row, not yet read by the host.

        scores (Hk, n) float32, not protected.
        """
        raise NotImplementedError

    def spread(self, weights: list[Any], n: int) -> list[Any]:
        """What each layer may keep of a row of n columns: columns per head, their mean at most `total(n)`."""
        raise NotImplementedError

    def rate(self, view: LayerView) -> list[Rated | None]:
        """Scores and weights of every row right after the attention of its last layer; None = the row fits."""
        row_ratings: list[Rated | None] = []
        for batch_index, columns in enumerate(real_columns(view)):
            if self.fits(len(columns)):
                row_ratings.append(None)
                continue
            batch_row = row_of(view, batch_index, columns)
            column_scores = self.score(batch_row).float()
            protected_scores = protect(column_scores, self.sinks, self.recent)
            row_ratings.append(Rated(protected_scores, self.tiebreak(batch_row), self.weigh(batch_row, column_scores)))
        return row_ratings

    def compress_all(self, views: list[LayerView], rated: list[list[Rated | None]]) -> list[CompressedLayer]:
        """Budgets for every row over all layers, then one `CompressedLayer` per view. views have no window."""
        choices: list[list[Choice | None]] = [[] for _ in views]
        for batch_index, columns in enumerate(real_columns(views[0])):
            row_ratings = [layer_ratings[batch_index] for layer_ratings in rated]
            if any(rating is None for rating in row_ratings):
                for layer_choices in choices:
                    layer_choices.append(None)
                continue
            weights = [weight for rating in row_ratings if rating is not None for weight in rating.weights]
            shares = iter(self.spread(weights, len(columns)))
            for layer_choices, view, rating in zip(choices, views, row_ratings, strict=True):
                assert rating is not None
                layer_shares = [next(shares) for _ in range(view.stacked)]
                layer_choices.append(self.pick(row_of(view, batch_index, columns), rating, layer_shares))
        return [self.gather(view, layer_choices) for view, layer_choices in zip(views, choices, strict=True)]

    def pick(self, row: Row, rated: Rated, shares: list[Any]) -> Choice:
        """What a row keeps, given what `spread` gave its layers. The row has no window."""
        heads_per_layer = len(rated.scores) // row.stacked
        head_counts = [share for share in shares for _ in range(heads_per_layer)]
        return Choice(best_of_heads(rated.scores, head_counts, rated.tiebreak))

    def compress(self, view: LayerView) -> CompressedLayer | None:
        """Score and compress one layer, for a model that has only this one. None when all rows fit."""
        if all(self.fits(len(columns)) for columns in real_columns(view)):
            return None
        return self.compress_all([view], [self.rate(view)])[0]
