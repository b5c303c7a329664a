"""Count the files of `vlmfast/` that a frame and the value `keep` pass through: `python tests/support/walks.py`.

Two journeys are run on a tiny model under a profiler that sees every call and every return of the package:

frame  `StreamSession.watch(file)` to `ask(...).evidence`, without a disk, with a retriever that has to choose
keep   `vlmfast ask --prune vidcom2:keep=0.25` to the gather of the kept columns (`GATHER`)

A file *handles* the value when one of its functions is given it, holds it in a local variable, or gives it out. What
carries the value is not guessed but measured: the journey runs three times, the third time with another value (other
pixels in the one frame that is watched, another `keep`) and nothing else changed. A variable or result carries it when
its content is another one in the third run, while it was the same in the first two (so clocks and identities do not
count). Content is looked at in tensors, arrays, decoded frames, numbers and text, in containers and dataclasses of
those; a large object (a session, a store, a model) is no carrier by itself: its methods count by what else they hold.

Left out, and listed: `GENERIC` files, whose functions pass on whatever they are given, and what runs only inside the
model's own forward (the fast layers and kernels that compute what the model's layers compute).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import tiny
import torch

import vlmfast

PACKAGE = Path(vlmfast.__file__).parent
GENERIC = {
    "runtime/model_lock.py": "waits for the model, then calls what it wraps",
    "runtime/patch.py": "sets an attribute and puts it back",
    "core.py": "checks, and prints values in messages",
    "fields.py": "checks the type and range of every field of every method",
    "cli/errors.py": "runs a command and prints its error",
    "report.py": "writes numbers down",
    "kernels/ranking.py": "sorts whatever scores it is given",
    "runtime/transfers.py": "moves whatever tensor it is given between host and device",
}
GATHER = "drop"  # the function of runtime/ that shrinks embeddings and positions to the kept columns
FAMILY = "qwen2_5_vl"


def content(value: Any, depth: int = 6) -> str:
    """A text that differs when the content of a value does; the class alone for what is no carrier."""
    kind = type(value).__name__
    if isinstance(value, torch.Tensor) and value.is_meta:
        return f"{value.dtype}{tuple(value.shape)}"
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous()
        return f"{flat.dtype}{tuple(flat.shape)}" + _sum(flat.reshape(-1).view(torch.uint8).numpy().tobytes())
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}" + _sum(np.ascontiguousarray(value).tobytes())
    if isinstance(value, (str, bytes, int, float, bool, type(None), torch.dtype)):
        return repr(value)
    if hasattr(value, "to_ndarray"):
        from av.video.reformatter import VideoReformatter  # a frame's own is used by the thread that converts it

        return content(VideoReformatter().reformat(value, format="rgb24", threads=1).to_ndarray())
    if depth and isinstance(value, functools.partial):
        return kind + content([value.args, value.keywords], depth - 1)
    if depth and dataclasses.is_dataclass(value) and not isinstance(value, type):
        return kind + content([getattr(value, f.name, None) for f in dataclasses.fields(value)], depth - 1)
    if depth and isinstance(value, dict):
        return kind + ",".join(f"{k!r}:{content(v, depth - 1)}" for k, v in value.items() if isinstance(k, (str, int)))
    if depth and isinstance(value, (list, tuple)) and not isinstance(value, os.stat_result):
        return kind + ",".join(content(v, depth - 1) for v in value)
    return kind


def _sum(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=12).hexdigest()


class Recorder:
    """What the variables and results of the package's functions held: seen[file, function, name, in the model?]."""

    def __init__(self, until: str | None = None) -> None:
        self.seen: dict[tuple[str, str, str, bool], set[str]] = {}
        self.until, self.on = until, True

    def __call__(self, frame: FrameType, event: str, result: Any) -> None:
        code = frame.f_code
        if not self.on or event not in ("call", "return"):
            return
        file = _file(code.co_filename)
        if file is None or code.co_name.startswith("<"):
            return
        inside, held = _in_model(frame), dict(frame.f_locals)
        for name, value in (held if event == "call" else held | {"return": result}).items():
            self.seen.setdefault((file, code.co_qualname, name, inside), set()).add(content(value))
        if event == "call" and code.co_name == self.until and file.startswith("runtime/"):
            self.on = False

    @contextlib.contextmanager
    def recording(self) -> Any:
        threading.setprofile(self)
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]


