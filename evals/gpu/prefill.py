"""The GPU suite's parts `first_token` and `choose`: what the first token takes, stage by stage, beside its bound."""

from __future__ import annotations

from typing import Any

from evals.gpu.run import (
    Prompts,
    Run,
    accelerated,
    answered,
    free,
    memory,
    model_of,
    notes,
    reported,
    spread,
    staged,
)
from evals.speed.shapes import encode_cost, prefill_cost
from vlmfast.bench import timing

REPORTED = ("encode_ms", "select_ms", "prefill_ms", "visual_tokens", "kept_tokens")
GREEDY = ("maxmin", "cdpruner", "mmtok")  # kernels that wait for each other inside: if one hangs, it hangs last


def arms(dry: bool) -> dict[str, dict[str, Any] | None]:
    """Name -> what `accelerate` is asked; None: stock."""
    from vlmfast.encode import VidCom2
    from vlmfast.prefill import HybridKV, SnapKV

    block = 1 if dry else 8
    return {
        "plain": None,
        "tower": {"tower": "fast"},
        "vidcom2-25": {"prune": VidCom2(keep=0.25)},
        f"vidcom2-25 after block {block}": {"prune": VidCom2(keep=0.25, after_block=block)},
        "balanced": {"plan": "balanced"},
        "fast": {"plan": "fast"},
        "snapkv-10": {"kv": SnapKV(keep=0.1)},
        "hybridkv-10": {"kv": HybridKV(keep=0.1)},
    }


def order(dry: bool) -> list[tuple[int, str]]:
    """(visual tokens, arm), what matters most first."""
    names = list(arms(dry))
    if dry:
        return [(128, name) for name in names if name not in ("balanced", "snapkv-10")]
    first, policies = names[:6], names[6:]
    rows = [(n, name) for n in (8192, 2048) for name in first] + [(n, name) for n in (2048, 8192) for name in policies]
    return rows + [(256, n) for n in first[:4]] + [(32768, n) for n in (*first[1:4], "plain")]


def first_token(run: Run) -> None:
    """Request to first token at every size and arm, every call over a length not used before."""
    import torch

    repeats = 1 if run.dry else 3
    model, prompts, asked = model_of(run), Prompts(run), arms(run.dry)
    plain: dict[int, list[dict[str, float]]] = {}
    for visual, name in order(run.dry):
        stock = name == "plain"
        needs = 0 if run.dry else visual / 1000 * (1.2 if stock else 0.5)
        what = f"{name}, {visual} visual tokens"
        if run.late(what, needs):
            continue
        with run.trying(what), torch.no_grad():
            memory(run, reset=True)
            with accelerated(model, asked[name]) as handle:
                warm = {"warm_ms": answered(run, model, prompts.next(visual), 1)[0]}
                if not stock:  # may capture what the first one compiled
                    warm["second_ms"], _ = answered(run, model, prompts.next(visual), 1)
                samples = []
                for _ in range(1 if visual > 10_000 else repeats):
                    ttft, _ = answered(run, model, prompts.next(visual), 1)
                    samples.append({"ttft_ms": ttft, **reported(handle, REPORTED)})
                more = notes(handle)
                peak = memory(run)
                with staged(run, model) as stages:
                    answered(run, model, prompts.next(visual), 1)
            if stock:
                plain[visual] = samples
            metrics = spread(samples, "ttft_ms") | {**warm, **peak, **stages}
            if stock:
                metrics |= {"encode_ms": stages["tower_ms"], "prefill_ms": stages["language_ms"]}
                metrics |= {"visual_tokens": visual, "kept_tokens": visual}
            metrics |= floors(run, visual, metrics, handle)
            vs = {} if stock or visual not in plain else {"plain": ratios(plain[visual], samples)}
            run.add(
                name, params={"visual_tokens": visual, "batch": 1}, plan=planned(handle), metrics=metrics, vs=vs, **more
            )
        free(run.device)


def ratios(plain: list[dict[str, float]], samples: list[dict[str, float]]) -> dict[str, list[float]]:
    """Stock over this, call by call."""
    most = min(len(plain), len(samples))
    return timing.ratios(plain[:most], samples[:most])


def planned(handle: Any) -> dict[str, Any]:
    """The plan of a row."""
    return {} if handle is None else handle.plan.json()


def floors(run: Run, visual: int, metrics: dict[str, float], handle: Any) -> dict[str, float]:
    """The shortest times that the arithmetic and bytes of each stage allow at the measured rates."""
    from dataclasses import replace

    from vlmfast.core import tower_block

    _, h, w = run.shape.grid
    shape = replace(run.shape, grid=(max(1, visual // (h * w)), h, w))
    prune = None if handle is None else handle.plan.prune
    kept = int(metrics.get("kept_tokens", visual)) or visual
    block = tower_block(getattr(prune, "after_block", None), shape.depth)
    encode = timing.floor_ms(*encode_cost(shape, kept, block), run.machine)
    prefill = timing.floor_ms(*prefill_cost(shape, kept), run.machine)
    return {"encode_floor_ms": encode, "prefill_floor_ms": prefill, "floor_ms": encode + prefill}


def choose(run: Run) -> None:
    """`select_ms` of every pruner at a quarter kept, the second of two calls."""
    import torch

    from vlmfast.encode import METHODS

    visual = 128 if run.dry else 8192
    model, prompts = model_of(run), Prompts(run)
    names = sorted(METHODS, key=lambda n: (n in GREEDY, list(METHODS).index(n)))
    for name in names[::4] if run.dry else names:
        if run.late(name, 0 if run.dry else 3):
            continue
        with run.trying(name), torch.no_grad():
            with accelerated(model, {"prune": METHODS[name](keep=0.25)}) as handle:
                warm, _ = answered(run, model, prompts.next(visual), 1)
                ttft, _ = answered(run, model, prompts.next(visual), 1)
                metrics = {"ttft_ms": ttft, "warm_ms": warm, **reported(handle, REPORTED)}
                more = notes(handle)
            run.add(name, params={"visual_tokens": visual, "keep": 0.25}, plan=planned(handle), metrics=metrics, **more)
