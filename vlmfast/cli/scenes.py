"""What the demo asks about: two clips and a picture of the pocket world, with questions whose answers are known."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECOND = 40  # tries for further questions about a scene


@dataclass
class Medium:
    """One clip or picture as the model gets it: written to a file and read back."""

    name: str
    turns: list[tuple[str, str]]  # question, right answer
    frames: Any  # (T, H, W, 3) uint8, T = 1 for a picture
    times: list[float]  # seconds, one per frame
    arguments: dict[str, Any] = field(default_factory=dict)  # of `Loaded.inputs`

    @property
    def video(self) -> bool:
        return "video" in self.arguments


def media(folder: Path, seed: int) -> list[Medium]:
    """Render, write to `folder` (H.264 mp4 and PNG), decode again."""
    from vlmfast.pocket import world
    from vlmfast.pocket.questions import STILL_KINDS

    moving = world.sample("motion", seed, "test", objects=(2, 3))
    events = world.sample("order", seed, "test", objects=(2, 3))
    picture = world.sample("location", seed, "test", size=256, objects=(3, 3))
    question_kinds = [kind for kind in STILL_KINDS if kind not in ("digits", "relation", "presence")]
    return [
        _clip(folder / "moves.mp4", moving, _questions(moving, ["motion"], 2)),
        _clip(folder / "events.mp4", events, _questions(events, ["what-when", "when"], 3)),
        _picture(folder / "picture.png", picture, _questions(picture, question_kinds, 4)),
    ]


def _questions(sample: Any, question_kinds: list[str], max_questions: int) -> list[tuple[str, str]]:
    """The sample's own question, then others about the same scene, of the given kinds in turn."""
    from vlmfast.pocket.questions import ask
    from vlmfast.pocket.scenes import Rng

    turns = [(sample.question, sample.answer)]
    for attempt in range(SECOND):
        question_pair = ask(
            question_kinds[attempt % len(question_kinds)],
            sample.meta["scene"],
            Rng(2, 4242, sample.meta["seed"], attempt),
            None,
        )
        if question_pair is not None and question_pair not in turns and len(turns) < max_questions:
            turns.append(question_pair)
    return turns


def _clip(path: Path, sample: Any, questions: list[tuple[str, str]]) -> Medium:
    from vlmfast.video import Uniform, read_video, write_video

    write_video(path, sample.frames, fps=sample.fps)
    video = read_video(path, select=Uniform(len(sample.frames)))
    return Medium(path.name, questions, video.frames, video.timestamps.tolist(), {"video": video})


def _picture(path: Path, sample: Any, questions: list[tuple[str, str]]) -> Medium:
    from PIL import Image

    from vlmfast.video import read_image

    save(Image.fromarray(sample.frames[0].numpy()), path)
    picture = read_image(path)
    return Medium(path.name, questions, picture[None], [0.0], {"images": [picture]})


def save(image: Any, path: Path) -> None:
    """A PNG that appears whole or not at all."""
    unfinished = path.with_name(f".{path.name}.part")
    try:
        image.save(unfinished, format="PNG")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
