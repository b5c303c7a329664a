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
    clip = options.video(video, frames, fps, select, backend)

    from vlmfast.prefill import heads as observed

    loaded = options.load(model, dtype, device, device_map)
    inputs = loaded.inputs(question, pictures, clip)
    with console.waiting("reading the prompt"):
        table = observed.classify(loaded.model, inputs, policy)
    if out is not None:
        table.draw(out)
    rows = [{k: v for k, v in row.items() if k != "row"} for row in table.rows()]  # one question, one row
    if as_json:
        columns = inputs["input_ids"].shape[1]
        print(json.dumps({"model": model, "question": question, "columns": columns, "heads": rows}, indent=1))
        return
    show(rows, table.policy)
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


def show(rows: list[dict[str, Any]], policy: Any) -> None:
    """One line per layer, one column per key head, in percent; dynamic heads carry a star."""
    page = console.out()
    page.print(f"attention on the top {policy.advanced.top:.0%} of columns, in % of all (* dynamic)")
    heads = [f"head\n{head}" if head == 0 else f"\n{head}" for head in range(1 + max(row["head"] for row in rows))]
    lines = []
    for layer in sorted({row["layer"] for row in rows}):
        here = [row for row in rows if row["layer"] == layer]
        count = sum(row["type"] == "dynamic" for row in here)
        lines.append([f"[cyan]{layer}[/cyan]", *(_cell(row) for row in here), f"{count} of {len(here)}"])
    console.table(["layer", *heads, "dynamic"], lines)
    dynamic = sum(row["type"] == "dynamic" for row in rows)
    theta, split = policy.advanced.theta, policy.split
    above, most = ("at least", "most") if policy.dynamic == "concentrated" else ("under", "least")
    rule = f"{above} {theta:.0%}" if split is None else f"the {most} concentrated {split:.0%} of a layer"
    page.print(f"{dynamic} of {len(rows)} heads are dynamic ({rule})")


def _cell(row: dict[str, Any]) -> str:
    percent = f"{100 * row['concentration']:.0f}"
    return f"[bold yellow]{percent}*[/]" if row["type"] == "dynamic" else f"{percent} "
