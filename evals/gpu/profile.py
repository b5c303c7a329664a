"""The GPU suite's part `profile`: which kernels the time of a tower call, a prefill and a token goes to."""

from __future__ import annotations

from collections import Counter
from typing import Any

from evals.gpu.decode import arms
from evals.gpu.run import Prompts, Run, accelerated, answered, language, model_of, tower
from vlmfast.bench import timing

TOP = 15
STEPS = 5
Times = tuple[Counter[str], Counter[str]]  # kernel -> microseconds, and how often


def profile(run: Run) -> None:
    """A row for each: the longest kernels by device time, and the sum of all."""
    import torch

    visual, short = (128, 128) if run.dry else (8192, 2048)
    model, prompts = model_of(run), Prompts(run)
    ours = arms()["ours"]
    for name, module in (("tower call", tower), ("language prefill", language)):
        if run.late(name, 0 if run.dry else 5):
            continue
        with run.trying(name), torch.no_grad(), accelerated(model, ours):
            answered(run, model, prompts.next(visual), 1)
            found: list[Any] = []
            part = module(model)
            hooks = [
                part.register_forward_pre_hook(lambda *a, f=found: _start(run, f)),
                part.register_forward_hook(lambda *a, f=found: _stop(run, f)),
            ]
            try:
                answered(run, model, prompts.next(visual), 1)
            finally:
                for hook in hooks:
                    hook.remove()
            write(run, name, visual, times(run, found[0]), 1)
    plans = arms()
    for name in ("ours",) if run.dry else ("ours", "plain", "hybridkv-10"):
        what = f"{STEPS} tokens, {name}"
        if run.late(what, 0 if run.dry else 6):
            continue
        with run.trying(what), torch.no_grad(), accelerated(model, plans[name]):
            answered(run, model, prompts.next(short, step=STEPS + 3), 1 + STEPS)
            both = []
            for new in (1, 1 + STEPS):
                inputs, watch = prompts.next(short, step=STEPS + 3), []
                timing.now(run.device)
                _start(run, watch)
                answered(run, model, inputs, new)
                _stop(run, watch)
                both.append(times(run, watch[0]))
            (one_us, one), (many_us, many) = both
            less = {k: many_us[k] - one_us[k] for k in many_us}
            write(run, what, short, (Counter(less), Counter({k: many[k] - one[k] for k in many})), STEPS)


def _start(run: Run, found: list[Any]) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    if not found:
        timing.now(run.device)
        watch = profiler(activities=[ProfilerActivity.CPU if run.dry else ProfilerActivity.CUDA])
        watch.start()
        found.append(watch)


def _stop(run: Run, found: list[Any]) -> None:
    if len(found) == 1:
        timing.now(run.device)
        found[0].stop()
        found.append("over")


def times(run: Run, watch: Any) -> Times:
    """What a profiler saw, by kernel; on a CPU by operation."""
    us: Counter[str] = Counter()
    n: Counter[str] = Counter()
    for event in watch.key_averages():
        took = event.self_cpu_time_total if run.dry else event.device_time_total
        if took > 0:  # calls of the runtime take none
            us[event.key] += took
            n[event.key] += event.count
    return us, n


def write(run: Run, name: str, visual: int, seen: Times, over: int) -> None:
    """A row; counts and times are of one call or one token."""
    us, n = seen
    kernels = [
        {"us": round(t / over, 1), "count": round(n[key] / over, 1), "kernel": key[:90]}
        for key, t in us.most_common(TOP)
        if t > 0
    ]
    metrics = {"device_ms": sum(t for t in us.values() if t > 0) / over / 1e3, "launches": sum(n.values()) / over}
    run.add(name, params={"visual_tokens": visual}, metrics=metrics, kernels=kernels)
