"""The GPU suite's part `decode`: what a token takes, beside the bytes that it must read."""

from __future__ import annotations

from typing import Any

from evals.gpu.prefill import planned, ratios
from evals.gpu.run import (
    Prompts,
    Run,
    accelerated,
    answered,
    free,
    language,
    memory,
    model_of,
    notes,
    reported,
    spread,
    takes_tower,
)
from vlmfast.bench import timing

REPORTED = (
    "kept_tokens", "visual_tokens", "cached_tokens", "kv_fast_bytes", "kv_host_bytes", "accepted_length",
    "verify_rounds", "drafted",
)  # fmt: skip


def arms() -> dict[str, dict[str, Any] | None]:
    """Name -> what `accelerate` is asked; None: stock. `repeating` in a name: a text that repeats itself."""
    from vlmfast.decode import PromptLookup, Speculate
    from vlmfast.encode import VidCom2
    from vlmfast.prefill import HybridKV, SnapKV

    lookup = Speculate(PromptLookup())
    ours: dict[str, Any] = {"tower": "fast"} if takes_tower() else {"speculate": Speculate(otherwise="plain")}
    return {
        "plain": None,
        "ours": ours,
        "loop": {"speculate": Speculate(otherwise="plain")},
        "vidcom2-25": {"prune": VidCom2(keep=0.25)},
        "snapkv-10": {"kv": SnapKV(keep=0.1)},
        "hybridkv-10": {"kv": HybridKV(keep=0.1)},
        "hybridkv-10 split": {"kv": HybridKV(keep=0.1, split=0.5)},
        "lookup": {"speculate": lookup},
        "ours, repeating": ours,
        "lookup 5, repeating": {"speculate": Speculate(PromptLookup(), length=5)},
        "lookup, repeating": {"speculate": lookup},
        "hybridkv-10+lookup, repeating": {"kv": HybridKV(keep=0.1), "speculate": lookup},
    }


def order(dry: bool, long: bool) -> list[tuple[int, int, str]]:
    """(visual tokens, rows, arm), what matters most first; those that repeat come last, they change the weights."""
    names = list(arms())
    usual, repeating = [n for n in names if "repeating" not in n], [n for n in names if "repeating" in n]
    if dry:
        return [(128, 1, n) for n in usual[:6]] + [(128, 2, "ours"), (128, 1, "lookup 5, repeating")]
    rows = [(2048, 1, n) for n in usual[:6]] + [(8192, 1, n) for n in usual[:6]] + [(2048, 8, n) for n in usual[:2]]
    rows += [(2048, 1, "lookup"), (2048, 1, "hybridkv-10 split"), (2048, 8, "vidcom2-25")]
    if long:
        rows += [(32768, 1, "plain"), (32768, 1, "ours"), (32768, 1, "hybridkv-10"), (2048, 1, "static")]
    return rows + [(2048, 1, n) for n in repeating]


def decode(run: Run) -> None:
    """Milliseconds a token: the time of 1 + n tokens less that of one, over n; every call over fresh lengths."""
    import torch

    model, prompts, asked = model_of(run), Prompts(run), arms()
    asked["static"] = None
    plain: dict[tuple[int, int], list[dict[str, float]]] = {}
    repeats = False
    for visual, rows, name in order(run.dry, run.long):
        what = f"{name}, {visual} visual tokens, {rows} rows"
        stock = asked[name] is None
        if run.late(what, 0 if run.dry else 3 + visual * rows / 2000 * (2 if stock else 1)):
            continue
        if "repeating" in name and not repeats:
            repeats = True
            echo(model)
        with run.trying(what), torch.no_grad():
            times = 1 if run.dry or (stock and rows > 1) else 2 if stock and visual > 4096 else 3
            with accelerated(model, asked[name]) as handle:
                warm, samples = timed(run, model, handle, prompts, (visual, rows, repeats), times, name == "static")
                words = {"report": handle.report.json()["decode"], **notes(handle)} if handle is not None else {}
            metrics = spread(samples, "decode_ms_per_token") | memory(run) | {"warm_ms": warm}
            metrics |= {k: v for k, v in samples[-1].items() if k == "steady_ms_per_token"}
            metrics["decode_floor_ms"] = floor(run, model, metrics, rows)
            if name == "plain":
                plain[visual, rows] = samples
            vs = {"plain": ratios(plain[visual, rows], samples)} if name != "plain" and (visual, rows) in plain else {}
            where = {"visual_tokens": visual, "batch": rows}
            run.add(name, params=where, plan=planned(handle), metrics=metrics, vs=vs, **words)
        free(run.device)


def timed(
    run: Run, model: Any, handle: Any, prompts: Prompts, what: tuple[int, int, bool], times: int, static: bool
) -> tuple[float, list[dict[str, float]]]:
    """Milliseconds of a first call, and the samples of those after it. what: visual tokens, rows, a repeating text."""
    visual, rows, repeats = what
    new = 8 if run.dry else 32
    generate = {"cache_implementation": "static"} if static else {}

    def call(tokens: int, step: int = 0) -> tuple[float, int]:
        inputs = prompts.next(visual, rows, step=step or tokens + 1, repeats=repeats)
        return answered(run, model, inputs, tokens, **generate)[0], inputs["input_ids"].shape[1]

    memory(run, reset=True)
    warm, _ = call(1 + new)
    samples = []
    for _ in range(times):
        one, _ = call(1)
        many, prompt = call(1 + new)
        sample = {"decode_ms_per_token": (many - one) / new, "ttft_ms": one, "total_ms": many, "prompt_tokens": prompt}
        own = reported(handle, ("decode_ms_per_token",))
        sample |= {"reported_ms_per_token": own["decode_ms_per_token"]} if own else {}
        samples.append(sample | reported(handle, REPORTED))
    if handle is not None and (run.dry or samples[-1]["decode_ms_per_token"] < 10):
        # what an answer costs once is in neither; a step of our own plans for no length
        short, long = (call(1 + n, step=1)[0] for n in (new, 4 * new))
        samples[-1]["steady_ms_per_token"] = (long - short) / (3 * new)
    return warm, samples


def floor(run: Run, model: Any, metrics: dict[str, float], rows: int) -> float:
    """Milliseconds that reading the weights once and every row's cache takes at the measured rate."""
    text = language(model)
    weights = sum(p.numel() * p.element_size() for p in [*text.layers.parameters(), model.lm_head.weight])
    c = text.config
    whole = 4 * c.num_hidden_layers * c.num_key_value_heads * (c.hidden_size // c.num_attention_heads)
    cache = metrics.get("kv_fast_bytes") or whole * metrics["prompt_tokens"] * rows
    return timing.floor_ms(0, weights + cache, run.machine)


def echo(model: Any) -> None:
    """Make the model say its last token for ever, at the same cost: its layers add next to nothing to the embedding."""
    for layer in language(model).layers:
        layer.self_attn.o_proj.weight.mul_(1e-3)
        layer.mlp.down_proj.weight.mul_(1e-3)
