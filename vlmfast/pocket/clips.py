"""Long clips with a known timetable, drawn frame by frame: an hour of video that never sits in memory.

A clip is a chain of short scenes, each on its own background. A few colour-shape pairs are reserved: each occurs in one
scene only, and the questions ask about those, so that every question has exactly one place in time that answers it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

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
        frames_per_scene = round(SEGMENT * self.fps)
        return render([self.scenes[index // frames_per_scene]], times=[(index % frames_per_scene) / self.fps])[0, 0]

    def frames(self, start: int = 0, stop: int | None = None, chunk: int = 16) -> Iterator[tuple[float, torch.Tensor]]:
        """`(seconds, uint8 (H, W, 3))` in order; at most `chunk` frames are held at once."""
        frames_per_scene, index = round(SEGMENT * self.fps), start
        stop = len(self) if stop is None else min(stop, len(self))
        while index < stop:
            num_frames = min(chunk, stop - index, frames_per_scene - index % frames_per_scene)
            times = [(index % frames_per_scene + offset) / self.fps for offset in range(num_frames)]
            pictures = render([self.scenes[index // frames_per_scene]], times=times)[0]
            for offset in range(num_frames):
                yield (index + offset) / self.fps, pictures[offset]
            index += num_frames


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
    frame_size = (size, size) if isinstance(size, int) else size
    num_scenes = -(-seconds // SEGMENT)
    every_pair = [(colour, shape) for colour in COLOUR_NAMES for shape in SHAPES]
    pairs = rng.shuffled([pair for pair in every_pair if split == "test" or pair not in HELD_OUT])
    num_asked = max(1, min(questions, num_scenes, 16))
    reserved, common = pairs[:num_asked], pairs[num_asked:]
    asked_scenes = sorted(rng.shuffled(list(range(num_scenes)))[:num_asked])
    needle_scene = Rng({"train": 13, "test": 14}[split], seed, seconds).n(num_scenes)
    long_clip = LongClip(seed, num_scenes * SEGMENT, fps, frame_size, split, [])
    pending: list[Question] = []
    for scene_index in range(num_scenes):
        scene_start = float(scene_index * SEGMENT)
        long_clip.events.append(Event(scene_start, scene_start + SEGMENT, "scene", "begins"))
        pair = reserved[asked_scenes.index(scene_index)] if scene_index in asked_scenes else rng.pick(common)
        cells = rng.shuffled(list(range(9)))
        main_object = place(rng, pair, cells[0], min(frame_size))
        if rng.u() < 0.5:
            set_moving(rng, main_object)
        objects = [main_object]
        if rng.u() < 0.5:  # another object, never asked about
            free_cells = [cell for cell in cells if cell != main_object.cell]
            other_pair = rng.pick([other for other in common if other != pair])
            objects.insert(0, place(rng, other_pair, free_cells[0], min(frame_size)))
        if scene_index == needle_scene:
            used_cells = {placed.cell for placed in objects}
            needle = star_at(rng, next(cell for cell in cells if cell not in used_cells), min(frame_size))
            needle.t_in = float(1 + rng.n(SEGMENT - 3))
            needle.t_out = needle.t_in + 2
            objects.append(needle)
            evidence = (scene_start + needle.t_in, scene_start + needle.t_out)
            long_clip.events.append(Event(*evidence, needle.name, "shows up briefly"))
            pending.append(Question(0.0, "needle", f"what colour is the {NEEDLE} ?", needle.colour, evidence))
        for obj in objects:
            if obj.shape != NEEDLE:
                behaviour = f"moves {obj.move}" if obj.move else "stays"
                long_clip.events.append(Event(scene_start, scene_start + SEGMENT, obj.name, behaviour))
        if scene_index in asked_scenes:
            evidence = (scene_start, scene_start + SEGMENT)
            pending.append(
                Question(0.0, "motion", f"which way does the {main_object.name} move ?", main_object.move, evidence)
                if main_object.move
                else Question(0.0, "location", f"where is the {main_object.name} ?", PLACES[main_object.cell], evidence)
            )
        long_clip.scenes.append(Scene(*frame_size, round(SEGMENT * fps), fps, objects, [], [background(rng)]))
    for question in pending:  # asked some time after the evidence has passed
        asked_at = float(long_clip.seconds)
        if question.evidence[1] < asked_at:
            asked_at = rng.u(question.evidence[1], asked_at)
        long_clip.questions.append(replace(question, time=asked_at))
    long_clip.questions.sort(key=lambda question: question.time)
    return long_clip
