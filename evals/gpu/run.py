"""What the parts of the GPU suite share: rows written as they come, prompts of fresh lengths, timed calls, stages."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evals.speed.shapes import QWEN_3B, TOY, Shape, build, clip
from vlmfast.bench import records, timing
from vlmfast.core import UserError


@dataclass
class Run:
    """One part's process: what it was asked, when it must be over, where its rows go."""

    part: str
    dry: bool
    long: bool
    lines: Path  # rows, one JSON object a line
    ends: float  # of time.monotonic(), which all processes of a machine share
    flops: float = 1e12  # matrix products a second, measured
    bytes: float = 1e11  # bytes copied a second, read and written, measured
    whole: Shape = QWEN_3B  # of the model; a dry run's is a toy
    only: tuple[str, ...] = ()  # names of the rows that are wanted, () = all

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def shape(self) -> Shape:
        return TOY if self.dry else self.whole

    @property
    def machine(self) -> timing.Rates:
        return timing.Rates(self.flops, self.bytes)

    def wants(self, name: str) -> bool:
        """Is a row of this name asked for?"""
        return not self.only or name in self.only

    def left(self) -> float:
        """Seconds until the part must be over."""
        return self.ends - time.monotonic()

    def add(self, name: str, *, params: dict[str, Any] | None = None, **row: Any) -> None:
        """Write a row; one of the same name and params replaces an earlier one."""
        self._write({"row": records.row(name, params={"part": self.part, **(params or {})}, **row)})

    def skip(self, what: str, why: str | BaseException) -> None:
        """Write what was not measured and why."""
        why = why if isinstance(why, str) else said(why)
        self._write({"skipped": f"{self.part}: {what}: {why}"})

    def late(self, what: str, needs_s: float = 0.0) -> bool:
        """Are fewer seconds left than this row takes? Then that is written down."""
        if self.left() >= needs_s:
            return False
        self.skip(what, f"out of time, {self.left():.0f} s left")
        return True

    @contextlib.contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """One row's work: what it raises is written down, and the next row begins."""
        print(what, flush=True)  # the last line of a process that hangs says where
        try:
            yield
        except Exception as e:
            self.skip(what, e)
            free(self.device)

    def _write(self, line: dict[str, Any]) -> None:
        with self.lines.open("a") as file:
            file.write(json.dumps(finite(line), default=str) + "\n")


def finite(x: Any) -> Any:
    """Numbers that JSON has no word for become None."""
    if isinstance(x, float) and not math.isfinite(x):
        return None
    if isinstance(x, dict):
        return {str(k): finite(v) for k, v in x.items()}
    return [finite(v) for v in x] if isinstance(x, (list, tuple)) else x


def said(error: BaseException) -> str:
    """An error in one line, with the innermost place in our code."""
    import vlmfast

    ours = (Path(vlmfast.__file__).parent, Path(__file__).parents[1])
    files = ((f, Path(f.filename)) for f in traceback.extract_tb(error.__traceback__))
    frames = [f for f, file in files if file != Path(__file__) and any(map(file.is_relative_to, ours))]
    at = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}{at}"


def enter(module: str, function: str, run: Run, arguments: tuple[Any, ...], log: Path) -> None:
    """The body of a part's process: its output goes to `log`, an error is the log's last line and exit code 1."""
    import importlib

    os.setsid()  # killed as a whole
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
    code = 0
    try:
        getattr(importlib.import_module(module), function)(run, *arguments)
    except BaseException as e:
        traceback.print_exc()
        print(said(e), flush=True)
        code = 1
    sys.stdout.flush()
    os._exit(code)  # at once: destructors of a broken device may hang


def takes_tower() -> bool:
    """Does this version's `accelerate` know `tower=`?"""
    import vlmfast

    return "tower" in inspect.signature(vlmfast.accelerate).parameters


def free(device: str) -> None:
    """Give back memory that nothing holds."""
    import gc

    gc.collect()
    if device != "cpu":
        import torch

        with contextlib.suppress(Exception):
            torch.cuda.empty_cache()


