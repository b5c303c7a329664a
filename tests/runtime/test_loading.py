"""Loading and inputs: whole checkpoints or none, the dtype a CPU is good at, media that no processor can misread."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from clips import pictures, refused
from safetensors.torch import load_file, save_file

from vlmfast import loading
from vlmfast.bench import records
from vlmfast.decode import ModelDraft
from vlmfast.runtime import dtypes, weights
from vlmfast.runtime.dtypes import preferred
from vlmfast.stream import StreamSession
from vlmfast.stream.vision import VisionEncoder
from vlmfast.video.read import Video

# ---------------------------------------------------------------- every tensor, or none


def edited(family: str, folder: Path, edit: Any, **config: Any) -> Path:
    """A tiny checkpoint whose tensors went through `edit(name, tensor)`: a tensor, or None to leave it out."""
    tiny.save(family, folder, **config)
    (file,) = folder.glob("*.safetensors")
    made = {k: edit(k, v) for k, v in load_file(file).items()}
    save_file({k: v.contiguous() for k, v in made.items() if v is not None}, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl_moe", "llava", "llava_onevision"])
@pytest.mark.parametrize("part", ["lm_head", "layers.1.", "vis", "norm"])
def test_a_missing_tensor_is_named(family: str, part: str, tmp_path: Path) -> None:
    gone: list[str] = []

    def edit(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        if part in name and not gone:
            gone.append(name)
            return None
        return tensor

    folder = edited(family, tmp_path / "m", edit)
    assert gone, f"no tensor of {family} is called {part}"
    with refused("lack", gone[0].split(".")[-2], "save them again"):
        loading.load(str(folder))
    with refused("no draft model", gone[0].split(".")[-2]):
        ModelDraft(str(folder)).load()


def test_many_missing_and_misshapen_tensors(tmp_path: Path) -> None:
    folder = edited("qwen2_5_vl", tmp_path / "a", lambda k, v: None if "mlp" in k else v)
    with refused("lack", "more tensors"):
        loading.load(str(folder))
    folder = edited("qwen2_5_vl", tmp_path / "b", lambda k, v: v[:-8] if "layers.1.mlp.up_proj" in k else v)
    with refused("shape", "layers.1.mlp.up_proj.weight 88x64 instead of 96x64"):
        loading.load(str(folder))
    (tmp_path / "b" / "model.safetensors").write_bytes(b"\x10" + bytes(100))
    with refused("cannot be loaded"):
        loading.load(str(folder))


def test_what_may_be_absent_is_no_fault(tmp_path: Path) -> None:
    """A head tied to the embedding is stored once; a tensor too many is passed over, as transformers does."""
    folder = tiny.save("qwen2_5_vl", tmp_path / "tied", config={"tie_word_embeddings": True}, tie_word_embeddings=True)
    stored = load_file(next(folder.glob("*.safetensors")))
    assert not any("lm_head" in k for k in stored)
    model = loading.load(str(folder)).model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    (file,) = folder.glob("*.safetensors")
    save_file({**stored, "extra.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    loading.load(str(folder))


def test_bad_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused("dtype='int8'", "bfloat16"):
        loading.load("pocket", dtype="int8")
    with refused("device='gpu'", "cuda"):
        loading.load("pocket", device="gpu")
    with refused("exclude"):
        loading.load("pocket", device="cpu", device_map="auto")
    with refused("device_map='everywhere'", "auto"):
        loading.load("pocket", device_map="everywhere")
    if not torch.cuda.is_available():
        with refused("device='cuda' is not available"):
            loading.load("pocket", device="cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refused("needs accelerate", "pip install accelerate"):
        loading.load("pocket", device_map="auto")


def test_a_spread_model_says_where_it_lies_and_answers_the_same(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    folder = str(tiny.save("qwen2_5_vl", tmp_path / "m"))
    plain, spread = loading.load(folder, device="cpu"), loading.load(folder, device_map="auto")
    assert not plain.notes and "device_map auto" in spread.notes[0]
    inputs = plain.inputs("what ?", images=[pictures(1)[0]])
    said = [m.model.generate(**m.inputs("what ?", images=[pictures(1)[0]]), max_new_tokens=4) for m in (plain, spread)]
    assert said[0].tolist() == said[1].cpu().tolist() and inputs


# ---------------------------------------------------------------- the dtype


@pytest.mark.parametrize(
    ("half", "single", "more", "free", "dtype", "words"),
    [
        (320.0, 100.0, 10, 100, "bfloat16", ["the checkpoint's", "320", "100"]),  # instructions for bfloat16
        (60.0, 100.0, 10, 100, "bfloat16", ["the checkpoint's"]),  # not clearly slower: half the memory counts more
        (50.0, 100.0, 10, 100, "float32", ["not the checkpoint's bfloat16"]),
        (0.3, 60.0, 10, 100, "float32", ["0.3 GFLOP/s in bfloat16", "60 in float32"]),
        (0.3, 60.0, 10, None, "float32", []),  # nobody knows how much is free
        (0.3, 60.0, 16_000_000_000, 9_000_000_000, "bfloat16", ["although", "16.0 GB more", "9.0 GB are free"]),
        (0.3, 60.0, 9, 9, "float32", []),
    ],
)
def test_the_dtype_is_decided_by_rates_and_memory(half, single, more, free, dtype, words) -> None:
    choice = preferred("bfloat16", half, single, more, free)
    assert choice.dtype == dtype
    assert all(word in choice.why for word in words) and "\n" not in choice.why


def rates(monkeypatch: pytest.MonkeyPatch, half: float, single: float) -> None:
    """Pretend that this CPU was measured so."""
    monkeypatch.setattr(dtypes, "measured", lambda dtype: single if dtype == "float32" else half)


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint stored in bfloat16."""
    folder = tmp_path_factory.mktemp("half")
    tiny.build("qwen2_5_vl").bfloat16().save_pretrained(folder)
    tiny.processor("qwen2_5_vl").save_pretrained(folder)
    return folder


