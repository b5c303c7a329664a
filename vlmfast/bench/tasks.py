"""Tasks: what is asked. A task knows its questions by number and makes each one when it is needed.

`get("pocket/colour")`, `get("pocket/needle:size=96,seconds=64")`, `get("pocket/all")`, `get("pocket/long")`,
`get("pocket/mid")`, `get("pocket/again")`, `get("pocket/turns")`, `get("easy-vqa")`, `get("easy-vqa/again")`,
`get("questions.jsonl")` (also `.parquet`, or a folder that holds such a file).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from vlmfast import spec
from vlmfast.bench import followup, scoring
from vlmfast.bench.question_sets import PICTURES, POCKET, QuestionSet
from vlmfast.bench.questions import load
from vlmfast.bench.task import Clip, Sample, Task
from vlmfast.core import UserError
from vlmfast.fields import NonNegativeInt, Options, PositiveInt, unknown

POCKET_KINDS = (
    "presence", "colour", "shape", "count", "relation", "location", "digits", "motion", "order", "when", "what-when",
    "how-often", "needle", "during", "follow-up",
    "caption", "describe",
)  # fmt: skip
FREE_TEXT = {"caption": 112, "describe": 160}  # scored by the facts of a text of at most so many tokens
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
POCKET_SIZE = 1000  # questions per kind, of a task that names its first


def get(name: str, metric: str | None = None, frames: str = "uniform:16", questions: QuestionSet = "reporting") -> Task:
    """The task of a name. metric, frames (how videos are sampled): for tasks of one's own questions; questions: the set
    of all others, unless the name says another."""
    if name == "easy-vqa":
        return easy_vqa(questions)
    if name in followup.TASKS:
        return followup.task(name, questions)
    if name.startswith("pocket/"):
        return pocket(name, questions)
    path = Path(name)
    if path.exists() or path.suffix in (".jsonl", ".parquet"):
        return load(path, metric, frames)
    raise unknown(
        "task", name, ["easy-vqa", *followup.TASKS, *KINDS, "a path to questions.jsonl, .parquet or a folder with one"]
    )


# ---------------------------------------------------------------- the pocket world


@dataclass(frozen=True)
class PocketOptions(Options):
    """size: pixels a side; seconds: of a clip; split: of the world; set: of questions (`vlmfast.bench.question_sets`);
    seed: number of the first question, instead of a set's. None = as the kind of question, or who asks, has it."""

    size: PositiveInt | None = None
    seconds: PositiveInt | None = None
    split: Literal["train", "test"] | None = None
    set: QuestionSet | None = None
    seed: NonNegativeInt | None = None
    title: ClassVar[str] = "a pocket task"


KINDS = {f"pocket/{kind}": PocketOptions for kind in ("all", *MIXES, *POCKET_KINDS)}


def pocket(name: str, questions: QuestionSet = "reporting") -> Task:
    """Held-out questions of the pocket world by number; `pocket/KIND:field=value` with fields of `PocketOptions`."""
    kind = spec.parse(name)["method"].removeprefix("pocket/")
    given: PocketOptions = spec.read("task", name, KINDS)
    set_name = given.set or ("" if given.seed is not None or given.split == "train" else questions)
    numbers = POCKET[set_name] if set_name else range(given.seed or 0, (given.seed or 0) + POCKET_SIZE)
    options = {
        field_name: value
        for field_name in ("size", "seconds", "split")
        if (value := getattr(given, field_name)) is not None
    }
    short_kinds = [item_kind for item_kind in POCKET_KINDS if item_kind not in FREE_TEXT]
    kinds = short_kinds if kind == "all" else list(MIXES.get(kind, [kind]))
    # an even mix: question i is of kind i mod n
    order = [(item_kind, number) for number in numbers for item_kind in kinds]
    kind_options = MIXES.get(kind, {})

    def make(index: int) -> Sample:
        from vlmfast.pocket import world

        item_kind, seed = order[index]
        item = world.sample(
            item_kind,
            seed,
            balanced=bool(set_name),
            **{"split": "test", **kind_options.get(item_kind, {}), **options},
        )
        media = Clip(item.frames.numpy(), item.fps) if item.is_video else item.frames[0].numpy()
        return Sample(f"{item_kind}/{seed}", item.question, [item.answer], [media],
                      functools.partial(world.score, item), cluster=f"{item_kind}/{seed}", kind=item_kind,
                      choices=item.choices, before=item.before)  # fmt: skip

    return Task(
        name, [f"{item_kind}/{seed}" for item_kind, seed in order], make, FREE_TEXT.get(kind, 10),
        "f1" if kind in FREE_TEXT else "accuracy",
        bucket=lambda index: order[index][0],
        config=options | ({"set": set_name} if set_name else {"seed": given.seed or 0}),
    )  # fmt: skip


# ---------------------------------------------------------------- easy-VQA


def easy_vqa(questions: QuestionSet = "reporting") -> Task:
    """The test split of easy-VQA (Zhou 2019, PyPI `easy-vqa`), 9,673 questions about 1,000 pictures: a set of them."""
    try:
        import easy_vqa as data
    except ImportError:
        raise UserError("task easy-vqa needs its data: pip install easy-vqa") from None
    question_texts, answer_texts, images = data.get_test_questions()
    paths = data.get_test_image_paths()
    chosen_indices = [index for index, image in enumerate(images) if image in PICTURES[questions]]

    def make(number: int) -> Sample:
        from PIL import Image

        index = chosen_indices[number]
        picture = Image.open(paths[images[index]]).convert("RGB")
        return Sample(f"easy-vqa/{index}", question_texts[index], [answer_texts[index]], [picture],
                      lambda text: scoring.exact(text, [answer_texts[index]]), cluster=f"image/{images[index]}",
                      kind="easy-vqa")  # fmt: skip

    return Task("easy-vqa", [f"easy-vqa/{index}" for index in chosen_indices], make, 6, "accuracy",
                config={"set": questions},
                clusters=lambda number: f"image/{images[chosen_indices[number]]}")  # fmt: skip
