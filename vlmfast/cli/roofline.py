"""`vlmfast roofline`: what an input must cost at best, stage by stage, and what each method could save."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmfast.cli import console, options


def roofline(
    model: Annotated[str, typer.Option(help="qwen2.5-vl-7b and the like, 'pocket', or a folder with config.json")],
    tokens: Annotated[str, typer.Option(help="visual=2000,text=100,new=64,batch=1,frames=8")] = "visual=2000",
    device: Annotated[str, typer.Option(help="h200, h100, a100, l4, rtx4090; cpu, cuda, auto are measured")] = "auto",
    check: Annotated[Path | None, typer.Option(help="a record of evals.speed --suite encode to compare with")] = None,
    as_json: options.Json = False,
) -> None:
    """FLOPs, bytes, the floor in ms and the regime of every stage, and the most that each method could save."""
    import json
    from dataclasses import asdict

    from vlmfast import roofline as roof
    from vlmfast.page import figure

    if check is not None:
        _compare(roof.check(roof.read_record(check)), as_json)
        return
    shape, request, machine = roof.shape_of(model), roof.parse(tokens), roof.device_of(device)
    costs = roof.stages(shape, request)
    best_savings = roof.savings(shape, request, machine)
    if as_json:
        stages = {
            stage: asdict(stage_cost) | {"floor_ms": stage_cost.floor_ms(machine), "regime": stage_cost.regime(machine)}
            for stage, stage_cost in costs.items()
        }
        saved = [
            {"method": method, "floor_ms": floors_ms, "best_ratio": ratio_at_best}
            for method, floors_ms, ratio_at_best in best_savings
        ]
        print(json.dumps({"model": asdict(shape), "request": asdict(request), "device": asdict(machine),
                          "stages": stages, "savings": saved}, indent=1))  # fmt: skip
        return
    rates_text = f"{machine.flops / 1e12:,.4g} TFLOP/s, {machine.bytes / 1e9:,.4g} GB/s, {machine.source}"
    page = console.out()
    page.print(f"[bold]{console.plain(shape.name)}[/bold] on {machine.name} ({rates_text})")
    page.print(f"{request.visual:,} visual tokens in {request.frames} frames, {request.text} text, {request.new} new, "
               f"batch {request.batch}")  # fmt: skip
    rows = []
    for name, cost in costs.items():
        stage_floor_ms = cost.floor_ms(machine)
        per_step_ms = figure(stage_floor_ms / cost.steps) if cost.steps > 1 else ""
        numbers = (figure(cost.flops / 1e9), figure(cost.bytes / 1e9), figure(stage_floor_ms), per_step_ms)
        rows.append([name, *numbers, cost.regime(machine)])
    console.table(("stage", "GFLOP", "GB", "floor\nms", "each step\nms", "regime"), rows)
    rows = []
    for name, floors, ratio in best_savings:
        floor_cells = [figure(floors[stage]) for stage in ("encode", "prefill", "decode")]
        rows.append([console.plain(name), *floor_cells, figure(sum(floors.values())), f"{ratio:.2f}x"])
    page.print("[bold]at best[/bold] (each stage at its floor, choosing and drafting cost nothing)")
    console.table(("method", "encode\nms", "prefill\nms", "decode\nms", "total\nms", "faster"), rows)


def _compare(rows: list[dict], as_json: bool) -> None:
    import json

    from vlmfast.page import BUSY, figure

    if as_json:
        print(json.dumps(rows, indent=1))
        return
    lines, busy_lines = [], []
    for record_row in rows:
        name = " ".join([record_row["name"], *(f"{kind}={value}" for kind, value in record_row["params"].items())])
        row_cells = [
            figure(float(record_row[stage][kind]))
            for stage in ("encode", "prefill")
            for kind in ("floor", "predicted", "measured")
        ]
        lines.append([console.plain(name), *row_cells])
        busy_lines += [
            f"{name}: {BUSY} ({stage})"
            for stage in ("encode", "prefill")
            if record_row[stage]["floor"] > 1.02 * record_row[stage]["measured"]
        ]
    column_heads = [
        f"{stage}\n{kind}" for stage in ("encode", "prefill") for kind in ("floor", "predicted", "measured")
    ]
    console.table(["method", *column_heads], lines, "floor, predicted from plain's efficiency, measured (ms)")
    for line in busy_lines:
        console.out().print(console.plain(line))
