"""`vlmfast heads`: which heads of a model are static and which dynamic, for one question: a table and a picture."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmfast.cli import console, options


def heads(
    question: Annotated[
        str, typer.Argument(help="what you want to know: heads are judged by the attention of its text")
    ],
    model: options.Model = "pocket",
    image: options.Images = None,
    video: options.VideoPath = None,
    kv: Annotated[
        str, typer.Option("--kv", help="how heads are judged, e.g. hybridkv:advanced=(theta=0.8,top=0.2)")
    ] = "hybridkv",
    out: Annotated[Path | None, typer.Option("--out", help="also draw them, as .png, .svg or .pdf")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an existing picture")] = False,
    frames: options.Frames = None,
    fps: options.Fps = None,
    select: options.Select = None,
    backend: options.Backend = "pyav",
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    as_json: options.Json = False,
) -> None:
    """Show how concentrated every head's attention is: static heads can be pruned, dynamic ones need retrieval."""
    from vlmfast.plan import parse

    policy = parse("kv", kv)
    if out is not None:
        check_picture(out, force)
    pictures = options.images(image)
    video_clip = options.video(video, frames, fps, select, backend)

    from vlmfast.prefill import heads as observed

    loaded = options.load(model, dtype, device, device_map)
    inputs = loaded.inputs(question, pictures, video_clip)
    with console.waiting("reading the prompt"):
        head_table = observed.classify(loaded.model, inputs, policy)
    if out is not None:
        head_table.draw(out)
    head_rows = [
        {field: value for field, value in head_row.items() if field != "row"} for head_row in head_table.rows()
    ]  # one question, one row
    if as_json:
        columns = inputs["input_ids"].shape[1]
        print(json.dumps({"model": model, "question": question, "columns": columns, "heads": head_rows}, indent=1))
        return
    show(head_rows, head_table.policy)
    if out is not None:
        console.out().print(f"drawn to {out}", markup=False)


def check_picture(path: Path, force: bool) -> None:
    """Raise UserError where no picture can be written."""
    from vlmfast.core import UserError
    from vlmfast.files import claim

    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}")
    claim(path, force, (".png", ".svg", ".pdf"))
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--out needs matplotlib: pip install 'vlmfast[plot]', or leave --out away")


def show(head_rows: list[dict[str, Any]], policy: Any) -> None:
    """One line per layer, one column per key head, in percent; dynamic heads carry a star."""
    terminal = console.out()
    terminal.print(f"attention on the top {policy.advanced.top:.0%} of columns, in % of all (* dynamic)")
    headings = [
        f"head\n{head_index}" if head_index == 0 else f"\n{head_index}"
        for head_index in range(1 + max(head_row["head"] for head_row in head_rows))
    ]
    table_lines = []
    for layer_index in sorted({head_row["layer"] for head_row in head_rows}):
        layer_rows = [head_row for head_row in head_rows if head_row["layer"] == layer_index]
        num_dynamic = sum(head_row["type"] == "dynamic" for head_row in layer_rows)
        table_lines.append(
            [
                f"[cyan]{layer_index}[/cyan]",
                *(_cell(head_row) for head_row in layer_rows),
                f"{num_dynamic} of {len(layer_rows)}",
            ]
        )
    console.table(["layer", *headings, "dynamic"], table_lines)
    dynamic = sum(head_row["type"] == "dynamic" for head_row in head_rows)
    theta, split = policy.advanced.theta, policy.split
    comparison, extreme = ("at least", "most") if policy.dynamic == "concentrated" else ("under", "least")
    rule = f"{comparison} {theta:.0%}" if split is None else f"the {extreme} concentrated {split:.0%} of a layer"
    terminal.print(f"{dynamic} of {len(head_rows)} heads are dynamic ({rule})")


def _cell(head_row: dict[str, Any]) -> str:
    percent = f"{100 * head_row['concentration']:.0f}"
    return f"[bold yellow]{percent}*[/]" if head_row["type"] == "dynamic" else f"{percent} "
