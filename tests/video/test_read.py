"""Media input: the same frames and timestamps whoever decodes, and frames chosen by time."""

from __future__ import annotations

import contextlib
import struct
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from clips import clip_files, decode_all, encode, installed, needs, pictures, refused, turned  # noqa: F401

from vlmfast.stream import Fps, SceneChange, Uniform, parse_select, read_video, write_video
from vlmfast.video import VideoReader
from vlmfast.video import decoders as backends_module
from vlmfast.video.decoders import BACKENDS, fetch, thumbnails
from vlmfast.video.frame_index import read_index

FILES = ["mp4", "mkv", "ts", "avi", "open_mp4", "open_mkv", "open_ts", "vfr_mp4", "vfr_mkv", "mpeg4", "raw", "gif"]
INEXACT = {"ts", "avi", "open_ts", "mpeg4", "raw", "gif"}  # decord and torchcodec shift or lose frames there


# ---------------------------------------------------------------- frames and timestamps


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_every_backend_gives_the_same_frames(clips, name, backend):
    """Few or many, in random places: pixels equal those of plain decoding from the start, times equal the index's."""
    needs(backend)
    path, rng = clips[name], np.random.default_rng(7)
    index, whole = read_index(path), decode_all(path)
    assert len(index) == len(whole) == index.timestamps.size
    if backend in ("decord", "torchcodec") and name in INEXACT:
        with refused(backend, path, "pyav"):
            read_video(path, backend=backend)
        return
    for count in (1, 2, 3, 7, len(whole)):
        wanted = np.sort(rng.choice(len(whole), min(count, len(whole)), replace=False))
        got = list(fetch(index, wanted, backend))
        assert len(got) == len(wanted)
        for k, frame in zip(wanted, got, strict=True):
            assert np.array_equal(frame, whole[k]), f"frame {k} of {wanted}"
    ours, reference = read_video(path, Uniform(5), backend), read_video(path, Uniform(5))
    assert np.array_equal(ours.frames, reference.frames)
    assert np.array_equal(ours.timestamps, reference.timestamps)
    assert np.array_equal(ours.indices, reference.indices)


@pytest.mark.parametrize("name", FILES)
def test_index(clips, name):
    index = read_index(clips[name])
    n = len(index)
    if name.startswith("vfr"):
        truth = (clips["vfr_pts"] - clips["vfr_pts"][0]) / 90
    elif name == "gif":
        truth = np.round(np.arange(n) / 30 * 100 - 0.01) / 100  # the format counts hundredths
    else:
        truth = np.arange(n) / 30
    assert np.abs(index.timestamps - truth).max() < (0.011 if name == "gif" else 0.0011)  # mkv rounds to 1 ms
    assert index.timestamps[0] == 0 and np.all(np.diff(index.timestamps) > 0)
    assert index.upright_size == (48, 64)
    assert index.fps == pytest.approx((n - 1) / truth[-1], rel=0.02)
    assert truth[-1] < index.duration < truth[-1] + 0.11


def test_seeks_instead_of_decoding_everything(clips, monkeypatch):
    """Two frames far apart cost at most a group of pictures each, and the frames not asked for are not converted."""
    seen = []

    def counted(*args):
        for frame in frames_of(*args):
            seen.append(frame.pts)
            yield frame

    frames_of = backends_module.frames_of
    monkeypatch.setattr(backends_module, "frames_of", counted)
    index = read_index(clips["mp4"])
    list(fetch(index, np.array([2, 95])))
    assert len(seen) <= 3 + 6, "frames 90 to 95 follow a key frame"
    assert set(seen) <= set(index.pts.tolist())


def test_a_seek_that_lands_too_late_is_noticed(clips, monkeypatch):
    """If the file's index of key frames lies, the frames are found by walking instead."""
    index = read_index(clips["mp4"])
    whole = decode_all(clips["mp4"])
    lying = replace(index, keys=np.array([index.pts[0], index.pts[50]]))  # 50 is no key frame; the next one is 60

    class Late:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def seek(self, stamp, **kwargs):
            self.container.seek(int(index.pts[60]), **kwargs)

    @contextlib.contextmanager
    def opened(path):
        with real(path) as (container, stream):
            yield Late(container), stream

    real = backends_module.open_video
    monkeypatch.setattr(backends_module, "open_video", opened)
    got = list(fetch(lying, np.array([3, 52, 70])))
    assert all(np.array_equal(g, whole[k]) for g, k in zip(got, (3, 52, 70), strict=True))


