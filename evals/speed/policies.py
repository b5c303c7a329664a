"""Every KV policy end to end, for the prefill suite: one prompt, a tenth of the columns kept, through `generate`.

Text layers of Qwen2.5-VL-3B behind a tower of next to no cost (see `evals.speed.shapes`), random weights: what choosing
costs, what is stored and how fast the rest decodes are real; which columns are chosen means nothing. A policy whose
head types come from attention finds flat heads here, so HybridKV's are replayed as in the rest of the suite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from evals.speed.shapes import QWEN_3B, TOY, Shape, build, clip
from vlmfast.bench import records, timing

KEEP, NEW, SEED, ROUNDS = 0.10, 17, 0, 3
SHAPE = replace(
    QWEN_3B, name="Qwen2.5-VL-3B text, 6 of its 36 layers", layers=6, depth=1, vision_hidden=128,
    vision_intermediate=256, vision_heads=2, full_attention=(0,), vocab=32768,
    note="a tower of one narrow block; the vocabulary is cut, so that the output head does not hide the layers",
)  # fmt: skip
METRICS = ("compress_ms", "prefill_ms", "ttft_ms", "decode_ms_per_token", "cached_tokens", "kv_fast_bytes",
           "kv_host_bytes")  # fmt: skip


def policies(split: float) -> dict[str, Any]:
    """Name -> policy: all of them."""
    from vlmfast.prefill import METHODS, HybridKV

    return {name: m(keep=KEEP) for name, m in METHODS.items()} | {"hybridkv": HybridKV(keep=KEEP, split=split)}


def one_run(model: Any, inputs: dict[str, Any], policy: Any, new: int) -> Callable[[], timing.Sample]:
    """A callable that answers once and returns what every stage took."""
    import vlmfast

    def run() -> timing.Sample:
        with vlmfast.accelerate(model, kv=policy) as fast:
            model.generate(**inputs, max_new_tokens=new)
        flat = {**fast.report.prefill, **fast.report.decode}
        return {k: float(flat.get(k, 0.0)) for k in METRICS}

    return run


def rows(split: float, quick: bool = False) -> list[dict[str, Any]]:
    """`plain` and every policy in turn, paired ratios to plain."""
    import torch

    from vlmfast.core import to_json

    shape: Shape = TOY if quick else SHAPE
    dtype = timing.half()
    model, inputs = build(shape, SEED, dtype), clip(shape, SEED, dtype)
    methods: dict[str, Any] = {"plain": None, **policies(split)}
    runs = {name: one_run(model, inputs, policy, 3 if quick else NEW) for name, policy in methods.items()}
    rounds = 2 if quick else ROUNDS
    with torch.inference_mode():
        samples = timing.interleaved(runs, rounds, progress=timing.ticker(len(runs) * (rounds + 1)))
    out = []
    plain = timing.medians(samples["plain"])["prefill_ms"]
    for name, policy in methods.items():
        metrics: dict[str, Any] = timing.medians(samples[name])
        params: dict[str, Any] = {"context_tokens": inputs["input_ids"].shape[1], "batch": 1, "layers": shape.layers}
        vs = {} if policy is None else {"plain": timing.ratios(samples["plain"], samples[name])}
        if policy is not None:
            metrics["compress_share"] = metrics["compress_ms"] / plain
            params["keep"] = policy.keep
        plan = {"prune": None, "kv": None if policy is None else to_json(policy), "speculate": None}
        out.append(records.row(name, plan=plan, params=params, metrics=metrics, vs=vs, end_to_end=True))
    return out
