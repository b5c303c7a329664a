"""The GPU suite's parts `first_token` and `choose`: what the first token takes, stage by stage, beside its bound."""

from __future__ import annotations

import functools
from typing import Any

from evals.gpu.beside import PLAIN, REPEATED, STOCK, WITHOUT_CUDNN, Group, Pair, PairedRows, Place, peak
from evals.gpu.run import Prompts, Run, accelerated, answered, free, memory, model_of, notes, reported, staged
from evals.speed.shapes import encode_cost, prefill_cost
from vlmfast.bench import timing
from vlmfast.bench.timing import Sample

REPORTED = ("encode_ms", "select_ms", "prefill_ms", "visual_tokens", "kept_tokens")
GREEDY = ("maxmin", "cdpruner", "mmtok")  # kernels that wait for each other inside: if one hangs, it hangs last


def arms(dry: bool) -> dict[str, dict[str, Any]]:
    """Name -> what `accelerate` is asked."""
    from vlmfast.encode import VidCom2
    from vlmfast.prefill import Full, HybridKV, SnapKV

    block = 1 if dry else 8
    return {
        "tower": {"tower": "fast"},
        f"vidcom2-25 after block {block}": {"prune": VidCom2(keep=0.25, after_block=block)},
        "balanced": {"plan": "balanced"},
        "fast": {"plan": "fast"},
        "vidcom2-25": {"prune": VidCom2(keep=0.25)},
        "full": {"kv": Full()},
        "snapkv-10": {"kv": SnapKV(keep=0.1)},
        "hybridkv-10": {"kv": HybridKV(keep=0.1)},
    }


def order(dry: bool) -> list[Group]:
    """Every row with what runs beside it, what matters most first."""
    names = list(arms(dry))
    if dry:
        rest = [Group(128, 1, name, 1) for name in names[1:] if name not in ("balanced", "snapkv-10")]
        return [Group(128, 1, "tower", 1, STOCK), *rest]
    few, policies = names[1:4], names[4:]
    groups = [Group(8192, 1, "tower", 3, (PLAIN, WITHOUT_CUDNN, REPEATED)), *(Group(8192, 1, name, 3) for name in few)]
    groups += [Group(2048, 1, "tower", 6, STOCK), *(Group(2048, 1, name, 6) for name in few)]
    groups += [Group(2048, 1, name, 3) for name in policies] + [Group(256, 1, name, 6) for name in names[:2]]
    groups += [Group(8192, 1, name, 3) for name in policies]
    return groups + [Group(32768, 1, name, 1) for name in names[:2]]


def first_token(run: Run) -> None:
    """Request to first token at every size, each call over a length not used before, but where a row says otherwise."""
    import torch

    pair, asked = Pair(run), arms(run.dry)
    rows = PairedRows(run, "ttft_ms", lambda place, metrics: floors(run, place[0], metrics, None))
    warmed: dict[Place, Sample] = {}
    for group in filter(lambda g: run.wants(g.name), order(run.dry)):
        stock = 0.25 + group.visual / 1000 * 0.17
        needs = (len(group.beside) * stock + 0.1 + group.visual / 30_000) * group.rounds + stock
        if run.late(group.what, 0 if run.dry else needs):
            continue
        with run.trying(group.what), torch.no_grad():
            if group.place not in warmed and group.visual < 10_000:
                warmed[group.place] = pair.plain(group.place)
            with accelerated(pair.ours, asked[group.name]) as handle:
                own = functools.partial(ours, pair, handle, group.visual)
                warm, second = own(), own()  # the first may compile, the second capture
                taken = timing.interleaved(pair.stock_runs(group) | {group.name: own}, group.rounds, warmup=0)
                more = notes(handle)
                with staged(run, pair.ours) as stages:
                    answered(run, pair.ours, pair.prompts.next(group.visual), 1)
            metrics = {"warm_ms": warm["ttft_ms"], "second_ms": second["ttft_ms"], **stages}
            metrics |= floors(run, group.visual, taken[group.name][-1], handle)
            words = {group.name: {"metrics": metrics, "plan": planned(handle), **more}}
            if group.place in warmed:
                words[PLAIN] = {"metrics": {"warm_ms": warmed[group.place]["ttft_ms"]}}
            rows.add(group.place, taken, words)
        free(run.device)


def ours(pair: Pair, handle: Any, visual: int) -> Sample:
    """One call of the accelerated model."""
    inputs = pair.prompts.next(visual)
    memory(pair.run, reset=True)
    ttft, _ = answered(pair.run, pair.ours, inputs, 1)
    own = {"ttft_ms": ttft, "prompt_tokens": inputs["input_ids"].shape[1], **reported(handle, REPORTED)}
    return own | peak(pair.run, pair.weights)


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
