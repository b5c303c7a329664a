"""The stream's evaluation: its record, and the claims its numbers stand on."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from typer.testing import CliRunner

from evals.stream import hour, levels, runs, windows
from evals.stream import suite as stream
from vlmfast.bench import records
from vlmfast.bench.scoring import exact_fact
from vlmfast.cli.errors import application
from vlmfast.core import UserError
from vlmfast.stream.retrievers import Oracle, Recency


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save("qwen2_5_vl", tmp_path_factory.mktemp("eval") / "model")


def run(*args):
    return CliRunner().invoke(application(stream.main), list(args))


def test_quick_writes_a_whole_record_and_its_plot(folder, tmp_path):
    out = tmp_path / "stream.json"
    options = ("--quick", "--model", str(folder), "--frames", "4", "--answers", str(tmp_path / "answers"))
    result = run(*options, "--out", str(out))
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    records.check(record)
    rows = {r["name"]: r["metrics"] for r in record["rows"]}
    assert {"internal", "recency", "oracle", "session"} <= set(rows)
    for name in ("internal", "recency", "oracle"):
        assert 0 <= rows[name]["accuracy"] <= 1 and rows[name]["total_ms"] > 0 and len(rows[name]["ci95_past"]) == 2
        assert rows[name]["retrieved_blocks"] == 4
    session = rows["session"]
    assert session["kept_tokens"] < session["visual_tokens"] and session["bytes_per_hour"] > 0
    assert out.with_suffix(".png").stat().st_size > 5000
    again = run(*options, "--out", str(out))
    assert again.exit_code == 2 and "exists" in again.output
    (kept,) = (tmp_path / "answers").rglob("*.json")
    second = run(*options, "--out", str(tmp_path / "again.json"))
    assert second.exit_code == 0 and "1 of 1 clips are in" in second.stderr, "a run goes on from what was answered"
    assert json.loads((tmp_path / "again.json").read_text())["rows"] == record["rows"]
    kept.write_text(kept.read_text()[:100])
    damaged = run(*options, "--out", str(tmp_path / "third.json"))
    assert damaged.exit_code == 2 and "is damaged" in damaged.stderr and not (tmp_path / "third.json").exists()


def test_questions_have_one_place_in_time():
    from vlmfast.pocket.clips import clip

    drawn = clip(3, 64, questions=8)
    asked = runs.questions(drawn, "x")
    assert len({q.question for q in asked}) == len(drawn.questions)
    for q in asked:
        assert q.time >= q.evidence[1] - 0.5 and q.kind in ("location", "motion", "needle", "now")


def test_the_external_control_finds_colours():
    t = torch

    tool = runs.by_colour(2)
    frames = t.full((3, 8, 8, 3), 120, dtype=t.uint8)
    frames[1, :4, :4] = t.tensor([222, 38, 38], dtype=t.uint8)
    seen, wanted = tool.frames_to(frames), tool.text_to("where is the red ring ?")
    assert int(t.cosine_similarity(seen, wanted[None], dim=-1).argmax()) == 1


def test_recall_counts_the_evidence_brought_back(folder):
    """Oracle reaches all of it, recency what is recent; a model's answer scores by the world's own rule."""
    from vlmfast import loading
    from vlmfast.pocket.clips import clip

    loaded = loading.load(str(folder))
    drawn, options = clip(1, 40, questions=4), {"redundancy": None, "window": 512, "recent": 0}
    done = runs.opened(loaded.model, loaded.processor, drawn, **options)
    first = runs.Asked("x", 40.0, "location", "where ?", "left", (8.0, 16.0))
    runs.watch([done], [], lambda asked: None)
    for tool, want in (
        (Oracle(frames=8, spans=(first.evidence,)), 1.0),
        (Recency(frames=8), 0.0),
        (Recency(frames=28), 0.5),
    ):
        result = runs.Result()
        runs.ask(done.session, first, tool, result)
        assert result.recalls == [want]
    assert done.session.turns == []
    plain = runs.rekv_bytes_per_hour(done.session)
    assert plain == 2 * 4 * 2 * 16 * 2 * 64 * 3600, "2 x layers x heads x size x 2 bytes x tokens a second x an hour"
    for block in list(done.session.store.blocks.values())[8:12]:
        done.session.store.blocks.pop(block.id)
    assert runs.recall(done.session, first, dict.fromkeys(range(40), 1.0)) == 0.5, "what was evicted was not recalled"
    done.close()
    assert exact_fact("Top Left .", "top left") == 1.0 and exact_fact("top", "top left") == 0.0
    assert torch.is_grad_enabled()


def test_questions_are_asked_while_the_clip_runs(folder):
    """In the order of time, before anything later was pushed, and all of it is pushed in the end."""
    from vlmfast import loading
    from vlmfast.pocket.clips import clip

    loaded = loading.load(str(folder))
    drawn = clip(2, 32, questions=4)
    done = runs.opened(loaded.model, loaded.processor, drawn, redundancy=None, window=512)
    seen = []
    asked = runs.questions(drawn, "x")
    runs.watch([done], asked[::-1], lambda question: seen.append((question.time, done.session.accepted)))
    assert [time for time, _ in seen] == sorted(question.time for question in asked)
    assert all(last < time <= last + 2 / drawn.fps for time, last in seen)
    assert done.session.stats()["frames"] == len(drawn)
    done.close()


def test_reported_clips_are_many_and_no_others():
    for minutes in (1.0, 10.0, 60.0):
        clips = runs.clips_of(minutes, quick=False)
        assert {seed for seed, _ in clips} <= set(runs.REPORTED) and len(clips) >= (10 if minutes == 60 else 20)


def test_fewer_clips_are_a_count_for_each_length():
    most = stream.counts_of("8,2", [1.0, 60.0])
    assert most == {"1": 8, "60": 2} and stream.counts_of(None, [1.0]) is None
    assert [len(runs.clips_of(minutes, False, most)) for minutes in (1.0, 10.0, 60.0)] == [8, 20, 2]
    for wrong in ("8", "8,2,1", "8,x", "8,0"):
        with pytest.raises(UserError, match="--clips"):
            stream.counts_of(wrong, [1.0, 60.0])


@pytest.mark.slow
def test_schedules_are_compared_on_the_same_questions(folder, tmp_path):
    """One row a schedule, its bytes and answers beside those of none; a run goes on from what was answered."""
    out, answers = tmp_path / "levels.json", tmp_path / "answers"
    options = ("--model", str(folder), "--minutes", "1", "--window", "128", "--clips", "1", "--frames", "4",
               "--layers", "1,2", "--schedule", "age:features=10", "--answers", str(answers))  # fmt: skip
    result = CliRunner().invoke(application(levels.main), [*options, "--out", str(out)])
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    records.check(record)
    full, coarse = (r["metrics"] for r in record["rows"])
    assert full["diff_vs_full"] == full["prefilled_again_blocks"] == 0 and full["bytes_share"] == 1
    assert coarse["questions"] == full["questions"] > 2
    assert coarse["right"] == full["right"] + coarse["won"] - coarse["lost"]
    assert coarse["bytes_share"] == pytest.approx(coarse["bytes_per_hour"] / full["bytes_per_hour"], rel=1e-4)
    assert coarse["bytes_share"] < 0.95
    assert coarse["prefilled_again_blocks"] > 0 and coarse["evicted"] == 0
    assert coarse["blocks_at_full"] + coarse["blocks_at_features"] == full["blocks_at_full"]
    assert sum(v for k, v in coarse.items() if k.startswith("asked_at_")) == full["questions"]
    again = CliRunner().invoke(application(levels.main), [*options, "--out", str(tmp_path / "again.json")])
    assert again.exit_code == 0 and "clip" not in again.stderr
    assert json.loads((tmp_path / "again.json").read_text())["rows"] == record["rows"]
    options = [*options, "--schedule", "age", "--out", str(tmp_path / "bad.json")]
    bad = CliRunner().invoke(application(levels.main), options)
    assert bad.exit_code == 2 and "names no level" in bad.output


@pytest.mark.slow
def test_windows_are_compared_with_whole_grids_on_the_same_questions(tmp_path):
    """One row a way, its answers beside those of grids encoded whole."""
    out = tmp_path / "windows.json"
    options = ("--minutes", "0.5", "--clips", "1", "--frames", "4", "--layers", "2,3")
    result = CliRunner().invoke(application(windows.main), [*options, "--out", str(out)])
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    records.check(record)
    whole, by_window = record["rows"]
    assert whole["metrics"]["questions"] == by_window["metrics"]["questions"] > 2
    assert by_window["metrics"]["tower_share"] < whole["metrics"]["tower_share"] <= 1
    assert set(by_window["vs"]) == {"whole"} and 0 < by_window["metrics"]["distance_95"] < 0.2
    bad = CliRunner().invoke(
        application(windows.main), [*options, "--clips", "99", "--out", str(tmp_path / "bad.json")]
    )
    assert bad.exit_code == 2 and "reporting has" in bad.output


@pytest.mark.slow
def test_a_stream_is_drawn_with_what_is_kept_and_brought_back(tmp_path):
    """Every stretch of the video has a level at every look, coarser with age; every question its evidence."""
    out = tmp_path / "hour.json"
    options = ["--minutes", "1", "--schedule", "age:four_bit=10,features=30", "--out", str(out)]
    result = CliRunner().invoke(application(hour.main), options)
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    records.check(record)
    looks = [r["metrics"] for r in record["rows"] if r["name"] == "minute"]
    asked = [r["metrics"] for r in record["rows"] if r["name"] == "question"]
    assert [look["second"] for look in looks] == [6.0 * i for i in range(1, 11)]
    counts = [sum(stretches for _, stretches in look["kept"]) for look in looks]
    assert counts == [(look["second"] - 1) // hour.STRETCH + 1 for look in looks]
    finest_first = ["full", "four_bit", "features"]
    for look in looks:  # what is older is never finer
        levels = [level for level, _ in look["kept"]]
        assert levels == sorted(levels, key=finest_first.index, reverse=True) and levels[-1] == "full"
    assert looks[-1]["kept"][0][0] == "features"
    assert {"full", "features"} <= {level for look in looks for level in look["bytes"]} <= set(finest_first)
    assert len(asked) >= 4 and any(question["brought_back"] for question in asked)
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert f"of {len(asked)} answers right" in hour.told(record)
