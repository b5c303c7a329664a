"""What every KV policy shares: the budget, the columns that always stay, and the selection itself.

A policy is a frozen dataclass that scores columns; everything else happens here, row by row without the padding, so a
row of a batch is treated exactly like that row alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfast.core import CompressedLayer, Kind, LayerView, LowRank, Retrieval, Rotation, UserError
from vlmfast.fields import Fraction, Method, NonNegativeInt
from vlmfast.kernels import highest, ranking
from vlmfast.prefill.ragged_layer import KVLayer


@dataclass
class Row:
    """One batch row of a `LayerView` without its padding; n columns."""

    keys: Tensor  # (Hk, n, Dh), RoPE applied
    values: Tensor  # (Hk, n, Dh)
    kinds: Tensor  # (n,) int8, `Kind`
    window: Tensor | None  # (H, W, n) float32 softmax weights of the text queries after the media
    layer: int
    layers: int
    rotation: Rotation | None = None  # of this row: cos and sin (n, Dh)
    rank: int | None = None  # as in `LayerView`

    @property
    def n(self) -> int:
        return self.keys.shape[1]

    def relevance(self, group: str = "mean") -> Tensor:
        """(Hk, n) float32: attention the text queries pay each column, mean (or max) over a key head's query group."""
        if self.window is None:
            raise UserError("this policy scores by attention but asks for no window queries: set queries >= 1")
        p = self.window.mean(1).view(self.keys.shape[0], -1, self.n)
        return p.amax(1) if group == "max" else p.mean(1)


@dataclass
class Choice:
    """What one row keeps: `keep[h]` ascending column indices (n,) of head h; the rest as in `CompressedLayer`."""

    keep: list[Tensor]
    dynamic: Tensor | None = None  # (Hk,) bool
    budget: Tensor | None = None  # (Hk,) int64
    stats: dict[str, Any] = field(default_factory=dict)
    merged: list[tuple[Tensor, Tensor] | None] | None = None  # per head, keys and values of what is kept
    mass: list[Tensor | None] | None = None  # per head, how many columns each kept one stands for
    low: list[Tensor] | None = None  # per head, columns that stay besides, as int8
    low_rank: list[LowRank | None] | None = None  # per head, factors of the keys


@dataclass(frozen=True)
class KVPolicy(Method):
    """Base of all policies. Subclasses set `name` and implement `score`, or `choose` when heads differ in kind.

    keep: fraction of all columns that enter the cache (after pruning) which stays, in (0, 1]
    budget: the same as a count of columns per head; overrides keep
    sinks: first columns, always kept
    recent: last columns, always kept
    int8: store what stays as int8 with a float32 scale per vector
    """

    name: ClassVar[str]
    per_query: ClassVar[bool] = False  # the mean over the window's queries is enough
    spans: ClassVar[bool] = False  # each layer is decided by itself, see `across.AcrossLayers`
    queries = 0  # text queries whose attention is needed; a field of the policies that read any
    keep: Fraction = 0.10
    budget: int | None = None
    sinks: NonNegativeInt = 4
    recent: NonNegativeInt = 32
    int8: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and self.budget < max(1, self.least()):
            raise UserError(self._too_small(self.budget))

    # -- what the runtime asks -------------------------------------------------------------------------------------

    def window(self) -> int:
        """Text queries whose attention is needed: the field `queries` where a policy has it, else none."""
        return self.queries

    def cache_layer(self) -> KVLayer:
        """An empty layer that can hold what `compress` keeps."""
        return KVLayer()

    def total(self, n: int) -> int:
        """Columns a head may keep on average out of n; a fraction never falls below what must stay."""
        return min(n, self.budget if self.budget is not None else max(self.least(), math.ceil(self.keep * n)))

    def fits(self, columns: int) -> bool:
        """True when so many columns are within the budget."""
        return self.total(columns) >= columns

    def least(self) -> int:
        """The smallest budget per head that works."""
        return self.sinks + self.recent

    def compress(self, view: LayerView) -> CompressedLayer | None:
        """Choose what stays of every row. None when all rows fit."""
        real = real_columns(view)
        if all(self.fits(len(columns)) for columns in real):
            return None
        choices = [None if self.fits(len(c)) else self.choose(row_of(view, i, c)) for i, c in enumerate(real)]
        return self.gather(view, choices)

    def rate(self, view: LayerView) -> Any:
        """For policies that share a budget among layers, see `across.AcrossLayers`."""
        raise NotImplementedError

    def compress_all(self, views: list[LayerView], rated: list[Any]) -> list[CompressedLayer]:
        """For policies that share a budget among layers, see `across.AcrossLayers`."""
        raise NotImplementedError

    def gather(self, view: LayerView, choices: list[Choice | None]) -> CompressedLayer:
        """One layer from the choices of its rows; None = the row stays whole."""
        b, hk, _, _ = view.keys.shape
        keep: list[Tensor] = []
        dynamic = torch.zeros(b * hk, dtype=torch.bool)  # on the host, which reads them
        budget = torch.zeros(b * hk, dtype=torch.int64)
        merged: list[tuple[Tensor, Tensor] | None] = []
        mass: list[Tensor | None] = []
        low: list[Tensor] = []
        low_rank: list[LowRank | None] = []
        stats: dict[str, Any] = {}
        for i, (columns, choice) in enumerate(zip(real_columns(view), choices, strict=True)):
            if choice is None:
                keep += [columns] * hk
                merged += [None] * hk
                mass += [None] * hk
                low += [columns[:0]] * hk
                low_rank += [None] * hk
                continue
            whole = len(columns) == view.keys.shape[2]  # then a column's place among them is the column
            keep += choice.keep if whole else [columns[k] for k in choice.keep]
            merged += choice.merged or [None] * hk
            mass += choice.mass or [None] * hk
            low_rank += choice.low_rank or [None] * hk
            low += [columns[:0]] * hk if choice.low is None else [columns[k] for k in choice.low]
            if choice.dynamic is not None and choice.budget is not None:
                dynamic[i * hk : (i + 1) * hk], budget[i * hk : (i + 1) * hk] = choice.dynamic, choice.budget
            stats.setdefault("rows", []).append(choice.stats)
        small = torch.full_like(dynamic, self.int8)
        stats = stats if any(stats.get("rows", [])) else {}
        return CompressedLayer(
            keep, dynamic, budget, small, self.retrieval(), stats, _given(merged), _given(mass),
            low if any(map(len, low)) else None, _given(low_rank),
        )  # fmt: skip

    def _too_small(self, budget: int) -> str:
        return (
            f"{self.name} with budget={budget} cannot hold the {self.least()} columns it must keep "
            f"(sinks={self.sinks}, recent={self.recent}): raise budget, or lower sinks or recent"
        )

    # -- what a policy decides -------------------------------------------------------------------------------------

    def retrieval(self) -> Retrieval | None:
        """How dynamic heads read, for policies that have them."""
        return None

    def score(self, row: Row) -> Tensor:
        """(Hk, n) float, higher stays."""
        raise NotImplementedError

    def tiebreak(self, row: Row) -> Tensor | None:
        """(Hk, n) float that orders columns of equal score, such as the score before pooling; None = earlier first."""
        return None

    def counts(self, scores: Tensor, total: int, tiebreak: Tensor | None = None) -> list[int]:
        """Columns each head keeps; their mean is at most `total`. scores (Hk, n), protected columns +inf."""
        return [total] * scores.shape[0]

    def allowance(self, row: Row) -> int:
        """Columns a head of this row's layer may keep on average; at least `least()`, at most `row.n`."""
        return self.total(row.n)

    def choose(self, row: Row) -> Choice:
        """Score, protect sinks and recent columns, keep the best of every head."""
        scores = protect(self.score(row).float(), self.sinks, self.recent)
        ties = self.tiebreak(row)
        counts = self.counts(scores, self.allowance(row), ties)
        return Choice(best_of_heads(scores, counts, ties))


