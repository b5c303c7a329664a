"""tune: what it confirms, refutes and chooses, on a runner with known scores and speeds and on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from evals import accuracy, journal, methods, runner, tasks
from vlmfast import tune
from vlmfast.core import UserError
from vlmfast.plan import Plan

# name -> (share of right answers that it keeps, milliseconds)
TRUTH = {"plain": (1.0, 100.0), "good": (1.0, 50.0), "slow": (1.0, 130.0), "close": (0.97, 20.0), "bad": (0.5, 10.0)}


class Known:
    """Answers like a model whose plans have known scores and speeds; counts what it was asked."""

    def __init__(self) -> None:
        self.asked: dict[str, int] = {}

    def ask(self, samples: list[tasks.Sample], plan: Plan, method: str, tokens: int) -> list[dict[str, Any]]:
        self.asked[method] = self.asked.get(method, 0) + len(samples)
        out = []
        for s in samples:
            if method == "broken":
                out.append({"id": s.id, "method": method, "cluster": s.id, "score": 0.0, "error": "ValueError: no"})
                continue
            rng = np.random.default_rng(int(s.id))
            right, luck, noise = rng.random() < 0.95, rng.random(), rng.normal(1, 0.02)
            keep, ms = TRUTH[method]
            score = float(right and luck < keep)
            out.append({"id": s.id, "method": method, "cluster": s.id, "score": score, "total_ms": ms * noise})
        return out


def known_task(n: int) -> tasks.Task:
    def make(i: int) -> tasks.Sample:
        return tasks.Sample(str(i), "?", [""], [], lambda text: 0.0)

    return tasks.Task("known", [str(i) for i in range(n)], make, 1, "accuracy")


def searched(tmp_path: Path, names: list[str], n: int = 2000, minutes: float = 5) -> tuple[Known, list[tune.Candidate]]:
    run = Known()
    plans = dict.fromkeys(names, Plan())
    book = journal.Journal(tmp_path / "a.jsonl", "x=1", dict.fromkeys(["plain", *names], "h"))
    return run, tune.search(run, known_task(n), plans, book, floor=0.99, minutes=minutes)


def test_the_fastest_plan_that_keeps_the_floor_wins(tmp_path: Path) -> None:
    run, field = searched(tmp_path, ["good", "slow", "close", "bad", "broken"])
    status = {c.name: c.status for c in field}
    assert tune.best(field).name == "good"
    assert status["close"] == status["bad"] == tune.REFUTED and status["broken"] == tune.FAILED
    assert run.asked["bad"] <= 64 < run.asked["close"], "what is plainly bad costs few questions"
    assert run.asked["slow"] < run.asked["good"], "what is slower than plain is not pursued"


def test_few_questions_confirm_nothing(tmp_path: Path) -> None:
    """Forty questions without a single difference cannot prove 99 %."""
    _, field = searched(tmp_path, ["good"], n=40)
    assert field[0].status == tune.OPEN and field[0].margin[0] < 0
    assert tune.best(field).name == "plain"


def test_the_clock_stops_the_search(tmp_path: Path) -> None:
    run, field = searched(tmp_path, ["good", "close"], minutes=0.0)
    assert run.asked["plain"] == tune.SLICE and len(field[0].answered) == tune.SLICE


def test_candidates_hold_the_presets_and_compositions() -> None:
    plans = tune.candidates(draft="some/draft")
    assert any(p.prune and p.kv and p.speculate for p in plans.values()) and any(n.endswith("+loose") for n in plans)
    assert Plan() not in plans.values() and len({repr(p) for p in plans.values()}) == len(plans)
    from vlmfast.plan import preset

    assert all(preset(n) in plans.values() or preset(n) == Plan() for n in ("safe", "balanced", "fast"))
    assert list(tune.candidates("vidcom2-25,plain")) == ["vidcom2-25"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> runner.Runner:
    return runner.load(str(tiny.save("qwen2_5_vl", tmp_path_factory.mktemp("tiny"))))


def test_tune_writes_a_plan_its_record_and_a_page(run: runner.Runner, tmp_path: Path) -> None:
    """Expected are the plain model's own answers, so plain scores 1 and the floor 0.5 is easily judged."""
    from PIL import Image

    lines = []
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        lines.append({"id": str(i), "image": f"{i}.png", "question": "what color ?", "answer": "?"})
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps(x) + "\n" for x in lines))
    accuracy.evaluate(str(file), tmp_path / "plain.jsonl", loaded=run, tokens=3)
    said = {r["id"]: r["answer"] for r in map(json.loads, (tmp_path / "plain.jsonl").read_text().splitlines())}
    file.write_text("".join(json.dumps(x | {"answer": said[x["id"]]}) + "\n" for x in lines))
    out = tmp_path / "plan.json"
    names = "uniform-50,plain_loop"
    chosen, field = tune.tune("tiny", str(file), out, floor=0.5, names=names, loaded=run, tokens=3)
    loop = next(c for c in field if c.name == "plain_loop")
    assert loop.margin[0] > 0 and loop.status == tune.CONFIRMED, "the loop says what plain says"
    assert Plan.load(out) == chosen.plan
    record = json.loads(out.with_suffix(".record.json").read_text())
    assert record["config"]["tune"]["chosen"] == chosen.name and record["rows"][0]["metrics"]["accuracy"] == 1
    page = out.with_suffix(".html").read_text()
    assert "data:image/png" in page and chosen.name in page and "http" not in page
    with pytest.raises(UserError, match="--force"):
        tune.tune("tiny", str(file), out, loaded=run)


@pytest.mark.parametrize("floor", [0.0, 1.5])
def test_a_floor_is_a_share(tmp_path: Path, floor: float) -> None:
    with pytest.raises(UserError, match="share"):
        tune.tune("tiny", "easy-vqa", tmp_path / "p.json", floor=floor)
    assert methods.plan("plain") == Plan()
