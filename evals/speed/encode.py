"""How much visual token pruning saves: at the tower's output, inside the tower, between text layers, against plain.

Random weights in real shapes (`evals.speed.shapes`), one clip, one new token: what is timed is request to first token.
Two groups, each with its own plain: a sixth of the model for pruning inside the tower and between layers, where depth
matters, and a twelfth for every method at the tower's output. `plain` is the model with nothing asked of vlmfast, whose
logits are bit-identical to stock transformers (law 1); its hooks only read the clock. `tower` is the tower without its
loops and nothing pruned: pruning runs over it, so what pruning gains is the ratio to `tower`. Both run beside every
method, and `plain again` is a null.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from evals.speed.shapes import QWEN_3B_SIXTH, QWEN_3B_TWELFTH, TOY, Shape, build, clip, encode_cost, prefill_cost
from vlmfast.bench import records, timing
from vlmfast.bench.sample_store import SampleStore

KEEP = 0.25
SEED = 0
ROUNDS = 6
BASELINES = ("plain", "tower")
DEEP = ("uniform", "vidcom2")  # methods of the deep group: at the output, and inside the tower
THRESHOLD = ("dtd", "pixelprune")  # keep what their threshold says; `keep` is a ceiling


def outside(shape: Shape) -> dict[str, Any]:
    """Row key -> pruner: every method that acts at the tower's output or before the tower."""
    from vlmfast.encode import METHODS, Pruner

    early = {name: m for name, m in METHODS.items() if issubclass(m, Pruner) or getattr(m, "resizes", False)}
    made = {name: m() if name in THRESHOLD else m(keep=KEEP) for name, m in early.items()}
    # the random tower makes all tokens alike, still or not: only what is nearly the same has not changed
    return made | {"dtd": METHODS["dtd"](keep=1 - 1e-4, threshold=0.999)}


def deep(shape: Shape) -> dict[str, Any]:
    """Row key -> pruner: two methods at the output and after the tower's first block, all methods between layers."""
    from vlmfast.encode import METHODS, LayerPruner

    rows: dict[str, Any] = {name: METHODS[name](keep=KEEP) for name in DEEP}
    block = max(1, round(shape.depth / 4))
    rows |= {f"{name} after block {block}": METHODS[name](keep=KEEP, after_block=block) for name in DEEP}
    return rows | {name: m(keep=KEEP) for name, m in METHODS.items() if issubclass(m, LayerPruner)}


def one_run(model: Any, inputs: dict[str, Any], pruner: Any, tower: str | None = None) -> Callable[[], timing.Sample]:
    """A callable that answers once with one new token and returns what every stage took."""
    import vlmfast

    def run() -> timing.Sample:
        with vlmfast.accelerate(model, prune=pruner, tower=tower) as fast:
            start = timing.now()
            model.generate(**inputs, max_new_tokens=1)
            total = (timing.now() - start) * 1e3
        report = fast.report
        sample = {k: float(report.encode[k]) for k in ("encode_ms", "select_ms", "visual_tokens", "kept_tokens")}
        sample |= {k: float(report.prefill[k]) for k in ("prefill_ms", "ttft_ms", "cached_tokens", "kv_fast_bytes")}
        return {**sample, "total_ms": total}

    return run


def run(quick: bool = False, store: SampleStore | None = None) -> dict[str, Any]:
    """Measure; returns the rows and what the head needs. store: of an unfinished run."""
    import torch

    groups = ((TOY, deep), (TOY, outside)) if quick else ((QWEN_3B_SIXTH, deep), (QWEN_3B_TWELFTH, outside))
    dtype, rounds = timing.half(), 1 if quick else ROUNDS
    machine = timing.rates("cpu", getattr(torch, dtype))
    rows = [r for shape, methods in groups for r in group(shape, methods(shape), rounds, machine, dtype, store)]
    return {
        "config": {"shapes": [s.json() for s, _ in groups], "keep": KEEP, "new_tokens": 1,
                   "matmul_gflops": round(machine.flops / 1e9, 1), "copy_gbytes": round(machine.bytes / 1e9, 2)},
        "seed": SEED,
        "repeats": rounds,
        "device": "cpu",
        "dtype": dtype,
        "rows": rows,
        "show": ["kept_tokens", "encode_ms", "select_ms", "prefill_ms", "ttft_ms", "encode_floor_ms",
                 "prefill_floor_ms"],
    }  # fmt: skip


def group(
    shape: Shape,
    pruners: dict[str, Any],
    rounds: int,
    machine: timing.Rates,
    dtype: str,
    store: SampleStore | None = None,
) -> list[dict[str, Any]]:
    """The rows of one shape: plain and each pruner in turn."""
    import torch

    gc.collect()
    model, inputs = build(shape, SEED, dtype), clip(shape, SEED, dtype)
    runs = {"plain": one_run(model, inputs, None), "tower": one_run(model, inputs, None, "fast")}
    runs |= {name: one_run(model, inputs, pruner) for name, pruner in pruners.items()}
    with torch.inference_mode():
        one_run(model, clip(shortest(shape), SEED, dtype), None)()  # touch every weight once
        tick = timing.ticker(timing.beside_runs(len(runs), len(BASELINES), rounds))
        samples = timing.beside(runs, BASELINES, rounds, warmup=0, progress=tick, store=store)
    return [summary(name, pruners.get(name), samples, shape, machine, dtype) for name in samples]


def shortest(shape: Shape) -> Shape:
    """The same model with the shortest clip."""
    return replace(shape, grid=(1, 4, 4), text=8)


def summary(
    name: str,
    pruner: Any,
    samples: dict[str, dict[str, list[timing.Sample]]],
    shape: Shape,
    machine: timing.Rates,
    dtype: str,
) -> dict[str, Any]:
    """The row of one method: medians, floors, and paired ratios to the baselines beside it."""
    from vlmfast.core import to_json

    medians = timing.medians(samples[name][name])
    kept, block = int(medians["kept_tokens"]), getattr(pruner, "after_block", None)
    resized = bool(getattr(pruner, "resizes", False))
    encode = timing.floor_ms(*encode_cost(shape, kept, block, resized), machine, dtype)
    cuts = pruner.cuts(shape.layers) if hasattr(pruner, "cuts") else ()
    prefill = timing.floor_ms(*prefill_cost(shape, kept, cuts), machine, dtype)
    plain_prefill = timing.medians(samples["plain"]["plain"])["prefill_ms"]
    metrics = {**medians, "encode_floor_ms": encode, "prefill_floor_ms": prefill, "floor_ms": encode + prefill}
    if pruner is not None:
        metrics["select_of_plain_prefill"] = medians["select_ms"] / plain_prefill
    params: dict[str, Any] = {"layers": shape.layers, "depth": shape.depth}
    if pruner is not None:
        params |= {"keep": pruner.keep} | ({} if block is None else {"after_block": block})
    vs = timing.ratio_rows(samples[name], name)
    plan = {"prune": to_json(pruner), "kv": None, "speculate": None}
    name = name if name == timing.AGAIN else name.split(" ")[0]
    return records.row(name, plan=plan, params=params, metrics=metrics, vs=vs)
