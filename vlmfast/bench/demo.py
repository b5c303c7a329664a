"""The demo's paired run: stock transformers and a pruned call, in turn, at the widths of Qwen2.5-VL-3B.

Random weights, a twelfth of the layers: times are real, answers mean nothing. Every round brings a new clip whose
pixels all differ, and both get it. How many frames and rounds fit is found from one untimed call of each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vlmfast.bench import timing
from vlmfast.bench.shapes import QWEN_3B_TWELFTH, Shape, build, clip
from vlmfast.core import UserError, tower_block
from vlmfast.encode import VidCom2
from vlmfast.plan import Plan
from vlmfast.runtime import dtypes

SHAPE = replace(QWEN_3B_TWELFTH, grid=(4, 16, 16))
PLAN = Plan(prune=VidCom2(keep=0.25, after_block="auto"))
SECONDS = 15.0  # that the first tokens of all rounds may take
FEWEST, MOST = 3, 5  # rounds
NEW = 5  # new tokens: the first one, and four of which the time of each next one is the mean
STAGES = ("encode_ms", "select_ms", "prefill_ms", "ttft_ms", "decode_ms_per_token")


def memory(shape: Shape, dtype: str) -> int:
    """Bytes that the run takes at most: the weights, and about as much again for what is computed with them."""
    decoder = shape.layers * (2 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate)
    tower = shape.depth * (4 * shape.vision_hidden**2 + 3 * shape.vision_hidden * shape.vision_intermediate)
    return 2 * (4 if dtype == "float32" else 2) * (decoder + tower + shape.vocab * shape.hidden)


def fitting(shape: Shape, frame_s: float, seconds: float) -> tuple[int, int]:
    """(frames, rounds) that fit into `seconds`. frame_s: seconds to first token of both, for one frame."""
    frames = next(
        (num_frames for num_frames in range(shape.grid[0], 0, -1) if FEWEST * num_frames * frame_s <= seconds), 1
    )
    return frames, min(MOST, max(FEWEST, int(seconds / (frames * frame_s))))


def measure(device: str = "cpu", shape: Shape | None = None, seconds: float | None = None) -> dict[str, Any]:
    """Run it. Returns what was run (shape, dtype, rates, rounds) and `stages`: for each its medians, the paired ratios
    [median, least, largest] of stock over ours, and the floors of both in milliseconds, None where there is none. The
    floors are at the better of the rates before and after; where a median lies below its floor all the same, somebody
    else used the machine, and `busy` is True.

    shape, seconds: None is `SHAPE`, `SECONDS`. Raises UserError where the memory does not suffice.
    """
    import torch

    import vlmfast
    from vlmfast import roofline

    shape, seconds = shape or SHAPE, seconds or SECONDS
    dtype = timing.half(device)
    needed_bytes, free_bytes = memory(shape, dtype), dtypes.available() if device == "cpu" else None
    if free_bytes is not None and needed_bytes > free_bytes:
        raise UserError(
            f"the run at real shapes needs {needed_bytes / 1e9:.1f} GB of memory, {free_bytes / 1e9:.1f} GB are free"
        )
    rates_before = roofline.measured(device, 0.5, dtype)
    model = build(shape, 0, dtype, device)

    def asked(shape: Shape, plan: Plan | None, seed: int) -> timing.Sample:
        inputs = {name: tensor.to(device) for name, tensor in clip(shape, seed, dtype, busy=1.0).items()}
        with torch.inference_mode(), vlmfast.accelerate(model, plan) as fast:
            model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW)
            report = {**fast.report.encode, **fast.report.prefill, **fast.report.decode}
        return {name: float(report[name]) for name in (*STAGES, "visual_tokens", "kept_tokens")}

    one_frame = replace(shape, grid=(1, *shape.grid[1:]))
    if device != "cpu":  # a card compiles and captures in its first calls
        asked(one_frame, None, 0), asked(one_frame, PLAN, 0)
    frame_ms = asked(one_frame, None, 0)["ttft_ms"] + asked(one_frame, PLAN, 0)["ttft_ms"]
    frames, rounds = fitting(shape, frame_ms / 1e3, seconds)
    full_clip = replace(shape, grid=(frames, *shape.grid[1:]))
    seeds = {"stock": itertools.count(1), "ours": itertools.count(1)}
    variants: dict[str, Callable[[], timing.Sample]] = {
        "stock": lambda: asked(full_clip, None, next(seeds["stock"])),
        "ours": lambda: asked(full_clip, PLAN, next(seeds["ours"])),
    }
    samples = timing.interleaved(variants, rounds, warmup=0)
    rates_after = roofline.measured(device, 0.5, dtype)
    machine = replace(
        rates_before, flops=max(rates_before.flops, rates_after.flops), bytes=max(rates_before.bytes, rates_after.bytes)
    )
    medians = {name: timing.medians(variant_samples) for name, variant_samples in samples.items()}
    ratios = timing.ratios(samples["stock"], samples["ours"], list(STAGES))
    kept_share = medians["ours"]["kept_tokens"] / full_clip.visual
    floors = {
        "stock": floor(full_clip, roofline.Asked(), machine, dtype),
        "ours": floor(full_clip, roofline.Asked(kept_share, tower_block("auto", shape.depth)), machine, dtype),
    }
    stages: dict[str, dict[str, Any]] = {
        stage: {
            "stock": medians["stock"][stage], "ours": medians["ours"][stage], "ratio": ratios.get(stage),
            "floor": {name: stage_floors.get(stage) for name, stage_floors in floors.items()},
        }
        for stage in STAGES
    }  # fmt: skip
    busy = any(
        floor_value is not None and floor_value > 1.02 * stage_values[variant]
        for stage_values in stages.values()
        for variant, floor_value in stage_values["floor"].items()
    )
    return {
        "shape": full_clip.json(), "plan": PLAN.json(), "dtype": dtype, "device": device, "machine": machine.name,
        "flops": machine.flops, "bytes": machine.bytes, "rounds": rounds, "visual_tokens": full_clip.visual,
        "kept_tokens": int(medians["ours"]["kept_tokens"]), "busy": busy, "stages": stages, "samples": samples,
    }  # fmt: skip


def floor(shape: Shape, asked: Any, machine: Any, dtype: str) -> dict[str, float]:
    """Milliseconds that arithmetic and bytes take at least, by stage, as `vlmfast.roofline` counts them."""
    from vlmfast import roofline

    request = roofline.Request(shape.visual, shape.text + 2, NEW, 1, shape.grid[0])
    stage_costs = roofline.stages(roofline.shape_of(shape.json()), request, asked, 4 if dtype == "float32" else 2)
    encode_ms, prefill_ms, decode_ms = (
        stage_costs[stage].floor_ms(machine) for stage in ("encode", "prefill", "decode")
    )
    per_token_ms = decode_ms / stage_costs["decode"].steps
    return {
        "encode_ms": encode_ms,
        "prefill_ms": prefill_ms,
        "ttft_ms": encode_ms + prefill_ms,
        "decode_ms_per_token": per_token_ms,
    }
