"""tune: what it confirms, refutes and chooses, on a runner with known scores and speeds and on a tiny model."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from evals.accuracy.command import show
from vlmfast.bench import accuracy, deadline, journal, methods, runner, stats, tasks, tune
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


def test_what_the_search_saw_confirms_nothing(tmp_path: Path) -> None:
    """Questions about one clip stay in one part, the parts share none, and the limit counts both."""
    task = known_task(90)
    task.clusters = lambda i: str(i % 30)
    for limit, sizes in ((None, (30, 60)), (9, (3, 6)), (1, (1, 0))):
        searched, fresh = tune.halves(task, limit)
        assert (len(searched), len(fresh)) == sizes
        assert not {i % 30 for i in searched} & {i % 30 for i in fresh}
    _, field = searched_of(tmp_path, ["good", "bad"], n=600)
    asked = {c.name: set(c.answered) for c in field}
    search = {str(i) for i in tune.halves(known_task(600), None)[0]}
    assert field[0].fresh and not asked["good"] & search and asked["bad"] <= search and not field[1].fresh


def test_evidence_is_a_bet_on_clips() -> None:
    assert stats.evidence([], []) == 1
    assert stats.evidence([0.5, 0.5], ["a", "b"]) == pytest.approx(np.mean([(1 + 0.5 * b) ** 2 for b in stats.BETS]))
    assert stats.evidence([1.0, 0.0, 0.5], ["a", "a", "b"]) == stats.evidence([0.5, 0.5], ["a", "b"])
    with pytest.raises(ValueError, match="gaps"):
        stats.evidence([1.5], ["a"])


def at_the_floor(seed: int, plans: int, n: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict]:
    """A whole search over plans that keep 99 % of a plain score of 0.8 exactly, answers drawn beforehand: what `best`
    takes, and all records. Ever faster plans, questions in clips of two that are right or wrong alike."""
    rng = np.random.default_rng(seed)
    plain = rng.random(n) < 0.8
    lost, won = rng.random((plans, n)) < 0.02, rng.random((plans, n)) < 0.04
    assert pytest.approx(0.99 * 0.8) == 0.8 * (1 - 0.02) + 0.2 * 0.04
    right = np.where(plain, ~lost, won)
    names, task = [f"p{k}" for k in range(plans)], known_task(2 * n)
    book = types.SimpleNamespace(records={})
    task.clusters = lambda i: str(i // 2)

    def ask(run: Any, task: Any, racing: Any, chosen: list[int], journal: Any, **more: Any) -> bool:
        for i in chosen:
            for k, name in [(-1, "plain"), *((int(c.name[1:]), c.name) for c in racing)]:
                score = float(plain[i // 2] if k < 0 else right[k, i // 2])
                journal.records[str(i), name] = {"score": score, "cluster": str(i // 2), "total_ms": 90.0 - k}
        return True

    monkeypatch.setattr(tune, "_ask", ask)
    field = tune.search(None, task, dict.fromkeys(names, Plan()), book, floor=0.99)
    return tune.best(field), book.records


def peeked(records: dict, floor: float = 0.99) -> bool:
    """Does any plan reach its 95 % bound at a look, as if it were the only plan and the only look?"""
    for name in {m for _, m in records} - {"plain"}:
        ids = [i for i, m in records if m == name]
        for n in (64, 128, 256, 512):
            gap = [records[i, name]["score"] - floor * records[i, "plain"]["score"] for i in ids[:n]]
            if len(gap) >= n and stats.paired(gap, [0.0] * n, [records[i, name]["cluster"] for i in ids[:n]]).low >= 0:
                return True
    return False


@pytest.mark.parametrize(("runs", "n"), [(8, 300), pytest.param(400, 500, marks=pytest.mark.slow)])
def test_at_the_floor_a_whole_search_is_seldom_wrong(runs: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten plans exactly at the floor count as wrong when confirmed: 5 % of the searches at most, where bounds that are
    looked at again and again are wrong in many more."""
    monkeypatch.setattr(stats, "RESAMPLES", 200)
    found = [at_the_floor(seed, 10, n, monkeypatch) for seed in range(runs)]
    wrong = sum(chosen.name != "plain" for chosen, _ in found)
    assert wrong <= 0.05 * runs
    assert sum(peeked(records) for _, records in found) > 3 * 0.05 * runs, "the simulation is not hard enough"


def test_a_plan_above_the_floor_is_found(tmp_path: Path) -> None:
    """Eight hundred fresh questions confirm a plan that loses nothing at a floor of 99 %."""
    _, field = searched_of(tmp_path, ["good"], n=1200)
    assert tune.best(field).name == "good" and field[0].faster[0] > 1.9


def known_task(n: int) -> tasks.Task:
    def make(i: int) -> tasks.Sample:
        return tasks.Sample(str(i), "?", [""], [], lambda text: 0.0)

    return tasks.Task("known", [str(i) for i in range(n)], make, 1, "accuracy")


