"""Memory and open files stay flat: over hundreds of questions about pictures and clips, and over hours of video."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import media_corpus
import numpy as np
import pytest
import tiny

from vlmfast import loading
from vlmfast.core import UserError
from vlmfast.stream import StreamSession, Uniform, open_source, read_image, read_video
from vlmfast.stream.archive.segments import MOST_OPEN


def held() -> tuple[float, int]:
    """(resident memory in MiB, open files) of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return loading.load(str(tiny.save("qwen2_5_vl", tmp_path_factory.mktemp("m") / "m")), device="cpu")


def test_files_are_closed_whatever_happens(tmp_path: Path) -> None:
    """Good, broken and half-read files leave no descriptor behind."""
    entries = media_corpus.pictures_of(tmp_path) + media_corpus.videos_of(tmp_path)
    entries = [e for e in entries if "frame of" not in e.name]

    def round_trip() -> None:
        for entry in entries:
            for read in (read_image, lambda p: read_video(p, Uniform(3)), lambda p: next(open_source(p))):
                try:
                    read(entry.path)
                except UserError:
                    pass
                except StopIteration:
                    raise AssertionError(f"{entry.name}: a source that just ends") from None

    round_trip()
    files = held()[1]
    round_trip()
    assert held()[1] <= files


@pytest.mark.slow
def test_300_questions(loaded: Any, tmp_path: Path) -> None:
    """What the `ask` command does, 300 times: read media of changing sizes, make inputs, answer."""
    image = media_corpus._save(tmp_path / "a.png", media_corpus.noise(48, 64))
    clips = [media_corpus.film(tmp_path / f"{k}.mp4", media_corpus.pictures(12, 32 + 16 * k)) for k in range(3)]

    def ask(k: int) -> None:
        clip = read_video(clips[k % 3], Uniform(2 + k % 4)) if k % 2 else None
        inputs = loaded.inputs(f"what is {k} ?", images=() if k % 2 else [read_image(image)], video=clip)
        loaded.decode(loaded.model.generate(**inputs, max_new_tokens=2, do_sample=False), inputs)

    for k in range(60):
        ask(k)
    memory, files = held()
    for k in range(300):
        ask(k)
    after = held()
    assert after[1] <= files and after[0] < memory + 20, (memory, after)


@pytest.mark.slow
@pytest.mark.parametrize("disk", [False, True])
def test_hours_of_video(loaded: Any, tmp_path: Path, disk: bool) -> None:
    """Three hours at one frame a second, as fast as they go, into a small archive: flat after the first."""
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 256, (32, 32, 3), np.uint8)

    def frames(first: int, count: int) -> Any:
        for second in range(first, first + count):
            picture = scene.copy()
            picture[8:24, (second % 2) * 16 : (second % 2) * 16 + 16] = second % 256
            yield picture, float(second)

    options = {"disk": tmp_path / "archive", "disk_limit": "8MiB"} if disk else {}
    with StreamSession(loaded.model, loaded.processor, window=64, ram="4MiB", redundancy=0.05, **options) as session:
        before, marks = held(), []
        for hour in range(3):
            session.watch(open_source(frames(hour * 3600, 3600)))
            session.ask("what is it ?", max_new_tokens=2)
            session.new_conversation()
            marks.append(held())
        stats = session.stats()
    assert stats["frames"] == 3 * 3600 and stats["evicted"] > 0 and stats["kv_host_bytes"] <= 4 << 20
    assert marks[2][0] < marks[0][0] + 20, marks
    assert marks[2][1] <= before[1] + 2 + (MOST_OPEN if disk else 0), (before, marks)  # segments stay open, so many
