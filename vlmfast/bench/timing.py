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
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmfast.bench.sample_store import SampleStore

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
    for round_number in range(warmup + rounds):
        first_run = round_number % len(names)
        for name in names[first_run:] + names[:first_run]:
            if progress is not None:
                progress(name)
            gc.collect()
            sample = runs[name]()
            if round_number >= warmup:
                samples[name].append(sample)
    return samples


AGAIN = "plain again"  # plain once more under another name: whoever reads its ratio learns what chance does


def beside(
    runs: dict[str, Callable[[], Sample]],
    baselines: Sequence[str],
    rounds: int,
    warmup: int = 1,
    progress: Callable[[str], None] | None = None,
    store: SampleStore | None = None,
) -> dict[str, dict[str, list[Sample]]]:
    """Run every competitor among all baselines, which are names of `runs` too, in every round.

    As many competitors as there are baselines, two at least, share one run of each baseline between them: plain, a,
    tower, b. They stand in another order, and with other neighbours, from round to round. Returns competitor ->
    (itself and every baseline -> one Sample per round): sample i of all of them ran together. A baseline is held
    against the other baselines of every such group; `AGAIN` is the first baseline once more, as a competitor. store:
    what it holds is not run again, what is run goes there.
    """
    runs = runs | {AGAIN: runs[baselines[0]]}
    names = [name for name in runs if name not in baselines]
    samples: dict[str, dict[str, list[Sample]]] = {
        name: {run_name: [] for run_name in (*(b for b in baselines if b != name), name)}
        for name in (*baselines[1:], *names)
    }
    first_samples: list[Sample] = []
    call = None if store is None else store.begin(names)
    for round_number in range(warmup + rounds):
        counts = round_number >= warmup
        for together in _groups(names, len(baselines), round_number):
            taken, key = None, ", ".join(together)
            if store is not None and call is not None and counts:
                taken = store.find(call, round_number, key)
            known, taken = taken is not None, taken or {}
            for run_name in _order(together, baselines, round_number):
                if progress is not None:
                    progress(run_name)
                if not known:
                    gc.collect()
                    taken[run_name] = runs[run_name]()
            if not counts:
                continue
            first_samples.append(taken[baselines[0]])
            for name in (*baselines[1:], *together):
                for run_name, run_samples in samples[name].items():
                    run_samples.append(taken[run_name])
            if store is not None and call is not None and not known:
                store.add(call, round_number, key, taken)
    return {baselines[0]: {baselines[0]: first_samples}} | samples


def _groups(names: list[str], num_baselines: int, round_number: int) -> list[list[str]]:
    """The competitors that share a run of each baseline, in this round."""
    size, first = max(2, num_baselines), round_number % len(names)
    turned = names[first:] + names[:first]
    return [turned[i : i + size] for i in range(0, len(turned), size)]


def _order(competitors: list[str], baselines: Sequence[str], round_number: int) -> list[str]:
    """Baselines and competitors in turns; who comes first changes from round to round."""
    first = round_number // 2 % len(baselines)
    turned = [*baselines[first:], *baselines[:first]]
    lists = (competitors, turned) if len(baselines) == 1 else (turned, competitors)
    order = [name for pair in itertools.zip_longest(*lists) for name in pair if name is not None]
    return order if round_number % 2 else order[::-1]


def beside_runs(runs: int, baselines: int, rounds: int) -> int:
    """How many runs `beside` takes of so many competitors, baselines among them."""
    competitors = runs - baselines + 1
    return rounds * (competitors + math.ceil(competitors / max(2, baselines)) * baselines)


def ratio_rows(taken: dict[str, list[Sample]], name: str, metrics: list[str] | None = None) -> dict[str, Any]:
    """`vs` of a competitor from what `beside` returns for it: baseline -> metric -> [median, low, high]."""
    return {
        baseline: ratios(baseline_samples, taken[name], metrics)
        for baseline, baseline_samples in taken.items()
        if baseline != name
    }


def ticker(total: int, clock: Callable[[], float] = time.monotonic, every: float = 15.0) -> Callable[[str], None]:
    """Progress of `total` runs: a bar where somebody watches, else a line on stderr at most every so many seconds."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        progress = tqdm(total=total, leave=False)

        def tick(name: str) -> None:
            progress.set_description(name)
            progress.update()

        return tick
    num_done, last_line = 0, clock()

    def tell(name: str) -> None:
        nonlocal num_done, last_line
        if clock() - last_line >= every:
            last_line = clock()
            print(f"{num_done} of {total} runs, now {name}", file=sys.stderr, flush=True)
        num_done += 1

    return tell


def medians(samples: list[Sample]) -> Sample:
    """The median of every metric over the rounds."""
    return {metric: statistics.median([sample[metric] for sample in samples]) for metric in samples[0]}


def median_interval(values: list[float]) -> list[float]:
    """[median, low, high]: low and high enclose the true median with 95 % (order statistics; six values or more).

    With fewer than six values they are simply the smallest and the largest.
    """
    ordered = sorted(values)
    num_values = len(ordered)
    outside_probability, num_dropped = 0.0, 0
    for rank in range(num_values // 2):
        outside_probability += 2 * math.comb(num_values, rank) / 2**num_values
        if outside_probability > 0.05:
            break
        num_dropped = rank
    return [statistics.median(ordered), ordered[num_dropped], ordered[num_values - 1 - num_dropped]]


def ratios(baseline: list[Sample], this: list[Sample], metrics: list[str] | None = None) -> dict[str, list[float]]:
    """Paired ratios baseline / this per metric, [median, low, high]: above 1 means this one is faster (or smaller).

    metrics: which to compare; None = every metric in both that ends in `_ms`, `_bytes` or `_per_token`.
    A metric that is zero in any round is left out: there is nothing to divide by.
    """
    if len(baseline) != len(this):
        raise ValueError(f"paired ratios need as many baseline samples as others, got {len(baseline)} and {len(this)}")
    shared = [name for name in baseline[0] if name in this[0]]
    compared = metrics or [name for name in shared if name.endswith(("_ms", "_bytes", "_per_token"))]
    metric_ratios = {}
    for metric in compared:
        pairs = [
            (baseline_item[metric], this_item[metric]) for baseline_item, this_item in zip(baseline, this, strict=True)
        ]
        if all(baseline_item > 0 and this_item > 0 for baseline_item, this_item in pairs):
            metric_ratios[metric] = [
                round(bound, 4)
                for bound in median_interval([baseline_item / this_item for baseline_item, this_item in pairs])
            ]
    return metric_ratios


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

    peak_rates = roofline.measured(device, seconds, str(dtype).removeprefix("torch."))
    return Rates(peak_rates.flops, peak_rates.bytes)


def floor_ms(flops: float, nbytes: float, machine: Rates, dtype: str = "bfloat16") -> float:
    """The shortest possible time: the larger of FLOPs over the matmul rate and bytes over the copy rate.

    nbytes: as if every number took two bytes; dtype: what they really are stored in.
    """
    nbytes *= 2 if dtype == "float32" else 1
    return 1e3 * max(flops / machine.flops, nbytes / machine.bytes)
