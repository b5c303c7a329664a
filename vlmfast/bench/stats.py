"""Paired statistics. Every method answers every question, so methods are compared by the difference per question.

    paired(scores, baseline, clusters)  ->  Difference(mean=-0.012, low=-0.021, high=-0.004, ...)

Intervals are percentile bootstraps over clusters (a clip, an image): questions about one clip are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, permutation_test

from vlmfast.bench.timing import median_interval

RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval over `clusters` groups of `n` questions."""

    mean: float
    low: float
    high: float
    n: int
    clusters: int


def mean(scores: Sequence[float], clusters: Sequence[str], level: float = 0.95, seed: int = 0) -> Interval:
    """Mean score in 0..1, the interval smoothed by one right and one wrong imagined question (see `paired`)."""
    return _bootstrap(np.asarray(scores, float), clusters, (0.0, 1.0), level, seed)


def paired(
    scores: Sequence[float], baseline: Sequence[float], clusters: Sequence[str], level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean difference scores - baseline of the same questions, with its interval.

    Two imagined questions join every resample's pool, one won and one lost (+1, -1): where few or none differ, a bare
    bootstrap would claim a width of zero; with them the bound follows the rule of three.
    """
    if len(scores) != len(baseline):
        raise ValueError(f"paired scores need the same questions, got {len(scores)} and {len(baseline)}")
    return _bootstrap(np.asarray(scores, float) - np.asarray(baseline, float), clusters, (-1.0, 1.0), level, seed)


def _bootstrap(
    values: NDArray[Any], clusters: Sequence[str], imagined: tuple[float, float], level: float, seed: int
) -> Interval:
    if len(values) == 0:
        raise ValueError("no questions to average")
    _, group_index = np.unique(np.asarray(clusters), return_inverse=True)
    num_groups = int(group_index.max()) + 1
    cluster_sums = np.append(np.bincount(group_index, values), imagined)
    sizes = np.append(np.bincount(group_index).astype(float), (1.0, 1.0))
    generator = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    draws_at_once = max(1, 4_000_000 // len(cluster_sums))
    for first_draw in range(0, RESAMPLES, draws_at_once):
        num_draws = min(draws_at_once, RESAMPLES - first_draw)
        weights = generator.multinomial(
            len(cluster_sums), np.full(len(cluster_sums), 1 / len(cluster_sums)), size=num_draws
        )
        means[first_draw : first_draw + num_draws] = (weights @ cluster_sums) / np.maximum(weights @ sizes, 1e-12)
    lower, upper = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    centre = float(values.mean())
    return Interval(centre, min(centre, float(lower)), max(centre, float(upper)), len(values), num_groups)


def mcnemar(scores: Sequence[float], baseline: Sequence[float]) -> float:
    """Exact two-sided p-value that wins and losses are equally likely; questions are taken as independent."""
    difference = np.asarray(scores, float) - np.asarray(baseline, float)
    num_wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    return float(binomtest(num_wins, num_wins + losses).pvalue) if num_wins + losses else 1.0


def clustered_p(scores: Sequence[float], baseline: Sequence[float], clusters: Sequence[str], seed: int = 0) -> float:
    """Two-sided p-value that scores and baseline are alike: signs of the clusters' summed differences are flipped."""
    _, group_index = np.unique(np.asarray(clusters), return_inverse=True)
    cluster_sums = np.bincount(group_index, np.asarray(scores, float) - np.asarray(baseline, float))
    cluster_sums = cluster_sums[cluster_sums != 0]
    if len(cluster_sums) < 2:
        return 1.0
    outcome = permutation_test(
        (cluster_sums,), np.mean, permutation_type="samples", vectorized=True, n_resamples=20_000, batch=2_000, rng=seed
    )
    return float(outcome.pvalue)


def holm(values: dict[Any, float], level: float = 0.05) -> dict[Any, bool]:
    """Name -> does it hold at `level` for all of them together? Holm's step-down correction of their p-values."""
    verdicts, holds = dict.fromkeys(values, False), True
    for rank, (name, p_value) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        holds = holds and p_value <= level / (len(values) - rank)
        verdicts[name] = holds
    return verdicts


BETS = (0.1, 0.3, 0.6, 0.95)  # shares of the capital


def evidence(gaps: Sequence[float], clusters: Sequence[str]) -> float:
    """How much the gaps, each in [-1, 1], speak against a mean of zero or less: what a bettor's capital of 1 became.

    Every cluster is one bet on its mean gap, in the order of their first questions; several bettors stake a fixed
    share (`BETS`) each, and the mean of their capitals counts. Where the true mean is zero or less, the chance that it
    ever reaches 1 / error is `error` at most, however often one looks (Ville's inequality; Waudby-Smith and Ramdas,
    arXiv 2010.09686). Clusters are taken as independent, questions of one are not.
    """
    _, first_question, group_index = np.unique(np.asarray(clusters), return_index=True, return_inverse=True)
    means = (np.bincount(group_index, np.asarray(gaps, float)) / np.bincount(group_index))[np.argsort(first_question)]
    if np.abs(means).max(initial=0.0) > 1:
        raise ValueError("gaps must lie in [-1, 1]")
    return float(np.exp(np.log1p(np.multiply.outer(BETS, means)).sum(1)).mean())


def median_ratio(
    baseline: Sequence[float], this: Sequence[float], clusters: Sequence[Any] | None = None
) -> list[float]:
    """[median, low, high] of the paired ratios baseline / this: how many times less time or bytes.

    Rows of one batch share one measurement: equal pairs count once. clusters: pairs of one clip or picture are not
    independent, and count as one, their geometric mean. The interval: `timing.median_interval`.
    """
    distinct_pairs: dict[tuple[float, float], Any] = {}
    for index, (baseline_value, this_value) in enumerate(zip(baseline, this, strict=True)):
        if baseline_value > 0 and this_value > 0:
            distinct_pairs.setdefault((baseline_value, this_value), index if clusters is None else clusters[index])
    log_ratios: dict[Any, list[float]] = {}
    for (baseline_value, this_value), cluster_name in distinct_pairs.items():
        log_ratios.setdefault(cluster_name, []).append(math.log(baseline_value / this_value))
    if not log_ratios:
        return []
    return [
        float(f"{bound:.4g}")
        for bound in median_interval(
            [math.exp(sum(cluster_logs) / len(cluster_logs)) for cluster_logs in log_ratios.values()]
        )
    ]
