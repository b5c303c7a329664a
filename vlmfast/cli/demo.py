"""`vlmfast demo`: answers about real video files, plain and accelerated, what became faster, and what was kept."""

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
    """Answer questions about real video files, plain and accelerated, and time a larger model's shapes."""
    from vlmfast.cli import scenes, sheet
    from vlmfast.core import UserError
    from vlmfast.files import claim, write_text

    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder")
    claim(out / "demo.json", force=True)
    present_files = [name for name in FILES if (out / name).exists()]
    if present_files and not (out / "demo.json").exists():
        raise UserError(f"--out {out} holds {present_files[0]}, which no demo wrote: give another folder")

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
    demo_record: dict[str, Any] = {"model": model, "seed": seed, "media": record(media, results)}
    write_text(out / "demo.json", json.dumps(demo_record, indent=1) + "\n")
    show(media, results)
    if model == "pocket":
        demo_record["speed"] = speed(str(loaded.model.device))
        write_text(out / "demo.json", json.dumps(demo_record, indent=1) + "\n")
    else:
        say(f"What becomes faster on your model: vlmfast check --model {model}")
    say(f"Which patches were kept in which frame: {out / 'kept.png'}", f"Clips and all figures: {out}")


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
    plans |= {f"vidcom2 {fraction:.0%}": Plan(prune=VidCom2(keep=fraction)) for fraction in (0.5, 0.25, 0.1)}
    if get(loaded.model).tower_pruning:
        plans["vidcom2 25% in tower"] = Plan(prune=VidCom2(keep=0.25, after_block=1))
    plans |= {f"{pruner.name} 25%": Plan(prune=pruner(keep=0.25)) for pruner in (MaxMin, Uniform, Random)}
    return plans


def warm_up(loaded: Any, media: list[Any]) -> None:
    """One answer that is not timed: the first call of anything is slow."""
    for medium in media:
        loaded.model.generate(**loaded.inputs(medium.turns[0][0], **medium.arguments), max_new_tokens=2)


def trial(loaded: Any, medium: Any, label: str, plan: Any, next_step: Any) -> dict[str, Any]:
    """All questions about one medium under one plan: answers, medians of the stages, what was kept."""
    import vlmfast
    from vlmfast.cli.ask import GREEDY

    next_step(f"{medium.name}: {label}")
    answers, reports, kept_indices, media_grid = [], [], None, (1, 1, 1)
    with vlmfast.accelerate(loaded.model, plan) as handle:
        for question, _ in medium.turns:
            inputs = loaded.inputs(question, **medium.arguments)
            generated = loaded.model.generate(**inputs, max_new_tokens=12, **GREEDY)
            answers.append(loaded.decode(generated, inputs))
            reports.append({**handle.report.encode, **handle.report.prefill, **handle.report.decode})
            media_kind = "video" if medium.video else "image"
            media_grid = handle.request.media[media_kind][0].grid
            kept_indices = handle.request.kept[media_kind][0].tolist() if media_kind in handle.request.kept else None
    metrics = {metric: statistics.median(r[metric] for r in reports) for metric in METRICS}
    correct = [_right(answer, expected) for answer, (_, expected) in zip(answers, medium.turns, strict=True)]
    return {"name": label, "plan": plan.json(), "answers": answers, "right": correct, "metrics": metrics,
            "grid": list(media_grid), "kept": kept_indices}  # fmt: skip


METRICS = (
    "visual_tokens", "kept_tokens", "encode_ms", "select_ms", "prefill_ms", "ttft_ms", "decode_ms_per_token",
    "cached_tokens", "kv_fast_bytes",
)  # fmt: skip


def _right(answer: str, expected: str) -> bool:
    return " ".join(answer.lower().split()).rstrip(" .") == expected.lower()


def _short(answer: str, max_length: int = 20) -> str:
    answer = answer or "(nothing)"
    return answer if len(answer) <= max_length else answer[: max_length - 3].rstrip() + "..."


