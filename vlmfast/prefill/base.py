"""Base class of all KV policies: the budget, the columns that are always kept, and the selection.

A policy is a frozen dataclass that scores columns. The selection runs here, one batch row at a time and without
padding, so a row of a batch gives the same result as that row alone.
"""

from __future__ import annotations

import dataclasses
import functools
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
from vlmfast.runtime.transfers import to_device


@dataclass
class Row:
    """One batch row of a `LayerView` without its padding; n columns. Hk: key heads of all its layers."""

    keys: Tensor  # (Hk, n, Dh), RoPE applied
    values: Tensor  # (Hk, n, Dh)
    kinds: Tensor  # (n,) int8, `Kind`
    window: Tensor | None  # (H, W, n) float32 softmax weights of the text queries after the media
    layer: int
    layers: int
    rotation: Rotation | None = None  # of this row: cos and sin (n, Dh)
    rank: int | None = None  # as in `LayerView`
    stacked: int = 1  # as in `LayerView`
    numbers: tuple[int, ...] = ()  # as in `LayerView`

    @property
    def n(self) -> int:
        return self.keys.shape[1]

    @functools.cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """(H, n) float32 each: mean and variance over the window's queries of the attention to each column."""
        assert self.window is not None
        mean = self.window.mean(1)
        return mean, (self.window - mean[:, None]).square_().mean(1)  # on a CPU faster than torch's variance

    def relevance(self, group: str = "mean") -> Tensor:
        """(Hk, n) float32: attention the text queries pay each column, mean (or max) over a key head's query group."""
        if self.window is None:
            raise UserError("this policy scores by attention but asks for no window queries: set queries >= 1")
        attention = self.window.mean(1).view(self.keys.shape[0], -1, self.n)
        return attention.amax(1) if group == "max" else attention.mean(1)