def model_of(run: Run) -> Any:
    """The part's model with random weights, made on the device; a row `build` says what came of it."""
    import torch

    if not run.dry:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    begin = timing.now(run.device)
    model = build(run.shape, device=run.device)
    seconds = timing.now(run.device) - begin
    inputs = Prompts(run).next(_small(run.shape))
    features = tower(model)(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
    zeros = float((features == 0).float().mean())
    metrics = {"seconds": seconds, "zero_features": zeros, "finite": bool(features.isfinite().all())}
    run.add("build", metrics=metrics, shape=run.shape.json())
    if zeros > 0.01:
        raise UserError(f"{zeros:.0%} of the random model's visual features are zero: nothing measured would count")
    return model


def tower(model: Any) -> Any:
    """The vision tower."""
    return model.model.visual


def language(model: Any) -> Any:
    """The language model."""
    return model.model.language_model


def _small(shape: Shape) -> int:
    return 2 * shape.grid[1] * shape.grid[2]


class Prompts:
    """One clip per size and prompts over it, each of a length that no earlier one had.

    Attention kernels plan for exact lengths, so a length that was seen before is faster than what a user meets.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.clips: dict[int, dict[str, Any]] = {}
        self.used: dict[int, int] = {}
        self.repeated: dict[tuple[int, int], dict[str, Any]] = {}

    def next(self, visual: int, rows: int = 1, step: int = 1, repeats: bool = False) -> dict[str, Any]:
        """A prompt; step: lengths that answering it will use. repeats: its text is one phrase, again and again."""
        import torch

        shape = self.run.shape
        if visual not in self.clips:
            _, h, w = shape.grid
            one = clip(replace(shape, grid=(max(1, visual // (h * w)), h, w)))
            self.clips = {visual: {k: v.to(self.run.device) for k, v in one.items()}}  # one at a time: they are large
        base = self.clips[visual]
        more = self.used.get(visual, 0)
        self.used[visual] = more + step
        generator = torch.Generator().manual_seed(more)
        words = torch.randint(5, shape.vocab, (more,), generator=generator)
        ids = torch.cat([base["input_ids"][0], words.to(self.run.device)])
        if repeats:
            at = int((base["input_ids"][0] == 4).nonzero()[-1]) + 1
            phrase = ids[at : at + 8]
            ids = torch.cat([ids[:at], phrase.repeat(1 + (len(ids) - at) // 8)[: len(ids) - at]])
        whole = base | {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
        whole["mm_token_type_ids"] = ((ids == 2).int() * 2)[None]
        return {k: v.repeat(rows, *[1] * (v.ndim - 1)) for k, v in whole.items()} if rows > 1 else whole

    def again(self, visual: int, rows: int = 1, step: int = 1) -> tuple[dict[str, Any], bool]:
        """The one prompt of this size that is asked again and again, and whether this is its first time."""
        first = (visual, rows) not in self.repeated
        if first:
            self.repeated[visual, rows] = self.next(visual, rows, step)
        return self.repeated[visual, rows], first


def answered(run: Run, model: Any, inputs: dict[str, Any], new: int, **generate: Any) -> tuple[float, Any]:
    """Milliseconds of one `generate` of `new` tokens, greedy where nothing else is asked, and what it gave."""
    begin = timing.now(run.device)
    out = model.generate(**inputs, max_new_tokens=new, **{"do_sample": False, **generate})
    return (timing.now(run.device) - begin) * 1e3, out


@contextlib.contextmanager
def accelerated(model: Any, asked: dict[str, Any] | None) -> Iterator[Any]:
    """The model under `accelerate(model, **asked)`; None: stock, nothing installed. Yields the handle or None."""
    import vlmfast

    if asked is None:
        yield None
        return
    if "tower" in asked and not takes_tower():
        raise UserError("this version's accelerate has no tower=")
    with vlmfast.accelerate(model, **asked) as handle:
        yield handle


def reported(handle: Any, names: tuple[str, ...]) -> dict[str, float]:
    """The named numbers of the handle's report; empty without a handle."""
    if handle is None:
        return {}
    report = handle.report.json()
    flat = {**report["encode"], **report["prefill"], **report["decode"]}
    return {k: float(flat[k]) for k in names if isinstance(flat.get(k), (int, float))}


def notes(handle: Any) -> dict[str, Any]:
    """The report's remarks and words (which engine, which kernels) for a row."""
    if handle is None:
        return {}
    report = handle.report.json()
    words = {k: v for stage in ("encode", "prefill", "decode") for k, v in report[stage].items() if isinstance(v, str)}
    return {"notes": report["notes"], "said": words} if words else {"notes": report["notes"]}


def spread(samples: list[dict[str, float]], of: str) -> dict[str, float]:
    """Medians of every metric that all samples have, and the least and largest of one of them."""
    shared = [k for k in samples[0] if all(k in s for s in samples)]
    low, high = min(s[of] for s in samples), max(s[of] for s in samples)
    stem = of.removesuffix("_ms_per_token").removesuffix("_ms")
    medians = {k: statistics.median(s[k] for s in samples) for k in shared}
    return medians | {f"{stem}_low_ms": low, f"{stem}_high_ms": high}


@contextlib.contextmanager
def staged(run: Run, model: Any) -> Iterator[dict[str, float]]:
    """Milliseconds on the device of the first call of the tower and of the language model inside the block.

    Yields a dict that is filled at its end: `tower_ms`, `language_ms`. Hooks of its own, none of our code's.
    """
    import torch

    marks: dict[str, list[Any]] = {"tower_ms": [], "language_ms": []}

    def mark(key: str, most: int) -> Any:
        def hook(*args: Any) -> None:
            if len(marks[key]) < most:
                if run.device == "cpu":
                    marks[key].append(time.perf_counter())
                else:
                    event = torch.cuda.Event(enable_timing=True)
                    event.record()
                    marks[key].append(event)

        return hook

    hooks, found = [], {}
    for key, module in (("tower_ms", tower(model)), ("language_ms", language(model))):
        hooks += [module.register_forward_pre_hook(mark(key, 1)), module.register_forward_hook(mark(key, 2))]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    timing.now(run.device)
    for key, pair in marks.items():
        if len(pair) == 2:
            first, last = pair
            found[key] = (last - first) * 1e3 if run.device == "cpu" else first.elapsed_time(last)


def memory(run: Run, reset: bool = False) -> dict[str, float]:
    """Peak bytes on the device since the last reset; empty on a CPU."""
    if run.device == "cpu":
        return {}
    import torch

    if reset:
        torch.cuda.reset_peak_memory_stats()
    return {"peak_bytes": float(torch.cuda.max_memory_allocated())}
