"""`vlmfast check`: checks the laws on a checkpoint, tries every method there, and times a plan."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from vlmfast.cli import console, options

WORDS = {
    "encode_ms": "vision tower",
    "prefill_ms": "prefill",
    "ttft_ms": "first token",
    "decode_ms_per_token": "each further token",
    "total_ms": "whole answer",
    "kv_fast_bytes": "KV cache",
}


TIMED = ("vidcom2:keep=0.25,after_block=auto", "speculate:draft=promptlookup,otherwise=plain")  # where nothing is asked


def check(
    model: options.Model = "pocket",
    image: options.Images = None,
    video: options.VideoPath = None,
    prune: options.Prune = None,
    kv: options.KV = None,
    speculate: options.Speculation = None,
    tower: options.Tower = None,
    preset: options.Preset = None,
    plan: options.PlanFile = None,
    frames: options.Frames = None,
    fps: options.Fps = None,
    select: options.Select = None,
    backend: options.Backend = "pyav",
    question: Annotated[str, typer.Option("--question", help="what to ask")] = "What do you see?",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="timed rounds, interleaved")] = 3,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    as_json: options.Json = False,
) -> None:
    """Check the laws on your own checkpoint and time it before and after."""
    from vlmfast.plan import resolve

    if all(given_value is None for given_value in (preset, plan, prune, kv, speculate, tower)):
        prune, speculate = TIMED  # a preset might leave a small picture alone
    whole_plan = options.whole_plan(preset, plan)
    chosen_plan = resolve(whole_plan, prune=prune, kv=kv, speculate=speculate, tower=tower)
    media: dict[str, Any] = {"images": options.images(image)}
    media["video"] = options.video(video, frames, fps, select, backend)
    if not media["images"] and media["video"] is None:
        media["images"] = [picture()]

    from vlmfast.cli import laws

    loaded = options.load(model, dtype, device, device_map)
    checked_case = laws.Case(loaded, question, media)
    methods = laws.catalogue(checked_case)
    verdicts, attempts = [], {}
    with console.counting(len(laws.LAWS) + len(methods) + 2 * (rounds + 1)) as next_step:
        for check_law in laws.LAWS:
            next_step(f"law: {check_law.__name__}")
            verdicts.append(check_law(checked_case))
        for name, stages in methods.items():
            next_step(f"trying {name}")
            attempts[name] = laws.attempt(checked_case, stages)
        measured_gains = laws.gain(checked_case, chosen_plan, rounds, 8, next_step)
    broken = any(state == "broke" for state, _ in attempts.values())
    all_hold = all(verdict.ok for verdict in verdicts) and not broken
    record = {
        "model": model,
        "model_type": loaded.model_type,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
        "notes": loaded.notes,
        "ok": all_hold,
        "laws": [vars(verdict) for verdict in verdicts],
        "methods": {name: {"state": state, "said": outcome} for name, (state, outcome) in attempts.items()},
        "plan": chosen_plan.json(),
        "gain": measured_gains,
    }
    if as_json:
        print(json.dumps(record, indent=1))
    else:
        show(record)
    if not all_hold:
        raise typer.Exit(1)


def picture(side: int = 448) -> Any:
    """A picture to check with where the user gives none: a gradient and a few shapes, (side, side, 3) uint8."""
    import numpy as np
    from PIL import Image, ImageDraw

    across, downwards = np.meshgrid(np.linspace(0, 1, side), np.linspace(0, 1, side))
    background = np.stack([60 + 120 * across, 90 + 90 * downwards, 200 - 110 * across * downwards], -1).astype(np.uint8)
    drawn_image = Image.fromarray(background)
    drawing, sixteenth = ImageDraw.Draw(drawn_image), side // 16
    drawing.ellipse([2 * sixteenth, 2 * sixteenth, 7 * sixteenth, 7 * sixteenth], fill=(214, 60, 48))
    drawing.rectangle([9 * sixteenth, 3 * sixteenth, 14 * sixteenth, 6 * sixteenth], fill=(248, 214, 72))
    drawing.polygon(
        [(4 * sixteenth, 14 * sixteenth), (8 * sixteenth, 8 * sixteenth), (12 * sixteenth, 14 * sixteenth)],
        fill=(58, 160, 90),
    )
    return np.array(drawn_image)


def show(record: dict[str, Any]) -> None:
    """The record in plain words."""
    terminal = console.out()
    title = f"{record['model']} · {record['model_type']} · {record['dtype']} on {record['device']}"
    terminal.print(f"\n[bold]{console.plain(title)}[/bold]")
    terminal.print("".join(f"[dim]{console.plain(note)}[/dim]\n" for note in record["notes"]))
    law_records = {law_record["name"]: (law_record["ok"], law_record["said"]) for law_record in record["laws"]}
    terminal.print(
        listing(
            {
                f"{'[green]holds[/]' if holds else '[red]BROKEN[/]'}  {method_name}": verdict
                for method_name, (holds, verdict) in law_records.items()
            }
        )
    )
    for state, heading, colour in (
        ("works", "Works", "green"),
        ("refused", "Refused", "yellow"),
        ("broke", "Broke", "red"),
    ):
        listed_methods = {
            f"[cyan]{method_name}[/]": method["said"]
            for method_name, method in record["methods"].items()
            if method["state"] == state
        }
        if listed_methods:
            terminal.print(f"\n[bold {colour}]{heading} here[/]", listing(listed_methods))
    terminal.print(f"\n[bold]Gained[/] with {console.plain(named(record['plan']))}")
    terminal.print(listing({WORDS[metric]: sentence(metric, values) for metric, values in record["gain"].items()}))
    terminal.print("\n[green]All laws hold.[/]\n" if record["ok"] else "\n[red]Not all is well: see above.[/]\n")


def listing(descriptions: dict[str, str]) -> Any:
    """Two columns, the second one wrapped under itself."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2), pad_edge=True)
    grid.add_column(no_wrap=True)
    grid.add_column()
    for heading, description in descriptions.items():
        grid.add_row(heading, console.plain(description))
    return grid


def named(plan_json: dict[str, Any]) -> str:
    """A plan in a few words: `prune vidcom2 keep=0.25`."""
    described = [
        f"{stage} {options['method']}" + (f" keep={options['keep']}" if "keep" in options else "")
        for stage, options in plan_json.items()
        if options
    ]
    return ", ".join(described) or "nothing asked"


def sentence(metric: str, values: dict[str, Any]) -> str:
    """Before, after, and what that means."""
    unit_name, scale = ("MB", 1e-6) if metric.endswith("_bytes") else ("ms", 1.0)
    better_word, worse_word = ("smaller", "larger") if unit_name == "MB" else ("faster", "slower")
    plain_value, fast_value, ratio = values["plain"] * scale, values["fast"] * scale, values["ratio"]
    if not ratio:
        return f"{plain_value:,.3g} -> {fast_value:,.3g} {unit_name}"
    median = ratio[0]
    comparison = (
        "about the same"
        if 0.97 < median < 1.03
        else f"{median:.2f}x {better_word}"
        if median > 1
        else f"{1 / median:.2f}x {worse_word}"
    )
    return (
        f"{plain_value:,.4g} -> {fast_value:,.4g} {unit_name}, {comparison} (rounds: {ratio[1]:.2f} to {ratio[2]:.2f})"
    )
