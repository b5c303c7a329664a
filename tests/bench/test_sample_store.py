"""A killed speed suite goes on where it stopped: what was measured is not run again, and no pair is torn apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evals.speed import suites
from vlmfast.bench import timing
from vlmfast.bench.sample_store import open_store
from vlmfast.core import UserError

IDENTITY = {"suite": "encode", "commit": "abc"}


class Killed(Exception):
    pass


def competitors(calls: list[str], last: int | None = None) -> dict[str, Any]:
    """Four runs that count themselves; the one numbered `last` is killed."""

    def one(name: str) -> Any:
        def run() -> timing.Sample:
            if last is not None and len(calls) == last:
                raise Killed
            calls.append(name)
            return {"x_ms": float(len(calls))}

        return run

    return {name: one(name) for name in ("plain", "tower", "a", "b")}


@pytest.mark.parametrize("last", [1, 4, 11, 27])
def test_a_killed_run_goes_on(tmp_path: Path, last: int) -> None:
    file, calls = tmp_path / "encode.jsonl", list[str]()
    with pytest.raises(Killed):
        timing.beside(competitors(calls, last), ["plain", "tower"], 4, 0, store=open_store(file, IDENTITY, False))
    before, whole = list(calls), list[str]()
    store = open_store(file, IDENTITY, False)
    taken = timing.beside(competitors(calls), ["plain", "tower"], 4, 0, store=store)
    reference = timing.beside(competitors(whole), ["plain", "tower"], 4, 0)
    assert {n: {k: len(v) for k, v in t.items()} for n, t in taken.items()} == {
        n: {k: len(v) for k, v in t.items()} for n, t in reference.items()
    }
    assert len(whole) <= len(calls) <= len(whole) + 3, "at most two competitors and their baselines again"
    for name, samples in taken.items():  # one after the other, in one start
        for together in zip(*samples.values(), strict=True):
            numbers = sorted(sample["x_ms"] for sample in together)
            assert numbers[-1] - numbers[0] <= 3 or name == "plain"
            assert (numbers[-1] <= len(before)) or (numbers[0] > len(before) - 3)
    calls.clear()
    timing.beside(competitors(calls), ["plain", "tower"], 4, 0, store=open_store(file, IDENTITY, False))
    assert calls == []
    store.close()
    assert not file.exists()


def test_samples_of_another_run_are_not_mixed_in(tmp_path: Path) -> None:
    file, calls = tmp_path / "encode.jsonl", list[str]()
    timing.beside(competitors(calls), ["plain"], 1, 0, store=open_store(file, IDENTITY, False))
    other = IDENTITY | {"commit": "def"}
    with pytest.raises(UserError, match=r"encode\.jsonl line 1 comes from another run \(commit abc, now def\)"):
        open_store(file, other, False)
    calls.clear()
    timing.beside(competitors(calls), ["plain"], 1, 0, store=open_store(file, other, True))
    assert calls


def test_a_suite_leaves_no_samples_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evals.speed import read

    def run(quick: bool, store: Any) -> dict[str, Any]:
        timing.beside(competitors([]), ["plain"], 1, 0, store=store)
        assert (tmp_path / "runs" / "read.jsonl").exists()
        return {"rows": [{"name": "plain", "plan": {}, "params": {}, "metrics": {"x_ms": 1.0}, "vs": {}}]}

    monkeypatch.setattr(read, "run", run)
    suites.main("read", tmp_path / "read.json", quick=True, samples=tmp_path / "runs")
    assert (tmp_path / "read.json").exists() and not (tmp_path / "runs" / "read.jsonl").exists()


def test_killed_descriptions_go_on_at_the_next_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decode suite keeps a picture with all its competitors, or nothing of it."""
    import torch

    from evals.speed import decode_runs

    asked: list[tuple[int, str]] = []

    def timed(model: Any, tokenizer: Any, picture: int, who: decode_runs.Competitor) -> tuple[Any, str, list]:
        if len(asked) == last:
            raise Killed
        asked.append((picture, who.name))
        return {"total_ms": float(len(asked))}, who.name, [(4, 2)]

    monkeypatch.setattr(decode_runs, "timed", timed)
    monkeypatch.setattr("vlmfast.pocket.world.score", lambda item, text: 1.0)
    model, who = torch.nn.Linear(1, 1), [decode_runs.Competitor(name, {}) for name in ("plain", "ours", "theirs")]
    items: list[Any] = [(picture, None) for picture in range(4)]
    file, last = tmp_path / "decode.jsonl", 3 + 3 + 2  # the warm-up, a picture, and two thirds of the next
    with pytest.raises(Killed):
        decode_runs.rotate(model, None, items, who, store=open_store(file, IDENTITY, False))
    asked.clear()
    last = -1
    results = decode_runs.rotate(model, None, items, who, store=open_store(file, IDENTITY, False))
    assert [picture for picture, _ in asked] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3, "the warm-up, then the rest"
    assert [{r["text"] for r in of_one} for of_one in results] == [{c.name} for c in who]
    assert all(len(of_one) == 4 for of_one in results)
    asked.clear()
    again = decode_runs.rotate(model, None, items, who, store=open_store(file, IDENTITY, False))
    assert asked == [] and [[r["total_ms"] for r in x] for x in again] == [[r["total_ms"] for r in x] for x in results]
