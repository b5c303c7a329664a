"""Paired timing: competitors take turns inside every round, so a noisy machine disturbs them alike.

samples = interleaved({"plain": run_plain, "vidcom2": run_pruned}, rounds=7)
taken = beside({"plain": run_plain, "vidcom2": run_pruned}, ["plain"], rounds=6)   # plain beside each competitor
medians(samples["vidcom2"])                                   # {"prefill_ms": 812.0, ...}
ratios(samples["plain"], samples["vidcom2"])                  # {"prefill_ms": [3.4, 3.2, 3.5], ...}
floor_ms(flops, bytes_moved, rates("cpu", torch.bfloat16))    # what this machine could do at best
"""

from __future__ import annotations

import functools
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
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


AGAIN = "plain again"  # plain once more under another name: whoever reads its ratio learns what chance does


def beside(
    runs: dict[str, Callable[[], Sample]],
    baselines: Sequence[str],
    rounds: int,
    warmup: int = 1,
    progress: Callable[[str], None] | None = None,
) -> dict[str, dict[str, list[Sample]]]:
    """Run every competitor between its own baselines, which are names of `runs` too, in every round.

    Returns competitor -> (itself and every baseline -> one Sample per round): sample i of all of them come from runs
    next to each other, in an order that turns round from round to round. Baselines are competitors of each other; one
    that is `AGAIN` is the first baseline once more.
    """
    runs = runs | {AGAIN: runs[baselines[0]]}
    groups = {name: [*(b for b in baselines if b != name)] for name in runs if name != baselines[0]}
    out: dict[str, dict[str, list[Sample]]] = {
        name: {n: [] for n in (*others, name)} for name, others in groups.items()
    }
    names = list(groups)
    for r in range(warmup + rounds):
        shift = r % len(names)
        for name in names[shift:] + names[:shift]:
            others = groups[name]
            order = [*others[: len(others) // 2], name, *others[len(others) // 2 :]]
            for one in order if r % 2 else order[::-1]:
                if progress is not None:
                    progress(one)
                gc.collect()
                sample = runs[one]()
                if r >= warmup:
                    out[name][one].append(sample)
    first = [s for name, got in out.items() if name != AGAIN for s in got[baselines[0]]]
    return {baselines[0]: {baselines[0]: first}} | out


def beside_runs(runs: int, baselines: int, rounds: int) -> int:
    """How many runs `beside` takes of so many competitors, baselines among them."""
    return rounds * ((runs - baselines + 1) * (baselines + 1) + (baselines - 1) * baselines)


def ratio_rows(taken: dict[str, list[Sample]], name: str, metrics: list[str] | None = None) -> dict[str, Any]:
    """`vs` of a competitor from what `beside` returns for it: baseline -> metric -> [median, low, high]."""
    return {base: ratios(got, taken[name], metrics) for base, got in taken.items() if base != name}


def ticker(total: int, clock: Callable[[], float] = time.monotonic, every: float = 15.0) -> Callable[[str], None]:
    """Progress of `total` runs: a bar where somebody watches, else a line on stderr at most every so many seconds."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        bar = tqdm(total=total, leave=False)

        def tick(name: str) -> None:
            bar.set_description(name)
            bar.update()

        return tick
    done, said = 0, clock()

    def tell(name: str) -> None:
        nonlocal done, said
        if clock() - said >= every:
            said = clock()
            print(f"{done} of {total} runs, now {name}", file=sys.stderr, flush=True)
        done += 1

    return tell


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


def half(device: str = "cpu") -> str:
    """The dtype of suites that make their own weights: bfloat16, or float32 on a CPU that multiplies it much faster."""
    from vlmfast.runtime import dtypes

    return "bfloat16" if device.startswith("cuda") else dtypes.on_cpu("bfloat16")


@functools.cache
def rates(device: str, dtype: Any, seconds: float = 1.5) -> Rates:
    """The peak rates of `roofline.measured`, once per process."""
    from vlmfast import roofline

    found = roofline.measured(device, seconds, str(dtype).removeprefix("torch."))
    return Rates(found.flops, found.bytes)


def floor_ms(flops: float, nbytes: float, machine: Rates, dtype: str = "bfloat16") -> float:
    """The shortest possible time: the larger of FLOPs over the matmul rate and bytes over the copy rate.

    nbytes: as if every number took two bytes; dtype: what they really are stored in.
    """
    nbytes *= 2 if dtype == "float32" else 1
    return 1e3 * max(flops / machine.flops, nbytes / machine.bytes)
