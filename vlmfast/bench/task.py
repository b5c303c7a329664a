"""What a task is made of: questions with their media, and how answers are scored. The tasks are in `bench.tasks`."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Sample:
    """One question with its media, ready to ask."""

    id: str
    question: str
    expected: list[str]
    media: list[Any]  # PIL images, uint8 arrays (H, W, 3), or `Clip`s
    score: Callable[[str], float]
    cluster: str = ""  # questions about one clip or image share it: they are not independent
    kind: str = ""
    choices: list[str] | None = None
    before: list[tuple[str, str]] = field(default_factory=list)  # turns (question, answer) about the media so far
    error: str | None = None  # why its media could not be read
    opening: str | None = (
        None  # a question that is asked first; this one reads the cache it left (`vlmfast.bench.followup`)
    )


@dataclass
class Clip:
    """Frames of a video, uint8 (T, H, W, 3), `fps` of them a second; metadata as HF processors take it, when known."""

    frames: Any
    fps: float  # of these frames, not of the file they were sampled from
    metadata: dict[str, Any] | None = None


@dataclass
class Task:
    """Questions 0 ... size - 1, each made by `make(index)`. ids and buckets cost nothing."""

    name: str
    ids: list[str]
    make: Callable[[int], Sample]
    tokens: int  # most new tokens an answer may take
    metric: str  # "accuracy" or "f1"
    bucket: Callable[[int], Hashable] = field(default=lambda i: 0)  # only questions of one bucket share a batch
    config: dict[str, Any] = field(default_factory=dict)
    clusters: Callable[[int], str] | None = None  # of a question by its index, where several share one

    def cluster(self, index: int) -> str:
        """What the question shares with those about the same clip or image; costs nothing."""
        return self.ids[index] if self.clusters is None else self.clusters(index)

    def sample(self, index: int) -> Sample:
        """The question; one whose media cannot be read says why in `error`."""
        try:
            return self.make(index)
        except Exception as problem:
            reason = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}"
            return Sample(self.ids[index], "", [""], [], lambda text: 0.0, cluster=self.ids[index], error=reason)

    def first(self, limit: int | None) -> list[int]:
        """The numbers of the first `limit` questions."""
        return list(range(len(self.ids) if limit is None else min(limit, len(self.ids))))
