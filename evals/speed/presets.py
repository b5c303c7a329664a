"""The presets end to end: 3B shapes, 2,048 visual tokens, 64 new tokens, beside plain and the other baselines.

What a stage of a preset gains (`gains`) is read against the same plan without it: pruning against the preset unpruned,
drafting against the preset on the loop without a draft.

Random weights in real shapes (`evals.speed.shapes`): times of encode, prefill, decode are real, answers mean nothing.
What a draft gets right is a property of trained models, so a preset that drafts is timed with its acceptance replayed:
in every round as many drafted tokens are right as the same draft and rule had right in a round on pocket captions,
drawn from the shares that the decode suite measured (`accepted_shares` of `evals/results/cpu-decode.json`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from evals.speed import baselines
from evals.speed.replay import DRY, SEED, ReplayedAcceptance, ReplayedDraft, measured_shares
from evals.speed.shapes import QWEN_3B, QWEN_3B_SIXTH, TOY, build, clip, encode_cost, prefill_cost
from vlmfast.bench import records, timing
from vlmfast.bench.sample_store import SampleStore
from vlmfast.core import tower_block
from vlmfast.plan import PRESETS, Plan, preset

SHAPE = replace(
    QWEN_3B_SIXTH, vocab=QWEN_3B.vocab // 6,
    note=f"{QWEN_3B_SIXTH.note}; a sixth of the vocabulary, so that decode weighs what it does in the whole model",
)  # fmt: skip
NEW = 64
ROUNDS = 6
STAGES = ("encode_ms", "select_ms", "prefill_ms", "ttft_ms", "decode_ms_per_token", "total_ms")
COUNTS = ("visual_tokens", "kept_tokens", "cached_tokens", "kv_fast_bytes", "kv_host_bytes")
SHOWN = (*STAGES, *COUNTS, "accepted_length", "verify_rounds")


BASELINES = ("plain", "packed", "tower", "plain_loop", "full")


def plans() -> dict[str, Plan]:
    """The baselines, every preset, and every pruning preset without its draft, which `gains` asks for."""
    from vlmfast.decode import Speculate

    named = {name: preset(name) for name in PRESETS}
    loop = {undrafted(n): replace(p, speculate=Speculate()) for n, p in named.items() if p.prune is not None}
    return {name: baselines.plans()[name] or Plan() for name in BASELINES} | named | loop


def undrafted(name: str) -> str:
    """The row of a preset on the loop without a draft."""
    return f"{name}, no draft"


def rests(plans: dict[str, Plan]) -> dict[str, dict[str, str]]:
    """Preset of these plans -> stage -> the row that has everything else."""
    named = [n for n in PRESETS if n in plans]
    safe = next(n for n in named if plans[n].prune is None)
    return {n: {"speculate": "plain_loop"} if n == safe else {"prune": safe, "speculate": undrafted(n)} for n in named}


def replayed(plan: Plan, said: tuple[int, ...], prompt: int, vocab: int, quick: bool = False) -> Plan:
    """The plan with its draft, if it has one, replaced by a replay of known acceptance."""
    if plan.speculate is None or plan.speculate.draft is None:
        return plan
    kind = (plan.speculate.accept.name, plan.speculate.draft.name)
    draft = ReplayedDraft(said, prompt, DRY if quick else measured_shares(*kind), vocab)
    return replace(plan, speculate=replace(plan.speculate, draft=draft, accept=ReplayedAcceptance(draft)))


def run(quick: bool = False, store: SampleStore | None = None) -> dict[str, Any]:
    """Measure; returns the rows and what the head needs. store: of an unfinished run."""
    import torch

    import vlmfast

    shape, rounds, new = (TOY, 1, 8) if quick else (SHAPE, ROUNDS, NEW)
    dtype = timing.half()
    model, inputs = build(shape, SEED, dtype), clip(shape, SEED, dtype)
    prompt = inputs["input_ids"].shape[1]
    said: dict[str, tuple[int, ...]] = {}

    def ask(plan: Plan, name: str = "") -> tuple[timing.Sample, tuple[int, ...]]:
        with baselines.scope(name, model), vlmfast.accelerate(model, plan) as fast:
            start = timing.now()
            out = model.generate(**inputs, max_new_tokens=new)
            total = (timing.now() - start) * 1e3
            report = fast.report.json()
        flat = {**report["encode"], **report["prefill"], **report["decode"], "total_ms": total}
        return {k: float(flat[k]) for k in SHOWN if k in flat}, tuple(out[0, prompt:].tolist())

    with torch.inference_mode():
        # what each preset says without drafting: its drafts replay that
        wanted = plans()
        for name, plan in wanted.items():
            bare = replace(plan, speculate=None)
            same = next(
                (n for n, p in wanted.items() if p.kv is None and n in said and replace(p, speculate=None) == bare),
                None,
            )
            said[name] = said[same] if same else ask(bare)[1]
        ready = {n: replayed(p, said[n], prompt, shape.vocab, quick) for n, p in wanted.items()}
        answers: dict[str, tuple[int, ...]] = {}

        def runner(name: str) -> Callable[[], timing.Sample]:
            def one() -> timing.Sample:
                sample, answers[name] = ask(ready[name], name)
                return sample

            return one

        runs, beside = {n: runner(n) for n in ready}, {}
        for name, rest in rests(wanted).items():  # what a stage gains: the preset beside what has everything else
            near = list(dict.fromkeys(rest.values()))
            beside[name] = timing.beside({n: runs[n] for n in (*near, name)}, near, rounds, 0, store=store)[name]
        # plain beside every row; the other baselines are rows too, and `gains` has its own pairs above
        tick = timing.ticker(timing.beside_runs(len(runs), 1, rounds))
        samples = timing.beside(runs, BASELINES[:1], rounds, 0, tick, store)
        for name in ready:
            if name not in answers:  # its samples are those of an earlier start
                runs[name]()
    machine = timing.rates("cpu", getattr(torch, dtype))
    rows = []
    for name, taken in samples.items():
        plan = wanted.get(name, Plan())
        medians = timing.medians(taken[name])
        kept, block = int(medians["kept_tokens"]), tower_block(getattr(plan.prune, "after_block", None), shape.depth)
        costs = (encode_cost(shape, kept, block), prefill_cost(shape, kept))
        floors = [timing.floor_ms(*cost, machine, dtype) for cost in costs]
        metrics: dict[str, Any] = {**medians, "floor_ms": sum(floors)}
        metrics |= {"encode_floor_ms": floors[0], "prefill_floor_ms": floors[1]}
        if name in ready and ready[name] == plan:  # a replayed draft accepts without asking: it says nothing of tokens
            metrics["same_tokens"] = answers[name] == answers["plain"]
        params: dict[str, Any] = {"batch": 1, "new_tokens": new}
        if plan.prune is not None:
            params["keep"] = plan.prune.keep
        gains = {
            stage: timing.ratios(beside[name][rest], beside[name][name])["total_ms"]
            for stage, rest in rests(wanted).get(name, {}).items()
        }
        vs = timing.ratio_rows(taken, name)
        rows.append(records.row(name, plan=plan.json(), params=params, metrics=metrics, vs=vs, gains=gains))
    rows.append(second_question(model, inputs, rounds))
    return {
        "config": {**shape.json(), "visual_tokens": shape.visual, "new_tokens": new, "whole_layers": QWEN_3B.layers,
                   "accept_replayed": "pocket captions",
                   "floor": "encode and prefill", "matmul_gflops": round(machine.flops / 1e9, 1),
                   "copy_gbytes": round(machine.bytes / 1e9, 2)},
        "seed": SEED, "repeats": rounds, "device": "cpu", "dtype": dtype, "rows": rows,
        "show": ["kept_tokens", "encode_ms", "prefill_ms", "ttft_ms", "decode_ms_per_token", "total_ms"],
    }  # fmt: skip


def second_question(model: Any, inputs: dict[str, Any], rounds: int) -> dict[str, Any]:
    """The row `reuse`: time to first token of a second question about the same clip, kept in memory or not."""
    import torch

    import vlmfast

    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, -4:] += 1  # other words after the same media

    def first_token(fast: Any, asked: dict[str, Any]) -> timing.Sample:
        model.generate(**asked, max_new_tokens=1)
        return {"ttft_ms": float(fast.report.prefill["ttft_ms"])}

    def plain() -> timing.Sample:
        with vlmfast.accelerate(model) as fast:
            return first_token(fast, other)

    def reused() -> timing.Sample:
        with vlmfast.accelerate(model, reuse="1GiB") as fast:
            first_token(fast, inputs)
            return first_token(fast, other)

    with torch.inference_mode():
        samples = timing.interleaved({"plain": plain, "reuse": reused}, rounds, warmup=0)
    vs = {"plain": timing.ratios(samples["plain"], samples["reuse"])}
    return records.row("reuse", params={"batch": 1, "question": 2}, metrics=timing.medians(samples["reuse"]), vs=vs)
