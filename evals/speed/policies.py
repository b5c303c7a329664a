"""Every KV policy end to end, for the prefill suite: one prompt, a tenth of the columns kept, through `generate`.

Text layers of Qwen2.5-VL-3B behind a tower of next to no cost (see `evals.speed.shapes`), random weights: what choosing
costs, what is stored and how fast the rest decodes are real; which columns are chosen means nothing. A policy whose
head types come from attention finds flat heads here, so HybridKV's are replayed as in the rest of the suite, one of the
two key heads of this model at least: a row that claims heads in host memory and holds none is refused. Every policy
runs beside `plain` and `full`; what it saves is read against `full`, which has our loop and attention and every column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from evals.speed import baselines
from evals.speed.shapes import QWEN_3B, TOY, Shape, build, clip
from vlmfast.bench import bounds, records, timing, validity
from vlmfast.bench.sample_store import SampleStore
from vlmfast.core import UserError

KEEP, NEW, SEED, ROUNDS = 0.10, 17, 0, 6
BASELINES = ("plain", "packed", "plain_loop", "full")
BESIDE = ("plain", "full")  # in every round beside every row; the other baselines are rows themselves
SHAPE = replace(
    QWEN_3B, name="Qwen2.5-VL-3B text, 3 of its 36 layers", layers=3, depth=1, vision_hidden=128,
    vision_intermediate=256, vision_heads=2, full_attention=(0,), vocab=32768,
    note="a tower of one narrow block; the vocabulary is cut, so that the output head does not hide the layers",
)  # fmt: skip
METRICS = ("compress_ms", "prefill_ms", "ttft_ms", "decode_ms_per_token", "cached_tokens", "kv_fast_bytes",
           "kv_host_bytes", "kv_fast_allocated_bytes")  # fmt: skip


def policies(split: float, kv_heads: int) -> dict[str, Any]:
    """Name -> policy: all of them. split: share of HybridKV's heads that are dynamic, one of `kv_heads` at least."""
    from vlmfast.prefill import METHODS, HybridKV

    split = max(split, 1 / kv_heads)
    return {name: m(keep=KEEP) for name, m in METHODS.items()} | {"hybridkv": HybridKV(keep=KEEP, split=split)}


def one_run(name: str, model: Any, inputs: dict[str, Any], plan: Any, new: int) -> Callable[[], timing.Sample]:
    """A callable that answers once and returns what every stage took. plan: what `accelerate` is given."""
    import vlmfast

    def run() -> timing.Sample:
        with baselines.scope(name, model), vlmfast.accelerate(model, plan) as fast:
            model.generate(**inputs, max_new_tokens=new)
        flat = {**fast.report.prefill, **fast.report.decode}
        return {k: float(flat.get(k, 0.0)) for k in METRICS}

    return run


def weights_bytes(model: Any) -> int:
    """Bytes that a decode step reads of the weights: the text layers' and the output head's."""
    from vlmfast import families

    text = families.get(model).text(model)
    parts = [*text.layers.parameters(), model.lm_head.weight]
    return sum(p.numel() * p.element_size() for p in parts)


def rows(split: float, quick: bool = False, store: SampleStore | None = None) -> list[dict[str, Any]]:
    """Every policy and baseline, paired ratios to the baselines beside it. Raises UserError where a policy that claims
    heads in host memory held none."""
    import torch

    from vlmfast.core import to_json
    from vlmfast.plan import Plan

    shape: Shape = TOY if quick else SHAPE
    dtype = timing.half()
    model, inputs = build(shape, SEED, dtype), clip(shape, SEED, dtype)
    methods = policies(split, shape.kv_heads)
    plans = {name: baselines.plans()[name] for name in BASELINES} | {n: Plan(kv=p) for n, p in methods.items()}
    runs = {name: one_run(name, model, inputs, plan, 3 if quick else NEW) for name, plan in plans.items()}
    rounds = 1 if quick else ROUNDS
    with torch.inference_mode():
        tick = timing.ticker(timing.beside_runs(len(runs), len(BESIDE), rounds + (not quick)))
        samples = timing.beside(runs, BESIDE, rounds, warmup=int(not quick), progress=tick, store=store)
    weights, found = weights_bytes(model), {n: timing.medians(taken[n]) for n, taken in samples.items()}
    out = []
    for name, taken in samples.items():
        policy, metrics = methods.get(name), dict[str, Any](found[name])
        params: dict[str, Any] = {"context_tokens": inputs["input_ids"].shape[1], "batch": 1, "layers": shape.layers}
        vs = timing.ratio_rows(taken, name)
        if policy is not None:
            metrics["compress_share"] = metrics["compress_ms"] / found["plain"]["prefill_ms"]
            params["keep"] = policy.keep
        plan = {"prune": None, "kv": None if policy is None else to_json(policy), "speculate": None}
        if why := validity.without_host_heads(plan, metrics):
            raise UserError(why)
        held = {n: m["kv_fast_bytes"] for n, m in found.items()}
        limits = {b: {"decode_ms_per_token": bounds.step(weights, held[name], held[b])} for b in vs}
        row = records.row(name, plan=plan, params=params, metrics=metrics, vs=vs, end_to_end=True, bounds=limits)
        out.append(row)
    return out
