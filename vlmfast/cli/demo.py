"""`vlmfast demo`: real video files, plain and accelerated answers side by side, and a picture of what was kept."""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmfast.cli import console, options


def demo(
    out: Annotated[Path, typer.Option("--out", help="folder for the clips, the picture sheet and the record")] = Path(
        "demo-out"
    ),
    seed: Annotated[int, typer.Option("--seed", min=0, help="which scenes")] = 1,
    model: options.Model = "pocket",
    dtype: options.Dtype = "float32",
    device: options.Device = None,
) -> None:
    """Answer questions about real video files, plain and accelerated, and show what was kept."""
    from vlmfast.cli import scenes, sheet
    from vlmfast.core import UserError

    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder")

    loaded = options.load(model, dtype, device)
    if not loaded.reads_video():
        raise UserError(
            f"{model} ({loaded.model_type}) reads pictures only, and the demo shows video: try --model pocket"
        )
    out.mkdir(parents=True, exist_ok=True)
    with console.waiting("rendering and encoding the clips"):
        media = scenes.media(out, seed)
    plans = configurations(loaded)
    with console.counting(len(media) * len(plans)) as step:
        warm_up(loaded, media)
        results = [[trial(loaded, medium, name, plan, step) for name, plan in plans.items()] for medium in media]
    sheet.draw(media, results, out / "kept.png", title(loaded))
    write(out / "demo.json", {"model": model, "seed": seed, "media": record(media, results)})
    show(media, results)
    files = ", ".join([*(m.name for m in media), "demo.json"])
    console.out().print(
        f"\nWhich patches were kept in which frame: [bold]{out / 'kept.png'}[/bold]   [dim](also {files})[/dim]"
    )


def title(loaded: Any) -> str:
    """Model and machine in a few words."""
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    return f"{loaded.name} · {loaded.model_type} · {dtype} on {loaded.model.device}"


def configurations(loaded: Any) -> dict[str, Any]:
    """What is compared: label -> plan."""
    from vlmfast.encode import MaxMin, Random, Uniform, VidCom2
    from vlmfast.families import get
    from vlmfast.plan import Plan

    plans: dict[str, Any] = {"plain": Plan()}
    plans |= {f"vidcom2 {keep:.0%}": Plan(prune=VidCom2(keep=keep)) for keep in (0.5, 0.25, 0.1)}
    if get(loaded.model).tower_pruning:
        plans["vidcom2 25% in tower"] = Plan(prune=VidCom2(keep=0.25, after_block=1))
    plans |= {f"{m.name} 25%": Plan(prune=m(keep=0.25)) for m in (MaxMin, Uniform, Random)}
    return plans


def warm_up(loaded: Any, media: list[Any]) -> None:
    """One answer that is not timed: the first call of anything is slow."""
    for medium in media:
        loaded.model.generate(**loaded.inputs(medium.turns[0][0], **medium.arguments), max_new_tokens=2)


def trial(loaded: Any, medium: Any, name: str, plan: Any, step: Any) -> dict[str, Any]:
    """All questions about one medium under one plan: answers, medians of the stages, what was kept."""
    import vlmfast
    from vlmfast.cli.ask import GREEDY

    step(f"{medium.name}: {name}")
    answers, reports, kept, grid = [], [], None, (1, 1, 1)
    with vlmfast.accelerate(loaded.model, plan) as fast:
        for question, _ in medium.turns:
            inputs = loaded.inputs(question, **medium.arguments)
            out = loaded.model.generate(**inputs, max_new_tokens=12, **GREEDY)
            answers.append(loaded.decode(out, inputs))
            reports.append({**fast.report.encode, **fast.report.prefill, **fast.report.decode})
            kind = "video" if medium.video else "image"
            grid = fast.columns.media[kind][0].grid
            kept = fast.columns.kept[kind][0].tolist() if kind in fast.columns.kept else None
    metrics = {key: statistics.median(r[key] for r in reports) for key in METRICS}
    right = [_right(answer, expected) for answer, (_, expected) in zip(answers, medium.turns, strict=True)]
    return {"name": name, "plan": plan.json(), "answers": answers, "right": right, "metrics": metrics,
            "grid": list(grid), "kept": kept}  # fmt: skip


METRICS = (
    "visual_tokens", "kept_tokens", "encode_ms", "select_ms", "prefill_ms", "ttft_ms", "decode_ms_per_token",
    "cached_tokens", "kv_fast_bytes",
)  # fmt: skip


def _right(answer: str, expected: str) -> bool:
    return " ".join(answer.lower().split()).rstrip(" .") == expected.lower()


def _short(answer: str, most: int = 20) -> str:
    answer = answer or "(nothing)"
    return answer if len(answer) <= most else answer[: most - 3].rstrip() + "..."


def record(media: list[Any], results: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What `demo.json` holds."""
    return [
        {"name": m.name, "questions": [{"question": q, "expected": a} for q, a in m.turns], "rows": rows}
        for m, rows in zip(media, results, strict=True)
    ]


def write(path: Path, data: Any) -> None:
    """JSON that appears whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(part, path)


def show(media: list[Any], results: list[list[dict[str, Any]]]) -> None:
    """One table: a section per clip or picture, a row per method; green answers are right."""
    from rich import box
    from rich.table import Table

    most = max(len(m.turns) for m in media)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for i in range(most):
        table.add_column("answers" if i == 0 else "", min_width=9)
    for heading in ("visual\ntokens", "encode\nms", "prefill\nms", "decode\nms/token", "KV\nkB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for medium, rows in zip(media, results, strict=True):
        asked = [f"[dim]{q}[/dim] [bold]{a}[/bold]" for q, a in medium.turns] + [""] * (most - len(medium.turns))
        table.add_row(f"[bold]{medium.name}[/bold]", *asked, end_section=False)
        for row in rows:
            cells = [
                f"[{'green' if right else 'red'}]{'✓' if right else '✗'} {_short(answer)}[/]"
                for answer, right in zip(row["answers"], row["right"], strict=True)
            ] + [""] * (most - len(row["answers"]))
            m = row["metrics"]
            table.add_row(
                row["name"],
                *cells,
                f"{m['kept_tokens']:,.0f}",
                f"{m['encode_ms']:.1f}",
                f"{m['prefill_ms']:.1f}",
                f"{m['decode_ms_per_token']:.1f}",
                f"{m['kv_fast_bytes'] / 1e3:,.0f}",
            )
        table.add_section()
    page = console.out()
    page.print(table)
    for name in dict.fromkeys(row["name"] for rows in results for row in rows):
        right = [r for rows in results for row in rows if row["name"] == name for r in row["right"]]
        page.print(f"  {name:<22} {sum(right)} of {len(right)} right")
