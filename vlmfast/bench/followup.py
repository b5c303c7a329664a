"""A second question about the same media, on the cache that the first one left.

The first token of an answer is read off the prefill, before anything is compressed, so a question with a one-word
answer loses nothing to any policy. What compression costs shows in what is asked afterwards: the cache was compressed
for another question, and each further one reads only what is left. Every clip has one opening question and several
that follow, each on a copy of the compressed cache: `pocket/again`, eight seconds in 1,152 visual tokens;
`pocket/turns`, a bit over a minute in 1,024, a new scene every eight seconds and every question about another of them;
`easy-vqa/again`, its pictures enlarged to 1,024 tokens.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmfast.bench.scoring import exact_fact
from vlmfast.bench.tasks import AGAIN, Clip, Sample, Task
from vlmfast.core import UserError
from vlmfast.plan import Plan

if TYPE_CHECKING:
    from vlmfast.bench.runner import Runner

OFFSET = 100  # clips of `evals.stream` have smaller seeds
CLIPS, EACH, SIZE = 400, 5, 192  # clips, questions about each, pixels a side: 8 seconds are 8 * 144 tokens
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
        item = world.sample(SCENES[seed % len(SCENES)], seed + attempt * CLIPS, "test", size=size, objects=(3, 3))
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
def _pictures() -> list[tuple[str, list[tuple[str, str]]]]:
    """Path and questions of the easy-VQA test pictures that have enough of them."""
    import easy_vqa as data

    asked, answered, images = data.get_test_questions()
    paths, by_image = data.get_test_image_paths(), dict[int, dict[str, str]]()
    for question, answer, image in zip(asked, answered, images, strict=True):
        by_image.setdefault(image, {}).setdefault(question, answer)
    return [(paths[i], list(qa.items())[: EACH + 1]) for i, qa in sorted(by_image.items()) if len(qa) > EACH]


@functools.lru_cache(maxsize=4)
def picture(seed: int) -> Chat:
    """An easy-VQA test picture, enlarged, with 1 + EACH of its questions."""
    from PIL import Image

    path, asked = _pictures()[seed]
    return Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC), asked


TASKS = dict(zip(AGAIN, [
    (chat, {"size": SIZE, "each": EACH}), (minute, {"seconds": MINUTE, "each": SCENE_QUESTIONS - 1}),
    (picture, {"size": SIDE, "each": EACH}),
], strict=True))  # fmt: skip


def task(name: str) -> Task:
    """Question i of a task of `TASKS` is one of those that follow the opening of clip (or picture) i // each."""
    draw, config = TASKS[name]
    each, short = config["each"], name.removeprefix("pocket/")
    try:
        many = min(CLIPS, len(_pictures())) if draw is picture else CLIPS
    except ImportError:
        raise UserError(f"task {name} needs its data: pip install easy-vqa") from None

    def make(i: int) -> Sample:
        seed, j = divmod(i, each)
        media, asked = draw(seed)
        (opening, _), (question, answer) = asked[0], asked[1 + j]
        return Sample(f"{short}/{seed}/{j}", question, [answer], [media], lambda said: exact_fact(said, answer),
                      cluster=f"{short}/{seed}", kind=short, opening=opening)  # fmt: skip

    ids = [f"{short}/{seed}/{j}" for seed in range(many) for j in range(each)]
    return Task(name, ids, make, 10, "accuracy", bucket=lambda i: i // each, config=config,
                clusters=lambda i: f"{short}/{i // each}")  # fmt: skip


def ask(runner: Runner, samples: Sequence[Sample], plan: Plan, tokens: int) -> tuple[list[str], dict[str, Any]]:
    """The answers to questions of one clip, and the report of the opening, which prefills and compresses.

    Every question goes on from a copy of the opening's cache, taken back to where the two prompts part, so that none
    hears the others.
    """
    import torch

    import vlmfast
    from vlmfast.runtime.compat import CACHE, cache_of

    model = runner.model
    opening, *prompts = (
        runner.inputs([replace(s, question=q)])
        for s, q in [(samples[0], str(samples[0].opening)), *((s, s.question) for s in samples)]
    )
    decode, answers = runner.processor.tokenizer.decode, []
    extra = {"tokenizer": runner.processor.tokenizer} if plan.speculate is not None else {}
    with vlmfast.accelerate(model, plan) as fast:
        out = model.generate(**opening, **extra, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
        report, kept = fast.report.json(), cache_of(out)
        for prompt in prompts:
            ids, before = prompt["input_ids"], opening["input_ids"]
            short = min(ids.shape[1], before.shape[1])
            common = int((ids[0, :short] == before[0, :short]).long().cumprod(0).sum())
            # on a kept cache transformers puts text behind the end of a long clip, in a whole prompt behind its start
            positions = model._prepare_position_ids_for_generation(ids, dict(prompt))[..., common:]
            cache = copy.deepcopy(kept)
            cache.crop(common - cache.get_seq_length())
            said = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, max_new_tokens=tokens,
                do_sample=False, **{CACHE: cache}, **extra,
            )  # fmt: skip
            answers.append(decode(said[0, ids.shape[1] :], skip_special_tokens=True))
    return answers, report