def _given(values: list) -> list | None:
    """The list, or None when nobody gave anything."""
    return values if any(v is not None for v in values) else None


def protect(scores: Tensor, sinks: int, recent: int) -> Tensor:
    """scores (..., n) with the first `sinks` and last `recent` columns at +inf (a copy)."""
    scores = scores.clone()
    scores[..., :sinks] = torch.inf
    scores[..., max(0, scores.shape[-1] - recent) :] = torch.inf
    return scores


def best(scores: Tensor, count: int, tiebreak: Tensor | None = None) -> Tensor:
    """Indices of the `count` highest of scores (n,), ascending int64; ties as in `kernels.highest`."""
    return highest(scores, count, tiebreak).sort().values


def best_of_heads(scores: Tensor, counts: Sequence[int], tiebreak: Tensor | None = None) -> list[Tensor]:
    """`best` of every head: scores and tiebreak (Hk, n), counts per head."""
    order = ranking(scores, tiebreak)
    if len(set(counts)) == 1:
        return list(order[:, : counts[0]].sort(1).values)
    return [row[:count].sort().values for row, count in zip(order, counts, strict=True)]


def under(policy: KVPolicy, scorer: KVPolicy) -> KVPolicy:
    """The scorer that `policy` wraps, with the columns that stay anyway under that policy."""
    return dataclasses.replace(scorer, keep=1.0, budget=None, sinks=policy.sinks, recent=policy.recent)


def check_scorer(policy: KVPolicy, scorer: KVPolicy) -> None:
    """Raise UserError unless `policy` can wrap the scorer: it scores one layer's columns, by mean attention if any."""
    if type(scorer).score is KVPolicy.score or scorer.spans or scorer.per_query:
        raise UserError(
            f"scorer={scorer.name} in {policy.name}: it does not score columns, or over layers or single queries: "
            "use e.g. scorer=snapkv"
        )


def max_pool(scores: Tensor, width: int) -> Tensor:
    """Maximum over `width` neighbouring columns (odd), same length: (Hk, n) -> (Hk, n)."""
    return torch.nn.functional.max_pool1d(scores[None], width, stride=1, padding=width // 2)[0] if width > 1 else scores


def real_columns(view: LayerView) -> list[Tensor]:
    """Columns of every batch row that are not padding, int64."""
    if view.held is not None:
        return [held.columns for held in view.held]
    return [(kinds != Kind.PAD).nonzero()[:, 0] for kinds in view.kinds]


def row_of(view: LayerView, i: int, columns: Tensor) -> Row:
    where = columns if view.held is None else view.held[i].where
    window = None
    if view.window is not None and view.queries is not None:
        picked = view.queries[i] if view.picked is None else view.picked[i]
        window = view.window[i] if view.window.shape[2] == 1 else view.window[i][:, picked]
        window = window[..., where]
    kinds = view.kinds[i, where]
    row = Row(view.keys[i][:, where], view.values[i][:, where], kinds, window, view.layer, view.layers, rank=view.rank)
    if view.rotation is not None:
        cos, sin = (x[min(i, len(x) - 1)][where] for x in (view.rotation.cos, view.rotation.sin))
        row.rotation = Rotation(cos, sin, view.rotation.owner)
    return row
