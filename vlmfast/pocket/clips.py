"""Long clips with a known timetable, drawn frame by frame: an hour of video that never sits in memory.

A clip is a chain of short scenes, each on its own background. A few colour-shape pairs are reserved: each occurs in one
scene only, and the questions ask about those, so that every question has exactly one place in time that answers it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from vlmfast.pocket.render import render
from vlmfast.pocket.scenes import (
    COLOUR_NAMES,
    HELD_OUT,
    NEEDLE,
    PLACES,
    SHAPES,
    Rng,
    Scene,
    background,
    place,
    set_moving,
    star_at,
)

SEGMENT = 8  # seconds per scene


@dataclass(frozen=True)
class Event:
    """Something visible from `start` to `end` (seconds)."""

    start: float
    end: float
    what: str  # "red circle", "white star", "scene"
    does: str  # "stays", "moves left", "shows up briefly", "begins"


@dataclass(frozen=True)
class Question:
    """A question asked at `time`, whose answer was to be seen during `evidence` (start, end) and at no other time."""

    time: float
    kind: str
    question: str
    answer: str
    evidence: tuple[float, float]


@dataclass
class LongClip:
    """`seconds` of video at `fps`; `frames()` draws it lazily, `events` and `questions` tell what is in it."""

    seed: int
    seconds: int
    fps: float
    size: tuple[int, int]
    split: str
    scenes: list[Scene]
    events: list[Event] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)

    def __len__(self) -> int:
        return round(self.seconds * self.fps)

    def frame(self, index: int) -> torch.Tensor:
        """Frame `index` as uint8 (H, W, 3)."""
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} of a clip of {len(self)} frames")
        per = round(SEGMENT * self.fps)
        return render([self.scenes[index // per]], times=[(index % per) / self.fps])[0, 0]

    def frames(self, start: int = 0, stop: int | None = None, chunk: int = 16) -> Iterator[tuple[float, torch.Tensor]]:
        """`(seconds, uint8 (H, W, 3))` in order; at most `chunk` frames are held at once."""
        per, index, stop = round(SEGMENT * self.fps), start, len(self) if stop is None else min(stop, len(self))
        while index < stop:
            many = min(chunk, stop - index, per - index % per)
            drawn = render([self.scenes[index // per]], times=[(index % per + i) / self.fps for i in range(many)])[0]
            for i in range(many):
                yield (index + i) / self.fps, drawn[i]
            index += many


def clip(
    seed: int,
    seconds: int,
    size: int | tuple[int, int] = 64,
    fps: float = 2.0,
    split: str = "test",
    questions: int = 8,
) -> LongClip:
    """Draw long clip `seed`.

    Parameters
    ----------
    seconds : length; rounded up to whole scenes of 8 seconds.
    fps : frames per second.
    questions : how many questions at most (location, motion and one needle); at most one per scene and reserved pair.
    """
    if seconds < 1:
        raise ValueError(f"a clip lasts at least a second, got {seconds}")
    rng = Rng({"train": 11, "test": 12}[split], seed, seconds)
    shape = (size, size) if isinstance(size, int) else size
    count = -(-seconds // SEGMENT)
    pairs = rng.shuffled([(c, s) for c in COLOUR_NAMES for s in SHAPES if split == "test" or (c, s) not in HELD_OUT])
    asked = max(1, min(questions, count, 16))
    reserved, common = pairs[:asked], pairs[asked:]
    marked = sorted(rng.shuffled(list(range(count)))[:asked])
    needle = Rng({"train": 13, "test": 14}[split], seed, seconds).n(count)  # the scene in which the star shows up
    out = LongClip(seed, count * SEGMENT, fps, shape, split, [])
    pending: list[Question] = []
    for number in range(count):
        begin = float(number * SEGMENT)
        out.events.append(Event(begin, begin + SEGMENT, "scene", "begins"))
        pair = reserved[marked.index(number)] if number in marked else rng.pick(common)
        cells = rng.shuffled(list(range(9)))
        main = place(rng, pair, cells[0], min(shape))
        if rng.u() < 0.5:
            set_moving(rng, main)
        objects = [main]
        if rng.u() < 0.5:  # a bystander that is never asked about
            free = [c for c in cells if c != main.cell]
            objects.insert(0, place(rng, rng.pick([p for p in common if p != pair]), free[0], min(shape)))
        if number == needle:
            used = {o.cell for o in objects}
            star = star_at(rng, next(c for c in cells if c not in used), min(shape))
            star.t_in = float(1 + rng.n(SEGMENT - 3))
            star.t_out = star.t_in + 2
            objects.append(star)
            at = (begin + star.t_in, begin + star.t_out)
            out.events.append(Event(*at, star.name, "shows up briefly"))
            pending.append(Question(0.0, "needle", f"what colour is the {NEEDLE} ?", star.colour, at))
        for obj in objects:
            if obj.shape != NEEDLE:
                out.events.append(Event(begin, begin + SEGMENT, obj.name, f"moves {obj.move}" if obj.move else "stays"))
        if number in marked:
            at = (begin, begin + SEGMENT)
            pending.append(
                Question(0.0, "motion", f"which way does the {main.name} move ?", main.move, at)
                if main.move
                else Question(0.0, "location", f"where is the {main.name} ?", PLACES[main.cell], at)
            )
        out.scenes.append(Scene(*shape, round(SEGMENT * fps), fps, objects, [], [background(rng)]))
    for q in pending:  # asked some time after the evidence has passed
        late = rng.u(q.evidence[1], float(out.seconds)) if q.evidence[1] < out.seconds else float(out.seconds)
        out.questions.append(Question(late, q.kind, q.question, q.answer, q.evidence))
    out.questions.sort(key=lambda q: q.time)
    return out
