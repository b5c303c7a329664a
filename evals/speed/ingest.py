"""What encoding a stream costs by how much of a frame changes, at real shapes: `--suite ingest`.

A sixth of the layers of Qwen2.5-VL-3B with random weights, a session as it is by default (redundant tokens are
dropped), frames of 448 x 448 pixels: sixteen windows of the tower. One grid of two frames is encoded first; timed are
the eight after it. From grid to grid everything changes, four windows, one, or nothing. Each is streamed in two ways:
`whole` encodes every grid that is not the one before again, `windows` (the default on a CPU) only windows that changed;
`whole again` is a null. Ratios are to `whole` of the same frames; where nothing changes, of those with one window.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from evals.speed.shapes import QWEN_3B_SIXTH, TOY, build
from evals.speed.stream import processor_for
from vlmfast.bench import records, timing

SEED, ROUNDS, GRIDS = 0, 6, 8
SIDE, WINDOW = 448, 112  # pixels of a frame and of a window
SCENES = {"everything": 16, "four windows": 4, "one window": 1, "nothing": 0}  # windows that change from grid to grid
WHOLE, WINDOWS, AGAIN = "whole", "windows", "whole again"


def run(quick: bool = False) -> dict[str, Any]:
    """Measure; returns the rows and what the head needs."""
    import torch

    shape, rounds, grids = (TOY, 1, 2) if quick else (QWEN_3B_SIXTH, ROUNDS, GRIDS)
    torch.manual_seed(SEED)
    dtype = timing.half()
    model = build(shape, SEED, dtype)
    processor = processor_for(model, shape)
    rows = []
    for scene, changing in SCENES.items():
        frames = drawn(changing, grids, shape.patch * 8, quick)
        pushes: dict[str, Callable[[], timing.Sample]] = {
            way: functools.partial(pushed, model, processor, frames, way) for way in (WHOLE, WINDOWS, AGAIN)
        }
        if changing == 0:  # the whole of nothing is nothing too: beside a scene in which one window changes
            pushes = {WINDOWS: pushes[WINDOWS]}
            moving = drawn(1, grids, shape.patch * 8, quick)
            pushes[WHOLE] = functools.partial(pushed, model, processor, moving, WHOLE)
        tick = timing.ticker(len(pushes) * (rounds + 1))
        taken = timing.interleaved(pushes, rounds, warmup=1, progress=tick)
        for way, samples in taken.items():
            if changing == 0 and way == WHOLE:
                continue
            vs = {} if way == WHOLE else {WHOLE: timing.ratios(taken[WHOLE], samples, ["encode_ms"])}
            params = {"changing": scene, "grids": grids}
            rows.append(records.row(way, params=params, metrics=timing.medians(samples), vs=vs))
    return {
        "config": {**shape.json(), "side": SIDE, "windows": (SIDE // WINDOW) ** 2},
        "seed": SEED,
        "repeats": rounds,
        "device": "cpu",
        "dtype": dtype,
        "rows": rows,
        "show": ["encode_ms", "fps", "tower_share", "kept_tokens"],
    }


def drawn(changing: int, grids: int, window: int, quick: bool) -> Any:
    """(2 * (1 + grids), H, W, 3) uint8: noise, of which so many windows are drawn anew from grid to grid."""
    import torch

    across = 2 if quick else SIDE // WINDOW
    side, made = window * across, []
    frame = torch.randint(0, 255, (side, side, 3), dtype=torch.uint8)
    for _ in range(1 + grids):
        for number in torch.randperm(across**2)[:changing].tolist():
            top, left = window * (number // across), window * (number % across)
            frame[top : top + window, left : left + window] = torch.randint(0, 255, (window, window, 3))
        made += [frame.clone(), frame.clone()]
    return torch.stack(made)


def pushed(model: Any, processor: Any, frames: Any, way: str) -> timing.Sample:
    """Stream frames in one way, in a session of their own; timed are all grids but the first."""
    from vlmfast.stream import StreamSession

    session = StreamSession(model, processor, window=1024)
    if way != WINDOWS:
        session.encoder.tower.window_side = None
    session.push(frames[:2])
    start = time.perf_counter()
    session.push(frames[2:])
    taken = time.perf_counter() - start
    stats = session.stats()
    session.close()
    return {
        "encode_ms": taken * 1e3, "fps": (len(frames) - 2) / taken, "tower_share": float(stats["tower_share"]),
        "visual_tokens": float(stats["visual_tokens"]), "kept_tokens": float(stats["kept_tokens"]),
    }  # fmt: skip
