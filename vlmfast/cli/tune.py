"""`vlmfast tune`: the fastest plan that keeps a share of the plain model's score."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from vlmfast.cli import console, options


def tune(
    task: Annotated[str, typer.Option(help="easy-vqa, pocket/<kind>, pocket/all, or a file of your own questions")],
    out: Annotated[Path, typer.Option(help="plan to write (.json); the page and the answers go beside it")],
    model: options.Model = "pocket",
    floor: Annotated[float, typer.Option(help="share of the plain model's score to keep")] = 0.99,
    minutes: Annotated[float, typer.Option(help="time for all of it, loading included")] = 20.0,
    methods: Annotated[str | None, typer.Option(help="plans to try, e.g. vidcom2-25,balanced+lossless")] = None,
    draft: Annotated[str | None, typer.Option(help="draft model; default with pocket: its own")] = None,
    limit: Annotated[int | None, typer.Option(help="at most this many questions", min=1)] = None,
    force: Annotated[bool, typer.Option("--force", help="start anew, replacing existing files")] = False,
) -> None:
    """Search plans by successive halving on paired questions; write the best as a plan file, and why as a page."""
    from vlmfast.bench import tune as tuning

    best_plan, tried_plans = tuning.tune(
        model, task, out, floor=floor, minutes=minutes, names=methods, draft=draft, limit=limit, force=force,
        say=lambda text: console.remarks().print(text, style="dim", markup=False),
    )  # fmt: skip
    asked_plans = [tried for tried in sorted(tried_plans, key=lambda tried: -tried.faster[0]) if tried.answered]
    rows = [[
        console.plain(tried.name), tried.status,
        f"{tried.faster[0]:.2f}x" if math.isfinite(tried.faster[0]) else "-",
        f"{100 * tried.margin[0]:+.1f}, {100 * tried.margin[1]:+.1f}" if math.isfinite(tried.margin[0]) else "-",
        str(len(tried.answered)),
    ] for tried in asked_plans]  # fmt: skip
    console.table(("plan", "status", "faster", "points above\nthe floor, 95 %", "questions"), rows)
    for tried in asked_plans:
        if tried.why:
            console.out().print(console.plain(f"{tried.name}: {tried.why}"))
    if len(asked_plans) < len(tried_plans):
        console.out().print(f"{len(tried_plans) - len(asked_plans)} more plans were not asked: give more minutes")
    console.out().print(console.plain(f"{best_plan.name} -> {out}, page {out.with_suffix('.html')}"), style="bold")