def searched_of(
    tmp_path: Path, names: list[str], n: int = 2000, minutes: float = 5
) -> tuple[Known, list[tune.Candidate]]:
    run = Known()
    plans = dict.fromkeys(names, Plan())
    book = journal.Journal(tmp_path / "a.jsonl", "x=1", dict.fromkeys(["plain", *names], "h"))
    return run, tune.search(run, known_task(n), plans, book, floor=0.99, minutes=minutes)


def test_the_fastest_plan_that_keeps_the_floor_wins(tmp_path: Path) -> None:
    run, field = searched_of(tmp_path, ["good", "slow", "close", "bad", "broken"])
    status = {c.name: c.status for c in field}
    assert tune.best(field).name == "good"
    assert status["close"] == status["bad"] == tune.REFUTED and status["broken"] == tune.FAILED
    assert run.asked["bad"] <= 64 < run.asked["close"], "what is plainly bad costs few questions"
    assert run.asked["slow"] < run.asked["good"], "what is slower than plain is not pursued"


def test_few_questions_confirm_nothing(tmp_path: Path) -> None:
    """Forty questions without a single difference cannot prove 99 %."""
    _, field = searched_of(tmp_path, ["good"], n=40)
    assert field[0].status == tune.OPEN and field[0].margin[0] < 0
    assert tune.best(field).name == "plain"


class Clock:
    """Seconds that pass only while a question is answered."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Slow(Known):
    """Takes so many seconds for every answer."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def ask(self, samples: list[tasks.Sample], plan: Plan, method: str, tokens: int) -> list[dict[str, Any]]:
        self.clock.now += self.seconds * len(samples)
        return super().ask(samples, plan, method, tokens)


@pytest.mark.parametrize(("minutes", "seconds", "spent"), [(3.0, 5.0, 0.0), (3.0, 40.0, 30.0), (20.0, 1.0, 0.0)])
def test_the_minutes_are_kept_within_a_quarter(tmp_path: Path, minutes: float, seconds: float, spent: float) -> None:
    """Also with many plans and slow answers, and when loading has used a part of the minutes before the first one."""
    clock, said = Clock(), []
    began = clock()
    clock.now += spent
    names = ["good", "close", "slow", "bad"]
    run, book = (
        Slow(clock, seconds),
        journal.Journal(tmp_path / "a.jsonl", "x=1", dict.fromkeys(["plain", *names], "h")),
    )
    field = tune.search(
        run, known_task(2000), dict.fromkeys(names, Plan()), book, minutes=minutes, say=said.append, clock=clock,
        start=began,
    )  # fmt: skip
    took = (clock() - began) / 60
    assert took <= 1.25 * minutes and took >= 0.9 * minutes
    assert sum(run.asked.values()) == len(book.records) == round((took * 60 - spent) / seconds)
    progress = [line for line in said if "min left" in line]
    assert len(progress) >= minutes * 60 / max(2 * deadline.SAY, 2 * seconds) - 2, "somebody who waits is told"
    assert all(set(c.answered) <= {i for i, name in book.records if name == "plain"} for c in field)


