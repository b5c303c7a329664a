"""Accuracy, paired: every method answers every question, the plain model always among them.

    python -m evals.accuracy --task easy-vqa --methods vidcom2-25,uniform-25 --batch 64 \\
        --out runs/easy.jsonl --summary runs/easy.json

A killed run goes on where it stopped when the same command is given again. Shards (`--shard 0/4`) may be concatenated
into one file; the command without --shard then finds everything answered and writes the summary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmfast.bench import methods, runner
from vlmfast.bench.accuracy import evaluate
from vlmfast.cli import console
from vlmfast.cli.options import MOST_TOKENS
from vlmfast.plan import Plan


def show(result: dict[str, Any]) -> None:
    """The summary as a table."""
    rows = []
    for r in result["rows"]:
        m = r["metrics"]
        faster = r["vs"].get("plain", {}).get("total_ms")
        score = f"{100 * m.get('accuracy', m.get('f1')):.1f}\n[dim]{_range(m['ci95'])}[/dim]"
        difference = f"{100 * m['diff_vs_plain']:+.1f}\n[dim]{_range(m['diff_ci95'])}[/dim]" if "diff_ci95" in m else ""
        kept = f"{m['kept_tokens']:,.0f}\n[dim]of {m['visual_tokens']:,.0f}[/dim]" if "kept_tokens" in m else "-"
        took = f"{m['total_ms']:,.1f}" if "total_ms" in m else "-"
        rows.append([
            console.plain(r["name"]), score, difference, kept,
            f"{m['kv_fast_bytes'] / 1e3:,.0f}" if "kv_fast_bytes" in m else "-",
            took + (f"\n{faster[0]:.2f}x" if faster else ""), str(m["failed"]),
        ])  # fmt: skip
    heads = ("method", "score\n95 %", "vs plain\n95 %", "visual\ntokens", "KV\nkB", "ms\nfaster", "failed")
    console.table(heads, rows, f"{console.plain(result['task'])} · {result['config']['questions']:,} questions")
    for r in result["rows"]:
        for note in r.get("notes", []):
            console.out().print(console.plain(f"{r['name']}: {note}"))


def _range(ci: list[float]) -> str:
    return f"[{100 * ci[0]:.1f}, {100 * ci[1]:.1f}]"


def main(
    task: Annotated[str, typer.Option(help="easy-vqa, pocket/<kind>, pocket/all, pocket/long, or a file of questions")],
    out: Annotated[Path, typer.Option(help="one JSON line per question and method; continued when it exists")],
    summary: Annotated[Path | None, typer.Option(help="result file (JSON)")] = None,
    limit: Annotated[int | None, typer.Option(help="the first N questions only", min=1)] = None,
    methods_: Annotated[str | None, typer.Option("--methods", help="e.g. vidcom2-25,balanced+lossless")] = None,
    prune: Annotated[str | None, typer.Option(help="name:field=value,...; the three make one method")] = None,
    kv: Annotated[str | None, typer.Option(help="name:field=value,...")] = None,
    speculate: Annotated[str | None, typer.Option(help="name:field=value,...")] = None,
    plan: Annotated[list[Path] | None, typer.Option(help="a plan file; may be given several times")] = None,
    model: Annotated[str, typer.Option(help="checkpoint folder or id; pocket = the embedded model")] = "pocket",
    draft: Annotated[str | None, typer.Option(help="draft model; default with pocket: its own")] = None,
    batch: Annotated[int, typer.Option(help="questions per forward, left-padded", min=1)] = 1,
    shard: Annotated[str | None, typer.Option(help="i/n: every n-th question from the i-th on")] = None,
    tokens: Annotated[int | None, typer.Option(help="most new tokens per answer", min=1, max=MOST_TOKENS)] = None,
    metric: Annotated[str | None, typer.Option(help="exact, vqa, choice, anls, relaxed")] = None,
    frames: Annotated[str, typer.Option(help="frames of one's own videos, e.g. fps:rate=2")] = "uniform:16",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="start anew, replacing existing files")] = False,
) -> None:
    """Ask a task's questions of the plain model and of every method; write answers and the paired summary."""
    runner.check_draft(draft)
    draft = draft or runner.own_draft(model)
    plans = methods.named(methods_, prune, kv, speculate, draft, {p.stem: Plan.load(p) for p in plan or []})
    result = evaluate(
        task, out, summary, plans=plans, model=model, limit=limit, batch=batch, shard=shard, tokens=tokens,
        force=force, metric=metric, frames=frames, device=device, dtype=dtype,
    )  # fmt: skip
    show(result)
