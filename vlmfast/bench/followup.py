"""A second question about the same media, on the cache that the first one left.

The first token of an answer is read off the prefill, before anything is compressed, so a question with a one-word
answer loses nothing to any policy. What compression costs shows in what is asked afterwards: the cache was compressed
for another question, and each further one reads only what is left. Every clip has one opening question and several
that follow, each on a copy of the compressed cache: `pocket/again`, eight seconds in 1,152 visual tokens;
`pocket/turns`, a bit over a minute in 1,024, a new scene every eight seconds and every question about another of them;
`easy-vqa/again`, its pictures enlarged to 1,024 tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from vlmfast.bench.question_sets import CHATS, PICTURES, QuestionSet
from vlmfast.bench.scoring import exact_fact
from vlmfast.bench.task import Clip, Sample, Task
from vlmfast.core import UserError

OFFSET = 2000  # clips of `evals.stream` have smaller numbers
EACH, SIZE = 5, 192  # questions about a clip, pixels a side: 8 seconds are 8 * 144 tokens
NEXT = 10_000  # from one try of a clip to the next, so that no two clips share one
SCENES = ("order", "what-when")  # kinds whose clips give rise to many questions
KINDS = (*SCENES, "motion", "when", "how-often", "during")
MINUTE, SCENE_QUESTIONS = 64, 9  # seconds of a clip of `pocket/turns`, and questions about it, one of them the opening
SIDE = 512  # pixels a side of an enlarged picture
Chat = tuple[Any, list[tuple[str, str]]]  # a `Clip` or a picture, questions with their answers, the opening first


@functools.lru_cache(maxsize=4)
def chat(seed: int, size: int = SIZE) -> Chat:
    """A held-out clip of one scene, with 1 + EACH different questions."""
    from vlmfast.pocket import questions, world
    from vlmfast.pocket.scenes import Rng

    for attempt in range(100):  # until a scene offers so many
        item = world.sample(SCENES[seed % len(SCENES)], seed + attempt * NEXT, "test", size=size, objects=(3, 3))
        rng, scene = Rng(2, 2001, seed, attempt), item.meta["scene"]
        asked = {item.question: item.answer}
        for number in range(60):
            got = questions.ask(KINDS[number % len(KINDS)], scene, rng)
            if got is not None:
                asked.setdefault(*got)
            if len(asked) > EACH:
                return Clip(item.frames.numpy(), item.fps), list(asked.items())
    raise RuntimeError(f"no clip with {EACH + 1} questions for seed {seed}")


@functools.lru_cache(maxsize=4)
def minute(seed: int) -> Chat:
    """A held-out clip of eight scenes, with one question about each and one about what shows up briefly."""
    from vlmfast.pocket.clips import clip
    from vlmfast.pocket.scenes import Rng

    drawn = clip(OFFSET + seed, MINUTE, questions=SCENE_QUESTIONS - 1)
    asked = Rng(2, 2002, seed).shuffled([(q.question, q.answer) for q in drawn.questions])
    return Clip(np.stack([frame.numpy() for _, frame in drawn.frames()]), drawn.fps), asked


@functools.lru_cache(maxsize=1)
def _pictures() -> dict[int, tuple[str, list[tuple[str, str]]]]:
    """Path and questions of the easy-VQA test pictures that have enough of them, by number."""
    import easy_vqa as data

    asked, answered, images = data.get_test_questions()
    paths, by_image = data.get_test_image_paths(), dict[int, dict[str, str]]()
    for question, answer, image in zip(asked, answered, images, strict=True):
        by_image.setdefault(image, {}).setdefault(question, answer)
    return {i: (paths[i], list(qa.items())[: EACH + 1]) for i, qa in sorted(by_image.items()) if len(qa) > EACH}


@functools.lru_cache(maxsize=4)
def picture(seed: int) -> Chat:
    """An easy-VQA test picture, enlarged, with 1 + EACH of its questions."""
    from PIL import Image

    path, asked = _pictures()[seed]
    return Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC), asked


TASKS = {
    "pocket/again": (chat, {"size": SIZE, "each": EACH}),
    "pocket/turns": (minute, {"seconds": MINUTE, "each": SCENE_QUESTIONS - 1}),
    "easy-vqa/again": (picture, {"size": SIDE, "each": EACH}),
}


def task(name: str, questions: QuestionSet = "reporting") -> Task:
    """Question i of a task of `TASKS` is one that follows the opening of a set's clip (or picture) i // each."""
    draw, config = TASKS[name]
    numbers = list((PICTURES if draw is picture else CHATS)[questions])
    each, short = config["each"], name.removeprefix("pocket/")
    try:
        numbers = [n for n in numbers if draw is not picture or n in _pictures()]
    except ImportError:
        raise UserError(f"task {name} needs its data: pip install easy-vqa") from None

    def make(i: int) -> Sample:
        seed, j = numbers[i // each], i % each
        media, asked = draw(seed)
        (opening, _), (question, answer) = asked[0], asked[1 + j]
        return Sample(f"{short}/{seed}/{j}", question, [answer], [media], lambda said: exact_fact(said, answer),
                      cluster=f"{short}/{seed}", kind=short, opening=opening)  # fmt: skip

    ids = [f"{short}/{seed}/{j}" for seed in numbers for j in range(each)]
    return Task(name, ids, make, 10, "accuracy", bucket=lambda i: i // each, config={**config, "set": questions},
                clusters=lambda i: f"{short}/{numbers[i // each]}")  # fmt: skip
