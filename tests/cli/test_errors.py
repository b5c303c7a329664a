"""Every error of every command is one line on stderr with exit code 2: bad values of every kind in every option.

The walk takes options and their types from the commands themselves, so that a new command or option is walked too.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import typer
from PIL import Image
from typer.testing import CliRunner

from vlmfast import cli, loading
from vlmfast.cli import laws
from vlmfast.cli.errors import application
from vlmfast.core import UserError, brief
from vlmfast.video.read import write_video

HUGE = "9" * 400
NUMBERS = ("x", "", "nan", "-1", "1e400", "0x10", "1,5", "\u0661")
TEXTS = ("", "\udcff", "\x1b[31mred", "a\nb", "[/bold]", "{}", "name:", "name:field", ":=,=:", "x" * 5000, HUGE)
PATHS = ("missing", "folder", "noise.bin", "list.json", "deep.json", "latin.txt", "empty", "null\\0", "x" * 5000)
WRITTEN = {"out", "summary", "answers", "save"}  # options that name what is written
NEVER = ("nan", "\udcff", "1e400")  # no option of any type takes these
PROGRESS = re.compile(r"\d+ (questions, \d+ plans|answers of)|Saving|Loading|.*\dit/s")
WORKING = ("demo", "ask", "check", "stream", "heads", "calibrate", "tune", "accuracy")
BIG_IS_FINE = {"seed", "limit", "frames", "questions", "first", "captions", "pictures", "rounds", "window", "stages"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, media, questions, and files that are not what their place asks for."""
    folder = tmp_path_factory.mktemp("errors")
    tiny.save("qwen2_5_vl", folder / "model")
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (8, 28, 28, 3), np.uint8)
    write_video(folder / "clip.mp4", frames, fps=4)
    Image.fromarray(frames[0]).save(folder / "a.png")
    (folder / "folder").mkdir()
    (folder / "noise.bin").write_bytes(bytes(range(256)) * 8)
    (folder / "empty").write_bytes(b"")
    (folder / "list.json").write_text("[1, 2]")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "latin.txt").write_bytes("später".encode("latin-1"))
    (folder / "taken").write_text("mine")
    questions = [{"image": "a.png", "question": "what ?", "answer": "cat"}]
    (folder / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return folder


@pytest.fixture
def place(home: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """The folder as the working directory. Nothing long is measured; the checkpoint is read once, or not at all."""
    monkeypatch.chdir(home)
    real, kept = loading.load, {}

    def load(name: str = "pocket", dtype: str = "auto", device: str | None = None, spread: str | None = None) -> Any:
        if (name, dtype, device, spread) != ("model", "auto", None, None):
            return real(name, dtype, device, spread)
        if not kept:
            kept[name] = real(name)
        return kept[name]

    monkeypatch.setattr(loading, "load", load if "read" in request.fixturenames else never)
    monkeypatch.setattr(laws, "LAWS", ())
    monkeypatch.setattr(laws, "catalogue", lambda case: {})
    for module, function in (("speed.suites", "measure"), ("gpu.suite", "measure"), ("stream.suite", "rows"),
                             ("accuracy.tables", "run"), ("stream.crash", "rows"), ("stream.degraded", "rows"),
                             ("stream.levels", "streamed"), ("stream.hour", "streamed"), ("stream.windows", "streamed"),
                             ("stream.rules", "scores"),
                             ("stream.rules", "accuracy_row"),
                             ("serving.answers", "rows"), ("serving.throughput", "rows"),
                             ("speed.decode", "main_ones"), ("speed.decode_batch", "rows"),
                             ("speed.describe", "measured"), ("speed.versions", "tree_of")):  # fmt: skip
        monkeypatch.setattr(importlib.import_module(f"evals.{module}"), function, never)
    return home


def never(*args: Any, **kwargs: Any) -> Any:
    raise UserError("the work itself began")


GOOD: dict[str, list[str]] = {  # arguments with which a command would do its work
    "demo": ["--model", "model", "--out", "new"],
    "ask": ["what ?", "--model", "model", "--image", "a.png", "--max-new-tokens", "2"],
    "check": ["--model", "model", "--rounds", "1"],
    "methods": [],
    "stream": ["clip.mp4", "--model", "model", "--ask", "what ?", "--max-new-tokens", "2"],
    "heads": ["what ?", "--model", "model", "--image", "a.png"],
    "calibrate": ["what ?", "--model", "model", "--image", "a.png"],
    "tune": ["--task", "q.jsonl", "--out", "new.json", "--model", "model", "--minutes", "0.001"],
    "roofline": ["--model", "qwen2.5-vl-7b", "--device", "h100"],
    "page": ["q.jsonl", "--out", "new.html"],
    "accuracy": ["--task", "q.jsonl", "--out", "new.jsonl", "--model", "model", "--tokens", "2"],
    "speed": ["--suite", "encode", "--out", "new.json", "--samples", "new"],
    "gpu": ["--out", "new", "--dry"],
    "serving": ["--suite", "answers", "--out", "new.json"],
    "stream*": ["--out", "new.json", "--quick"],
    "stream.crash": ["--out", "new.json", "--kills", "0"],
    "stream.degraded": ["--out", "new.json", "--clips", "2"],
    "stream.levels": ["--out", "new.json"],
    "stream.windows": ["--out", "new.json", "--layers", "2,3"],
    "stream.hour": ["--out", "new.json"],
    "stream.rules": ["--out", "new.json", "--clips", "2"],
    "accuracy.tables": ["--only", "pocket", "--out", "new", "--answers", "new"],
    "speed.decode": ["--out", "new.json", "--samples", "float32"],
    "speed.decode_batch": ["--out", "new.json"],
    "speed.random_baseline": ["--out", "new.json"],
    "speed.versions": ["--out", "new.json"],
    "speed.describe": ["--out", "new.json", "--samples", "new", "--target", "model", "--drafts", "model"],
}


def function_of(name: str) -> Any:
    """A command's function; `stream*` is the evaluation of that name."""
    if name in cli.COMMANDS:
        return getattr(importlib.import_module(f"vlmfast.cli.{name}"), name)
    module = f"evals.{name.strip('*')}"
    whole = importlib.util.find_spec(f"{module}.__main__") if "." not in name else None
    return importlib.import_module(whole.name if whole else module).main


@dataclass
class Asked:
    """A parameter of a command: its flags (none: an argument), and the type of its value."""

    name: str
    flags: tuple[str, ...]
    kind: type


def options_of(name: str) -> list[Asked]:
    """What a command may be given, as its signature says it; switches are left out."""
    found = []
    for parameter, hint in typing.get_type_hints(function_of(name), include_extras=True).items():
        info = next((x for x in getattr(hint, "__metadata__", ()) if hasattr(x, "param_decls")), None)
        kinds = [k for k in (int, float, Path, str, bool) if str(k.__name__) in str(hint).partition(", <typer")[0]]
        if info is None or bool in kinds:
            continue
        flags = tuple(info.param_decls or ()) or (f"--{parameter.strip('_').replace('_', '-')}",)
        found.append(Asked(parameter, () if type(info).__name__ == "ArgumentInfo" else flags, (kinds or [str])[0]))
    return found


def bad_values(option: Asked, command: str) -> tuple[str, ...]:
    """Values that the option's type cannot take, or that name what is not there."""
    if option.name in WRITTEN:
        folders = option.name != "summary" and (option.name != "out" or command in ("demo", "gpu", "tables"))
        return ("taken/x.json", "taken", "x" * 5000, *(() if folders else ("folder",)))
    if option.kind in (int, float):
        return NUMBERS if option.name in BIG_IS_FINE else (*NUMBERS, HUGE)
    return (*PATHS, *TEXTS) if option.kind is Path else (*TEXTS, "missing", "noise.bin", "folder")


def invoke(program: typer.Typer, arguments: list[str]) -> Any:
    return CliRunner().invoke(program, arguments)


def replaced(option: Asked, value: str, good: list[str]) -> list[str]:
    """The good arguments with one of them replaced, or added."""
    if not option.flags:
        return [value, *good[1:]]
    flag, at = option.flags[-1], [i for i, x in enumerate(good) if x in option.flags]
    return [*good[: at[0]], flag, value, *good[at[0] + 2 :]] if at else [*good, flag, value]


def fault(result: Any) -> str | None:
    """What is wrong with how a command ended, None when it did its work or said in one line why not."""
    if result.exit_code == 0 and result.exception is None:
        return None
    lines = [line for line in result.stderr.splitlines() if line.strip() and not PROGRESS.match(line)]
    if result.exit_code != 2 or not isinstance(result.exception, SystemExit):
        return f"exit {result.exit_code}, {result.exception!r}"
    if len(lines) != 1 or not lines[0].startswith("error: ") or len(lines[0]) > 700:
        return f"{len(lines)} lines: {lines[:3]}"
    return lines[0] if "fault of vlmfast" in lines[0] or "Traceback" in result.stderr else None


@pytest.mark.parametrize("name", GOOD)
def test_bad_values_end_in_one_line_before_a_model_is_read(name: str, place: Path) -> None:
    walk(name, place)


@pytest.mark.slow
@pytest.mark.parametrize("read", [True])
@pytest.mark.parametrize("name", WORKING)
def test_bad_values_end_in_one_line(name: str, place: Path, read: bool) -> None:
    """The same with a model in memory, so that what is found out later is walked too."""
    walk(name, place)


def walk(name: str, place: Path) -> None:
    """Every bad value of every option, one at a time."""
    program, before = application(function_of(name)), {p.name for p in place.iterdir()}
    wrong = {}
    for option in options_of(name):
        for value in bad_values(option, name):
            result = invoke(program, replaced(option, value, GOOD[name]))
            said = fault(result)
            if said is None and result.exit_code == 0 and (value in NEVER or option.name in ("out", "summary")):
                said = "was accepted"
            if said is not None:
                wrong[option.name, value[:40]] = said
    assert not wrong, "\n".join(f"{k}: {v}" for k, v in wrong.items())
    assert (place / "taken").read_text() == "mine"
    if name not in WORKING:
        assert {p.name for p in place.iterdir()} <= before | {"new"}, "something was written on the way to an error"


def test_no_command_is_left_out() -> None:
    found = {c.name for c in cli.build().registered_commands}
    folder = Path(importlib.import_module("evals").__file__ or "").parent
    programs = {".".join(p.relative_to(folder).with_suffix("").parts).removesuffix(".__main__")
                for p in folder.glob("*/*.py") if "application(main)" in p.read_text()}  # fmt: skip
    assert found <= set(GOOD) and programs - {"report.documents"} <= {name.strip("*") for name in GOOD}
    for earlier in folder.glob("*.py"):  # the names before commands had folders
        assert earlier.stem == "__init__" or "import main" in earlier.read_text()
    for arguments in (["no-such-command"], ["--no-such-option"], ["ask"]):
        result = CliRunner().invoke(cli.build(), arguments)
        assert result.exit_code == 2 and fault(result) is None, result.stderr
    assert CliRunner().invoke(cli.build(), []).exit_code == 0


@pytest.mark.parametrize("name", GOOD)
def test_typers_own_errors_are_one_line_too(name: str, place: Path) -> None:
    program = application(function_of(name))
    for arguments in (["--no-such-option"], ["a", "b", "c", "d"], ["--out"], ["--model"]):
        if name in ("page", "calibrate") and arguments[0] == "a":
            continue  # these take several words
        result = invoke(program, arguments)
        assert result.exit_code == 2 and fault(result) is None, (arguments, result.stderr, result.exception)


def test_a_fault_of_our_own_is_one_line_and_says_how_to_see_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise KeyError("kept_tokens")

    result = CliRunner().invoke(application(broken), [])
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert "KeyError: 'kept_tokens'" in result.stderr and "VLMFAST_TRACEBACK" in result.stderr
    monkeypatch.setenv("VLMFAST_TRACEBACK", "1")
    assert isinstance(CliRunner().invoke(application(broken), []).exception, KeyError)


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (PermissionError(13, "Permission denied", "secret.json"), "Permission denied: secret.json"),
        (OSError(28, "No space left on device"), "No space left"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "not UTF-8"),
        (UserError("a\nb\x1b[31m " + "long " * 500), "error: a b"),
    ],
)
def test_what_the_system_refuses_is_one_short_line(error: Exception, word: str) -> None:
    def refused() -> None:
        raise error

    result = CliRunner().invoke(application(refused), [])
    assert fault(result) is None and result.exit_code == 2 and word in result.stderr and "\x1b" not in result.stderr


def test_brief_keeps_both_ends() -> None:
    assert brief("a  b\nc") == "a b c" and brief("x" * 50, 50) == "x" * 50
    cut = brief("start" + "x" * 1000 + "end", 100)
    assert len(cut) <= 100 and cut.startswith("start") and cut.endswith("end")
