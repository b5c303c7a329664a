"""Policies that share one budget among all layers of a prefill: every layer is rated first, then all are compressed.

Until the last layer has been rated the whole prefill is held, as it would be without a policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vlmfast.core import CompressedLayer, LayerView
from vlmfast.prefill.base import Choice, KVPolicy, Row, best_of_heads, protect, real_columns, row_of


@dataclass
class Rated:
    """What is remembered of one row of one layer until the budgets are known."""

    scores: Tensor  # (Hk, n) float32, protected columns +inf
    tiebreak: Tensor | None  # (Hk, n), what orders columns of equal score
    weight: Any  # what `spread` goes by


@dataclass(frozen=True)
class AcrossLayers(KVPolicy):
    """Base of policies that decide for all layers together. Subclasses implement `score`, `weigh` and `spread`."""

    spans: ClassVar[bool] = True

    def weigh(self, row: Row, scores: Tensor) -> Any:
        """What `spread` needs to know of this layer's row. scores (Hk, n) float32, not protected."""
        raise NotImplementedError

    def spread(self, weights: list[Any], n: int) -> list[Any]:
        """What each layer may keep of a row of n columns: columns per head, their mean at most `total(n)`."""
        raise NotImplementedError

    def rate(self, view: LayerView) -> list[Rated | None]:
        """Scores and weights of every row right after this layer's attention; None = the row fits."""
        rated: list[Rated | None] = []
        for i, columns in enumerate(real_columns(view)):
            if self.fits(len(columns)):
                rated.append(None)
                continue
            row = row_of(view, i, columns)
            scores = self.score(row).float()
            protected = protect(scores, self.sinks, self.recent)
            rated.append(Rated(protected, self.tiebreak(row), self.weigh(row, scores)))
        return rated

    def compress_all(self, views: list[LayerView], rated: list[list[Rated | None]]) -> list[CompressedLayer]:
        """Budgets for every row over all layers, then one `CompressedLayer` per layer. views have no window."""
        choices: list[list[Choice | None]] = [[] for _ in views]
        for i, columns in enumerate(real_columns(views[0])):
            mine = [layer[i] for layer in rated]
            if any(r is None for r in mine):
                for c in choices:
                    c.append(None)
                continue
            shares = self.spread([r.weight for r in mine if r is not None], len(columns))
            for c, view, r, share in zip(choices, views, mine, shares, strict=True):
                assert r is not None
                c.append(self.pick(row_of(view, i, columns), r, share))
        return [self.gather(view, c) for view, c in zip(views, choices, strict=True)]

    def pick(self, row: Row, rated: Rated, share: Any) -> Choice:
        """What a row of one layer keeps, given what `spread` gave the layer. The row has no window."""
        return Choice(best_of_heads(rated.scores, [share] * len(rated.scores), rated.tiebreak))

    def compress(self, view: LayerView) -> CompressedLayer | None:
        """A model of one layer."""
        if all(self.fits(len(columns)) for columns in real_columns(view)):
            return None
        return self.compress_all([view], [self.rate(view)])[0]
