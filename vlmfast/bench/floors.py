"""Floors: scores of answers given without the right media, to show how much of a score needs the media.

`text-only` asks the plain model without media, `grey` with grey media of the same size, `wrong-media` with those of
another question. `majority` asks no model: it gives the commonest answer that other questions of the same words have.
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
    """The sample as a floor asks it. number: the question's, in its task; the other one is half the task away.

    Where `wrong-media` finds no other media, the sample says so in `error`, and counts as failed.
    """
    if sample.error:
        return sample
    if floor == "text-only":
        media: list[Any] = []
    elif floor == "grey":
        media = [_grey(item) for item in sample.media]
    else:
        other = _another(sample, task, number)
        if other is None:
            return replace(sample, error=f"no other question of kind {sample.kind!r} has media of its own")
        media = other.media
    return replace(sample, media=media, opening=None, before=[])


def _grey(item: Any) -> Any:
    if isinstance(item, Clip):
        return replace(item, frames=np.full_like(np.asarray(item.frames), 128))
    return np.full_like(np.asarray(item), 128)


def _another(sample: Sample, task: Task, number: int) -> Sample | None:
    """The first question from half the task away on that asks the same kind about something else; None in 64 tries."""
    num_questions = len(task.ids)
    for distance in range(min(num_questions, 64)):
        candidate_number = (number + num_questions // 2 + distance) % num_questions
        candidate = task.sample(candidate_number)
        if not candidate.error and candidate.cluster != sample.cluster and candidate.kind == sample.kind:
            return candidate
    return None


def majority(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of the commonest answer. records: those of the plain model, with `question`, `expected` and `cluster`.

    Counted are questions of the same words about other media; where there are none, questions of the same kind. Scored
    by the exact answer.
    """
    by_words, by_kind = _counts(records, "question"), _counts(records, "kind")
    majority_records = []
    for record in records:
        answer = _commonest(by_words[record["question"]], record["cluster"])
        answer = answer or _commonest(by_kind[record["kind"]], record["cluster"]) or ""
        score = scoring.exact(answer, [record["expected"]])
        copied_fields = {field: record[field] for field in ("id", "kind", "cluster", "expected", "question")}
        majority_records.append(
            {**copied_fields, "method": MAJORITY, "answer": answer, "score": score, "batch": 1, "no_speed": "no model"}
        )
    return majority_records


def _counts(records: Sequence[dict[str, Any]], field_name: str) -> dict[str, list[tuple[str, str]]]:
    answers_by_value: dict[str, list[tuple[str, str]]] = {}
    for record in records:
        answers_by_value.setdefault(record[field_name], []).append((record["cluster"], record["expected"]))
    return answers_by_value


def _commonest(answers: list[tuple[str, str]], cluster: str) -> str | None:
    frequency = Counter(answer for other_cluster, answer in answers if other_cluster != cluster)
    return max(frequency, key=lambda answer: (frequency[answer], answer)) if frequency else None