@dataclass
class Choice:
    """What one row keeps: `keep[h]` ascending column indices (n,) of head h; the rest as in `CompressedLayer`."""

    keep: list[Tensor]
    dynamic: Tensor | None = None  # (Hk,) bool
    budget: Tensor | None = None  # (Hk,) int64
    stats: Any = field(default_factory=dict)  # a dict, or one for each layer
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
    stacks: ClassVar[bool] = False  # a view of several layers gives what a view of each would
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
        real_column_lists = real_columns(view)
        if all(self.fits(len(columns)) for columns in real_column_lists):
            return None
        choices = [
            None if self.fits(len(row_columns)) else self.choose(row_of(view, batch_index, row_columns))
            for batch_index, row_columns in enumerate(real_column_lists)
        ]
        return self.gather(view, choices)

    def rate(self, view: LayerView) -> Any:
        """For policies that share a budget among layers, see `across.AcrossLayers`."""
        raise NotImplementedError

    def compress_all(self, views: list[LayerView], rated: list[Any]) -> list[CompressedLayer]:
        """For policies that share a budget among layers, see `across.AcrossLayers`."""
        raise NotImplementedError

    def gather(self, view: LayerView, choices: list[Choice | None]) -> CompressedLayer:
        """One layer from the choices of its rows; None = the row stays whole."""
        batch_size, num_heads, _, _ = view.keys.shape
        kept_columns: list[Tensor] = []
        dynamic_heads = torch.zeros(batch_size * num_heads, dtype=torch.bool)  # on the host, which reads them
        head_budgets = torch.zeros(batch_size * num_heads, dtype=torch.int64)
        merged_vectors: list[tuple[Tensor, Tensor] | None] = []
        column_masses: list[Tensor | None] = []
        low_columns: list[Tensor] = []
        key_factors: list[LowRank | None] = []
        statistics: dict[str, Any] = {}
        for batch_index, (columns, choice) in enumerate(zip(real_columns(view), choices, strict=True)):
            if choice is None:
                kept_columns += [columns] * num_heads
                merged_vectors += [None] * num_heads
                column_masses += [None] * num_heads
                low_columns += [columns[:0]] * num_heads
                key_factors += [None] * num_heads
                continue
            is_unpadded = len(columns) == view.keys.shape[2]  # then a column's place among them is the column
            kept_columns += choice.keep if is_unpadded else [columns[indices] for indices in choice.keep]
            low_indices = choice.low or [columns[:0]] * num_heads
            low_columns += low_indices if is_unpadded or choice.low is None else [columns[i] for i in low_indices]
            merged_vectors += choice.merged or [None] * num_heads
            column_masses += choice.mass or [None] * num_heads
            key_factors += choice.low_rank or [None] * num_heads
            if choice.dynamic is not None and choice.budget is not None:
                (
                    dynamic_heads[batch_index * num_heads : (batch_index + 1) * num_heads],
                    head_budgets[batch_index * num_heads : (batch_index + 1) * num_heads],
                ) = choice.dynamic, choice.budget
            statistics.setdefault("rows", []).append(choice.stats)
        stored_as_int8 = torch.full_like(dynamic_heads, self.int8)
        statistics = statistics if any(statistics.get("rows", [])) else {}
        return CompressedLayer(
            kept_columns, dynamic_heads, head_budgets, stored_as_int8, self.retrieval(), statistics,
            _given(merged_vectors), _given(column_masses), low_columns if any(map(len, low_columns)) else None,
            _given(key_factors), [len(columns) for columns in real_columns(view)],
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

    def counts(self, scores: Tensor, totals: list[int], tiebreak: Tensor | None = None) -> list[int]:
        """Columns each head keeps; their mean over a layer is at most its total.

        scores and tiebreak (Hk, n), protected columns +inf; totals: of each layer in the row.
        """
        return [total for total in totals for _ in range(len(scores) // len(totals))]

    def allowance(self, row: Row, depth: int = 0) -> int:
        """Columns a head may keep on average in a layer of this row, the one at `depth` of those stacked; at least
        `least()`, at most `row.n`."""
        return self.total(row.n)

    def choose(self, row: Row) -> Choice:
        """Score, protect sinks and recent columns, keep the best of every head."""
        scores = protect(self.score(row).float(), self.sinks, self.recent)
        tie_scores = self.tiebreak(row)
        totals = [self.allowance(row, depth) for depth in range(row.stacked)]
        head_counts = self.counts(scores, totals, tie_scores)
        return Choice(best_of_heads(scores, head_counts, tie_scores))


def _given(values: list) -> list | None:
    """The list, or None when all its values are None."""
    return values if any(value is not None for value in values) else None


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
    column_order = ranking(scores, tiebreak)[:, : max(counts)]
    if len(set(counts)) > 1:  # what a head does not keep is sorted behind what it does
        places = torch.arange(max(counts), device=scores.device)
        is_dropped = places >= to_device(torch.tensor(counts), scores.device)[:, None]
        column_order = column_order.masked_fill(is_dropped, scores.shape[1])
    kept_columns = column_order.sort(1).values
    return [head_columns[:count] for head_columns, count in zip(kept_columns, counts, strict=True)]


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
        return [held_row.columns for held_row in view.held]
    return [(kinds != Kind.PAD).nonzero()[:, 0] for kinds in view.kinds]


def row_of(view: LayerView, i: int, columns: Tensor) -> Row:
    """Batch row i of a layer as a `Row`; columns (n,) int64 are those that are not padding."""
    places = columns if view.held is None else view.held[i].where
    attention = None
    if view.window is not None and view.queries is not None:
        query_indices = view.queries[i] if view.picked is None else view.picked[i]
        attention = view.window[i] if view.window.shape[2] == 1 else view.window[i][:, query_indices]
        attention = attention[..., places]
    column_kinds = view.kinds[i, places]
    batch_row = Row(
        view.keys[i][:, places],
        view.values[i][:, places],
        column_kinds,
        attention,
        view.layer,
        view.layers,
        rank=view.rank,
        stacked=view.stacked,
        numbers=view.numbers,
    )
    if view.rotation is not None:
        cosines, sines = (table[min(i, len(table) - 1)][places] for table in (view.rotation.cos, view.rotation.sin))
        batch_row.rotation = Rotation(cosines, sines, view.rotation.owner)
    return batch_row
