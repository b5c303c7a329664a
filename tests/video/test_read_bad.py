"""Bad media: one line that names the thing and the way out, nothing half-written; folders and pictures."""

from __future__ import annotations

import ast
import os
import struct
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from clips import clip_files, encode, installed, pictures, refused  # noqa: F401
from PIL import Image

from vlmfast.stream import Fps, SceneChange, Uniform, read_image, read_video, write_video
from vlmfast.video import decoders as backends_module
from vlmfast.video.decoders import BACKENDS

# ---------------------------------------------------------------- folders and pictures


def test_folder_of_frames(tmp_path):
    frames = pictures(12)
    for k, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"f{k}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / ".f99.png").write_bytes(b"hidden")
    video = read_video(tmp_path, Uniform(12), fps=4)
    assert np.array_equal(video.frames, frames)  # f2 before f10
    assert np.allclose(video.timestamps, np.arange(12) / 4) and video.duration == 3 and video.fps == 4
    assert read_video(tmp_path, Fps(1), fps=4).indices.tolist() == [0, 4, 8]
    assert read_video(tmp_path, Uniform(2)).timestamps.tolist() == [0, 11]  # one a second unless told
    assert len(read_video(tmp_path, SceneChange(0.001, min_gap=0))) > 1
    Image.fromarray(frames[0][:40]).save(tmp_path / "f12.png")
    with refused("differ in size", "f0.png is 48x64", "f12.png is 40x64", "size="):
        read_video(tmp_path)
    assert read_video(tmp_path, Uniform(13), size=(24, 32)).frames.shape == (13, 24, 32, 3)
    for fps in (0, -1):
        with refused("fps", fps):
            read_video(tmp_path, fps=fps)


def test_pictures(tmp_path):
    frame = pictures(1)[0]
    image = Image.fromarray(frame)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "exif.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "exif.png"), np.rot90(frame, -1))
    image.convert("RGBA").save(tmp_path / "rgba.png")
    assert np.array_equal(read_image(tmp_path / "rgba.png"), frame)
    deep = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 20
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(read_image(tmp_path / "deep.png")[..., 1], deep >> 8)
    image.save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("hello")
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBBI", 13, b"IHDR", 0, 0, 8, 2, 0, 0, 0, 0)
    (tmp_path / "none.png").write_bytes(png)
    (tmp_path / "empty.png").touch()
    for name in ("cut.jpg", "text.png", "none.png", "empty.png"):
        with refused(tmp_path / name):
            read_image(tmp_path / name)
    with refused("no such picture", tmp_path / "absent.png"):
        read_image(tmp_path / "absent.png")
    with refused("folder"):
        read_image(tmp_path)


# ---------------------------------------------------------------- bad input


def cut(path, out, part):
    data = path.read_bytes()
    out.write_bytes(data[: int(len(data) * part)])
    return out


def faststart(path, out):
    """The same mp4 with its index in front, as on the web: cut short, it still opens."""
    with av.open(str(path)) as src, av.open(str(out), "w", options={"movflags": "faststart"}) as dst:
        stream = dst.add_stream_from_template(src.streams.video[0])
        for packet in src.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                dst.mux(packet)
    return out