def test_a_file_that_cannot_seek_is_decoded_in_turn_and_says_so(clips, monkeypatch):
    """A seek that libav refuses costs time, not the answer."""

    class Still:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def seek(self, *args, **kwargs):
            raise av.error.PermissionError(1, "Operation not permitted")

    @contextlib.contextmanager
    def opened(path):
        with real(path) as (container, stream):
            yield Still(container), stream

    real = backends_module.open_video
    want = read_video(clips["mp4"], Uniform(3))
    reader = VideoReader(clips["mp4"], Uniform(3))
    assert reader.decodes_more() is None
    monkeypatch.setattr(backends_module, "open_video", opened)
    assert np.array_equal(reader.read().frames, want.frames)
    assert "decoded in turn" in reader.decodes_more()


CODED = {
    "h264": {"codec": "libx264", "g": 40, "x264-params": "bframes=8:b-pyramid=normal:b-adapt=0"},
    "open groups": {"codec": "libx264", "g": 24, "x264-params": "open-gop=1:bframes=4"},
    "hevc": {"codec": "libx265", "g": 30, "x265-params": "bframes=4:log-level=none"},
    "hevc in layers": {"codec": "libx265", "g": 30, "x265-params": "bframes=8:temporal-layers=3:log-level=none"},
    "mpeg2": {"codec": "mpeg2video", "g": 30, "bf": 2},
    "mpeg4": {"codec": "mpeg4", "g": 30, "bf": 2},
    "vp9": {"codec": "libvpx-vp9", "g": 30},
}


@pytest.mark.parametrize("coded", CODED)
def test_frames_nobody_refers_to_are_not_decoded(coded, tmp_path, monkeypatch):
    """What was asked for is exact, also frames that nobody refers to; of the others some are left out."""
    path = encode(tmp_path / "clip.mp4", pictures(120), **CODED[coded])
    index, whole, decoded = read_index(path), decode_all(path), []

    def counted(*args):
        for frame in frames_of(*args):
            decoded.append(frame.pts)
            yield frame

    frames_of = backends_module.frames_of
    monkeypatch.setattr(backends_module, "frames_of", counted)
    assert index.skips == (coded not in ("hevc in layers", "mpeg4", "vp9"))
    rng = np.random.default_rng(0)
    for count in (1, 6, 30, 120):
        wanted = np.sort(rng.choice(120, count, replace=False))
        assert all(np.array_equal(g, whole[k]) for g, k in zip(fetch(index, wanted), wanted, strict=True))
    decoded.clear()
    list(fetch(index, np.arange(0, 120, 10)))
    assert len(decoded) <= 60 if index.skips else len(decoded) == 111


def test_a_frame_lost_by_skipping_is_found_in_turn(clips, monkeypatch):
    """Should a decoder skip more than it may, every frame is decoded."""

    def too_few(container, stream, path, count=None, wanted=None):
        frames = frames_of(container, stream, path, count, wanted)
        return frames if wanted is None else (frame for frame in frames if frame.key_frame)

    frames_of = backends_module.frames_of
    monkeypatch.setattr(backends_module, "frames_of", too_few)
    index, whole = read_index(clips["mp4"]), decode_all(clips["mp4"])
    got = list(fetch(index, np.array([0, 7, 44, 119])))
    assert all(np.array_equal(g, whole[k]) for g, k in zip(got, (0, 7, 44, 119), strict=True))


