"""The GPU suite: `python -m evals.gpu --minutes 8 --out DIR [--dry]`. Self-contained, no network, inside its minutes.

7B shapes in bf16 with random weights: request to first token, ms per token, memory and KV bytes at 2 k to 128 k
visual tokens and batch 1 and 8, for plain, pruners, policies and exact and loose loops; stream ingest; the ragged
kernel against its reference on the device; achieved TB/s and TFLOP/s beside the card's measured peak. The record is
written after every cell. `--dry` runs the same code in toy shapes on the CPU.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from evals import gpu_extra, methods, records, speed, timing
from evals.shapes import TOY, Shape, build, clip
from evals.speed_presets import DRY, SHOWN, Replay, measured_shares
from vlmfast.cli import console
from vlmfast.cli.errors import application
from vlmfast.core import UserError
from vlmfast.page import floors_above
from vlmfast.plan import Plan

QWEN_7B = Shape("Qwen2.5-VL-7B", 28, 3584, 18944, 28, 4, 152064, 32, 1280, 3420, 16, (7, 15, 23, 31), (8, 16, 16))
SIZES, TOY_SIZES = (2048, 8192, 32768, 131072), (640,)
METHODS = (
    "plain", "vidcom2-25", "vidcom2-10", "uniform-25", "hybridkv-10", "snapkv-10", "plain_loop", "exact", "loose",
    "vidcom2-25+hybridkv-25", "vidcom2-25+exact",
)  # fmt: skip
NEW = 33


def model_on(shape: Shape, device: str) -> Any:
    """The model with random weights, made on the device in bf16."""
    import torch

    if device == "cpu":
        return build(shape)
    small = build(replace(shape, layers=1, depth=1, full_attention=(0,), vocab=1024))
    config = copy.deepcopy(small.config)
    text, vision = config.text_config, config.vision_config
    text.vocab_size, text.num_hidden_layers = shape.vocab, shape.layers
    text.layer_types = ["full_attention"] * shape.layers
    vision.depth, vision.fullatt_block_indexes = shape.depth, list(shape.full_attention)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = type(small)(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.generation_config = small.generation_config
    return model.eval().requires_grad_(False)


def inputs_on(shape: Shape, visual: int, batch: int, device: str) -> dict[str, Any]:
    """One clip of `visual` tokens and a question, repeated for the batch."""
    _, h, w = shape.grid
    one = clip(replace(shape, grid=(max(1, visual // (h * w)), h, w)))
    whole = {k: v.repeat(batch, *[1] * (v.ndim - 1)) for k, v in one.items()}
    return {k: v.to(device) for k, v in whole.items()}


def plan_of(name: str, said: tuple[int, ...], prompt: int, vocab: int, dry: bool = False) -> Plan:
    """The plan of a cell; `exact` and `loose` draft by replaying what was said without a draft."""
    from vlmfast.decode import Loose, Speculate

    parts = [p for p in name.split("+") if p not in ("exact", "loose")]
    plan = methods.plan("+".join(parts) or "plain")
    if len(parts) < len(name.split("+")):
        shares = DRY if dry else measured_shares("loose" if "loose" in name else "lossless", "modeldraft")
        draft = Replay(said, prompt, shares, vocab)
        speculate = (
            Speculate(draft=draft, accept=Loose(digits=False, negation=False, comparison=False))
            if "loose" in name
            else Speculate(draft=draft)
        )
        plan = replace(plan, speculate=speculate)
    return plan


def ask(model: Any, inputs: dict[str, Any], plan: Plan, new: int, device: str) -> tuple[timing.Sample, tuple[int, ...]]:
    """One call under a plan: its figures, and the first row's new tokens."""
    import torch

    import vlmfast

    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    with vlmfast.accelerate(model, plan) as fast:
        start = timing.now(device)
        out = model.generate(**inputs, max_new_tokens=new)
        total = (timing.now(device) - start) * 1e3
        report = fast.report.json()
    flat = {**report["encode"], **report["prefill"], **report["decode"], "total_ms": total}
    sample = {k: float(flat[k]) for k in SHOWN if k in flat}
    if device != "cpu":
        sample["peak_bytes"] = float(torch.cuda.max_memory_allocated())
    return sample, tuple(out[0, inputs["input_ids"].shape[1] :].tolist())


