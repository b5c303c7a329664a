"""`vlmfast ask`: one question about pictures and a video, the answer streamed, the cost of every stage beside it."""

from __future__ import annotations

import json
import textwrap
from typing import Annotated, Any

import typer

from vlmfast.cli import console, options


def ask(
    question: Annotated[str, typer.Argument(help="what you want to know")],
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
    size: options.Size = "model",
    max_new_tokens: options.NewTokens = 128,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    as_json: options.Json = False,
) -> None:
    """Ask a question of a picture or a video."""
    from vlmfast.core import UserError
    from vlmfast.plan import resolve

    whole_plan = options.whole_plan(preset, plan)
    chosen_plan = resolve(whole_plan, prune=prune, kv=kv, speculate=speculate, tower=tower)
    pictures = options.images(image)
    video_clip, wanted_size = options.video(video, frames, fps, select, backend), options.frame_size(size)
    if not pictures and video_clip is None:
        raise UserError("nothing to look at: give --image or --video")

    loaded = options.load(model, dtype, device, device_map)
    media = {"images": pictures, "video": video_clip, "size": wanted_size}
    record = answer(loaded, question, media, chosen_plan, max_new_tokens, stream=not as_json)
    if as_json:
        print(json.dumps(record | {"notes": loaded.notes}, indent=1))


def answer(
    loaded: Any, question: str, media: dict[str, Any], plan: Any, max_new_tokens: int, stream: bool
) -> dict[str, Any]:
    """Read the media (`loaded.inputs`) and generate greedily under the plan; returns the record of one question.

    stream: print the answer as it comes.
    """
    import vlmfast

    with vlmfast.accelerate(loaded.model, plan) as handle:
        inputs = loaded.inputs(question, **media)
        generate_options: dict[str, Any] = {}
        if stream:
            from transformers import TextStreamer

            generate_options["streamer"] = TextStreamer(
                loaded.processor.tokenizer, skip_prompt=True, skip_special_tokens=True
            )
        accelerated: Any = handle.model
        generated = accelerated.generate(**inputs, max_new_tokens=max_new_tokens, **GREEDY, **generate_options)
        if stream:
            console.remarks().print(wrapped(str(handle.report)), style="dim", markup=False)
        return {
            "answer": loaded.decode(generated, inputs),
            "tokens": generated.shape[1] - inputs["input_ids"].shape[1],
            "report": handle.report.json(),
            "plan": plan.json(),
        }


def wrapped(report: str) -> str:
    """The report's lines, those too long for the terminal indented below their stage's name."""
    num_columns = console.remarks().width
    return "\n".join(textwrap.fill(line, num_columns, subsequent_indent=" " * 9) for line in report.splitlines())


GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