def test_loading_follows_the_measurement(halved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates(monkeypatch, 0.3, 60)
    slow = loading.load(str(halved), device="cpu")
    assert slow.model.dtype == torch.float32 and {p.dtype for p in slow.model.parameters()} == {torch.float32}
    assert slow.model.config.dtype == slow.model.config.text_config.dtype == torch.float32
    assert slow.notes == [preferred("bfloat16", 0.3, 60, 0, None).why]
    assert ModelDraft(str(halved)).load().dtype == torch.float32
    wide = loading.load(str(halved), dtype="float32", device="cpu")  # the same values, however it came to be
    assert not wide.notes
    for (name, a), (_, b) in zip(slow.model.named_parameters(), wide.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    given = slow.inputs("what ?", images=[pictures(1)[0]])
    with torch.inference_mode():
        assert torch.equal(slow.model(**given).logits, wide.model(**given).logits)
    assert loading.load(str(halved), dtype="bfloat16", device="cpu").model.dtype == torch.bfloat16  # as was asked

    monkeypatch.setattr(dtypes, "available", lambda: 10)
    poor = loading.load(str(halved), device="cpu")
    assert poor.model.dtype == torch.bfloat16 and "although" in poor.notes[0]

    rates(monkeypatch, 300, 100)
    fast = loading.load(str(halved), device="cpu")
    assert fast.model.dtype == torch.bfloat16 and "the checkpoint's" in fast.notes[0]


def test_measuring_gives_rates_once_and_memory_is_known() -> None:
    assert dtypes.measured("float32") == dtypes.measured("float32") > 0
    assert dtypes.available() is None or dtypes.available() > 0


def test_a_control_groups_limit_counts(tmp_path: Path) -> None:
    for name, text in (("max", "1000"), ("current", "700"), ("stat", "anon 5\ninactive_file 50\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert dtypes._group(tmp_path) == 350
    (tmp_path / "memory.max").write_text("max\n")
    assert dtypes._group(tmp_path) is None and dtypes._group(tmp_path / "absent") is None


def test_records_name_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    said = records.hardware("cpu", "float32")
    assert said["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert isinstance(said["bfloat16_in_hardware"], bool) and said["limited_to"]["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    json.dumps(said)


# ---------------------------------------------------------------- media that cannot be misread


def seen(inputs: dict[str, Any]) -> list[torch.Tensor]:
    return [v for k, v in inputs.items() if k.startswith("pixel_values")]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("size", [(1, 40), (3, 40), (4, 40), (40, 3), (40, 1), (3, 3), (4, 3)])
def test_low_pictures_are_rows_and_not_channels(loaded: Any, family: str, size: tuple[int, int]) -> None:
    """What a processor makes of a picture of 1, 3 or 4 rows equals what it makes of the same picture said in full."""
    model, picture = loaded(family), np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    stated = np.ascontiguousarray(picture.transpose(2, 0, 1))  # channels first, and told so
    want = model.processor.image_processor(
        [torch.from_numpy(stated)], return_tensors="pt", input_data_format="channels_first"
    )
    got = model.inputs("what ?", images=[picture])
    for a, b in zip(seen(got), seen(want), strict=True):
        assert a.shape == b.shape and torch.equal(a, b.to(a.dtype))
    tall = model.inputs("what ?", images=[np.ascontiguousarray(picture.transpose(1, 0, 2))])
    assert size[0] == size[1] or not all(torch.equal(a, b) for a, b in zip(seen(got), seen(tall)) if a.shape == b.shape)


@pytest.mark.parametrize("family", tiny.VIDEO_FAMILIES)
@pytest.mark.parametrize("size", [(1, 40), (3, 40), (4, 40), (40, 3), (3, 3)])
def test_low_frames_are_rows_and_not_channels(loaded: Any, family: str, size: tuple[int, int]) -> None:
    model, frames = loaded(family), np.random.default_rng(0).integers(0, 256, (4, *size, 3), np.uint8)
    times = np.arange(4) / 2
    clip = Video(frames, times, np.arange(4), 2.0, 2.0, 4, size)
    stated = torch.from_numpy(frames).permute(0, 3, 1, 2)
    options = {"do_sample_frames": False, "input_data_format": "channels_first"}
    want = model.processor.video_processor([stated], return_tensors="pt", **options)
    for a, b in zip(seen(model.inputs("what ?", video=clip)), seen(want), strict=True):
        assert a.shape == b.shape and torch.equal(a, b.to(a.dtype))
    vision = VisionEncoder(model.model, model.processor)
    with torch.inference_mode():  # and in a stream: one grid alone, as wide as the picture is
        grids = vision.features(torch.from_numpy(frames[: vision.frames_per_grid]))
    if vision.qwen and size[0] != size[1]:
        assert (grids.size[0] < grids.size[1]) == (size[0] < size[1])


# ---------------------------------------------------------------- questions and shapes that processors do not take


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_typed_placeholder_is_refused(loaded: Any, family: str) -> None:
    model = loaded(family)
    names = ["image_token", "video_token"] if family in tiny.VIDEO_FAMILIES else ["image_token"]
    for token in (getattr(model.processor, name) for name in names):
        for question in (f"what is {token} ?", token, f"{token}{token} and?"):
            with refused(repr(token), "leave it out"):
                model.inputs(question, images=[pictures(1)[0]])
            with refused(repr(token)):
                model.inputs(["what ?", question], images=[pictures(1)[0]])
    assert model.inputs("what is <this> | image_pad ?", images=[pictures(1)[0]])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_a_typed_placeholder_is_refused_in_a_stream(loaded: Any, family: str) -> None:
    model = loaded(family)
    session = StreamSession(model.model, model.processor)
    session.push(pictures(4))
    for token in (model.processor.image_token, model.processor.video_token):
        with refused(repr(token), "leave it out"):
            session.ask(f"what is {token} ?")
    assert session.turns == [] and session.ask("what ?", max_new_tokens=2).report["tokens"] == 2


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("size", [(10, 3000), (3000, 10)])
def test_a_picture_too_slim_is_refused(loaded: Any, family: str, size: tuple[int, int]) -> None:
    model, picture = loaded(family), np.zeros((*size, 3), np.uint8)
    with refused(f"{size[1]} x {size[0]}", "crop or pad"):
        model.inputs("what ?", images=[pictures(1)[0], picture])
    frames = np.stack([picture] * 2)
    clip = Video(frames, np.arange(2.0), np.arange(2), 1.0, 2.0, 2, size)
    with refused(f"{size[1]} x {size[0]}", "crop or pad"):
        model.inputs("what ?", video=clip)
    session = StreamSession(model.model, model.processor)
    assert session.push(pictures(2), [0.0, 1.0]) == 2
    for bad in (frames, np.zeros((2, 0, 64, 3), np.uint8)):
        with refused(f"{bad.shape[2]} x {bad.shape[1]}"):
            session.push(bad, [2.0, 3.0])
    assert session.push(pictures(2), [2.0, 3.0]) == 2  # nothing of the refused frames was taken
    assert session.stats()["frames"] == 4


def test_whole_is_quiet_about_nothing_and_names_conversion_errors() -> None:
    weights.whole("m", {"missing_keys": set(), "unexpected_keys": {"x"}, "mismatched_keys": set(), "error_msgs": []})
    with refused("m cannot be loaded", "bad expert"):
        weights.whole("m", {"error_msgs": ["bad expert"]})
