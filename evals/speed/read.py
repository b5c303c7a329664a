"""What it costs to get from a video file to pixel values: as `vlmfast ask` does, and as one would without it.

`full` decodes every frame up to the last one chosen, converts the chosen ones at full size, and leaves scaling to the
model's processor. `model` is `read_inputs`: frames at the size of the processor, and those that nobody chose or refers
to are not decoded. `model, all decoded` and `full, skipping` are the two halves of that. `decode` only decodes every
frame, `decode, skipping` only those that must be: the bounds. The clip is rendered and encoded here with H.264 as x264
does by default (three B-frames, a key frame every 250 frames); the processor is that of Qwen2.5-VL, limited to 256
tokens a pair of frames. The model does not run.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from evals.speed.shapes import TOY, build
from evals.speed.stream import processor_for
from vlmfast.bench import records, timing
from vlmfast.bench.sample_store import SampleStore

SEED, ROUNDS, FPS = 0, 6, 30
TOKENS = 256  # of a pair of frames, at most
BASELINES = ("full", "decode")
WHOLE = {"height": 1080, "width": 1920, "seconds": 30, "frames": 64}
QUICK = {"height": 240, "width": 320, "seconds": 2, "frames": 8}


def run(quick: bool = False, store: SampleStore | None = None) -> dict[str, Any]:
    """Measure; returns the rows and what the head needs. store: of an unfinished run."""
    clip, rounds = (QUICK, 1) if quick else (WHOLE, ROUNDS)
    shape = replace(TOY, patch=14)
    model = build(shape, SEED, "float32")
    processor = processor_for(model, shape)
    processor.video_processor.size = {"shortest_edge": 4 * 28 * 28, "longest_edge": TOKENS * 28 * 28}
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder) / "clip.mp4", **clip)
        runs = competitors(model, processor, path, clip["frames"])
        runs["model"]()  # what is made once per process
        tick = timing.ticker(timing.beside_runs(len(runs), len(BASELINES), rounds))
        samples = timing.beside(runs, BASELINES, rounds, warmup=0, progress=tick, store=store)
        clip_bytes = path.stat().st_size
    rows = [
        records.row(name, params=clip, metrics=timing.medians(taken[name]), vs=timing.ratio_rows(taken, name))
        for name, taken in samples.items()
    ]
    return {
        "config": {**clip, "fps": FPS, "codec": "h264", "clip_bytes": clip_bytes, "tokens_per_pair": TOKENS},
        "seed": SEED,
        "repeats": rounds,
        "device": "cpu",
        "dtype": "float32",
        "rows": rows,
        "show": ["total_ms", "read_ms", "processor_ms", "visual_tokens", "decoded_frames"],
    }


def pictures(height: int, width: int, count: int) -> Iterator[np.ndarray]:
    """(height, width, 3) uint8: a texture that moves, a square that moves otherwise, grain that is new in each."""
    rng = np.random.default_rng(SEED)
    coarse = rng.integers(0, 200, (height // 24 + 1, width // 24 + 1, 3), np.uint8)
    texture = np.kron(coarse, np.ones((24, 24, 1), np.uint8))[:height, :width]
    side = height // 4
    for number in range(count):
        picture = np.roll(texture, 3 * number % width, 1)
        left = 5 * number % (width - side)
        picture[side : 2 * side, left : left + side] = (255, number % 256, 0)
        picture[::7] ^= rng.integers(0, 8, picture[::7].shape, np.uint8)
        yield picture


def written(path: Path, height: int, width: int, seconds: int, frames: int) -> Path:
    """The clip as a file."""
    from vlmfast.video import write_video

    return write_video(path, pictures(height, width, seconds * FPS), fps=FPS, crf=23)


def competitors(model: Any, processor: Any, path: Path, frames: int) -> dict[str, Callable[[], timing.Sample]]:
    """Name -> one way from the file to pixel values, `full` first."""

    def way(size: str, skipping: bool) -> Callable[[], timing.Sample]:
        return lambda: whole(model, processor, path, frames, size, skipping)

    return {
        "full": way("full", False),
        "decode": lambda: decoding(path, frames, False),
        "decode, skipping": lambda: decoding(path, frames, True),
        "full, skipping": way("full", True),
        "model, all decoded": way("model", False),
        "model": way("model", True),
    }


def opened(path: Path, frames: int, skipping: bool) -> Any:
    """The reader of the chosen frames; `skipping` as it is, else one that decodes every frame."""
    from vlmfast.video import Uniform, VideoReader

    reader = VideoReader(path, Uniform(frames))
    if not skipping:
        reader.index = replace(reader.index, skips=False)
    return reader


def whole(model: Any, processor: Any, path: Path, frames: int, size: str, skipping: bool) -> timing.Sample:
    """From the file to the inputs of `generate`."""
    from vlmfast.media import read_inputs
    from vlmfast.runtime.reading import reading_of

    start = time.perf_counter()
    reader = opened(path, frames, skipping)
    inputs = read_inputs(model, processor, "what moves", video=reader, size=size)
    total_ms = (time.perf_counter() - start) * 1e3
    reading = reading_of(inputs["input_ids"])
    assert reading is not None
    measured = reading.json()
    tokens = int(inputs["video_grid_thw"].prod()) // processor.video_processor.merge_size**2
    return {"read_ms": measured["read_ms"], "processor_ms": measured["processor_ms"], "total_ms": total_ms,
            "visual_tokens": float(tokens)}  # fmt: skip


def decoding(path: Path, frames: int, skipping: bool) -> timing.Sample:
    """Every frame of the file is decoded, or only those that the chosen ones need; no pixel is converted."""
    from vlmfast.video.frames import frames_of, open_video

    start = time.perf_counter()
    reader = opened(path, frames, skipping)
    wanted = frozenset(reader.index.pts[reader.indices].tolist()) if skipping else None
    with open_video(path) as (container, stream):
        num_decoded = sum(1 for _ in frames_of(container, stream, path, None, wanted))
    total_ms = (time.perf_counter() - start) * 1e3
    return {"read_ms": total_ms, "total_ms": total_ms, "decoded_frames": float(num_decoded)}
