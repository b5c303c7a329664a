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
        drawn_sample = world.sample(
            SCENES[seed % len(SCENES)], seed + attempt * NEXT, "test", size=size, objects=(3, 3)
        )
        generator, scene = Rng(2, 2001, seed, attempt), drawn_sample.meta["scene"]
        answers_by_question = {drawn_sample.question: drawn_sample.answer}
        for kind_number in range(60):
            question_pair = questions.ask(KINDS[kind_number % len(KINDS)], scene, generator)
            if question_pair is not None:
                answers_by_question.setdefault(*question_pair)
            if len(answers_by_question) > EACH:
                return Clip(drawn_sample.frames.numpy(), drawn_sample.fps), list(answers_by_question.items())
    raise RuntimeError(f"no clip with {EACH + 1} questions for seed {seed}")


@functools.lru_cache(maxsize=4)
def minute(seed: int) -> Chat:
    """A held-out clip of eight scenes, with one question about each and one about what shows up briefly."""
    from vlmfast.pocket.clips import clip
    from vlmfast.pocket.scenes import Rng

    drawn_clip = clip(OFFSET + seed, MINUTE, questions=SCENE_QUESTIONS - 1)
    question_pairs = Rng(2, 2002, seed).shuffled([(item.question, item.answer) for item in drawn_clip.questions])
    return Clip(np.stack([frame.numpy() for _, frame in drawn_clip.frames()]), drawn_clip.fps), question_pairs


@functools.lru_cache(maxsize=1)
def _pictures() -> dict[int, tuple[str, list[tuple[str, str]]]]:
    """Path and questions of the easy-VQA test pictures that have enough of them, by number."""
    import easy_vqa as data

    question_texts, answer_texts, image_numbers = data.get_test_questions()
    paths, answers_by_image = data.get_test_image_paths(), dict[int, dict[str, str]]()
    for question, answer, image in zip(question_texts, answer_texts, image_numbers, strict=True):
        answers_by_image.setdefault(image, {}).setdefault(question, answer)
    return {
        number: (paths[number], list(image_answers.items())[: EACH + 1])
        for number, image_answers in sorted(answers_by_image.items())
        if len(image_answers) > EACH
    }


@functools.lru_cache(maxsize=4)
def picture(seed: int) -> Chat:
    """An easy-VQA test picture, enlarged, with 1 + EACH of its questions."""
    from PIL import Image

    path, question_pairs = _pictures()[seed]
    return Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC), question_pairs


TASKS = {
    "pocket/again": (chat, {"size": SIZE, "each": EACH}),
    "pocket/turns": (minute, {"seconds": MINUTE, "each": SCENE_QUESTIONS - 1}),
    "easy-vqa/again": (picture, {"size": SIDE, "each": EACH}),
}


def task(name: str, questions: QuestionSet = "reporting") -> Task:
    """Question i of a task of `TASKS` is one that follows the opening of a set's clip (or picture) i // each."""
    draw_chat, config = TASKS[name]
    numbers = list((PICTURES if draw_chat is picture else CHATS)[questions])
    num_following, short_name = config["each"], name.removeprefix("pocket/")
    try:
        numbers = [number for number in numbers if draw_chat is not picture or number in _pictures()]
    except ImportError:
        raise UserError(f"task {name} needs its data: pip install easy-vqa") from None

    def make(index: int) -> Sample:
        seed, follow_index = numbers[index // num_following], index % num_following
        media, question_pairs = draw_chat(seed)
        (opening, _), (question, answer) = question_pairs[0], question_pairs[1 + follow_index]
        return Sample(f"{short_name}/{seed}/{follow_index}", question, [answer], [media],
                      lambda text: exact_fact(text, answer),
                      cluster=f"{short_name}/{seed}", kind=short_name, opening=opening)  # fmt: skip

    question_ids = [f"{short_name}/{seed}/{follow_index}" for seed in numbers for follow_index in range(num_following)]
    return Task(name, question_ids, make, 10, "accuracy", bucket=lambda index: index // num_following,
                config={**config, "set": questions},
                clusters=lambda index: f"{short_name}/{numbers[index // num_following]}")  # fmt: skip
