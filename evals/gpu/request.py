"""The GPU suite's part `request`: from a video file and a question to the first token.

`reading alone` is what `read_inputs` takes without the model, `model alone` the call with inputs that were read before.
`one after the other` does both; `together` lets the tower encode earlier frames while later ones are read, as
`read_inputs` does by default. `of_longer` is its time over the longer of the first two. `plain` decodes at full size,
has the processor scale on the CPU, and asks stock transformers.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from evals.gpu.beside import PLAIN, Pair
from evals.gpu.run import Run, accelerated, answered, notes
from evals.speed.read import QUICK, TOKENS, WHOLE, written
from evals.speed.stream import processor_for
from vlmfast.bench import timing

ROUNDS = 3
ALONE = ("reading alone", "model alone")


def plans() -> dict[str, dict[str, Any]]:
    """What `accelerate` is asked."""
    from vlmfast.encode import VidCom2

    return {"tower": {"tower": "fast"}, "vidcom2-25": {"prune": VidCom2(keep=0.25)}}


def request(run: Run) -> None:
    """A clip of 30 seconds at 1080p, 64 of its frames, 256 visual tokens a pair; each call asks at a new length."""
    import torch

    clip, rounds = (QUICK, 1) if run.dry else (WHOLE, ROUNDS)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        begin = time.perf_counter()
        path = written(Path(folder) / "clip.mp4", **clip)
        run.add("clip", metrics={"seconds": time.perf_counter() - begin, "bytes": path.stat().st_size}, params=clip)
        pair = Pair(run)
        processor = processor_for(pair.ours, run.shape)
        processor_for(pair.stock, run.shape)
        processor.video_processor.size = {"shortest_edge": 4 * 28 * 28, "longest_edge": TOKENS * 28 * 28}
        lengths = count(1)
        for name, asked in plans().items():
            if run.late(name, 0 if run.dry else 12):
                return
            with run.trying(name), accelerated(pair.ours, asked) as handle:
                ways = competitors(pair, processor, path, clip["frames"], lengths)
                for way in ways.values():
                    way()  # the first may compile
                taken = timing.interleaved(ways, rounds, warmup=0)
                write(run, name, taken, {"plan": handle.plan.json(), **notes(handle)}, clip)


def competitors(
    pair: Pair, processor: Any, path: Path, frames: int, lengths: Any
) -> dict[str, Callable[[], timing.Sample]]:
    """Name -> one way from the file to the first token, or one half of it."""
    from vlmfast.media import read_inputs
    from vlmfast.video import Uniform

    run, model = pair.run, pair.ours

    def question() -> str:
        return "what moves" + " now" * next(lengths)

    def read(of: Any = model, encode: bool = False, **more: Any) -> dict[str, Any]:
        return read_inputs(of, processor, question(), video=path, select=Uniform(frames), encode=encode, **more)

    def timed(work: Callable[[], Any]) -> timing.Sample:
        begin = timing.now(run.device)
        work()
        return {"total_ms": (timing.now(run.device) - begin) * 1e3}

    def whole(of: Any = model, **how: Any) -> None:
        answered(run, of, read(of, **how), 1)

    def model_alone() -> timing.Sample:
        inputs = read()
        return {"total_ms": answered(run, model, inputs, 1)[0], "prompt_tokens": inputs["input_ids"].shape[1]}

    return {
        ALONE[0]: lambda: timed(read),
        ALONE[1]: model_alone,
        "one after the other": lambda: timed(whole),
        "together": lambda: timed(lambda: whole(encode=True)),
        PLAIN: lambda: timed(lambda: whole(pair.stock, size="full")),
    }


def write(
    run: Run, plan: str, taken: dict[str, list[timing.Sample]], words: dict[str, Any], clip: dict[str, Any]
) -> None:
    """A row for each way."""
    medians = {name: statistics.median(sample["total_ms"] for sample in samples) for name, samples in taken.items()}
    for name, samples in taken.items():
        metrics = timing.medians(samples) | {"samples": len(samples)}
        metrics |= {
            "total_low_ms": min(s["total_ms"] for s in samples),
            "total_high_ms": max(s["total_ms"] for s in samples),
        }
        if name not in ALONE:
            metrics["of_longer"] = medians[name] / max(medians[alone] for alone in ALONE)
        baselines = [PLAIN] if name not in (*ALONE, PLAIN) else []
        vs = {baseline: timing.ratios(taken[baseline], samples, ["total_ms"]) for baseline in baselines}
        run.add(name, params={"asked": plan, "frames": clip["frames"]}, metrics=metrics, vs=vs, **words)
