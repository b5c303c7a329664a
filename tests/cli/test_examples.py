"""Every script of examples/ runs as it stands on the pocket model, answers rightly, and leaves nothing behind."""

from __future__ import annotations

import ast
import runpy
import tempfile
from pathlib import Path
from typing import Any

import pytest

from vlmfast.pocket import world

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "pyproject.toml").exists())
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs a script by its name in an empty folder; returns its variables. What it writes elsewhere goes there too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def go(name: str, *arguments: str) -> dict[str, Any]:
        script = ROOT / "examples" / f"{name}.py"
        monkeypatch.setattr("sys.argv", [str(script), *arguments])
        return runpy.run_path(str(script), run_name="__main__")

    return go


def test_there_are_few_and_each_says_what_it_does() -> None:
    assert 6 <= len(SCRIPTS) <= 8
    tested = Path(__file__).read_text()
    for script in SCRIPTS:
        text = script.read_text()
        summary = ast.get_docstring(ast.parse(text))
        assert summary and "\n" not in summary and len(text.splitlines()) in range(15, 51), script.name
        assert f'run("{script.stem}"' in tested, f"{script.name}: no test runs it"
        for node in ast.walk(ast.parse(text)):  # what a user may import: packages, no inner module
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vlmfast"):
                assert (node.module or "").count(".") <= 1 and not any(n.name.startswith("_") for n in node.names)


def test_question(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    seen = run("question")
    assert world.score(seen["drawn"], seen["answer"]) == 1
    assert "256 -> 128 visual tokens" in capsys.readouterr().out


def test_chat(run: Any) -> None:
    seen = run("chat")
    said = [m["content"][0]["text"] for m in seen["messages"] if m["role"] == "assistant"]
    assert "orange circle" in said[0] and said[1] == "2"
    assert any("neither encoded nor prefilled" in note for note in seen["fast"].report.notes)


def test_chat_asks_what_it_is_given(run: Any, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    seen = run("chat", world.__file__.replace("world.py", "weights/target"), "a.png", "what is it ?")
    assert seen["questions"] == ["what is it ?"] and len(seen["messages"]) == 2


def test_several_questions(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    seen = run("several_questions")
    told = capsys.readouterr().out
    assert f"{seen['clip'].question}\n  {seen['clip'].answer}\n" in told
    assert told.count("neither encoded nor prefilled") == len(seen["questions"]) - 1


def test_camera(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    seen = run("camera")
    assert f"{seen['clip'].question}\n  {seen['clip'].answer}\n" in capsys.readouterr().out
    (star,) = (o for o in seen["clip"].meta["scene"].objects if o.shape == "star")
    assert any(a <= star.t_in and star.t_out <= b for a, b, _ in seen["answer"].evidence)
    assert seen["seen"]["frames"] == 64 and seen["seen"]["kept_tokens"] < seen["seen"]["visual_tokens"]


def test_compare_plans(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    seen = run("compare_plans")
    rows = capsys.readouterr().out.splitlines()[-len(seen["plans"]) :]
    assert all(row.startswith(name) for row, name in zip(rows, seen["plans"], strict=True))
    assert rows[0].endswith(seen["drawn"].answer) and " 256 " in rows[0] and " 64 " in rows[2]


def test_draft_model(run: Any) -> None:
    seen = run("draft_model")
    assert seen["answers"][0] == seen["answers"][1] and len(seen["answers"][0]) > 60
    assert seen["fast"].report.decode["accepted_length"] > 1


def test_plan_file(run: Any, tmp_path: Path) -> None:
    seen = run("plan_file")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert seen["fast"].plan == seen["plan"] and "vidcom2" in str(seen["plan"])
    assert seen["fast"].report.encode["kept_tokens"] < seen["fast"].report.encode["visual_tokens"]
    again = run("plan_file", "pocket", "plan.json")
    assert again["plan"] == seen["plan"]