def cells(sizes: tuple[int, ...], batches: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(visual tokens, batch), what matters most first."""
    order = [(n, 1) for n in sizes[:3]] + [(n, b) for b in batches[1:] for n in sizes[:3]]
    yield from dict.fromkeys(order + [(n, b) for n in sizes[3:] for b in batches])


def measure(shape: Shape, device: str, minutes: float, save: Any, dry: bool) -> dict[str, Any]:
    """The whole suite; `save(record)` is called after every cell."""
    import torch

    deadline = time.monotonic() + 60 * minutes
    machine = timing.rates(device, torch.bfloat16)
    sizes, batches, new = (TOY_SIZES, (1, 2), 5) if dry else (SIZES, (1, 8), NEW)
    record = records.head("gpu", seed=0, repeats=1 if dry else 2, device=device, dtype="bfloat16", config={
        **shape.json(), "minutes": minutes, "dry": dry, "new_tokens": new, "accept_replayed": "pocket captions",
        "matmul_gflops": round(machine.flops / 1e9, 1), "copy_gbytes": round(machine.bytes / 1e9, 2)})  # fmt: skip
    record["kernels"] = gpu_extra.kernels(device)
    model = model_on(shape, device)
    record["attention"] = model.config.get_text_config()._attn_implementation
    record["skipped"] = []
    with torch.inference_mode():
        for visual, batch in cells(sizes, batches):
            inputs, rounds = inputs_on(shape, visual, batch, device), int(record["repeats"])
            prompt, said, done = inputs["input_ids"].shape[1], {}, {}
            for name in METHODS:
                where = f"{name}, {visual} visual tokens, batch {batch}"
                if batch > 1 and any(w in name for w in ("loop", "exact", "loose")):
                    continue  # the draft-verify loop takes one row
                if time.monotonic() > deadline:
                    record["skipped"].append(f"{where}: out of time")
                    continue
                try:
                    base = "+".join(p for p in name.split("+") if p not in ("exact", "loose")) or "plain"
                    plan = plan_of(name, said.get(base, ()), prompt, shape.vocab, dry)
                    samples = []
                    for k in range(rounds + (not dry)):  # the first is a warm-up
                        if time.monotonic() > deadline:
                            raise TimeoutError("out of time")
                        sample, said[name] = ask(model, inputs, plan, new, device)
                        samples += [sample] if k or dry else []
                    done[name] = samples
                    row = _row(name, plan, samples, done.get("plain"), shape, visual, batch, new, machine)
                    record["rows"].append(row)
                except TimeoutError as e:
                    record["skipped"].append(f"{where}: {e}")
                except torch.cuda.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    record["skipped"].append(f"{where}: out of memory")
                except Exception as e:
                    why = (str(e).splitlines() or [""])[0]
                    record["skipped"].append(f"{where}: {type(e).__name__}: {why}")
                if record["rows"]:
                    save(record)
    if time.monotonic() < deadline:
        record["stream"] = gpu_extra.ingest(model, device, shape, dry)
        save(record)
    return record


def _row(
    name: str,
    plan: Plan,
    samples: list,
    plain: list | None,
    shape: Shape,
    visual: int,
    batch: int,
    new: int,
    machine: Any,
) -> dict[str, Any]:
    from vlmfast import roofline

    metrics: dict[str, Any] = timing.medians(samples)
    exact = replace(shape, grid=(max(1, visual // (shape.grid[1] * shape.grid[2])), *shape.grid[1:]))
    request = roofline.Request(visual, shape.text + 2, new, batch, exact.grid[0])
    kept = metrics["kept_tokens"] / max(1, metrics["visual_tokens"])
    share = metrics["cached_tokens"] / max(1.0, kept * visual + request.text)
    asked = roofline.Asked(keep=kept, kv=min(1.0, share))
    device = roofline.Device("measured", machine.flops, machine.bytes)
    costs = roofline.stages(roofline.shape_of(shape.json()), request, asked)
    metrics["prefill_tflops"] = costs["prefill"].flops / metrics["prefill_ms"] / 1e9
    if plan.speculate is None or plan.speculate.draft is None:
        metrics["decode_gbytes_per_s"] = costs["decode"].bytes / (new - 1) / metrics["decode_ms_per_token"] / 1e6
        metrics["decode_floor_ms"] = costs["decode"].floor_ms(device) / (new - 1)
    metrics["floor_ms"] = sum(c.floor_ms(device) for c in costs.values())
    vs = {"plain": timing.ratios(plain, samples)} if plain and name != "plain" else {}
    params = {**methods.keep(plan), "visual_tokens": visual, "batch": batch}
    bare = Plan(prune=plan.prune, kv=plan.kv).json()
    return records.row(name, plan=bare, params=params, metrics=metrics, vs=vs)


def show(record: dict[str, Any]) -> None:
    """The short table, last."""
    lines = []
    for r in record["rows"]:
        m, ratio = r["metrics"], r["vs"].get("plain", {}).get("total_ms")
        lines.append([
            console.plain(r["name"]), f"{r['params']['visual_tokens']:,}", str(r["params"]["batch"]),
            speed.number(m["ttft_ms"]), speed.number(m["decode_ms_per_token"]), f"{m.get('peak_bytes', 0) / 1e9:.1f}",
            f"{m['kv_fast_bytes'] / 1e6:,.1f}", speed.number(m["prefill_tflops"]),
            speed.number(m.get("decode_gbytes_per_s", 0)), f"{ratio[0]:.2f}x" if ratio else "",
        ])  # fmt: skip
    heads = ("method", "visual\ntokens", "batch", "TTFT\nms", "ms/\ntoken", "GB\npeak", "KV\nMB", "TFLOP/s", "GB/s",
             "total")  # fmt: skip
    title = f"{record['hardware']['name']} · {record['config']['name']} · {record['attention']}"
    console.table(heads, lines, console.plain(title))
    page = console.out()
    for r in record["rows"]:
        for note in floors_above(r["metrics"]):
            page.print(console.plain(f"{r['name']}: {note}"))
    for k in record["kernels"]:
        page.print(
            f"kernel {k['case']}: error {k['error']:.2e}, plain torch {k['plain_error']:.2e}: "
            f"{'ok' if k['ok'] else 'WRONG'}"
        )
    if record.get("stream"):
        page.print(f"stream: {record['stream']}", markup=False)
    for line in record["skipped"]:
        page.print(f"skipped: {line}", markup=False)


def main(
    out: Annotated[Path, typer.Option(help="folder for <device>.json")],
    minutes: Annotated[float, typer.Option(help="time for the whole suite", min=0)] = 8.0,
    dry: Annotated[bool, typer.Option("--dry", help="toy shapes on the CPU: does everything run?")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace an existing record")] = False,
) -> None:
    """Measure a GPU: every stage, every size, kernels and streams; one record and a short table."""
    import torch

    if not dry and not torch.cuda.is_available():
        raise UserError("no CUDA device here; --dry runs the suite in toy shapes on the CPU")
    device = "cpu" if dry else "cuda"
    name = "dry" if dry else torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-")
    path = out / f"{name}.json"
    records.claim(path, force)
    record = measure(TOY if dry else QWEN_7B, device, minutes, lambda r: records.write(path, r, force=True), dry)
    records.write(path, record, force=True)
    show(record)
    if not all(k["ok"] for k in record["kernels"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    application(main)()
