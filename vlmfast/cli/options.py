"""Options that several commands share, and what they mean: plans and media."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vlmfast.loading import Loaded
    from vlmfast.plan import Plan
    from vlmfast.video import VideoReader

Model = Annotated[str, typer.Option("--model", help="'pocket', a checkpoint folder, or a hub id")]
Images = Annotated[list[Path] | None, typer.Option("--image", help="a picture; may be given several times")]
VideoPath = Annotated[Path | None, typer.Option("--video", help="a video file, or a folder of frames")]
Prune = Annotated[str | None, typer.Option("--prune", help="visual tokens kept, e.g. vidcom2:keep=0.25")]
KV = Annotated[str | None, typer.Option("--kv", help="keys and values kept, e.g. hybridkv:keep=0.1")]
Speculation = Annotated[str | None, typer.Option("--speculate", help="drafting, e.g. speculate:draft=promptlookup")]
Tower = Annotated[str | None, typer.Option("--tower", help="the vision tower: fast (where anything is asked) or stock")]
Preset = Annotated[str | None, typer.Option("--preset", help="safe, balanced or fast")]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="a plan file (JSON)")]
Frames = Annotated[int | None, typer.Option("--frames", min=1, help="frames taken evenly from the video (default 16)")]
Fps = Annotated[float | None, typer.Option("--fps", help="frames taken per second instead")]
Select = Annotated[str | None, typer.Option("--select", help="or any selection: uniform:16, fps:2, scene:0.08")]
Backend = Annotated[str, typer.Option("--backend", help="video decoder: pyav, torchcodec, decord or opencv")]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", help="auto (the checkpoint's; on a CPU float32 where faster), bfloat16, float16 or float32"
    ),
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, ... (default: the GPU if there is one)")]
DeviceMap = Annotated[
    str | None, typer.Option("--device-map", help="auto, balanced, ...: spread the model over GPUs (needs accelerate)")
]
Size = Annotated[str, typer.Option("--size", help="frames: model (as its processor scales), full, or longer side")]
MOST_PIXELS = 65_536  # of a side
MOST_TOKENS = 1_000_000
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, max=MOST_TOKENS, help="longest answer")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON record instead")]


def whole_plan(preset: str | None, file: Path | None) -> Plan | None:
    """The plan of `--preset` or `--plan`, None without either; `plan.resolve` replaces single stages of it."""
    from vlmfast import plan
    from vlmfast.core import UserError

    if preset is not None and file is not None:
        raise UserError("--preset and --plan exclude each other: give one")
    if file is not None:
        return plan.Plan.load(file)
    return None if preset is None else plan.preset(preset)


def load(model: str, dtype: str, device: str | None, device_map: str | None = None) -> Loaded:
    """The model and its processor; what was chosen for the user is said on stderr."""
    from vlmfast import loading
    from vlmfast.cli import console

    with console.waiting(f"loading {model}"):
        loaded = loading.load(model, dtype, device, device_map)
    for note in loaded.notes:
        console.remarks().print(f"[dim]{note}[/dim]")
    return loaded


def images(paths: list[Path] | None) -> list[Any]:
    """The pictures as (H, W, 3) uint8."""
    import warnings

    from PIL.Image import DecompressionBombWarning

    from vlmfast.video import read_image

    warnings.filterwarnings("ignore", category=DecompressionBombWarning)  # too large is an error here, said once
    return [read_image(path) for path in paths or ()]


def video(
    path: Path | None,
    frames: int | None = None,
    fps: float | None = None,
    select: str | None = None,
    backend: str = "pyav",
) -> VideoReader | None:
    """The chosen frames of the video, still to be decoded; None without one."""
    from vlmfast.core import UserError
    from vlmfast.video import Fps, Uniform, VideoReader

    given_options = [
        option_name
        for option_name, value in (("--frames", frames), ("--fps", fps), ("--select", select))
        if value is not None
    ]
    if len(given_options) > 1:
        raise UserError(f"{' and '.join(given_options)} exclude each other: give one")
    if path is None:
        if given_options:
            raise UserError(f"{given_options[0]} chooses frames of a video: give --video too")
        return None
    selection: Any = select if select is not None else Fps(fps) if fps is not None else Uniform(frames or 16)
    return VideoReader(path, selection, backend)


def frame_size(text: str) -> Any:
    """`--size`: "model", "full", or the longer side in pixels."""
    from vlmfast.core import UserError

    if text in ("model", "full"):
        return text
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MOST_PIXELS):
        raise UserError(f"--size {text!r}: give model, full, or the longer side in pixels (1 to {MOST_PIXELS})")
    return int(text)
