"""HybridKV: static heads pruned once, dynamic heads kept whole in host memory and read by chunk (arXiv 2604.05887).

The paper's method section is known to us only through summaries; what they leave open is a field here, and its default
is ours. Published at a 10 % budget on Qwen2.5-VL-7B: 66.68 against 67.53 for the full cache.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmfast.core import Kind, Retrieval
from vlmfast.fields import Fraction, OddInt, Options, PositiveFloat, PositiveInt, Share
from vlmfast.kernels import ranking, ranks
from vlmfast.prefill.base import Choice, Row, best_of_heads, max_pool, protect
from vlmfast.prefill.budget import by_head, by_type, evenly
from vlmfast.prefill.in_two_parts import InTwoParts
from vlmfast.prefill.keydiff import distinctness
from vlmfast.runtime import transfers


@dataclass(frozen=True)
class HybridAdvanced(Options):
    """What HybridKV's paper leaves open, or what changes nothing within the ablation's error bars.

    queries: text queries observed, the last ones (open in the paper)
    theta: a head is concentrated when the top columns hold at least this share of its attention (paper 0.9)
    top: fraction of the columns that counts as top (open; 0.1 = "90 % of the mass in the 10 % budget")
    group: how a key head's query group is summarised: mean or max (open)
    ratio: level 1: a dynamic head's budget over the mean budget (open)
    share: level 2, static heads: "broad" gives less concentrated heads more, "sparse" the reverse, or "equal"
    text_first: static heads keep all text before any visual column (paper)
    static: what else they keep: the columns most attended to ("attention", paper), those whose keys are unlike the
    others ("keys", see KeyDiff), or as many of "both"
    pool: width of the max pooling that makes visual columns locally salient, odd (open)
    chunk: columns per chunk of a dynamic head (open); fewer where its budget cannot hold four of them
    bound: what stands for a chunk: its mean key, or the minmax bound of its keys (open)
    refresh: choose chunks anew every this many tokens (open)
    """

    title: ClassVar[str] = "hybridkv:advanced"
    queries: PositiveInt = 64
    theta: Share = 0.9
    top: Fraction = 0.1
    group: Literal["mean", "max"] = "mean"
    ratio: PositiveFloat = 1.0
    share: Literal["broad", "sparse", "equal"] = "equal"
    text_first: bool = True
    static: Literal["attention", "keys", "both"] = "both"
    pool: OddInt = 1
    chunk: PositiveInt = 16
    bound: Literal["mean", "minmax"] = "minmax"
    refresh: PositiveInt = 4


@dataclass(frozen=True)
class HybridKV(InTwoParts):
    """Heads are classified at every prefill from the attention of the text after the media.

    dynamic: which heads are dynamic: the "concentrated" ones, or the "diffuse" ones (paper). Concentrated heads are
    those that search: what they find for this question is not what the next one asks for, so they need
    everything within reach, where a diffuse head sums up what any good sample of the columns tells
    split: fraction of heads made dynamic, the most or the least concentrated ones, so that the bytes in host memory
    are known beforehand; None = those that `advanced.theta` tells apart
    advanced: everything else, see `HybridAdvanced`

    The ablation in `docs/benchmarks.md` (second questions about other scenes of a pocket clip, a twentieth kept): with
    diffuse heads dynamic, as published, 16 to 22 points go, with concentrated ones none; as many go where a split makes
    too few heads dynamic. What is `advanced` is within its error bars of its neighbours.
    """

    name: ClassVar[str] = "hybridkv"
    stacks: ClassVar[bool] = True
    dynamic: Literal["concentrated", "diffuse"] = "concentrated"
    split: Share | None = None
    advanced: HybridAdvanced = HybridAdvanced()

    def window(self) -> int:
        return self.advanced.queries

    def retrieval(self) -> Retrieval:
        settings = self.advanced
        return Retrieval(settings.chunk, settings.bound, settings.refresh, self.sinks, self.recent)

    def least(self) -> int:
        """Sinks, recent columns, and one chosen column."""
        return self.sinks + self.recent + 1

    # -- stage 1: head types ---------------------------------------------------------------------------------------

    def concentration(self, row: Row) -> Tensor:
        """(Hk,) float32 in [0, 1]: share of a head's attention on its top columns; sinks and recent ones are left out,
        since they stay anyway and could make any head look concentrated."""
        attention = row.relevance(self.advanced.group)[:, self.sinks : max(self.sinks + 1, row.n - self.recent)]
        num_top_columns = max(1, int(-(-self.advanced.top * attention.shape[1] // 1)))
        return attention.topk(num_top_columns, dim=1).values.sum(1) / attention.sum(1).clamp(min=1e-12)

    def classify(self, sigma: Tensor) -> Tensor:
        """True = dynamic: (..., Hk) float32 -> (..., Hk) bool."""
        searching = self.dynamic == "concentrated"
        if self.split is None:
            return (sigma >= self.advanced.theta) == searching
        dynamic_heads = sigma.argsort(stable=True, descending=searching)[..., : round(self.split * sigma.shape[-1])]
        return torch.zeros_like(sigma, dtype=torch.bool).scatter_(-1, dynamic_heads, True)

    # -- stages 2 and 3: budgets, then what each type keeps --------------------------------------------------------

    def score(self, row: Row) -> Tensor:
        """(Hk, n) scores of static heads: text above every visual column, visual ones pooled."""
        return self._scores(row)[0]

    def _scores(self, row: Row) -> tuple[Tensor, Tensor]:
        """Scores, and what orders equal ones: the attention before pooling, or the score before text is raised."""
        attention = row.relevance(self.advanced.group)
        is_visual = row.kinds == Kind.VISUAL
        column_scores, tie_scores = (
            torch.where(is_visual, max_pool(attention * is_visual, self.advanced.pool), attention),
            attention,
        )
        if self.advanced.static != "attention":
            key_distinctness = distinctness(row.keys)
            uses_attention = self.advanced.static == "both"
            column_scores = tie_scores = (
                torch.maximum(
                    _rank(column_scores, attention if self.advanced.pool > 1 else None), _rank(key_distinctness)
                )
                if uses_attention
                else key_distinctness
            )
        return (
            torch.where(is_visual, column_scores, column_scores + 1e3) if self.advanced.text_first else column_scores
        ), tie_scores

    def choosing(self, row: Row) -> Generator[None, None, Choice]:
        (concentration,), arrival = transfers.send_back([self.concentration(row)])
        scores, tie_scores = self._scores(row)
        scores = protect(scores, self.sinks, self.recent)
        num_columns, stacked = row.n, row.stacked
        del row  # its keys and its attention may be freed
        yield
        arrival.wait()  # the one wait
        by_layer = concentration.view(stacked, -1)
        dynamic_by_layer, budgets_by_layer = self._budgets(by_layer, num_columns)
        is_dynamic, head_budgets = dynamic_by_layer.flatten(), torch.tensor(budgets_by_layer).flatten()
        static_heads, all_columns = (~is_dynamic).nonzero()[:, 0], torch.arange(num_columns, device=scores.device)
        kept_columns = [all_columns] * len(is_dynamic)
        if len(static_heads) < len(is_dynamic):
            picked = transfers.to_device(static_heads, scores.device)
            scores, tie_scores = scores[picked], tie_scores[picked]
        if len(static_heads):
            kept_static = best_of_heads(scores, head_budgets[static_heads].tolist(), tie_scores)
            for head_index, columns in zip(static_heads.tolist(), kept_static, strict=True):
                kept_columns[head_index] = columns
        statistics = [
            {"concentration": layer_concentration, "dynamic": layer_dynamic, "budget": layer_budgets}
            for layer_concentration, layer_dynamic, layer_budgets in zip(
                by_layer.tolist(), dynamic_by_layer.tolist(), budgets_by_layer, strict=True
            )
        ]
        return Choice(kept_columns, is_dynamic, head_budgets, statistics if stacked > 1 else statistics[0])

    def _budgets(self, concentration: Tensor, num_columns: int) -> tuple[Tensor, list[list[int]]]:
        """Which heads are dynamic, (layers, Hk) bool, and how many columns each reads; concentration (layers, Hk)."""
        is_dynamic, num_heads = self.classify(concentration), concentration.shape[1]
        mean_budget, least_static = self.total(num_columns), self.sinks + self.recent
        head_budgets: list[list[int]] = []
        for layer_concentration, layer_dynamic in zip(concentration, is_dynamic, strict=True):
            dynamic_heads = layer_dynamic.tolist()
            num_dynamic = sum(dynamic_heads)
            static_columns, dynamic_columns = by_type(
                mean_budget, num_heads, num_dynamic, self.advanced.ratio, least_static, self.least()
            )
            static_budgets: list[int] = []
            if num_dynamic < num_heads and self.advanced.share == "equal":
                static_budgets = evenly(static_columns, num_heads - num_dynamic, num_columns)
            elif num_dynamic < num_heads:
                weights = layer_concentration if self.advanced.share == "sparse" else 1 - layer_concentration
                static_budgets = by_head(static_columns, weights[~layer_dynamic], least_static, num_columns)
            dynamic_budget = min(num_columns, dynamic_columns // max(1, num_dynamic))
            of_static = iter(static_budgets)
            head_budgets.append([dynamic_budget if dynamic else next(of_static) for dynamic in dynamic_heads])
        return is_dynamic, head_budgets


def _rank(scores: Tensor, tiebreak: Tensor | None = None) -> Tensor:
    """Place of every column in its head's ascending order, the earlier of equals higher, in [0, 1): (Hk, n) float32."""
    num_columns = scores.shape[-1]
    return (num_columns - 1 - ranks(ranking(scores, tiebreak))).float() / num_columns
