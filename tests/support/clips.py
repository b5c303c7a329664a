"""Small videos of every awkward kind, made with libav itself rather than with the code under test."""

from __future__ import annotations

import contextlib
import importlib.util
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from vlmfast.core import UserError
from vlmfast.video.decoders import BACKENDS


@contextlib.contextmanager
def refused(*words):
    """The block raises a UserError of one line that has all the words in it, and drags no other error along."""
    with pytest.raises(UserError) as caught:
        yield caught
    error = caught.value
    message = str(error)
    assert "\n" not in message and len(message) < 400, message
    assert error.__cause__ is None and (error.__context__ is None or error.__suppress_context__), "a chained traceback"
    for word in words:
        assert str(word) in message, f"{word!r} is missing in {message!r}"


def pictures(n, h=48, w=64, seed=0):
    """(n, h, w, 3): a box that moves over blocks of colour; every frame differs from every other."""
    rng = np.random.default_rng(seed)
    back = np.kron(rng.integers(0, 200, (h // 8, w // 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    out = np.repeat(back[None], n, 0)
    for k in range(n):
        out[k, 8:24, (2 * k) % (w - 16) : (2 * k) % (w - 16) + 16] = (255, (9 * k) % 256, 0)
        out[k, 40:, : 1 + k % w] = 255
    return out


def encode(path, frames, pts=None, unit=Fraction(1, 30), codec="libx264", pix="yuv420p", format=None, aspect=None,
           container=None, **options):  # fmt: skip
    """A video file made with libav itself, not with the code under test. container: options of the file format."""
    with av.open(str(path), "w", format=format, options=container or {}) as out:
        stream = out.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pix
        stream.options = {k: str(v) for k, v in options.items()} | ({"sc_threshold": "0"} if codec == "libx264" else {})
        stream.codec_context.time_base = unit
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for k, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix)
            frame.pts, frame.time_base = int(k if pts is None else pts[k]), unit
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def decode_all(path):
    """Every frame, by the plainest loop there is."""
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def turned(path, out, degrees):
    """A copy of an mp4 whose track header says that it was filmed with the camera on its side."""
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 44
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    out.write_bytes(data)
    return out


@pytest.fixture(scope="session", name="clips")
def clip_files(tmp_path_factory):
    """name -> path; `vfr_pts` are the stamps (1/90 s) of the files of variable frame rate."""
    root = tmp_path_factory.mktemp("clips")
    frames = pictures(120)
    out = {"vfr_pts": np.cumsum(np.random.default_rng(1).integers(1, 9, 120)), "root": root}
    open_groups = {"g": 24, "x264-params": "open-gop=1:bframes=4"}
    for ext in ("mp4", "mkv", "ts", "avi"):
        out[ext] = encode(root / f"plain.{ext}", frames, g=30)
        out[f"open_{ext}"] = encode(root / f"open.{ext}", frames, **open_groups)
        if ext in ("mp4", "mkv"):
            vfr = {"pts": out["vfr_pts"], "unit": Fraction(1, 90), "g": 20}
            out[f"vfr_{ext}"] = encode(root / f"vfr.{ext}", frames, **vfr)
    out["mpeg4"] = encode(root / "mpeg4.avi", frames, codec="mpeg4", g=12, bf=2)
    out["raw"] = encode(root / "raw.h264", frames, format="h264", g=30)
    out["gif"] = encode(root / "anim.gif", frames[:12], codec="gif", pix="rgb8")
    out["side"] = turned(out["mp4"], root / "side.mp4", 90)
    return out


def installed():
    """The backends that are there."""
    there = [b for b, module in BACKENDS.items() if importlib.util.find_spec(module)]
    return [b for b in there if b != "torchcodec-cuda" or torch.cuda.is_available()]


def needs(backend):
    if backend not in installed():
        pytest.skip(f"{backend} is not installed")
