"""Tasks: what is asked. A task knows its questions by number and makes each one when it is needed.

`get("pocket/colour")`, `get("pocket/needle:size=96,seconds=64")`, `get("pocket/all")`, `get("pocket/long")`,
`get("pocket/mid")`, `get("pocket/again")`, `get("pocket/turns")`, `get("easy-vqa")`, `get("easy-vqa/again")`,
`get("questions.jsonl")` (also `.parquet`, or a folder that holds such a file).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmfast.bench import scoring
from vlmfast.core import UserError

POCKET_KINDS = (
    "presence", "colour", "shape", "count", "relation", "location", "digits", "motion", "order", "when", "what-when",
    "how-often", "needle", "during", "follow-up",
    "caption",
)  # fmt: skip
# at least 1,000 visual tokens each: stills of 512 pixels a side, clips of 16 frames at 192 or of 64 at 96
LONG = {k: {"size": 512} for k in ("presence", "colour", "shape", "count", "location", "digits")} | {
    "motion": {"size": 192}, "when": {"size": 192}, "what-when": {"size": 192}, "order": {"size": 192},
    "needle": {"size": 96, "seconds": 32},
}  # fmt: skip
# 64 visual tokens a picture, 128 a clip: what 10 % leaves is still a choice, and 50 methods are asked in minutes
MID = {k: {"size": 128} for k in ("presence", "colour", "shape", "count", "relation", "location", "digits")} | {
    k: {} for k in ("motion", "order", "when", "what-when", "how-often")
}  # fmt: skip
MIXES: dict[str, dict[str, dict[str, int]]] = {"long": LONG, "mid": MID}
AGAIN = ("pocket/again", "pocket/turns", "easy-vqa/again")  # second questions, see `vlmfast.bench.followup`
POCKET_SIZE = 1000  # questions per kind


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
    """Questions 0 ... size - 1, of which question i is made by `make(i)`. ids and buckets cost nothing."""

    name: str
    ids: list[str]
    make: Callable[[int], Sample]
    tokens: int  # most new tokens an answer may take
    metric: str  # "accuracy" or "f1"
    bucket: Callable[[int], Hashable] = field(default=lambda i: 0)  # only questions of one bucket share a batch
    config: dict[str, Any] = field(default_factory=dict)
    clusters: Callable[[int], str] | None = None  # of question i, where it is not alone in its own

    def cluster(self, i: int) -> str:
        """What question i shares with those about the same clip or image; costs nothing."""
        return self.ids[i] if self.clusters is None else self.clusters(i)

    def sample(self, i: int) -> Sample:
        """Question i; one whose media cannot be read says why in `error`."""
        try:
            return self.make(i)
        except Exception as e:
            why = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
            return Sample(self.ids[i], "", [""], [], lambda text: 0.0, cluster=self.ids[i], error=why)

    def first(self, limit: int | None) -> list[int]:
        """The numbers of the first `limit` questions."""
        return list(range(len(self.ids) if limit is None else min(limit, len(self.ids))))


def get(name: str, metric: str | None = None, frames: str = "uniform:16") -> Task:
    """The task of a name. metric, frames (how videos are sampled): for tasks of one's own questions."""
    if name == "easy-vqa":
        return easy_vqa()
    if name in AGAIN:
        from vlmfast.bench import followup

        return followup.task(name)
    if name.startswith("pocket/"):
        return pocket(name)
    path = Path(name)
    if path.exists() or path.suffix in (".jsonl", ".parquet"):
        from vlmfast.bench import questions

        return questions.load(path, metric, frames)
    raise UserError(
        f"unknown task {name!r}; known: easy-vqa, {', '.join(AGAIN)}, pocket/all, pocket/long, pocket/mid, "
        f"{', '.join(f'pocket/{k}' for k in POCKET_KINDS)}, or a path to questions.jsonl, .parquet or a folder with one"
    )


# ---------------------------------------------------------------- the pocket world


def pocket(name: str) -> Task:
    """Held-out questions of the pocket world, fixed seeds; options after a colon: size, seconds, split, seed."""
    kind, _, rest = name.removeprefix("pocket/").partition(":")
    if kind not in (*POCKET_KINDS, "all", *MIXES):
        raise UserError(f"unknown pocket kind {kind!r}; known: all, {', '.join((*MIXES, *POCKET_KINDS))}")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in ("size", "seconds", "split", "seed") or not (value.isdigit() or key == "split"):
            raise UserError(f"{part!r} in task {name!r}: options are size=PIXELS, seconds=N, seed=N, split=train|test")
        options[key] = value if key == "split" else int(value)
    first = options.pop("seed", 0)
    kinds = list(POCKET_KINDS[:-1]) if kind == "all" else list(MIXES.get(kind, [kind]))
    # an even mix: question i is of kind i mod n
    order = [(k, first + i) for i in range(POCKET_SIZE) for k in kinds]
    extra = MIXES.get(kind, {})

    def make(i: int) -> Sample:
        from vlmfast.pocket import world

        k, seed = order[i]
        item = world.sample(k, seed, **{"split": "test", **extra.get(k, {}), **options})
        media = Clip(item.frames.numpy(), item.fps) if item.is_video else item.frames[0].numpy()
        return Sample(f"{k}/{seed}", item.question, [item.answer], [media], functools.partial(world.score, item),
                      cluster=f"{k}/{seed}", kind=k, choices=item.choices, before=item.before)  # fmt: skip

    caption = kind == "caption"
    return Task(
        name, [f"{k}/{seed}" for k, seed in order], make, 112 if caption else 10, "f1" if caption else "accuracy",
        bucket=lambda i: order[i][0], config=options,
    )  # fmt: skip


# ---------------------------------------------------------------- easy-VQA


def easy_vqa() -> Task:
    """The test split of easy-VQA (Zhou 2019, PyPI `easy-vqa`): 9,673 questions about 1,000 pictures."""
    try:
        import easy_vqa as data
    except ImportError:
        raise UserError("task easy-vqa needs its data: pip install easy-vqa") from None
    asked, answered, images = data.get_test_questions()
    paths = data.get_test_image_paths()

    def make(i: int) -> Sample:
        from PIL import Image

        picture = Image.open(paths[images[i]]).convert("RGB")
        return Sample(f"easy-vqa/{i}", asked[i], [answered[i]], [picture],
                      lambda text: scoring.exact(text, [answered[i]]), cluster=f"image/{images[i]}",
                      kind="easy-vqa")  # fmt: skip

    return Task("easy-vqa", [f"easy-vqa/{i}" for i in range(len(asked))], make, 6, "accuracy",
                clusters=lambda i: f"image/{images[i]}")  # fmt: skip
