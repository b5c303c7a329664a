"""`vlmfast calibrate`: finds the layers after which AdaptInfer should prune in a model; writes a plan file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmfast.cli import console, options


def calibrate(
    questions: Annotated[list[str] | None, typer.Argument(help="asked about --image and --video, one by one")] = None,
    model: options.Model = "pocket",
    task: Annotated[str | None, typer.Option(help="or a task: pocket/<kind>, easy-vqa, a file of questions")] = None,
    limit: Annotated[int, typer.Option(help="at most this many questions of the task", min=1)] = 32,
    image: options.Images = None,
    video: options.VideoPath = None,
    stages: Annotated[int, typer.Option(help="at most this many cuts", min=1)] = 3,
    keep: Annotated[float, typer.Option(help="fraction of the visual tokens left after the last cut")] = 0.25,
    out: Annotated[Path | None, typer.Option(help="plan to write (.json)")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an existing plan")] = False,
    frames: options.Frames = None,
    fps: options.Fps = None,
    select: options.Select = None,
    backend: options.Backend = "pyav",
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    as_json: options.Json = False,
) -> None:
    """Find the layers where a model's text turns to other visual tokens, and cut after them (AdaptInfer)."""
    from vlmfast import files
    from vlmfast.core import UserError
    from vlmfast.encode import AdaptInfer
    from vlmfast.plan import Plan

    asked_questions = list(questions or ())
    if task is not None and (asked_questions or image or video):
        raise UserError("--task brings its own questions and media: leave the questions, --image and --video away")
    if task is None and not (asked_questions and (image or video)):
        raise UserError("nothing to look at: give --task pocket/all, or a question with --image or --video")
    if out is not None:
        files.claim(out, force, (".json",))
    if task is not None:
        from vlmfast.bench import tasks

        tasks.get(task)  # says what is wrong with its name
    AdaptInfer(keep=keep)  # says what is wrong with keep before anything is loaded
    pictures, video_clip = options.images(image), options.video(video, frames, fps, select, backend)

    from vlmfast.encode import inflection

    loaded = options.load(model, dtype, device, device_map)
    media = (pictures, loaded.read(video_clip))
    prompts = (
        of_task(loaded, task, limit)
        if task is not None
        else (loaded.inputs(question, *media) for question in asked_questions)
    )
    with console.waiting("looking"):
        calibration = inflection.calibrate(loaded.model, prompts, stages)
    plan = Plan(prune=AdaptInfer(keep=keep, layers=calibration.layers))
    if out is not None:
        plan.save(out)
    record = {
        "model": model,
        "task": task,
        "prompts": calibration.prompts,
        "shift": calibration.shift.tolist(),
        "plan": plan.json(),
    }
    if as_json:
        print(json.dumps(record, indent=1))
        return
    show(record, out)


def of_task(loaded: Any, task_name: str, limit: int) -> Iterator[dict[str, Any]]:
    """The task's first questions as inputs, one row each."""
    from vlmfast.bench import tasks
    from vlmfast.bench.runner import Runner
    from vlmfast.core import UserError

    task = tasks.get(task_name, questions="tuning")
    run = Runner(loaded.model, loaded.processor, loaded.name)
    for number in task.first(limit):
        sample = task.sample(number)
        if sample.error:
            raise UserError(f"question {sample.id} of {task_name} cannot be asked: {sample.error}")
        yield run.inputs([sample])


def show(record: dict[str, Any], out: Path | None) -> None:
    """The shift of every layer as a bar, and the cuts between them."""
    terminal, pruner, layer_shifts = console.out(), record["plan"]["prune"], record["shift"]
    terminal.print(
        f"how far the text's look at the visual tokens moves, layer by layer ({record['prompts']} prompts)\n"
    )
    largest_shift = max(*layer_shifts, 1e-9)
    for layer_index, shift in enumerate(layer_shifts):
        if layer_index in pruner["layers"]:
            terminal.print("[yellow]       ---- cut ----[/]")
        terminal.print(f"[cyan]{layer_index:4}[/]  {shift:5.3f}  {'█' * round(40 * shift / largest_shift)}")
    terminal.print(f"\nadaptinfer keep={pruner['keep']:g} layers={pruner['layers']}")
    if out is not None:
        terminal.print(f'plan written to {out}: vlmfast.accelerate(model, "{out}")', markup=False, soft_wrap=True)
    else:
        terminal.print(json.dumps(record["plan"]), markup=False, soft_wrap=True)
