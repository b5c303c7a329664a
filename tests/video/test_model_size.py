"""Frames at the size of the model: the same grid as of full frames, about the same pixels, and the report of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from clips import encode, needs, pictures, refused, turned
from PIL import Image
from pretend_cuda import PretendCuda, to_cuda, to_host

import vlmfast
from vlmfast import families, media
from vlmfast.stream import StreamSession
from vlmfast.video import Uniform, VideoReader, read_video
from vlmfast.video.decoders import BACKENDS

QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
# height, width: odd ones, portrait, slim, and such that the clip has to be made larger
SIZES = [(48, 64), (270, 480), (480, 270), (301, 455), (97, 1201), (1080, 1920), (1920, 1080), (33, 33), (2160, 3840)]


def smooth(count: int, height: int, width: int) -> np.ndarray:
    """(count, height, width, 3) uint8: waves that move, and an edge."""
    y, x = np.mgrid[0:height, 0:width]
    frames = []
    for k in range(count):
        waves = [np.sin((x + 9 * k) / 23 + y / 19), np.cos((x - 5 * k) / 31), np.sin(y / 17 + k)]
        frame = np.stack([127 + 90 * wave for wave in waves], -1)
        frame[:, width // 2 :] *= 0.7
        frames.append(frame.clip(0, 255).astype(np.uint8))
    return np.stack(frames)


def stand_in(family: str, video_processor: Any) -> tuple[Any, Any]:
    """(model, processor) of which only the type and the video processor count."""
    model = SimpleNamespace(config=SimpleNamespace(model_type=family))
    return model, SimpleNamespace(video_processor=video_processor)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("cap", [None, True])
def test_the_grid_is_that_of_full_frames(family: str, cap: bool | None) -> None:
    """Real limits of pixels, many sizes and counts: the processor makes the same grid of the frames that come."""
    kind = transformers.Qwen3VLVideoProcessor if family == "qwen3_vl" else transformers.Qwen2VLVideoProcessor
    model, processor = stand_in(family, kind(cap_pixels_per_frame=cap))
    options = media.video_options(processor)

    def grid(frames: int, height: int, width: int) -> list[int]:
        shapes = torch.empty(frames, 3, height, width, dtype=torch.uint8, device="meta")
        return processor.video_processor([shapes], return_tensors="pt", **options)["video_grid_thw"][0].tolist()

    rng, smaller = np.random.default_rng(0), 0
    sizes = SIZES + [tuple(map(int, rng.integers(20, 2200, 2))) for _ in range(6)]
    for height, width in sizes:
        for frames in (2, 3, 64):
            size = media.frame_size(model, processor, frames, height, width)
            if size is None:
                continue
            assert grid(frames, *size) == grid(frames, height, width), (frames, height, width, size)
            assert size[0] * size[1] <= height * width
            smaller += size != (height, width)
    assert smaller > 15


@pytest.mark.parametrize("family", [*QWEN, "llava_onevision", "llava_next_video"])
@pytest.mark.parametrize("shape", [(192, 320), (320, 192), (193, 321), (80, 400)])
def test_a_file_gives_the_same_call_and_about_the_same_pixels(
    family: str, shape: tuple[int, int], loaded: Any, tmp_path: Path
) -> None:
    """Bound: 0.05 on average and 0.5 at most, in normalised units, of which 0.015 is one of 256 levels."""
    model = loaded(family)
    codec = {"codec": "ffv1", "pix": "yuv444p"} if shape[0] % 2 else {}
    path = encode(tmp_path / "clip.mkv", smooth(12, *shape), **codec)
    full = model.inputs("what ?", video=path, select="uniform:6", size="full")
    read = model.inputs("what ?", video=path, select="uniform:6")
    for name in full.keys() - {"pixel_values_videos"}:
        assert torch.equal(full[name], read[name]), name
    far = (full["pixel_values_videos"] - read["pixel_values_videos"]).abs()
    assert 0 < far.mean() < 0.05 and far.max() < 0.5, (far.mean(), far.max())
    ready = model.inputs("what ?", video=read_video(path, Uniform(6)))
    assert torch.equal(ready["pixel_values_videos"], full["pixel_values_videos"])


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_turned_film_is_scaled_upright(degrees: int, tmp_path: Path) -> None:
    flat = encode(tmp_path / "flat.mp4", smooth(4, 96, 160))
    path = turned(flat, tmp_path / "turned.mp4", degrees)
    size = (48, 80) if degrees == 180 else (80, 48)
    scaled, straight = read_video(path, Uniform(2), size=size), read_video(flat, Uniform(2), size=(48, 80))
    assert np.array_equal(scaled.frames, np.rot90(straight.frames, -degrees // 90, axes=(1, 2)))


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_whoever_decodes_gives_the_size_and_about_the_pixels(backend: str, loaded: Any, tmp_path: Path) -> None:
    needs(backend)
    model, path = loaded("qwen2_5_vl"), encode(tmp_path / "clip.mp4", smooth(12, 192, 320))
    want = model.inputs("what ?", video=path, select="uniform:4")
    got = model.inputs("what ?", video=path, select="uniform:4", backend=backend)
    assert (got["pixel_values_videos"] - want["pixel_values_videos"]).abs().mean() < 0.05


def test_a_folder_is_read_at_the_size_of_the_model(loaded: Any, tmp_path: Path) -> None:
    for number, frame in enumerate(smooth(4, 96, 160)):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    model = loaded("qwen2_5_vl")
    full, read = (model.inputs("what ?", video=tmp_path, size=size) for size in ("full", "model"))
    assert torch.equal(full["video_grid_thw"], read["video_grid_thw"])
    assert (full["pixel_values_videos"] - read["pixel_values_videos"]).abs().max() < 0.1


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_a_stream_watches_a_file_at_the_size_of_the_model(family: str, loaded: Any, tmp_path: Path) -> None:
    """As many visual tokens as of full frames; other sources and sizes that are asked for are left alone."""
    model, path = loaded(family), encode(tmp_path / "clip.mp4", smooth(8, 384, 512))
    stats, shapes = {}, {}

    def watched(**options: Any) -> tuple[dict[str, Any], set[tuple[int, ...]]]:
        seen: set[tuple[int, ...]] = set()
        with StreamSession(model.model, model.processor, redundancy=None) as session:
            encode_grids = session.encoder.encode
            session.encoder.encode = lambda grids: (seen.add(grids.frames.shape[1:3]), encode_grids(grids))[1]
            session.watch(path, sample_fps=10, **options)
            return session.stats(), seen

    for size in (None, "full", "model", 64):
        stats[size], shapes[size] = watched(**({} if size is None else {"size": size}))
    assert shapes["full"] == {(384, 512)} and shapes[64] == {(48, 64)} and shapes[None] == shapes["model"]
    assert shapes["model"] != shapes["full"]
    assert stats["model"]["visual_tokens"] == stats["full"]["visual_tokens"]


def test_small_frames_are_left_alone(loaded: Any, tmp_path: Path) -> None:
    """Frames that the processor makes larger come as they are: bit for bit the same call."""
    model, path = loaded("qwen2_5_vl"), encode(tmp_path / "small.mkv", pictures(4, 8, 8), codec="ffv1", pix="bgr0")
    full, read = (model.inputs("what ?", video=path, size=size) for size in ("full", "model"))
    assert torch.equal(full["pixel_values_videos"], read["pixel_values_videos"])
    report = asked(model, read)
    assert report["read"]["size"] == report["read"]["source_size"] == [8, 8] and not report["notes"]


def asked(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The report of one accelerated call."""
    with vlmfast.accelerate(model.model) as fast:
        model.model.generate(**inputs, max_new_tokens=2)
        return fast.report.json() | {"text": str(fast.report)}


