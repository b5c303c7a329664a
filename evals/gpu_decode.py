"""The GPU suite's part `decode`: what a token takes, beside the bytes that it must read."""

from __future__ import annotations

from typing import Any

from evals import timing
from evals.gpu_prefill import planned, ratios
from evals.gpu_run import (
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
    ours: dict[str, Any] = {"tower": "fast"} if takes_tower() else {"speculate": Speculate()}
    return {
        "ours": ours,
        "plain": None,
        "vidcom2-25": {"prune": VidCom2(keep=0.25)},
        "snapkv-10": {"kv": SnapKV(keep=0.1)},
        "hybridkv-10": {"kv": HybridKV(keep=0.1)},
        "hybridkv-10 split": {"kv": HybridKV(keep=0.1, split=0.5)},
        "lookup": {"speculate": lookup},
        "ours, repeating": ours,
        "lookup, repeating": {"speculate": lookup},
        "hybridkv-10+lookup, repeating": {"kv": HybridKV(keep=0.1), "speculate": lookup},
    }


def order(dry: bool, long: bool) -> list[tuple[int, int, str]]:
    """(visual tokens, rows, arm), what matters most first; those that repeat come last, they change the weights."""
    names = list(arms())
    usual, repeating = [n for n in names if "repeating" not in n], [n for n in names if "repeating" in n]
    if dry:
        return [(128, 1, n) for n in usual] + [(128, 2, n) for n in usual[:3]] + [(128, 1, n) for n in repeating]
    rows = [(2048, 1, n) for n in usual[:5]] + [(8192, 1, n) for n in usual[:5]]
    rows += [(2048, 8, "ours"), (2048, 8, "plain"), (2048, 1, "lookup"), (2048, 1, "hybridkv-10 split")]
    rows += [(2048, 8, "vidcom2-25")]
    if long:
        rows += [(32768, 1, "ours"), (32768, 1, "hybridkv-10"), (32768, 1, "plain"), (2048, 1, "static")]
    return rows + [(2048, 1, n) for n in repeating]


def decode(run: Run) -> None:
    """Milliseconds a token: the time of 1 + n tokens less that of one, over n; every call over fresh lengths."""
    import torch

    model, prompts, asked = model_of(run), Prompts(run), arms()
    asked["static"] = None
    repeats, new = (1, 4) if run.dry else (3, 32)
    plain: dict[tuple[int, int], list[dict[str, float]]] = {}
    others: dict[tuple[int, int], Any] = {}  # rows measured before stock was, their ratios to be written
    repeating = False
    for visual, rows, name in order(run.dry, run.long):
        what = f"{name}, {visual} visual tokens, {rows} rows"
        if run.late(what, 0 if run.dry else 4 + visual * rows / 2000 * (4 if name == "plain" else 1)):
            continue
        if "repeating" in name and not repeating:
            repeating = True
            echo(model)
        with run.trying(what), torch.no_grad():
            more: dict[str, Any] = {"repeats": repeating}
            generate = {"cache_implementation": "static"} if name == "static" else {}
            memory(run, reset=True)
            with accelerated(model, asked[name]) as handle:
                samples = []
                for _ in range(1 + (repeats if rows == 1 else 2)):
                    one, _ = answered(run, model, prompts.next(visual, rows, **more), 1, **generate)
                    inputs = prompts.next(visual, rows, step=new + 2, **more)
                    many, out = answered(run, model, inputs, 1 + new, **generate)
                    samples.append({"decode_ms_per_token": (many - one) / new, "ttft_ms": one, "total_ms": many,
                                    **reported(handle, REPORTED)})  # fmt: skip
                    if handle is not None:
                        own = reported(handle, ("decode_ms_per_token", "tokens"))
                        samples[-1]["reported_ms_per_token"] = own.get("decode_ms_per_token", 0.0)
                words = {"report": handle.report.json()["decode"], **notes(handle)} if handle is not None else {}
            warm, samples = samples[0], samples[1:] or samples
            metrics = spread(samples, "decode_ms_per_token") | memory(run) | {"warm_ms": warm["total_ms"]}
            columns = inputs["input_ids"].shape[1] + new // 2
            metrics["decode_floor_ms"] = floor(run, model, metrics, rows, columns)
            where, key = {"visual_tokens": visual, "batch": rows}, (visual, rows)
            if name == "plain":
                plain[key] = samples
            row = {"params": where, "plan": planned(handle), "metrics": metrics, **words}
            vs = {"plain": ratios(plain[key], samples)} if name != "plain" and key in plain else {}
            run.add(name, **row, vs=vs)
            if name == "ours":
                others[key] = (row, samples)
            elif name == "plain" and key in others:
                row, early = others.pop(key)
                run.add("ours", **row, vs={"plain": ratios(samples, early)})
            del out
        free(run.device)


def floor(run: Run, model: Any, metrics: dict[str, float], rows: int, columns: int) -> float:
    """Milliseconds that reading the weights once and every row's cache takes at the measured rate."""
    text = language(model)
    weights = sum(p.numel() * p.element_size() for p in [*text.layers.parameters(), model.lm_head.weight])
    c = text.config
    head = c.hidden_size // c.num_attention_heads
    cache = metrics.get("kv_fast_bytes") or 4 * c.num_hidden_layers * c.num_key_value_heads * head * columns * rows
    return timing.floor_ms(0, weights + cache, run.machine)


def echo(model: Any) -> None:
    """Make the model say its last token for ever, at the same cost: its layers add next to nothing to the embedding."""
    for layer in language(model).layers:
        layer.self_attn.o_proj.weight.mul_(1e-3)
        layer.mlp.down_proj.weight.mul_(1e-3)