def test_damaged_and_wrong_files(clips, tmp_path):
    with refused("no such file", tmp_path / "absent.mp4"):
        read_video(tmp_path / "absent.mp4")
    (tmp_path / "empty.mp4").touch()
    with refused("empty.mp4", "0 bytes"):
        read_video(tmp_path / "empty.mp4")
    for name in ("notes.mp4", "notes.txt"):
        (tmp_path / name).write_text("nothing to see here\n" * 40)
        with refused(name, "not a video"):
            read_video(tmp_path / name)
    with refused("cut.mp4", "cut short"):
        read_video(cut(clips["mp4"], tmp_path / "cut.mp4", 0.6))
    web = faststart(clips["mp4"], tmp_path / "web.mp4")
    assert len(read_video(web)) == 16
    for path, part in ((web, 0.6), (clips["mkv"], 0.5), (clips["avi"], 0.5)):
        with refused("truncated", "copy it again"):
            read_video(cut(path, tmp_path / f"cut_{path.name}", part))
    data = bytearray(web.read_bytes())
    third = slice(len(data) * 2 // 5, len(data) * 3 // 5)
    data[third] = np.random.default_rng(0).integers(0, 256, third.stop - third.start, np.uint8).tobytes()
    (tmp_path / "damaged.mp4").write_bytes(data)
    for backend in installed():
        with refused("damaged.mp4"):
            read_video(tmp_path / "damaged.mp4", Uniform(120), backend)
    picture = tmp_path / "picture.png"
    Image.fromarray(pictures(1)[0]).save(picture)
    with refused("picture.png", "is a picture"):
        read_video(picture)
    with av.open(str(tmp_path / "sound.mka"), "w") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    with refused("sound.mka", "no video track"):
        read_video(tmp_path / "sound.mka")
    with av.open(str(tmp_path / "none.mkv"), "w") as out:
        stream = out.add_stream("mjpeg", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        out.start_encoding()
    with refused("none.mkv"):
        read_video(tmp_path / "none.mkv")
    (tmp_path / "bare").mkdir()
    with refused("bare", "no pictures"):
        read_video(tmp_path / "bare")


def test_playlists_open_nothing_else(clips, tmp_path):
    """A file must not make us open other files or addresses; a name that looks like an address is just a name."""
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:4,\n{clips['ts']}\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {clips['mp4']}\n")
    for name in ("list.m3u8", "list.mp4"):
        with refused(name, "is a playlist, not a video"):
            read_video(tmp_path / name)
    for name in ("http:x.mp4", "concat:a|b.mp4", "50%d.mp4"):
        odd = tmp_path / name
        odd.write_bytes(clips["mp4"].read_bytes())
        assert len(read_video(odd, Uniform(2))) == 2
        here = os.getcwd()
        os.chdir(tmp_path)
        try:
            assert len(read_video(name, Uniform(2))) == 2
        finally:
            os.chdir(here)


def test_bad_arguments(clips, monkeypatch, tmp_path):
    with refused("unknown video backend 'vlc'", "pyav, decord, opencv, torchcodec"):
        read_video(clips["mp4"], backend="vlc")
    monkeypatch.setitem(BACKENDS, "decord", "no_such_module_at_all")
    with refused("'decord' is not installed", "pip install decord", "'pyav'"):
        read_video(clips["mp4"], backend="decord")
    monkeypatch.setitem(BACKENDS, "torchcodec", "no_such_module_at_all")
    with refused("'torchcodec' is not installed", "pip install torchcodec", "'pyav'"):
        read_video(clips["mp4"], backend="torchcodec")
    monkeypatch.setitem(BACKENDS, "torchcodec-cuda", "av")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with refused("torchcodec-cuda", "there is none here", "'pyav'"):
        read_video(clips["mp4"], backend="torchcodec-cuda")
    monkeypatch.setitem(BACKENDS, "torchcodec", "av")
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)  # its libraries cannot be loaded
    with refused("torchcodec cannot decode", clips["mp4"], "'pyav'"):
        read_video(clips["mp4"], backend="torchcodec")
    for select in (16, [1, 2], Uniform):
        with refused("select must be", repr(select)):
            read_video(clips["mp4"], select)
    for size in (0, -3, (0, 4), (1, 2, 3), "big", 2.5):
        with refused("size", repr(size)):
            read_video(clips["mp4"], size=size)
    for most in (0, -1, 1.5):
        with refused("max_frames", most):
            read_video(clips["mp4"], max_frames=most)
    with refused("fps= is for folders", "select="):
        read_video(clips["mp4"], fps=3)
    monkeypatch.setattr("vlmfast.video.read._MOST_BYTES", 100_000)
    with refused("16 frames of 48x64", "size="):
        read_video(clips["mp4"])
    assert len(read_video(clips["mp4"], size=24)) == 16


def test_changing_size_in_one_file(tmp_path):
    """Two recordings in one transport stream: refused unless one size is asked for."""
    one, two = (encode(tmp_path / f"{k}.ts", pictures(20, h, 64), g=10) for k, h in ((1, 48), (2, 32)))
    both = tmp_path / "both.ts"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    with refused("change size from 48x64 to 32x64", "size=(height, width)"):
        read_video(both, Uniform(40))
    assert len({f.shape for f in read_video(both, Uniform(40), size=(24, 32)).frames}) == 1


def test_nothing_heavy_is_imported_until_asked():
    for path in Path(backends_module.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
                heavy = {n.split(".")[0] for n in names} & {"av", "cv2", "decord", "PIL", "transformers", "torchvision"}
                assert not heavy, f"{path.name} imports {heavy} at its top"


def test_nothing_half_written(tmp_path):
    def breaks():
        yield from pictures(3)
        raise KeyboardInterrupt

    kept = tmp_path / "kept.mp4"
    kept.write_text("what was there before")
    with pytest.raises(KeyboardInterrupt):
        write_video(kept, breaks(), fps=5)
    for frames, word in (([], "no frames"), (pictures(2)[:, :47], "even"), (pictures(2) / 255.0, "uint8")):
        with refused(word):
            write_video(kept, frames, fps=5)
    with refused("change size"):
        write_video(kept, [pictures(1)[0], pictures(1, 32)[0]], fps=5)
    with refused("pixels"):
        write_video(kept, np.empty((2, 0, 64, 3), np.uint8), fps=5)
    for fps in (0, -2, float("nan"), float("inf"), "3"):
        with refused("fps", repr(fps)):
            write_video(kept, pictures(2), fps=fps)
    with refused("no such folder"):
        write_video(tmp_path / "nowhere" / "x.mp4", pictures(2), fps=5)
    with refused("folder"):
        write_video(tmp_path, pictures(2), fps=5)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.mp4"]
    assert kept.read_text() == "what was there before"


@pytest.mark.parametrize("bad", [0, -1, 2.5, None, "3", True, float("nan")])
def test_bad_selections(bad):
    with refused("frames=", "in uniform", repr(bad)):
        Uniform(bad)
    if bad != 2.5:
        with refused("rate=", "in fps", repr(bad)):
            Fps(bad)
        with refused("threshold=", "in scene"):
            SceneChange(bad if bad is not True else 1)