@functools.cache
def _file(path: str) -> str | None:
    """A file of the package by its path in it; None for others, and for those in `GENERIC`."""
    file = path.removeprefix(f"{PACKAGE}/")
    return None if file == path or file in GENERIC else file


def _in_model(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "_call_impl" and frame.f_code.co_filename.endswith("nn/modules/module.py"):
            return True
        frame = frame.f_back
    return False


@dataclasses.dataclass
class Walk:
    """files: those that handle the value, with a function and a variable of each. model: those that do so in the
    model's own forward alone."""

    files: dict[str, str]
    model: list[str]


def compare(journey: Callable[[int], None], hooks_count: bool, until: str | None = None) -> Walk:
    """Run a journey with value 0, 0 and 1. hooks_count: count what runs inside the model's forward too."""
    runs = []
    for value in (0, 0, 1):
        recorder = Recorder(until)
        with recorder.recording():
            journey(value)
        assert until is None or not recorder.on, f"{until} was not reached"
        runs.append(recorder.seen)
    first, again, other = runs
    files: dict[str, str] = {}
    model: dict[str, str] = {}
    for key in first:
        if first[key] == again.get(key) != other.get(key):
            file, function, name, inside = key
            (model if inside and not hooks_count else files).setdefault(file, f"{function}({name})")
    return Walk(dict(sorted(files.items())), sorted(f for f in model if f not in files))


def frame_walk() -> Walk:
    """One frame of a file, from `watch` to the evidence of an answer."""
    from vlmfast.stream import Internal, StreamSession, write_video

    rng = np.random.default_rng(0)
    earlier = rng.integers(0, 255, (9, 16, 24, 3), np.uint8)
    watched = rng.integers(0, 255, (2, 1, 16, 24, 3), np.uint8)
    model, processor = tiny.build(FAMILY), tiny.processor(FAMILY)
    with tempfile.TemporaryDirectory() as folder:
        for value in (0, 1):
            write_video(Path(folder) / f"{value}.mp4", watched[value], 2, crf=0)

        def journey(value: int) -> None:
            with StreamSession(model, processor, retrieve=Internal(frames=3)) as session:
                session.push(earlier)  # the last of nine waits for its partner, the frame to come
                session.watch(Path(folder) / f"{value}.mp4")
                assert session.ask("what color is the cat ?", max_new_tokens=2).evidence

        return compare(journey, hooks_count=False)


def keep_walk() -> Walk:
    """`keep` from the command line to the gather of the kept columns."""
    from typer.testing import CliRunner

    from vlmfast.cli import build
    from vlmfast.stream import write_video

    with tempfile.TemporaryDirectory() as folder:
        tiny.save(FAMILY, Path(folder) / "model")
        clip = np.random.default_rng(0).integers(0, 255, (4, 56, 56, 3), np.uint8)
        write_video(Path(folder) / "clip.mp4", clip, 2)

        def journey(value: int) -> None:
            command = ["ask", "what ?", "--model", f"{folder}/model", "--video", f"{folder}/clip.mp4"]
            command += ["--prune", f"vidcom2:keep={(0.25, 0.5)[value]}", "--max-new-tokens", "2", "--json"]
            with contextlib.redirect_stderr(io.StringIO()):
                result = CliRunner().invoke(build(), command)
            assert result.exit_code == 0, result.output

        return compare(journey, hooks_count=True, until=GATHER)


def main() -> None:
    for name, walk in (("frame, from watch() to the evidence", frame_walk()), ("keep, to the gather", keep_walk())):
        print(f"{name}: {len(walk.files)} files")
        for file, where in walk.files.items():
            print(f"  {file:36} {where}")
        if walk.model:
            print(f"  in the model's own forward alone: {', '.join(walk.model)}")


if __name__ == "__main__":
    main()
