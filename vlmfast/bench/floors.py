"""Floors: what is answered without looking. Beside them one sees how much of a score the media are needed for.

`text-only` asks the plain model without media, `grey` with grey media of the same size, `wrong-media` with those of
another question. `majority` asks no model: it says the commonest answer that other questions of the same words have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vlmfast.bench import scoring
from vlmfast.bench.task import Clip, Sample, Task

ASKED = ("text-only", "grey", "wrong-media")  # of the plain model
MAJORITY = "majority"


def blinded(sample: Sample, floor: str, task: Task, number: int) -> Sample:
    """The sample as a floor asks it. number: the question's, in its task; the other one is half the task away."""
    if sample.error:
        return sample
    if floor == "text-only":
        media: list[Any] = []
    elif floor == "grey":
        media = [_grey(item) for item in sample.media]
    else:
        media = _of_another(sample, task, number)
    return replace(sample, media=media, opening=None, before=[])


def _grey(item: Any) -> Any:
    if isinstance(item, Clip):
        return replace(item, frames=np.full_like(np.asarray(item.frames), 128))
    return np.full_like(np.asarray(item), 128)


def _of_another(sample: Sample, task: Task, number: int) -> list[Any]:
    """Media of the first question from half the task away on that asks the same kind about something else."""
    count = len(task.ids)
    for step in range(min(count, 64)):
        other_number = (number + count // 2 + step) % count
        other = task.sample(other_number)
        if not other.error and other.cluster != sample.cluster and other.kind == sample.kind:
            return other.media
    return [_grey(item) for item in sample.media]


def majority(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of the commonest answer. records: those of the plain model, with `question`, `expected` and `cluster`.

    Counted are questions of the same words about other media; where there are none, questions of the same kind. Scored
    by the exact answer.
    """
    by_words, by_kind = _counts(records, "question"), _counts(records, "kind")
    out = []
    for record in records:
        answer = _commonest(by_words[record["question"]], record["cluster"])
        answer = answer or _commonest(by_kind[record["kind"]], record["cluster"]) or ""
        score = scoring.exact(answer, [record["expected"]])
        kept = {k: record[k] for k in ("id", "kind", "cluster", "expected", "question")}
        out.append({**kept, "method": MAJORITY, "answer": answer, "score": score, "batch": 1, "no_speed": "no model"})
    return out


def _counts(records: Sequence[dict[str, Any]], key: str) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for record in records:
        found.setdefault(record[key], []).append((record["cluster"], record["expected"]))
    return found


def _commonest(answers: list[tuple[str, str]], cluster: str) -> str | None:
    counted = Counter(answer for other, answer in answers if other != cluster)
    return max(counted, key=lambda answer: (counted[answer], answer)) if counted else None
