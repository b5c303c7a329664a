"""Paired timing: competitors take turns inside every round, so a noisy machine disturbs them alike.

samples = interleaved({"plain": run_plain, "vidcom2": run_pruned}, rounds=7)
medians(samples["vidcom2"])                                   # {"prefill_ms": 812.0, ...}
ratios(samples["plain"], samples["vidcom2"])                  # {"prefill_ms": [3.4, 3.2, 3.5], ...}
floor_ms(flops, bytes_moved, rates("cpu", torch.bfloat16))    # what this machine could do at best
"""

from __future__ import annotations

import functools
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Sample = dict[str, float]  # metric name -> value of one run


def now(device: Any = "cpu") -> float:
    """Seconds, after the device has finished what was queued."""
    if str(device).startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def interleaved(
    runs: dict[str, Callable[[], Sample]],
    rounds: int,
    warmup: int = 1,
    progress: Callable[[str], None] | None = None,
) -> dict[str, list[Sample]]:
    """Run every competitor once per round, in an order that rotates from round to round.

    runs: name -> a callable that does the work once and returns its metrics. warmup: rounds that are not kept.
    progress: called with the name of each run about to start. Returns name -> one Sample per kept round, so that
    sample i of one competitor is the pair of sample i of another.
    """
    names = list(runs)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for r in range(warmup + rounds):
        shift = r % len(names)
        for name in names[shift:] + names[:shift]:
            if progress is not None:
                progress(name)
            gc.collect()
            sample = runs[name]()
            if r >= warmup:
                samples[name].append(sample)
    return samples


def medians(samples: list[Sample]) -> Sample:
    """The median of every metric over the rounds."""
    return {key: statistics.median([s[key] for s in samples]) for key in samples[0]}


def median_interval(values: list[float]) -> list[float]:
    """[median, low, high]: low and high enclose the true median with 95 % (order statistics; six values or more).

    With fewer than six values they are simply the smallest and the largest.
    """
    ordered = sorted(values)
    n = len(ordered)
    outside, drop = 0.0, 0
    for k in range(n // 2):
        outside += 2 * math.comb(n, k) / 2**n
        if outside > 0.05:
            break
        drop = k
    return [statistics.median(ordered), ordered[drop], ordered[n - 1 - drop]]


def ratios(baseline: list[Sample], this: list[Sample], metrics: list[str] | None = None) -> dict[str, list[float]]:
    """Paired ratios baseline / this per metric, [median, low, high]: above 1 means this one is faster (or smaller).

    metrics: which to compare; None = every metric in both that ends in `_ms`, `_bytes` or `_per_token`.
    A metric that is zero in any round is left out: there is nothing to divide by.
    """
    if len(baseline) != len(this):
        raise ValueError(f"paired ratios need as many baseline samples as others, got {len(baseline)} and {len(this)}")
    shared = [k for k in baseline[0] if k in this[0]]
    wanted = metrics or [k for k in shared if k.endswith(("_ms", "_bytes", "_per_token"))]
    out = {}
    for key in wanted:
        pairs = [(b[key], t[key]) for b, t in zip(baseline, this, strict=True)]
        if all(b > 0 and t > 0 for b, t in pairs):
            out[key] = [round(x, 4) for x in median_interval([b / t for b, t in pairs])]
    return out


@dataclass(frozen=True)
class Rates:
    """What this machine reaches at best, measured: matrix products (FLOP/s) and copies (bytes/s, read + written)."""

    flops: float
    bytes: float


SIZES = {"cuda": (8192, 2**28), "cpu": (2048, 2**28)}  # side of the matrices, bytes of the copies


@functools.cache
def rates(device: str, dtype: Any, seconds: float = 1.5) -> Rates:
    """Measure the peak rates once per process: the best of repeated large matmuls, and of large copies."""
    import torch

    side, size = SIZES["cuda" if device.startswith("cuda") else "cpu"]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty(side, side, device=device, dtype=dtype)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Rates(
        flops=2 * side**3 / _best(lambda: torch.mm(a, b, out=out), device, seconds),
        bytes=2 * source.numel() / _best(lambda: target.copy_(source), device, seconds),
    )


def _best(work: Callable[[], Any], device: str, seconds: float) -> float:
    """The shortest time of `work` within a time budget, after two warm-up runs."""
    work()
    work()
    best, begin = math.inf, now(device)
    while time.perf_counter() - begin < seconds:
        start = now(device)
        work()
        best = min(best, now(device) - start)
    return best


def floor_ms(flops: float, nbytes: float, machine: Rates) -> float:
    """The shortest possible time: the larger of FLOPs over the matmul rate and bytes over the copy rate."""
    return 1e3 * max(flops / machine.flops, nbytes / machine.bytes)