def test_no_time_for_one_question_is_an_error_and_not_a_plan(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give more minutes"):
        searched_of(tmp_path, ["good"], minutes=0.0)


def test_what_was_not_asked_has_no_figures(run: runner.Runner, tmp_path: Path) -> None:
    """A search that ends after its first answers writes whole files: no infinity, no missing field."""
    file, clock = own_questions(tmp_path), Clock()

    def ticking() -> float:
        clock.now += 10
        return clock.now

    out = tmp_path / "plan.json"
    chosen, field = tune.tune(
        "tiny", str(file), out, names="uniform-50,plain_loop,uniform-25", loaded=run, tokens=2, minutes=2, clock=ticking
    )
    assert chosen.name == "plain" and any(not c.answered for c in field) | any(len(c.answered) < 3 for c in field)
    text = out.with_suffix(".record.json").read_text()
    assert any(c.fresh for c in field)
    assert "Infinity" not in text and "NaN" not in text and Plan.load(out) == Plan()


def own_questions(folder: Path, image: str = "{}.png", n: int = 6) -> Path:
    """A file of questions about pictures beside it; image: how they are named in it."""
    from PIL import Image

    lines = []
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append({"id": str(i), "image": image.format(i), "question": "what color ?", "answer": "cat"})
    file = folder / "q.jsonl"
    file.write_text("".join(json.dumps(x) + "\n" for x in lines))
    return file


@pytest.mark.parametrize("where", ["../media/{}.png", "{home}/media/{}.png"])
def test_media_may_lie_outside_the_folder(run: runner.Runner, tmp_path: Path, where: str) -> None:
    """Relative and absolute; clusters name the same file alike and hold no absolute path."""
    for name in ("media", "asked"):
        (tmp_path / name).mkdir()
    own_questions(tmp_path / "media")
    lines = [
        {"image": where.replace("{home}", str(tmp_path)).format(i // 2), "question": "what ?", "answer": "cat"}
        for i in range(4)
    ]
    file = tmp_path / "asked" / "q.jsonl"
    file.write_text("".join(json.dumps(x) + "\n" for x in lines))
    task = tasks.get(str(file))
    samples = [task.sample(i) for i in range(4)]
    assert [s.error for s in samples] == [None] * 4
    assert [s.cluster for s in samples] == [f"../media/{i // 2}.png" for i in range(4)]
    result = accuracy.evaluate(str(file), tmp_path / "a.jsonl", names="uniform-50", loaded=run, tokens=2)
    assert all(r["metrics"]["failed"] == 0 and r["metrics"]["kept_tokens"] > 0 for r in result["rows"])
    out = tmp_path / "plan.json"
    tune.tune("tiny", str(file), out, names="uniform-50", loaded=run, tokens=2)
    assert out.exists() and out.with_suffix(".html").exists()


def test_questions_that_cannot_be_asked_are_an_error_and_not_a_table(
    run: runner.Runner, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Every picture broken: one line that names the first. One of them broken: counted, and the table is whole."""
    file = own_questions(tmp_path)
    (tmp_path / "0.png").write_text("not a picture")
    result = accuracy.evaluate(str(file), tmp_path / "some.jsonl", names="uniform-50", loaded=run, tokens=2)
    assert [r["metrics"]["failed"] for r in result["rows"]] == [1, 1]
    show(result)
    assert "1 of 6 questions failed" in capsys.readouterr().out
    for i in range(6):
        (tmp_path / f"{i}.png").write_text("not a picture")
    with pytest.raises(UserError, match=r"none of the 6 questions could be asked; the first: .*0\.png"):
        accuracy.evaluate(str(file), tmp_path / "none.jsonl", names="uniform-50", loaded=run, tokens=2)
    out = tmp_path / "plan.json"
    with pytest.raises(UserError, match="none of the 2 questions could be asked"):
        tune.tune("tiny", str(file), out, names="uniform-50", loaded=run, tokens=2)
    assert not out.exists()


def test_a_method_that_fails_everywhere_has_a_row_without_figures(
    run: runner.Runner, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = own_questions(tmp_path)
    plans = {"lossless": methods.plan("vidcom2-50")}
    real = run.ask

    class Broken:
        model, name, device, processor, inputs = run.model, run.name, run.device, run.processor, run.inputs

        @staticmethod
        def ask(samples: Any, plan: Plan, method: str, tokens: int) -> Any:
            if method == "plain":
                return real(samples, plan, method, tokens)
            return [runner._failed(s, method, "Unsupported: no") for s in samples]

    result = accuracy.evaluate(str(file), tmp_path / "a.jsonl", plans=plans, loaded=Broken(), tokens=2)
    assert result["rows"][1]["metrics"]["failed"] == 6 and "kept_tokens" not in result["rows"][1]["metrics"]
    show(result)
    assert "Unsupported: no" in capsys.readouterr().out


def test_the_copied_line_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page offers to copy, beside the plan file, on a model of the reader's."""
    import html
    import re

    from vlmfast.encode import Uniform

    chosen = tune.Candidate("uniform-50", Plan(prune=Uniform(keep=0.5)), tune.CONFIRMED, answered=["1"])
    chosen.faster, out = [2.0, 1.9, 2.1], tmp_path / "my 'plan'.json"
    chosen.plan.save(out)
    text = tune.explain(chosen, [chosen], 0.99, "mine", out)
    code = html.unescape(re.findall(r"<pre>(.*?)</pre>", text, re.DOTALL)[0])
    monkeypatch.chdir(tmp_path)
    model: Any = tiny.build("qwen2_5_vl")
    scope: dict[str, Any] = {"model": model}
    exec(code, scope)
    model.generate(**tiny.inputs("qwen2_5_vl"), max_new_tokens=2, do_sample=False)
    encode = scope["fast"].report.encode
    assert encode["kept_tokens"] == round(encode["visual_tokens"] / 2)


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
    for i in range(24):
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
    assert loop.fresh and len(loop.answered) == 16, "confirmed on questions that the search did not ask"
    assert Plan.load(out) == chosen.plan
    record = json.loads(out.with_suffix(".record.json").read_text())
    assert record["config"]["tune"]["chosen"] == chosen.name and record["rows"][0]["metrics"]["accuracy"] == 1
    page = out.with_suffix(".html").read_text()
    assert "data:image/png" in page and chosen.name in page and "://" not in page  # base64 has no colon
    with pytest.raises(UserError, match="--force"):
        tune.tune("tiny", str(file), out, loaded=run)


@pytest.mark.parametrize("floor", [0.0, 1.5])
def test_a_floor_is_a_share(tmp_path: Path, floor: float) -> None:
    with pytest.raises(UserError, match="share"):
        tune.tune("tiny", "easy-vqa", tmp_path / "p.json", floor=floor)
    assert methods.plan("plain") == Plan()