def test_the_report_has_a_stage_of_reading(loaded: Any, tmp_path: Path) -> None:
    model, path = loaded("qwen2_5_vl"), encode(tmp_path / "clip.mp4", smooth(12, 192, 320))
    report = asked(model, model.inputs("what ?", video=VideoReader(path, "uniform:4")))
    read, first = report["read"], report["prefill"]["ttft_ms"]
    assert read["frames"] == 4 and read["source_size"] == [192, 320] and read["size"][0] < 192
    assert read["read_ms"] > 0 and read["processor_ms"] > 0
    assert read["first_token_ms"] == pytest.approx(read["read_ms"] + read["processor_ms"] + first)
    assert report["text"].startswith("read     4 frames of 320x192 -> ")
    ready = asked(model, model.inputs("what ?", images=[pictures(1)[0]]))
    assert "read_ms" not in ready["read"] and ready["read"]["processor_ms"] > 0
    by_hand = {name: tensor.clone() for name, tensor in model.inputs("what ?", images=[pictures(1)[0]]).items()}
    assert asked(model, by_hand)["read"] == {}, "nothing is known of inputs made elsewhere"


@pytest.mark.parametrize(
    ("name", "codec", "select", "word"),
    [
        ("clip.mp4", "libx264", "uniform:3", None),
        ("clip.mp4", "mpeg4", "uniform:3", "leaves no frame out"),
        ("clip.mp4", "mpeg4", "uniform:12", None),
        ("clip.mkv", "mjpeg", "uniform:3", None),
        ("clip.h264", "libx264", "uniform:3", "can only be counted"),
    ],
)
def test_what_cannot_be_skipped_is_a_line(
    name: str, codec: str, select: str, word: str | None, loaded: Any, tmp_path: Path
) -> None:
    pix = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    model, path = loaded("qwen2_5_vl"), encode(tmp_path / name, pictures(12), codec=codec, pix=pix)
    notes = asked(model, model.inputs("what ?", video=path, select=select))["notes"]
    assert notes == [] if word is None else word in notes[0] and name in notes[0] and len(notes) == 1


