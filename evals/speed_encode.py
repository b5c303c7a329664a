"""How much visual token pruning saves: every method at the tower's output, and inside the tower, against plain.

Random weights in real shapes (see `evals.shapes`), one clip, one new token: what is timed is request to first token.
`plain` is the model with nothing asked of vlmfast, whose logits are bit-identical to stock transformers (law 1); its
hooks only read the clock.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from evals import records, timing
from evals.shapes import QWEN_3B_TWELFTH, TOY, Shape, build, clip, encode_cost, prefill_cost

KEEP = 0.25
SEED = 0
ROUNDS = 3
TIMED = ("uniform", "random", "evs", "vidcom2", "maxmin")


def pruners(shape: Shape) -> dict[str, Any]:
    """Row key -> pruner: each timed method at the tower's output, VidCom2 and Uniform inside the tower."""
    from vlmfast.encode import METHODS

    rows: dict[str, Any] = {name: METHODS[name](keep=KEEP) for name in TIMED}
    block = max(1, round(shape.depth / 4))
    for name in ("vidcom2", "uniform"):
        rows[f"{name} after block {block}"] = METHODS[name](keep=KEEP, after_block=block)
    return rows


def one_run(model: Any, inputs: dict[str, Any], pruner: Any) -> Callable[[], timing.Sample]:
    """A callable that answers once with one new token and returns what every stage took."""
    import vlmfast

    def run() -> timing.Sample:
        with vlmfast.accelerate(model, prune=pruner) as fast:
            start = timing.now()
            model.generate(**inputs, max_new_tokens=1)
            total = (timing.now() - start) * 1e3
        report = fast.report
        sample = {k: float(report.encode[k]) for k in ("encode_ms", "select_ms", "visual_tokens", "kept_tokens")}
        sample |= {k: float(report.prefill[k]) for k in ("prefill_ms", "ttft_ms", "cached_tokens", "kv_fast_bytes")}
        return {**sample, "total_ms": total}

    return run


def run(quick: bool = False) -> dict[str, Any]:
    """Measure; returns the rows and what the head needs."""
    import torch

    shape, rounds = (TOY, 2) if quick else (QWEN_3B_TWELFTH, ROUNDS)
    model, inputs = build(shape, SEED), clip(shape, SEED)
    methods: dict[str, Any] = {"plain": None, **pruners(shape)}
    runs = {name: one_run(model, inputs, pruner) for name, pruner in methods.items()}
    with torch.inference_mode():
        one_run(model, clip(shortest(shape), SEED), None)()  # touch every weight once
        samples = timing.interleaved(runs, rounds, warmup=int(quick), progress=ticker(len(runs) * rounds))
    machine = timing.rates("cpu", torch.bfloat16)
    rows = [summary(name, methods[name], samples, shape, machine) for name in methods]
    return {
        "config": {**shape.json(), "keep": KEEP, "visual_tokens": shape.visual, "new_tokens": 1,
                   "matmul_gflops": round(machine.flops / 1e9, 1), "copy_gbytes": round(machine.bytes / 1e9, 2)},
        "seed": SEED,
        "repeats": rounds,
        "device": "cpu",
        "dtype": "bfloat16",
        "rows": rows,
        "show": ["kept_tokens", "encode_ms", "select_ms", "prefill_ms", "ttft_ms", "encode_floor_ms",
                 "prefill_floor_ms"],
    }  # fmt: skip


def shortest(shape: Shape) -> Shape:
    """The same model with the shortest clip."""
    return replace(shape, grid=(1, 4, 4), text=8)


def summary(
    name: str, pruner: Any, samples: dict[str, list[timing.Sample]], shape: Shape, machine: timing.Rates
) -> dict[str, Any]:
    """The row of one method: medians, floors, and paired ratios to plain."""
    from vlmfast.core import to_json

    medians = timing.medians(samples[name])
    kept, block = int(medians["kept_tokens"]), getattr(pruner, "after_block", None)
    encode = timing.floor_ms(*encode_cost(shape, kept, block), machine)
    prefill = timing.floor_ms(*prefill_cost(shape, kept), machine)
    plain_prefill = timing.medians(samples["plain"])["prefill_ms"]
    metrics = {**medians, "encode_floor_ms": encode, "prefill_floor_ms": prefill, "floor_ms": encode + prefill}
    if pruner is not None:
        metrics["select_of_plain_prefill"] = medians["select_ms"] / plain_prefill
    params = {} if pruner is None else {"keep": pruner.keep} | ({} if block is None else {"after_block": block})
    vs = {} if pruner is None else {"plain": timing.ratios(samples["plain"], samples[name])}
    plan = {"prune": to_json(pruner), "kv": None, "speculate": None}
    return records.row(name.split(" ")[0], plan=plan, params=params, metrics=metrics, vs=vs)


def ticker(total: int) -> Callable[[str], None] | None:
    """A progress bar where somebody watches."""
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    bar = tqdm(total=total, leave=False)

    def tick(name: str) -> None:
        bar.set_description(name)
        bar.update()

    return tick
