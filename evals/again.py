"""A second question about the same media, on the cache that the first one left.

The first token of an answer is read off the prefill, before anything is compressed, so a question with a one-word
answer loses nothing to any policy. What compression costs shows in what is asked afterwards: the cache was compressed
for another question, and each further one reads only what is left. `task` draws clips of 1,152 visual tokens, each
with one opening question and several that follow, each on a copy of the compressed cache.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from evals.stream_runs import right
from evals.tasks import Clip, Sample, Task
from vlmfast.plan import Plan

if TYPE_CHECKING:
    from evals.runner import Runner

CLIPS, EACH, SIZE = 400, 5, 192  # clips, questions about each, pixels a side: 8 seconds are 8 * 144 tokens
SCENES = ("order", "what-when")  # kinds whose clips give rise to many questions
KINDS = (*SCENES, "motion", "when", "how-often", "during")


@functools.lru_cache(maxsize=4)
def chat(seed: int, size: int = SIZE) -> tuple[Any, list[tuple[str, str]]]:
    """A held-out clip (`world.Sample`) and 1 + EACH different questions about it with their answers."""
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
                return item, list(asked.items())
    raise RuntimeError(f"no clip with {EACH + 1} questions for seed {seed}")


def task(name: str) -> Task:
    """Question i is one of those that follow the opening of clip i // EACH."""

    def make(i: int) -> Sample:
        seed, j = divmod(i, EACH)
        item, asked = chat(seed)
        (opening, _), (question, answer) = asked[0], asked[1 + j]
        return Sample(f"again/{seed}/{j}", question, [answer], [Clip(item.frames.numpy(), item.fps)],
                      lambda said: right(said, answer), cluster=f"again/{seed}", kind="again",
                      opening=opening)  # fmt: skip

    ids = [f"again/{seed}/{j}" for seed in range(CLIPS) for j in range(EACH)]
    return Task(name, ids, make, 10, "accuracy", bucket=lambda i: i // EACH, config={"size": SIZE, "each": EACH})


def ask(runner: Runner, samples: Sequence[Sample], plan: Plan, tokens: int) -> tuple[list[str], dict[str, Any]]:
    """The answers to questions of one clip, and the report of the opening, which prefills and compresses.

    Every question goes on from a copy of the opening's cache, taken back to where the two prompts part, so that none
    hears the others.
    """
    import torch

    import vlmfast
    from vlmfast.runtime.names import CACHE, cache_of

    opening, *prompts = (
        runner.inputs([replace(s, question=q)])["input_ids"]
        for s, q in [(samples[0], str(samples[0].opening)), *((s, s.question) for s in samples)]
    )
    inputs = runner.inputs([replace(samples[0], question=str(samples[0].opening))])
    decode, answers = runner.processor.tokenizer.decode, []
    extra = {"tokenizer": runner.processor.tokenizer} if plan.speculate is not None else {}
    with vlmfast.accelerate(runner.model, plan) as fast:
        out = runner.model.generate(**inputs, **extra, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
        report, kept = fast.report.json(), cache_of(out)
        for ids in prompts:
            short = min(ids.shape[1], opening.shape[1])
            common = int((ids[0, :short] == opening[0, :short]).long().cumprod(0).sum())
            cache = copy.deepcopy(kept)
            cache.crop(common - cache.get_seq_length())
            said = runner.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                **{CACHE: cache}, **extra,
            )  # fmt: skip
            answers.append(decode(said[0, ids.shape[1] :], skip_special_tokens=True))
    return answers, report
