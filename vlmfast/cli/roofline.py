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

    from rich.table import Table

    from vlmfast import roofline as roof

    if check is not None:
        _compare(roof.check(roof.read_record(check)), as_json)
        return
    shape, request, machine = roof.shape_of(model), roof.parse(tokens), roof.device_of(device)
    costs = roof.stages(shape, request)
    best = roof.savings(shape, request, machine)
    if as_json:
        stages = {
            k: asdict(c) | {"floor_ms": c.floor_ms(machine), "regime": c.regime(machine)} for k, c in costs.items()
        }
        saved = [{"method": n, "floor_ms": f, "best_ratio": r} for n, f, r in best]
        print(json.dumps({"model": asdict(shape), "request": asdict(request), "device": asdict(machine),
                          "stages": stages, "savings": saved}, indent=1))  # fmt: skip
        return
    rates = f"{machine.flops / 1e12:,.4g} TFLOP/s, {machine.bytes / 1e9:,.4g} GB/s, {machine.source}"
    page = console.out()
    page.print(f"[bold]{shape.name}[/bold] on {machine.name} ({rates})")
    page.print(f"{request.visual:,} visual tokens in {request.frames} frames, {request.text} text, {request.new} new, "
               f"batch {request.batch}")  # fmt: skip
    table = Table()
    for column in ("stage", "GFLOP", "GB", "floor ms", "each step", "regime"):
        table.add_column(column, justify="left" if column in ("stage", "regime") else "right")
    for name, cost in costs.items():
        floor = cost.floor_ms(machine)
        each = f"{floor / cost.steps:,.3g}" if cost.steps > 1 else ""
        numbers = (f"{cost.flops / 1e9:,.4g}", f"{cost.bytes / 1e9:,.4g}", f"{floor:,.4g}", each)
        table.add_row(name, *numbers, cost.regime(machine))
    page.print(table)
    table = Table(title="at best (each stage at its floor, choosing and drafting cost nothing)", title_justify="left")
    for column in ("method", "encode", "prefill", "decode", "total ms", "times faster"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, floors, ratio in best:
        cells = [f"{floors[k]:,.4g}" for k in ("encode", "prefill", "decode")]
        table.add_row(name, *cells, f"{sum(floors.values()):,.4g}", f"{ratio:.2f}")
    page.print(table)


def _compare(rows: list[dict], as_json: bool) -> None:
    import json

    from rich.table import Table

    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(title="floor, predicted from plain's efficiency, measured (ms)", title_justify="left")
    for column in ("method", "encode floor", "predicted", "measured", "prefill floor", "predicted", "measured"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for r in rows:
        name = " ".join([r["name"], *(f"{k}={v}" for k, v in r["params"].items())])
        cells = [f"{r[s][k]:,.4g}" for s in ("encode", "prefill") for k in ("floor", "predicted", "measured")]
        table.add_row(name, *cells)
    console.out().print(table)
