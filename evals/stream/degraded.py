"""What damaged video costs a stream: `python -m evals.stream.degraded [--clips 24] [--quick] --out FILE.json`.

Reported pocket clips of a minute at 128 pixels are streamed clean, and once more in each of these ways:

* `... kbit/s`: encoded as H.264 at that bitrate and read again from the file;
* `... % lost`: so many frames, drawn at random, never arrive; the others keep their seconds;
* `frozen`: in a fifth of the time, in spans of four seconds, the picture stands still;
* `half size`: every other 15 seconds arrive at half the width and height.

Every question is asked at its own second, as in `evals.stream`, and paired with its answer on the clean clip; intervals
are over clips. `counters_true` says whether the stream counted what it was given: frames, blocks, tokens and seconds.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn import functional

from evals.stream import runs
from vlmfast.bench import records, stats
from vlmfast.cli.errors import application
from vlmfast.core import UserError
from vlmfast.pocket.clips import LongClip, clip
from vlmfast.pocket.scenes import Rng

SIZE, SECONDS, QUESTIONS = 128, 60, 8
RATES = (8, 4, 2, 1)  # kbit/s asked of the encoder
LOST = (10, 20, 30)  # per cent
FROZEN, SPAN = 0.2, 4.0  # share of the time; seconds that a picture stands still
TURN = 15.0  # seconds at one size
CLEAN = "clean"
Frames = Iterator[tuple[float, torch.Tensor]]


@dataclass
class Degraded:
    """A clip as it arrives: what `runs.watch` reads. way: (clip, folder for files) -> its frames."""

    clip: LongClip
    way: Callable[[LongClip, Path], Frames]
    folder: Path
    pushed: int = 0  # frames given out so far
    pixels: int = 0

    @property
    def fps(self) -> float:
        return self.clip.fps

    def frames(self) -> Frames:
        """(seconds, uint8 (H, W, 3)) in order, counted."""
        for seconds, frame in self.way(self.clip, self.folder):
            self.pushed += 1
            self.pixels += frame.shape[0] * frame.shape[1]
            yield seconds, frame


def clean(drawn: LongClip, folder: Path) -> Frames:
    """As drawn."""
    return drawn.frames()


def encoded(rate: int) -> Callable[[LongClip, Path], Frames]:
    """Through a file of `rate` kbit/s."""

    def through_a_file(drawn: LongClip, folder: Path) -> Frames:
        from vlmfast.video.live_source import open_source

        path = folder / f"{rate}.mp4"
        write(drawn, path, rate)
        for image, seconds in open_source(path):
            yield seconds, torch.as_tensor(image)

    return through_a_file


def write(drawn: LongClip, path: Path, rate: int) -> None:
    """Encode a clip as H.264 of `rate` kbit/s, a key frame every ten seconds."""
    from fractions import Fraction

    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=Fraction(drawn.fps).limit_denominator(1000))
        stream.width, stream.height = drawn.size[1], drawn.size[0]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 1000 * rate
        stream.gop_size = round(10 * drawn.fps)
        stream.options = {"maxrate": str(1000 * rate), "bufsize": str(2000 * rate)}
        for _, frame in drawn.frames():
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
        file.mux(stream.encode(None))


def lost(percent: int) -> Callable[[LongClip, Path], Frames]:
    """`percent` of the frames never arrive; the first one does."""

    def with_gaps(drawn: LongClip, folder: Path) -> Frames:
        rng = Rng(21, drawn.seed, percent)
        for index, (seconds, frame) in enumerate(drawn.frames()):
            if rng.u() >= percent / 100 or index == 0:
                yield seconds, frame

    return with_gaps


def frozen(drawn: LongClip, folder: Path) -> Frames:
    """In `FROZEN` of the spans of `SPAN` seconds the last picture before stays."""
    rng, last, standing = Rng(22, drawn.seed, 0), None, False
    for seconds, frame in drawn.frames():
        if seconds % SPAN == 0:
            standing = last is not None and rng.u() < FROZEN
        last = last if standing else frame
        yield seconds, last


def half_size(drawn: LongClip, folder: Path) -> Frames:
    """Every other `TURN` seconds at half the width and height."""
    for seconds, frame in drawn.frames():
        if int(seconds / TURN) % 2:
            smaller = functional.avg_pool2d(frame.permute(2, 0, 1).float(), 2)
            frame = smaller.round().to(torch.uint8).permute(1, 2, 0).contiguous()
        yield seconds, frame


def ways(quick: bool) -> dict[str, Callable[[LongClip, Path], Frames]]:
    """Name -> how frames arrive; the clean ones first."""
    found = {CLEAN: clean} | {f"{rate} kbit/s": encoded(rate) for rate in (RATES[-1:] if quick else RATES)}
    found |= {f"{percent} % lost": lost(percent) for percent in (LOST[-1:] if quick else LOST)}
    return found | {"frozen": frozen, "half size": half_size}


def stream(loaded: Any, degraded: Degraded, retriever: Any, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """One clip, its questions asked as it arrives: the answers, and what the stream counted."""
    result, drawn = runs.Result(), degraded.clip
    opened = runs.opened(loaded.model, loaded.processor, degraded, **options)
    session = opened.session
    try:
        asked = runs.questions(drawn, name)
        runs.watch([opened], asked, lambda question: runs.ask(session, question, retriever, result))
        counted = session.stats()
        true = counters_true(session, degraded)
    finally:
        opened.close()
    hour = 3600 / drawn.seconds
    written = sum(8 * file.stat().st_size for file in degraded.folder.iterdir())
    return {
        "result": result, "counters_true": true, "frames": degraded.pushed, "kbit": written / 1000 / drawn.seconds,
        "kept": counted["kept_tokens"] / counted["visual_tokens"], "bytes_per_hour": counted["archive_bytes"] * hour,
    }  # fmt: skip


def counters_true(session: Any, degraded: Degraded) -> bool:
    """Did the stream count what it was given? A frame without a partner is shown twice, and counted once."""
    counted, vision = session.stats(), session.vision
    blocks = list(session.store.blocks.values())
    side = vision.processor.video_processor.patch_size * vision.processor.video_processor.merge_size
    paired = degraded.pixels / degraded.pushed / side**2 / vision.frames_per_grid  # tokens of a frame, on average
    doubled = counted["blocks"] * vision.frames_per_grid - degraded.pushed  # frames that were shown twice
    least = paired * degraded.pushed
    return bool(
        counted["frames"] == degraded.pushed
        and counted["dropped_frames"] == counted["evicted"] == counted["pending_frames"] == 0
        and 0 <= doubled <= 1 + degraded.clip.seconds / TURN
        and least <= counted["visual_tokens"] <= least + doubled * (SIZE / side) ** 2
        and counted["kept_tokens"] == sum(block.num_tokens for block in blocks)
        and all(before.start < after.start for before, after in itertools.pairwise(blocks))
    )


def rows(loaded: Any, clips: int, quick: bool, options: dict[str, Any], frames: int) -> list[dict[str, Any]]:
    """One row per way, paired with the clean clips."""
    layers = None if quick else runs.best_layers(loaded.model, loaded.processor, frames, **options)[0]
    retriever, arrived = runs.internal(frames, layers), ways(quick)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arrived}
    for seed in runs.REPORTED[:clips]:
        drawn = clip(seed, 16 if quick else SECONDS, size=SIZE, questions=2 if quick else QUESTIONS)
        for name, way in arrived.items():
            with tempfile.TemporaryDirectory(prefix="vlmfast-") as folder:
                degraded = Degraded(drawn, way, Path(folder))
                found[name].append(stream(loaded, degraded, retriever, str(seed), options))
    return [row(name, found[name], found[CLEAN]) for name in arrived]


def row(name: str, found: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """What a way costs: right answers past and now, the paired difference, bytes, and whether the counters hold."""
    mine, theirs = runs.Result(), runs.Result()
    for each, other in zip(found, base, strict=True):
        mine.extend(each["result"])
        theirs.extend(other["result"])
    metrics: dict[str, Any] = {
        "clips": len(found), "questions": len(mine.scores),
        "counters_true": sum(each["counters_true"] for each in found) / len(found),
        "kept": sum(each["kept"] for each in found) / len(found),
        "bytes_per_hour": sum(each["bytes_per_hour"] for each in found) / len(found),
        "frames": sum(each["frames"] for each in found) / sum(each["frames"] for each in base),
    }  # fmt: skip
    if any(each["kbit"] for each in found):
        metrics["kbit_per_second"] = sum(each["kbit"] for each in found) / len(found)
    for part in ("past", "now"):
        picked = [i for i, kind in enumerate(mine.kinds) if (kind == "now") == (part == "now")]
        clips = [mine.questions[i][0] for i in picked]
        scores = [mine.scores[i] for i in picked]
        mean = stats.mean(scores, clips)
        metrics |= {f"accuracy_{part}": mean.mean, f"ci95_{part}": [mean.low, mean.high]}
        if name != CLEAN:
            gap = stats.paired(scores, [theirs.scores[i] for i in picked], clips)
            metrics |= {f"diff_vs_clean_{part}": gap.mean, f"diff_vs_clean_{part}_ci95": [gap.low, gap.high]}
    return records.row(name, params={"minutes": SECONDS / 60, "size": SIZE}, metrics=metrics)


def main(
    out: Annotated[Path, typer.Option(help="result file (JSON)")],
    clips: Annotated[int, typer.Option(help="how many clips", min=1, max=len(runs.REPORTED))] = 24,
    quick: Annotated[bool, typer.Option("--quick", help="two short clips, under a minute")] = False,
    model: Annotated[str, typer.Option(help="'pocket', or a checkpoint folder of the same world")] = "pocket",
    frames: Annotated[int, typer.Option(help="blocks retrieved", min=1)] = 16,
    force: Annotated[bool, typer.Option("--force", help="replace an existing result")] = False,
) -> None:
    """Measure what damaged video costs and write the record."""
    import importlib.util

    from evals.speed.suites import show
    from vlmfast import loading

    if importlib.util.find_spec("av") is None:
        raise UserError("clips are encoded with PyAV, which is not installed: pip install av")
    records.claim(out, force)
    options: dict[str, Any] = {"redundancy": 0.01, "window": 1024, "ram": "64MiB"}
    clips = 2 if quick else clips
    config = {"clips": clips, "quick": quick, "model": model, "frames": frames, **options}
    record = records.head("stream-degraded", config=config, seed=runs.REPORTED[0], repeats=1)
    record["rows"] = rows(loading.load(model), clips, quick, options, frames)
    record["show"] = ["accuracy_past", "accuracy_now", "diff_vs_clean_past", "kept", "bytes_per_hour", "counters_true"]
    records.write(out, record, force)
    show(record)


if __name__ == "__main__":
    application(main)()
