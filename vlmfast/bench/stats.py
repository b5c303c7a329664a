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
    _, group = np.unique(np.asarray(clusters), return_inverse=True)
    n_groups = int(group.max()) + 1
    sums = np.append(np.bincount(group, values), imagined)
    sizes = np.append(np.bincount(group).astype(float), (1.0, 1.0))
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    step = max(1, 4_000_000 // len(sums))
    for at in range(0, RESAMPLES, step):
        many = min(step, RESAMPLES - at)
        weights = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=many)
        means[at : at + many] = (weights @ sums) / np.maximum(weights @ sizes, 1e-12)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    centre = float(values.mean())
    return Interval(centre, min(centre, float(low)), max(centre, float(high)), len(values), n_groups)


def mcnemar(scores: Sequence[float], baseline: Sequence[float]) -> float:
    """Exact two-sided p-value that wins and losses are equally likely; questions are taken as independent."""
    difference = np.asarray(scores, float) - np.asarray(baseline, float)
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def clustered_p(scores: Sequence[float], baseline: Sequence[float], clusters: Sequence[str], seed: int = 0) -> float:
    """Two-sided p-value that scores and baseline are alike: signs of the clusters' summed differences are flipped."""
    _, group = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(group, np.asarray(scores, float) - np.asarray(baseline, float))
    sums = sums[sums != 0]
    if len(sums) < 2:
        return 1.0
    found = permutation_test(
        (sums,), np.mean, permutation_type="samples", vectorized=True, n_resamples=20_000, batch=2_000, rng=seed
    )
    return float(found.pvalue)


def holm(values: dict[Any, float], level: float = 0.05) -> dict[Any, bool]:
    """Name -> does it hold at `level` for all of them together? Holm's step-down correction of their p-values."""
    out, holds = dict.fromkeys(values, False), True
    for i, (name, p) in enumerate(sorted(values.items(), key=lambda x: x[1])):
        holds = holds and p <= level / (len(values) - i)
        out[name] = holds
    return out


BETS = (0.1, 0.3, 0.6, 0.95)  # shares of the capital


def evidence(gaps: Sequence[float], clusters: Sequence[str]) -> float:
    """How much the gaps, each in [-1, 1], speak against a mean of zero or less: what a bettor's capital of 1 became.

    Every cluster is one bet on its mean gap, in the order of their first questions; several bettors stake a fixed
    share (`BETS`) each, and the mean of their capitals counts. Where the true mean is zero or less, the chance that it
    ever reaches 1 / error is `error` at most, however often one looks (Ville's inequality; Waudby-Smith and Ramdas,
    arXiv 2010.09686). Clusters are taken as independent, questions of one are not.
    """
    _, first, group = np.unique(np.asarray(clusters), return_index=True, return_inverse=True)
    means = (np.bincount(group, np.asarray(gaps, float)) / np.bincount(group))[np.argsort(first)]
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
    pairs: dict[tuple[float, float], Any] = {}
    for i, (b, t) in enumerate(zip(baseline, this, strict=True)):
        if b > 0 and t > 0:
            pairs.setdefault((b, t), i if clusters is None else clusters[i])
    logs: dict[Any, list[float]] = {}
    for (b, t), name in pairs.items():
        logs.setdefault(name, []).append(math.log(b / t))
    if not logs:
        return []
    return [float(f"{x:.4g}") for x in median_interval([math.exp(sum(v) / len(v)) for v in logs.values()])]
