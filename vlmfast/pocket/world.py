"""The pocket world: seeded scenes and clips with questions that need looking.

`sample(kind, seed, split)` is one question about one picture or clip, `clip(seed, seconds)` a long one with a timetable
, `score` compares an answer. The train and test splits never share a seed stream, and the colour-shape
pairs in `HELD_OUT` occur in the test split only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from vlmfast.pocket.captions import Fact, caption, facts, normalise, read_facts, score_caption
from vlmfast.pocket.clips import LongClip, clip
from vlmfast.pocket.descriptions import describe, description_facts, score_description
from vlmfast.pocket.questions import CLIP_KINDS, KINDS, STILL_KINDS, answers, subjects, turns
from vlmfast.pocket.render import render
from vlmfast.pocket.scenes import COLOUR_NAMES, HELD_OUT, SHAPES, Rng, Scene, moving, still, written

__all__ = [
    "HELD_OUT",
    "KINDS",
    "STILL_KINDS",
    "CLIP_KINDS",
    "LongClip",
    "Sample",
    "clip",
    "sample",
    "scene_for",
    "score",
    "score_caption",
    "score_description",
    "read_facts",
    "render",
]

SPLITS = {"train": 1, "test": 2}
SUBJECTS = {"colour": SHAPES, "shape": COLOUR_NAMES}  # what a question of the kind names
FREE_TEXT = ("caption", "describe")  # scored by their facts
SECONDS = dict.fromkeys((*CLIP_KINDS, "describe"), 8) | {"needle": 32}  # of a clip where none are asked for


@dataclass
class Sample:
    """One question about one picture (T = 1) or clip.

    Attributes
    ----------
    frames : uint8 (T, H, W, 3).
    fps : frames per second of a clip.
    choices : the closed set of answers, or None.
    before : earlier turns (question, answer) about the same clip, oldest first.
    facts : of a caption or description, what it must state; else None.
    meta : kind, seed, split, `heldout` (a held-out pair occurs), evidence `(start, end)` in seconds, the `scene`.
    """

    frames: torch.Tensor
    fps: float
    is_video: bool
    question: str
    answer: str
    choices: list[str] | None = None
    facts: frozenset[Fact] | None = None
    before: list[tuple[str, str]] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)


def _size(size: int | tuple[int, int] | None) -> tuple[int, int]:
    height, width = (64, 64) if size is None else (size, size) if isinstance(size, int) else size
    if height % 16 or width % 16 or min(height, width) < 48:
        raise ValueError(f"size must be multiples of 16 and at least 48 pixels, got {height} x {width}")
    return height, width


def request(scene: Scene) -> str:
    """What asks for a description; a caption is asked for in other words."""
    return "tell me about the picture ." if scene.still else "tell me about the clip ."


def scene_for(
    kind: str, rng: Rng, split: str, size: tuple[int, int], seconds: int, objects: tuple[int, int] | None = None
) -> Scene:
    """A scene in which a question of `kind` is likely to be possible."""
    if kind == "caption":
        is_clip = seconds > 0
        return (
            moving(rng, split, size, seconds, objects=objects or (2, 3))
            if is_clip
            else still(rng, split, size, objects or (2, 4))
        )
    if kind == "describe":
        if seconds:
            return moving(rng, split, size, seconds, objects=objects or (2, 3))
        return still(rng, split, size, objects or (3, 4))
    if kind in CLIP_KINDS:
        return moving(rng, split, size, seconds, kind, objects=objects or (1, 3))
    min_objects = 2 if kind == "relation" else 1
    scene = still(rng, split, size, objects or (min_objects, 3), text=0.0 if kind == "digits" else 0.2)
    if kind == "digits":
        scene.objects = scene.objects[:2]
        used_rows = {obj.cell // 3 for obj in scene.objects}
        text_row = next(row for row in (rng.n(3), 0, 1, 2) if row not in used_rows)
        scene.texts = [written(rng, "".join(str(rng.n(10)) for _ in range(2 + rng.n(3))), text_row, min(size))]
    return scene


def sample(
    kind: str,
    seed: int,
    split: str = "train",
    size: int | tuple[int, int] | None = None,
    seconds: int | None = None,
    objects: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    balanced: bool = False,
) -> Sample:
    """Draw sample `seed` of question kind `kind`.

    Parameters
    ----------
    kind : one of `KINDS`.
    size : pixels, one number or (height, width); multiples of 16, so that one visual token covers 16 x 16.
    seconds : length of a clip at 2 frames per second (default 8, needles 32; captions are of pictures unless given, and
        descriptions of clips unless 0).
    objects : (fewest, most) objects.
    balanced : what a question of colour or shape is about is drawn as evenly as its answer, so that no answer is common
        for the words of a question. Otherwise the test split asks mostly about pairs that training never saw.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown question kind {kind!r}; known: {', '.join(KINDS)}")
    if split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    rng = Rng(SPLITS[split], KINDS.index(kind), seed)
    frame_size = _size(size)
    num_seconds = seconds or (0 if kind == "describe" and seconds == 0 else SECONDS.get(kind, 0))
    choices = answers(kind, num_seconds)
    subject = ""  # a word that the question must name
    if balanced and kind in SUBJECTS:
        subject = Rng(SPLITS[split], KINDS.index(kind), seed, 1).pick(SUBJECTS[kind])
    wanted_answer = rng.pick(choices) if choices else rng.pick(("a", "b")) if kind == "order" else None
    for _ in range(2000):
        scene = scene_for(kind, rng, split, frame_size, num_seconds, objects)
        if kind == "caption":
            question_turns: list[tuple[str, str]] | None = [
                ("describe the picture ." if scene.still else "describe the clip .", caption(scene, rng))
            ]
        elif kind == "describe":
            question_turns = [(request(scene), describe(scene, rng))]
        else:
            question_turns = turns(kind, scene, rng, wanted_answer)
        if question_turns is not None and (not subject or subject in question_turns[-1][0].split()):
            break
    else:
        raise RuntimeError(
            f"no {kind} question with answer {wanted_answer!r} in 2000 scenes (seed {seed}, objects {objects})"
        )
    question = question_turns[-1]
    frames = render([scene], device)[0]
    has_held_out = any((obj.colour, obj.shape) in HELD_OUT for obj in scene.objects)
    meta = {
        "kind": kind,
        "seed": seed,
        "split": split,
        "heldout": has_held_out,
        "asked_heldout": bool(subjects(question[0]) & HELD_OUT),
        "scene": scene,
    }
    return Sample(
        frames,
        scene.fps,
        not scene.still,
        question[0],
        question[1],
        choices,
        facts(scene) if kind == "caption" else description_facts(scene) if kind == "describe" else None,
        question_turns[:-1],
        meta,
    )


def score(item: Sample, text: str) -> float:
    """1.0 for the right answer (spaces between digits do not matter), the fact F1 for a caption or description."""
    if item.facts is not None:
        rate = score_description if item.meta["kind"] == "describe" else score_caption
        return rate(text, item.facts)["f1"]
    return float(normalise(text).rstrip(" .") == normalise(item.answer).rstrip(" ."))
