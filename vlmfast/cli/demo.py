"""`vlmfast demo`: real video files, plain and accelerated answers side by side, and a picture of what was kept."""

from __future__ import annotations

import json
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
    from vlmfast.files import claim, write_text

    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder")
    claim(out / "demo.json", force=True)
    held = [name for name in FILES if (out / name).exists()]
    if held and not (out / "demo.json").exists():
        raise UserError(f"--out {out} holds {held[0]}, which no demo wrote: give another folder")

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
    data = {"model": model, "seed": seed, "media": record(media, results)}
    write_text(out / "demo.json", json.dumps(data, indent=1) + "\n")
    show(media, results)
    files = ", ".join([*(m.name for m in media), "demo.json"])
    console.out().print(console.plain(f"\nWhich patches were kept in which frame: {out / 'kept.png'}   (also {files})"))


FILES = ("moves.mp4", "events.mp4", "picture.png", "kept.png")


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
            grid = fast.request.media[kind][0].grid
            kept = fast.request.kept[kind][0].tolist() if kind in fast.request.kept else None
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


def show(media: list[Any], results: list[list[dict[str, Any]]]) -> None:
    """A table per clip or picture, below its questions, a row per method; green answers are right."""
    page = console.out()
    heads = ("", "visual\ntokens", "encode\nms", "prefill\nms", "decode\nms/token", "KV\nkB")
    for medium, rows in zip(media, results, strict=True):
        page.print(f"\n[bold]{console.plain(medium.name)}[/bold]")
        for question, answer in medium.turns:
            page.print(f"  [dim]{console.plain(question)}[/dim] {console.plain(answer)}")
        lines = []
        for row in rows:
            answers = [
                f"[{'green' if right else 'red'}]{'✓' if right else '✗'} {console.plain(_short(answer))}[/]"
                for answer, right in zip(row["answers"], row["right"], strict=True)
            ]
            m, each = row["metrics"], 4 if sum(len(_short(a)) + 4 for a in row["answers"]) <= 36 else 2
            below = ["  " + "  ".join(answers[i : i + each]) for i in range(0, len(answers), each)]
            lines.append([
                "\n".join([console.plain(row["name"]), *below]),
                f"{m['kept_tokens']:,.0f}", f"{m['encode_ms']:.1f}", f"{m['prefill_ms']:.1f}",
                f"{m['decode_ms_per_token']:.1f}", f"{m['kv_fast_bytes'] / 1e3:,.0f}",
            ])  # fmt: skip
        console.table(heads, lines)
    for name in dict.fromkeys(row["name"] for rows in results for row in rows):
        right = [r for rows in results for row in rows if row["name"] == name for r in row["right"]]
        page.print(f"  {name:<22} {sum(right)} of {len(right)} right")
