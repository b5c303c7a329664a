"""`vlmfast stream`: asked on the way and at the end, kept and resumed, and typed at while it plays."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
from typer.testing import CliRunner

from vlmfast.cli import build
from vlmfast.cli.stream import Talk, parse, status
from vlmfast.stream.session import StreamSession
from vlmfast.stream.source import write_video


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


def test_answers_are_printed(home):
    out = run(home, str(home / "clip.mp4"), "--ask", "what now ?", "--retrieve", "recency:frames=2")
    assert out.exit_code == 0, out.output
    assert "looked at 6-8 s" in out.output


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ((), "nothing to watch"),
        (("a.mp4", "--camera", "0"), "exclude each other"),
        (("nosuch.mp4", "--ask", "?"), "nosuch.mp4"),
        (("--resume", "nosuch", "--ask", "?"), "holds no stream"),
        (("--resume", "a", "--save", "b"), "leave --save out"),
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
