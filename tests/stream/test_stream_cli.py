"""`vlmfast stream`: asked on the way and at the end, kept and resumed, and typed at while it plays."""

from __future__ import annotations

import json
import re
import threading
import time

import numpy as np
import pytest
import tiny
from typer.testing import CliRunner

from vlmfast.cli import build
from vlmfast.cli.stream import Talk, parse, status
from vlmfast.stream.session import StreamSession
from vlmfast.video.read import write_video


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a checkpoint and a clip of eight seconds."""
    folder = tmp_path_factory.mktemp("home")
    tiny.save("qwen2_5_vl", folder / "model")
    rng = np.random.default_rng(0)
    write_video(folder / "clip.mp4", rng.integers(0, 255, (32, 32, 32, 3), np.uint8), fps=4)
    return folder


def run(home, *args):
    return CliRunner().invoke(build(), ["stream", "--model", str(home / "model"), "--max-new-tokens", "3", *args])


def test_questions_on_the_way_and_at_the_end(home, tmp_path):
    out = run(
        home,
        str(home / "clip.mp4"),
        "--ask",
        "what now ?",
        "--ask",
        "3s: what is it ?",
        "--json",
        "--save",
        str(tmp_path / "s"),
    )
    assert out.exit_code == 0, out.output
    record = json.loads(out.stdout)
    asked = record["answers"]
    assert [(a["question"], a["at"]) for a in asked] == [("what is it ?", 3.0), ("what now ?", None)]
    assert all(a["evidence"][-1][1] <= 4.0 for a in asked[:1]), "nothing later than the question's second"
    assert record["stats"]["frames"] == 16 and record["stats"]["dropped_frames"] == 0
    assert asked[1]["report"]["tokens"] == 3
    again = run(home, "--resume", str(tmp_path / "s"), "--ask", "and then ?", "--json")
    assert again.exit_code == 0, again.output
    stats = json.loads(again.stdout)["stats"]
    assert stats["frames"] == 16 and stats["lost_seconds"] == 0 and stats["blocks"] == 8
    more = run(home, str(home / "clip.mp4"), "--resume", str(tmp_path / "s"), "--ask", "and then ?", "--json")
    stats = json.loads(more.stdout)["stats"]
    assert stats["frames"] == 32 and stats["seconds"] == 16.0


def test_what_is_only_kept_says_what_was_kept(home, tmp_path):
    out = run(home, str(home / "clip.mp4"), "--save", str(tmp_path / "s"))
    assert (
        out.exit_code == 0 and "8 s seen" in out.stdout and f"kept in {tmp_path / 's'}" in out.stdout.replace("\n", "")
    )


def test_blocks_coarsen_as_the_option_says(home, tmp_path):
    args = (str(home / "clip.mp4"), "--ask", "what now ?", "--json")
    out = run(home, *args, "--coarsen", "age:features=2", "--save", str(tmp_path / "s"))
    assert out.exit_code == 0, out.output
    assert set(json.loads(out.stdout)["stats"]["levels"]) <= {"full", "features"}
    again = run(home, "--resume", str(tmp_path / "s"), "--coarsen", "age:features=0", "--ask", "and then ?", "--json")
    assert again.exit_code == 0, again.output
    bad = run(home, *args, "--coarsen", "age:features=2,representative=1")
    assert bad.exit_code == 2 and "grow with age" in bad.stderr


def test_the_status_line_leaves_the_evidence_alone(monkeypatch):
    """A terminal replayed: what an answer printed stands there after the status line was written above the prompt."""
    monkeypatch.setenv("COLUMNS", "60")
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    session = StreamSession(tiny.build("qwen2_5_vl"), tiny.processor("qwen2_5_vl"), retrieve=None)
    session.push(np.zeros((4, 16, 24, 3), np.uint8))
    talk = Talk(session, 2, silent=True)
    typed = iter(["what is it ?", ""])

    def ask(prompt):
        screen.write(prompt)
        time.sleep(0.1)  # the status line is written while somebody types
        if not any("seen" in line for line in screen.lines):
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline and not any("seen" in line for line in screen.lines):
                time.sleep(0.01)
        said = next(typed)
        screen.write(said + "\n")
        if said:
            screen.write("an answer\nlooked at 0-2 s\n")
        return said

    monkeypatch.setattr("builtins.input", ask)
    with talk.live_status(every=0.01):
        talk.converse(talk._lines())
    text = [line.rstrip() for line in screen.lines]
    assert "looked at 0-2 s" in text and "an answer" in text and "? what is it ?" in text, text
    status_lines = [line for line in text if "seen" in line]
    assert status_lines and all(len(line) < 60 for line in status_lines)


class Screen:
    """A terminal that knows the few codes that the status line uses."""

    def __init__(self):
        self.lines, self.row, self.column, self.saved = [""], 0, 0, (0, 0)
        self.lock = threading.RLock()

    def isatty(self):
        return True

    def flush(self):
        pass

    def write(self, text):
        with self.lock:
            for code, plain in re.findall(r"(\x1b7|\x1b8|\x1b\[1A|\x1b\[2K|\r|\n)|([^\x1b\r\n]+)", text):
                if code == "\x1b7":
                    self.saved = (self.row, self.column)
                elif code == "\x1b8":
                    self.row, self.column = self.saved
                elif code == "\x1b[1A":
                    self.row = max(0, self.row - 1)
                elif code == "\x1b[2K":
                    self.lines[self.row] = ""
                elif code == "\r":
                    self.column = 0
                elif code == "\n":
                    self.row, self.column = self.row + 1, 0
                    self.lines += [""] * (self.row + 1 - len(self.lines))
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + plain + line[self.column + len(plain) :]
                self.column += len(plain)


def test_answers_are_printed(home):
    out = run(home, str(home / "clip.mp4"), "--ask", "what now ?", "--retrieve", "recency:frames=1", "--recent", "1")
    assert out.exit_code == 0, out.output
    assert "looked at 6-8 s" in out.output


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ((), "nothing to watch"),
        (("a.mp4", "--camera", "0"), "exclude each other"),
        (("nosuch.mp4", "--ask", "?"), "nosuch.mp4"),
        (("a.mp4", "--ask", "?", "--recent", "-1"), "--recent"),
        (("a.mp4", "--when", "  "), "is empty"),
        (("a.mp4", "--when", "a cat appears", "--cooldown", "-1"), "--cooldown"),
        (("--resume", "nosuch", "--ask", "?"), "holds no stream"),
        (("--resume", "a", "--save", "b"), "leave --save out"),
        (("clip.mp4",), "nothing is asked"),
        (("--resume", "a"), "nothing is asked"),
        (("--camera", "0", "--retrieve", "magic", "--ask", "?"), "unknown retriever"),
        (("--camera", "0", "--ram", "lots", "--ask", "?"), "is not a size"),
    ],
)
def test_bad_calls_end_in_one_line(home, args, why):
    out = run(home, *args)
    assert out.exit_code == 2 and why in out.output and "Traceback" not in out.output


@pytest.mark.parametrize(
    ("text", "second", "question"),
    [
        ("12s: who came ?", 12.0, "who came ?"), ("1m30s: what ?", 90.0, "what ?"), ("2m: what ?", 120.0, "what ?"),
        ("what about 3: or 4 ?", None, "what about 3: or 4 ?"), ("plain", None, "plain"), (" 0.5s: x", 0.5, "x"),
    ],
)  # fmt: skip
def test_questions_with_a_second(text, second, question):
    assert parse(text) == (second, question)


def test_the_status_line_says_what_it_takes():
    stats = {"seconds": 61.2, "fps": 9.87, "kv_host_bytes": 2.5e6, "kv_disk_bytes": 0, "queue": 3}
    line = status(stats | {"dropped_frames": 7})
    assert line == "61 s seen · 9.9 fps · RAM 2.5 MB · disk 0.0 MB · queue 3 · 7 dropped"
    assert "dropped" not in status(stats | {"dropped_frames": 0})


def test_typed_questions_while_it_plays(capsys):
    """Errors are said and the next question is taken; an empty line ends; the status follows."""
    session = StreamSession(tiny.build("qwen2_5_vl"), tiny.processor("qwen2_5_vl"), retrieve=None)
    talk, written = Talk(session, 2, silent=True), []

    def lines():
        yield "too early ?"
        session.push(np.zeros((4, 16, 24, 3), np.uint8))
        yield "what is it ?"
        yield "1s: and then ?"
        yield "/new"
        yield "again ?"
        yield ""
        raise AssertionError("an empty line should have ended it")

    talk.converse(lines())
    assert [a["question"] for a in talk.answers] == ["what is it ?", "and then ?", "again ?"]
    assert session.turns[-1][0] == "again ?" and len(session.turns) == 1
    assert "nothing was seen" in capsys.readouterr().err
    import sys
    import time

    class Terminal:
        def isatty(self):
            return True

        def write(self, text):
            written.append(text)

        def flush(self):
            pass

    real, sys.stderr = sys.stderr, Terminal()
    try:
        with talk.live_status(every=0.01):
            for _ in range(500):
                if written:
                    break
                time.sleep(0.01)
    finally:
        sys.stderr = real
    assert any("2 s seen" in text for text in written)