def record(media: list[Any], results: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What `demo.json` holds."""
    return [
        {
            "name": medium.name,
            "questions": [{"question": question, "expected": answer} for question, answer in medium.turns],
            "rows": rows,
        }
        for medium, rows in zip(media, results, strict=True)
    ]


def say(*lines: str) -> None:
    """Print lines, wrapped where they are too long, after an empty one."""
    terminal = console.out()
    terminal.print()
    for line in lines:
        terminal.print(console.plain(line))


def show(media: list[Any], results: list[list[dict[str, Any]]]) -> None:
    """The questions, one row per method with what was right, and the answers that were not."""
    terminal, number = console.out(), 0
    terminal.print("[bold]Answers[/bold]")
    for medium in media:
        terminal.print(f"  {console.plain(medium.name)}")
        for question, answer in medium.turns:
            number += 1
            terminal.print(f"  {number:>3} {console.plain(question)} [dim]{console.plain(answer)}[/dim]")
    table_rows, wrong_lines = [], []
    for method in zip(*results, strict=True):  # the same plan on every medium
        label, correct = method[0]["name"], [is_correct for result in method for is_correct in result["right"]]
        answers = [answer for result in method for answer in result["answers"]]
        marks = " ".join("".join(MARKS[is_correct] for is_correct in result["right"]) for result in method)
        num_tokens, cache_bytes = (
            sum(result["metrics"][metric] for result in method) for metric in ("kept_tokens", "kv_fast_bytes")
        )
        correct_count = f"{sum(correct)} of {len(correct)}"
        table_rows.append(
            [console.plain(label), f"{num_tokens:,.0f}", f"{cache_bytes / 1e3:,.0f}", marks, correct_count]
        )
        wrong_answers = [
            f"{index + 1} {_short(wrong_answer)}"
            for index, (wrong_answer, is_correct) in enumerate(zip(answers, correct, strict=True))
            if not is_correct
        ]
        wrong_lines += [f"  {label}: {', '.join(wrong_answers)}"] if wrong_answers else []
    console.table(("method", "visual\ntokens", "KV\nkB", "questions\nin order", "right"), table_rows)
    if wrong_lines:
        terminal.print("Answered otherwise:")
        for wrong_line in wrong_lines:
            terminal.print(console.plain(wrong_line))


MARKS = {True: "[green]✓[/green]", False: "[red]✗[/red]"}
WORDS = {
    "encode_ms": "vision tower",
    "select_ms": "choosing tokens",
    "prefill_ms": "prefill",
    "ttft_ms": "first token",
    "decode_ms_per_token": "each next token",
}


def speed(device: str) -> dict[str, Any]:
    """Run and print the paired timing at real shapes; returns it, or why it could not run."""
    from vlmfast.bench.demo import measure
    from vlmfast.core import UserError

    console.out().print("\n[bold]What becomes faster[/bold]")
    try:
        with console.waiting("timing a larger model's shapes, about half a minute"):
            timed = measure(device)
    except UserError as error:
        console.out().print(console.plain(f"not timed: {error}"))
        return {"error": str(error)}
    show_speed(timed)
    return timed


def show_speed(timed: dict[str, Any]) -> None:
    """What was timed, stage by stage, with its floor, and what that means in words."""
    from vlmfast.page import figure

    terminal, shape, stages = console.out(), timed["shape"], timed["stages"]
    terminal.print(
        f"A clip of {timed['visual_tokens']:,} visual tokens, of which vlmfast keeps {timed['kept_tokens']:,}, chosen "
        f"inside the vision tower. Widths of Qwen2.5-VL-3B, {shape['layers']} of 36 text layers and {shape['depth']} "
        f"of 32 tower blocks, random weights: speed, not answers. {timed['dtype']} on "
        f"{console.plain(timed['machine'])}. {timed['rounds']} rounds, both in turn, a new clip each: medians, in "
        "brackets the least and largest ratio."
    )
    table_rows = []
    for stage, stage_name in WORDS.items():
        stage_values, ratio = stages[stage], stages[stage]["ratio"]
        faster = f"{ratio[0]:.2f}x [{ratio[1]:.2f}, {ratio[2]:.2f}]" if ratio else ""
        floors = [
            "" if floor_ms is None or timed["busy"] else figure(floor_ms) for floor_ms in stage_values["floor"].values()
        ]
        table_rows.append(
            [stage_name, figure(stage_values["stock"]), figure(stage_values["ours"]), console.plain(faster), *floors]
        )
    console.table(("milliseconds", "plain", "vlmfast", "faster", "floor\nplain", "floor\nvlmfast"), table_rows)
    first_token, next_token = stages["ttft_ms"], stages["decode_ms_per_token"]
    terminal.print(f"The first token {verdict(first_token['ratio'])}.")
    if timed["busy"]:
        terminal.print(
            "[yellow]No floor: the machine was busy while its rates were measured. Run it again when idle.[/]"
        )
    else:
        terminal.print(
            f"Its floor: arithmetic alone takes {figure(first_token['floor']['stock'])} ms for all tokens and "
            f"{figure(first_token['floor']['ours'])} ms for those kept, at the rates reached here just now "
            f"({timed['flops'] / 1e9:,.0f} GFLOP/s, {timed['bytes'] / 1e9:,.0f} GB/s). Pruning lowers the floor."
        )
    terminal.print(
        f"Each next token {verdict(next_token['ratio'])}. It reads all weights once, whatever was pruned; guessing "
        "several tokens at a time shortens that: examples/draft_model.py"
    )


def verdict(ratio: list[float]) -> str:
    """What a paired ratio [median, least, largest] of plain over ours says."""
    median, smallest, largest = ratio
    spread = f"{smallest:.2f} to {largest:.2f} over the rounds"
    if smallest > 1.03:
        return f"comes {median:.2f}x sooner ({spread})"
    if largest < 0.97:
        return f"comes {1 / median:.2f}x later ({spread})"
    return f"shows no clear gain ({median:.2f}x, {spread})"
