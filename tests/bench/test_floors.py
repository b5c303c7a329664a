"""Floors: what is answered without looking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmfast.bench import accuracy, floors, tasks
from vlmfast.bench.tasks import Clip, Sample


def sample(number: int, kind: str = "colour") -> Sample:
    media = np.full((8, 8, 3), number, np.uint8)
    return Sample(f"{kind}/{number}", "what colour ?", ["red" if number % 4 else "blue"], [media], lambda text: 0.0,
                  cluster=f"c{number // 2}", kind=kind, opening="and before ?", before=[("a", "b")])  # fmt: skip


def task(kinds: tuple[str, ...] = ("colour",), count: int = 12) -> tasks.Task:
    ids = [f"{kinds[i % len(kinds)]}/{i}" for i in range(count)]
    return tasks.Task("known", ids, lambda i: sample(i, kinds[i % len(kinds)]), 4, "accuracy")


def test_blind_questions_keep_their_words_and_lose_their_media() -> None:
    asked = task().sample(3)
    for floor in floors.ASKED:
        blind = floors.blinded(asked, floor, task(), 3)
        assert (blind.id, blind.question, blind.expected, blind.cluster) == ("colour/3", asked.question, ["red"], "c1")
        assert blind.opening is None and blind.before == []
    assert floors.blinded(asked, "text-only", task(), 3).media == []
    (grey,) = floors.blinded(asked, "grey", task(), 3).media
    assert grey.shape == (8, 8, 3) and (grey == 128).all()
    clip = Clip(np.zeros((4, 8, 8, 3), np.uint8), 2.0)
    asked.media = [clip]
    (grey_clip,) = floors.blinded(asked, "grey", task(), 3).media
    assert grey_clip.fps == 2.0 and grey_clip.frames.shape == (4, 8, 8, 3) and (grey_clip.frames == 128).all()


@pytest.mark.parametrize("kinds", [("colour",), ("colour", "shape"), ("colour", "shape", "count")])
def test_wrong_media_are_of_another_question_of_the_kind(kinds: tuple[str, ...]) -> None:
    questions = task(kinds)
    for number in range(12):
        asked = questions.sample(number)
        (other,) = floors.blinded(asked, "wrong-media", questions, number).media
        found = int(other[0, 0, 0])
        assert found // 2 != number // 2 and kinds[found % len(kinds)] == asked.kind


def test_a_question_without_other_media_is_an_error_and_not_grey() -> None:
    alone = tasks.Task("one", ["colour/0"], lambda i: sample(0), 4, "accuracy")
    assert "no other question of kind 'colour'" in str(floors.blinded(alone.sample(0), "wrong-media", alone, 0).error)


def test_the_majority_does_not_see_its_own_clip() -> None:
    def record(number: int, words: str, expected: str, cluster: str) -> dict[str, Any]:
        return {"id": str(number), "kind": "k", "cluster": cluster, "question": words, "expected": expected}

    records = [
        record(0, "where ?", "left", "a"), record(1, "where ?", "left", "b"), record(2, "where ?", "right", "c"),
        record(3, "who ?", "cat", "a"), record(4, "who ?", "dog", "b"), record(5, "alone ?", "left", "d"),
    ]  # fmt: skip
    answers = {r["id"]: r["answer"] for r in floors.majority(records)}
    assert answers == {"0": "right", "1": "right", "2": "left", "3": "dog", "4": "cat", "5": "left"}
    assert [r["score"] for r in floors.majority(records)] == [0, 0, 0, 0, 0, 1]


class Blind:
    """A model that says what the media show, and nothing where there are none."""

    name, alone = "blind", set[str]()
    device = "cpu"

    def __init__(self) -> None:
        import torch

        self.model = torch.nn.Linear(1, 1)
        self.model.dtype = torch.float32  # type: ignore[assignment]

    def ask(self, samples: Any, plan: Any, method: str, tokens: int) -> list[dict[str, Any]]:
        out = []
        for s in samples:
            seen = int(s.media[0][0, 0, 0]) if s.media else None
            answer = "" if seen is None else "red" if seen % 4 else "blue"
            out.append({"id": s.id, "method": method, "kind": s.kind, "cluster": s.cluster, "question": s.question,
                        "expected": s.expected[0], "answer": answer, "score": float(answer == s.expected[0]),
                        "batch": 1, "no_speed": "made up"})  # fmt: skip
        return out


def test_a_table_has_its_floors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "get", lambda *args: task(count=40))
    monkeypatch.setattr(accuracy, "laws", lambda *args: {})
    monkeypatch.setattr(accuracy, "identity_of", lambda *args: {"task": "known", "dtype": "float32"})
    result = accuracy.evaluate("known", tmp_path / "a.jsonl", names="uniform-50", loaded=Blind(), blind=True)  # type: ignore[arg-type]
    found = {row["name"]: row["metrics"]["accuracy"] for row in result["rows"]}
    assert list(found) == ["plain", "uniform-50", "text-only", "grey", "wrong-media", "majority"]
    assert (found["plain"], found["text-only"], found["majority"]) == (1.0, 0.0, 0.75)
    assert 0 < found["grey"] < 1 and 0 < found["wrong-media"] <= 1
    bare = accuracy.evaluate("known", tmp_path / "b.jsonl", names="uniform-50", loaded=Blind())  # type: ignore[arg-type]
    assert [row["name"] for row in bare["rows"]] == ["plain", "uniform-50"]
