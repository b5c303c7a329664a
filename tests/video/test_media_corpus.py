"""Every malformed or odd medium gives the right frames or one UserError of one line: no other error, no hang."""

from __future__ import annotations

import faulthandler
import resource
import subprocess
import sys
from pathlib import Path

import media_corpus
import numpy as np
import pytest

from vlmfast.core import UserError
from vlmfast.stream import Uniform, open_source, read_image, read_video
from vlmfast.video.images import as_frame, image_size

PATIENCE = 120  # seconds after which a hang ends the run with a traceback


@pytest.fixture(autouse=True)
def _no_hang():
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return media_corpus.pictures_of(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return media_corpus.videos_of(tmp_path_factory.mktemp("videos"))


def attempt(read, entry):
    """What `read` gives, or None for a UserError of one line that names the file."""
    error: UserError | None = None
    try:
        return read(entry.path)
    except UserError as e:
        error = e
    text = str(error)
    assert "\n" not in text and len(text) < 500, (entry.name, text)
    assert entry.path.name[:50].split("\0")[0] in text, (entry.name, text)
    assert error.__cause__ is None and (error.__context__ is None or error.__suppress_context__), entry.name
    return None


def test_pictures(images):
    wrong = []
    for entry in images:
        got = attempt(read_image, entry)
        if entry.truth is None:
            if got is not None and entry.exact:
                wrong.append(f"{entry.name}: came out as {got.shape}")
        elif got is None or got.shape != entry.truth.shape or got.dtype != np.uint8:
            wrong.append(f"{entry.name}: {None if got is None else got.shape} instead of {entry.truth.shape}")
        elif np.abs(got.astype(int) - entry.truth).max() > (0 if entry.exact else 3):
            wrong.append(f"{entry.name}: other pixels")
        if got is not None and image_size(entry.path) != got.shape[:2]:
            wrong.append(f"{entry.name}: the header says {image_size(entry.path)}, the picture is {got.shape[:2]}")
    assert not wrong, "\n".join(wrong)


def test_videos(videos):
    wrong = []
    for entry in videos:
        for way, read in (("read_video", _whole), ("open_source", _streamed)):
            got = attempt(read, entry)
            label = f"{entry.name}, {way}"
            if entry.truth is None:
                if got is not None and entry.exact:
                    wrong.append(f"{label}: came out as {got[0].shape}")
            elif not entry.exact:  # cut where the format cannot say: what there is must be the beginning
                if got is not None and not np.array_equal(got[0][:-1], entry.truth[: len(got[0]) - 1]):
                    wrong.append(f"{label}: other pixels")
            elif got is None or got[0].shape != entry.truth.shape:
                wrong.append(f"{label}: {None if got is None else got[0].shape} instead of {entry.truth.shape}")
            elif not np.array_equal(got[0], entry.truth):
                wrong.append(f"{label}: other pixels")
            elif np.abs(got[1] - entry.seconds).max() > 2e-3:
                wrong.append(f"{label}: other seconds, {got[1][:4]} instead of {entry.seconds[:4]}")
    assert not wrong, "\n".join(wrong)


def _whole(path):
    video = read_video(path, Uniform(1000))
    assert len(video.frames) == len(video.timestamps) and np.all(np.diff(video.timestamps) > 0)
    return video.frames, video.timestamps


def _streamed(path):
    got = list(open_source(path))
    return np.stack([f.image for f in got]), np.array([f.timestamp for f in got])


def test_the_corpus_says_what_the_law_says():
    """The display matrices and the EXIF marks of the corpus are inverse to each other, eight different ones."""
    upright = media_corpus.noise(5, 7)
    seen = set()
    for how, store in media_corpus.STORED.items():
        stored = np.ascontiguousarray(store(upright))
        seen.add(stored.tobytes() + bytes(stored.shape))
        assert np.array_equal(media_corpus.shown_of(stored[None], how)[0], upright)
    assert len(seen) == 8
    assert np.array_equal(as_frame(upright), upright)


def test_a_small_file_takes_little_memory(tmp_path):
    """13,300 pixels a side in a few kilobytes: refused before it is decoded, in a process of its own."""
    path = media_corpus.png(tmp_path / "bomb.png", (13_300, 13_300), body=bytes(1664 * 13_300))
    assert path.stat().st_size < 600_000
    code = (
        "import resource, sys\nfrom vlmfast.stream import read_image\nimport PIL.Image, numpy\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read_image(sys.argv[1])\nexcept ValueError as e: print(e)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    message, grown = out.stdout.strip().splitlines()
    assert "13300 x 13300" in message and int(grown) < 50, out.stdout


def test_the_largest_picture_allowed_is_read(tmp_path):
    """8,192 pixels a side come out, and a mebibyte of pixels takes at most 12 of memory on the way."""
    path = media_corpus.png(tmp_path / "wide.png", (8192, 4096), body=(b"\0" + bytes([0xAA] * 1024)) * 4096)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    picture = read_image(path)
    assert picture.shape == (4096, 8192, 3) and picture[0, :4, 0].tolist() == [255, 0, 255, 0]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 12 * (8192 * 4096 // 1024)


def test_other_kinds_of_picture_are_refused_by_name(tmp_path):
    """What is not on the list never reaches PIL's other readers, whatever the name ends in."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(UserError, match=r"PNG, JPEG, BMP, WEBP, TIFF, GIF, PPM"):
        read_image(tmp_path / "a.png")
    with pytest.raises(UserError, match="no regular file"):
        read_image(Path("/dev/zero"))