@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_rotated_videos_come_out_upright(clips, tmp_path, degrees, backend):
    needs(backend)
    path = turned(clips["mp4"], tmp_path / "turned.mp4", degrees)
    if backend in ("decord", "torchcodec"):
        with refused(backend, "rotated", "pyav"):
            read_video(path, Uniform(3), backend)
        return
    video, flat = read_video(path, Uniform(3), backend), read_video(clips["mp4"], Uniform(3))
    clockwise = np.rot90(flat.frames, -degrees // 90, axes=(1, 2))  # the mark says: turn it by that much to show it
    assert np.array_equal(video.frames, clockwise)
    assert video.size == video.frames.shape[1:3]


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_frames_cut_away_by_an_edit_list(clips, tmp_path, backend):
    """The first ten frames are in the file for others to refer to, but are not shown: they do not count."""
    needs(backend)
    data = bytearray(clips["mp4"].read_bytes())
    at = data.find(b"elst") + 4
    flags, count, length, begin = struct.unpack(">IIIi", data[at : at + 16])
    data[at : at + 16] = struct.pack(">IIIi", flags, count, length - 333, begin + 10 * 512)
    path = tmp_path / "edited.mp4"
    path.write_bytes(data)
    if backend == "decord":
        with refused("decord sees 120 of 110 frames", "pyav"):
            read_video(path, backend=backend)
        return
    video, whole = read_video(path, Uniform(110), backend), decode_all(clips["mp4"])
    assert np.array_equal(video.frames, whole[10:])
    assert np.allclose(video.timestamps, np.arange(110) / 30, atol=1e-4)


def test_size_and_metadata(clips):
    video = read_video(clips["mp4"], Uniform(4), size=32)
    assert video.frames.shape == (4, 24, 32, 3) and video.size == (48, 64)  # the longer side, shape kept
    assert read_video(clips["mp4"], Uniform(4), size=1000).frames.shape == (4, 48, 64, 3)  # never enlarged
    exact = read_video(clips["mp4"], Uniform(4), size=(20, 90))
    assert exact.frames.shape == (4, 20, 90, 3)
    upright = read_video(clips["side"], Uniform(2), size=32)
    assert upright.frames.shape == (2, 32, 24, 3)
    full = read_video(clips["mp4"], Uniform(4)).frames
    assert np.abs(full[:, ::2, ::2].mean((1, 2)) - video.frames.mean((1, 2))).max() < 8
    for name in ("mp4", "vfr_mp4"):  # a processor that knows only a constant rate still gets the true times
        video = read_video(clips[name], Fps(3))
        meta = video.metadata()
        times = np.array(meta["frames_indices"]) / meta["fps"]
        assert np.abs(times - video.timestamps).max() <= 0.5 / meta["fps"] + 1e-9
        assert max(meta["frames_indices"]) < meta["total_num_frames"]


def test_write_and_read_back(tmp_path):
    frames = pictures(20)
    path = write_video(tmp_path / "out.mp4", iter(frames), fps=12.5)
    video = read_video(path, Uniform(20))
    assert video.frames.shape == frames.shape and video.fps == 12.5 and video.total == 20
    assert np.allclose(video.timestamps, np.arange(20) / 12.5, atol=1e-4)
    error = np.abs(video.frames.astype(int) - frames)
    assert error[..., 2:].mean() < 8 and np.median(error) <= 4  # chroma is halved in yuv420p; the rest survives
    same = write_video(tmp_path / "tensor.mp4", torch.from_numpy(frames), fps=12.5)
    assert same.read_bytes() == path.read_bytes()  # the same frames make the same file
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.mp4", "tensor.mp4"]


# ---------------------------------------------------------------- selection


def stamps(rng):
    """Random timestamps, constant rate or not."""
    n = int(rng.integers(1, 80))
    steps = np.full(n, 1 / rng.choice([1.0, 10, 24, 29.97, 30, 60])) if rng.random() < 0.4 else rng.exponential(0.2, n)
    times = np.cumsum(np.maximum(steps, 2e-3))
    return times - times[0]


def test_uniform_laws():
    rng = np.random.default_rng(0)
    for _ in range(400):
        times, k = stamps(rng), int(rng.integers(1, 40))
        picked = Uniform(k).pick(times, iter(()))
        assert len(picked) == min(k, len(times)) and np.all(np.diff(picked) > 0)
        assert picked[0] >= 0 and picked[-1] < len(times)
        if k < len(times):
            wanted = np.linspace(times[0], times[-1], k) if k > 1 else np.array([times[-1] / 2])
            nearest = np.abs(times[None] - wanted[:, None]).argmin(1)
            if len(set(nearest.tolist())) == k:  # no two instants share a frame: exactly the nearest ones
                gap = np.abs(times[picked] - wanted) - np.abs(times[nearest] - wanted)
                assert np.abs(gap).max() < 1e-9
        if k > 1:
            assert picked[0] == 0 and picked[-1] == len(times) - 1
    even = Uniform(5).pick(np.arange(101) / 30, iter(()))
    assert even.tolist() == [0, 25, 50, 75, 100]


def test_fps_laws():
    """At every tick the frame then on show is among those picked, and nothing else is."""
    rng = np.random.default_rng(1)
    for _ in range(120):
        times, rate = stamps(rng), float(rng.choice([0.3, 1, 2, 5, 24, 60, 1000]))
        picked = Fps(rate).pick(times, iter(()))
        on_show, tick = set(), 0
        while tick / rate <= times[-1] + 6e-4:
            on_show.add(int(np.nonzero(times <= tick / rate + 6e-4)[0][-1]))
            tick += 1
        assert picked.tolist() == sorted(on_show)
    assert Fps(2).pick(np.arange(60) / 30, iter(())).tolist() == [0, 15, 30, 45]
    assert len(Fps(30).pick(np.round(np.arange(60) / 30, 3), iter(()))) == 60  # stamps rounded to milliseconds
    assert len(Fps(1e9).pick(np.arange(60) / 30, iter(()))) == 60


def test_scene_change_laws():
    rng = np.random.default_rng(2)
    for _ in range(100):
        times = stamps(rng)
        thumbs = rng.integers(0, 256, (len(times), 24, 24, 3), np.uint8)
        walk = rng.random(len(times)) < 0.7
        for k in range(1, len(times)):
            if walk[k]:  # most frames hardly differ from the one before
                thumbs[k] = np.clip(thumbs[k - 1].astype(int) + rng.integers(-6, 7), 0, 255)
        rule = SceneChange(threshold=0.1, min_gap=0.15, max_gap=3.0)
        picked = rule.pick(times, iter(thumbs)).tolist()
        assert picked[0] == 0
        last = 0
        for k in range(1, len(times)):
            differs = np.abs(thumbs[k].astype(int) - thumbs[last]).mean() / 255 > 0.1
            gap = times[k] - times[last]
            assert (k in picked) == (gap >= 0.15 - 1e-6 and (differs or gap >= 3.0))
            last = k if k in picked else last


def test_scene_change_finds_the_cuts(tmp_path):
    scenes = [pictures(30, seed=s)[:, :, :, [s % 3, 1, 2]] for s in (1, 2, 3)]
    path = encode(tmp_path / "cuts.mkv", np.concatenate(scenes), g=30)
    for backend in installed():
        video = read_video(path, SceneChange(0.2), backend)
        assert video.indices.tolist() == [0, 30, 60], backend
    assert len(list(thumbnails(read_index(path), 24))) == 90


def test_max_frames_thins_evenly(clips):
    assert read_video(clips["mp4"], Fps(30), max_frames=5).indices.tolist() == [0, 30, 59, 89, 119]
    assert len(read_video(clips["mp4"], Uniform(3), max_frames=5)) == 3


def test_selections_as_text(clips):
    assert parse_select("uniform:8") == Uniform(8) and parse_select("uniform") == Uniform()
    assert parse_select("fps:rate=0.5") == Fps(0.5) and parse_select("scene:0.1, max_gap=9") == SceneChange(0.1, 0.2, 9)
    assert len(read_video(clips["mp4"], "fps:1")) == 4
    for text, word in (
        ("every:2", "every"),
        ("uniform:x", "'x'"),
        ("fps:speed=2", "speed"),
        ("uniform:-1", "-1"),
        ("scene:max_gap=0.1", "longer than min_gap"),
    ):
        with refused(word):
            parse_select(text)