def test_a_processor_without_such_a_rule_gets_full_frames(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families.llava.Llava, "frame_size", families.base.Family.frame_size)
    model, path = loaded("llava_onevision"), encode(tmp_path / "clip.mp4", pictures(6))
    inputs = model.inputs("what ?", video=path, select="uniform:2")
    full = model.inputs("what ?", video=path, select="uniform:2", size="full")
    assert torch.equal(inputs["pixel_values_videos"], full["pixel_values_videos"])
    assert "has no size of its own for 64x48: full size" in asked(model, inputs)["notes"][0]
    assert not asked(model, full)["notes"]


def test_bad_sizes(loaded: Any, tmp_path: Path) -> None:
    model, path = loaded("qwen2_5_vl"), encode(tmp_path / "clip.mp4", pictures(6))
    for size in ("big", 0, (1, 2, 3)):
        with refused("size", repr(size)):
            model.inputs("what ?", video=path, size=size)
    with refused("size='model'", "vlmfast.read_inputs"):
        read_video(path, size="model")
    slim = encode(tmp_path / "slim.mkv", smooth(2, 10, 3000), codec="ffv1", pix="bgr0")
    with refused("3000 x 10", "crop or pad"):
        model.inputs("what ?", video=slim)


def test_the_processor_works_where_the_model_does() -> None:
    """On the pretend device: pixel values are made there, from frames of one byte a value."""
    processor, model = tiny.processor("qwen2_5_vl"), tiny.build("qwen2_5_vl")
    clip = SimpleNamespace(frames=smooth(4, 24, 32))
    want = media.read_inputs(model, processor, "what ?", images=[clip.frames[0]])
    with PretendCuda():
        there = to_cuda(tiny.build("qwen2_5_vl"))
        got = media.read_inputs(there, processor, "what ?", images=[clip.frames[0]])
        assert all(tensor.device.type == "cuda" for tensor in got.values())
        assert torch.allclose(to_host(got["pixel_values"]), want["pixel_values"], atol=1e-5)
    processor.image_processor.valid_kwargs = dict
    notes: list[str] = []
    with PretendCuda():
        assert media.device_option(to_cuda(tiny.build("qwen2_5_vl")), processor, notes) == {}
    assert "no device of its own" in notes[0]
