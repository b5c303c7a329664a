"""A video that is read by pieces, the earlier ones encoded meanwhile, equals the same video read first, to the bit."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from clips import encode, pictures, refused
from pretend_cuda import PretendCuda, to_cuda, to_host

import vlmfast
from vlmfast import families, media, read_ahead
from vlmfast.core import UserError
from vlmfast.encode import Downsample, HiRED, VidCom2
from vlmfast.runtime.reading import Reading
from vlmfast.video.ahead import ahead
from vlmfast.video.decoders import fetch

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "llava_onevision", "llava_next_video"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(tmp_path_factory.mktemp("v") / "clip.mp4", pictures(24, 96, 160))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "LEAST", 1)
    monkeypatch.setattr(read_ahead, "PIECES", 4)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Any:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "vlmfast-reading"]


def tower_calls(model: Any, calls: list[int]) -> Any:
    """A hook that notes the patches of every call of the tower."""
    tower = families.get(model).tower(model)
    return tower.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))


def in_tower(model: Any, inputs: dict[str, Any]) -> int:
    """What the tower counts of a video: patches, or frames."""
    return int(inputs["pixel_values_videos"].shape[families.get(model).pieces_along])


def answered(model: Any, inputs: dict[str, Any]) -> tuple[Any, list[Any]]:
    """(logits of every step, what encoded the video for the language model) of a greedy answer."""
    seen: list[Any] = []

    def see(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if (kwargs.get("mm_encoder_outputs") or {}).get("video") is not None and not seen:
            seen.append(kwargs["mm_encoder_outputs"]["video"])

    hook = families.get(model).base(model).register_forward_pre_hook(see, with_kwargs=True)
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
    hook.remove()
    return torch.stack(out.logits), seen


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one is None and other is None


# -- the law -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("plan", "frames"), [({}, 7), ({"prune": VidCom2(keep=0.5)}, 16)], ids=["stock", "vidcom2"])
def test_pieces_equal_the_whole(family: str, plan: dict[str, Any], frames: int, loaded: Any, clip: Path) -> None:
    model, question = loaded(family), {"video": clip, "select": f"uniform:{frames}"}
    with vlmfast.accelerate(model.model, **plan) as fast:
        whole = model.inputs("what ?", encode=False, **question)
        want, (want_features,) = answered(model.model, whole)
        assert "pieces" not in fast.report.read
        calls: list[int] = []
        hook = tower_calls(model.model, calls)
        parts = model.inputs("what ?", **question)
        assert len(calls) >= 3 and sum(calls) == in_tower(model.model, whole)
        got, (got_features,) = answered(model.model, parts)
        hook.remove()
        assert sum(calls) == in_tower(model.model, whole), "the tower did not run again"
        assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
        assert want_features.keys() == got_features.keys()
        assert all(same(want_features[name], got_features[name]) for name in want_features)
        assert torch.equal(got, want)
        read = fast.report.read
        assert read["pieces"] == len(calls) and 0 <= read["hidden_ms"] <= read["read_ms"] + read["processor_ms"]
        assert f"beside the tower, in {len(calls)} pieces" in str(fast.report) and fast.report.encode["encode_ms"] > 0
        assert not [note for note in fast.report.notes if "tower began" in note]


@pytest.mark.parametrize(("frames", "grid", "want"), [
    (16, [8, 4, 4], [4, 4, 4, 4]), (9, [5, 4, 4], [2, 2, 2, 3]), (7, [4, 4, 4], [2, 2, 3]), (2, [1, 4, 4], [2]),
    (1, [1, 4, 4], [1]), (40, [20, 4, 4], [10, 10, 10, 10]), (22, [11, 4, 4], [6, 6, 6, 4]),
])  # fmt: skip
def test_pieces_are_whole_temporal_patches(frames: int, grid: list[int], want: list[int]) -> None:
    assert read_ahead.piece_lengths(frames, 2, grid) == want


def test_small_videos_are_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "LEAST", 64)
    assert read_ahead.piece_lengths(16, 2, [8, 4, 4]) == [8, 8]
    assert read_ahead.piece_lengths(6, 2, [3, 4, 4]) == [6]


def test_pictures_come_beside_a_video(loaded: Any, clip: Path) -> None:
    model, given = loaded("qwen2_5_vl"), {"images": [pictures(1)[0]], "video": clip, "select": "uniform:8"}
    with vlmfast.accelerate(model.model, prune=VidCom2(keep=0.5)) as fast:
        want, _ = answered(model.model, model.inputs("what ?", encode=False, **given))
        got, _ = answered(model.model, model.inputs("what ?", **given))
        assert torch.equal(got, want) and fast.report.read["pieces"] == 4


# -- where the whole video is needed -----------------------------------------------------------------------------------

WHOLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "inside": ("qwen2_5_vl", {"prune": VidCom2(keep=0.5, after_block=1)}, "VidCom2 chooses among all"),
    "attention": ("qwen2_5_vl", {"prune": HiRED(keep=0.5)}, "attention inside the tower"),
    "downsample": ("qwen2_5_vl", {"prune": Downsample(keep=0.5)}, "downsample makes"),
    "reuse": ("qwen2_5_vl", {"reuse": "1MiB"}, "reuse= knows a video"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_plan_that_needs_the_whole_video_gets_it_and_says_so(case: str, loaded: Any, clip: Path) -> None:
    family, plan, word = WHOLE[case]
    model, given = loaded(family), {"video": clip, "select": "uniform:8", "size": "full"}
    with vlmfast.accelerate(model.model, **plan) as fast:
        got, _ = answered(model.model, model.inputs("what ?", **given))
        (note,) = [note for note in fast.report.notes if "came before the tower began" in note]
        assert word in note and "pieces" not in fast.report.read
    with vlmfast.accelerate(model.model, **plan):
        want, _ = answered(model.model, model.inputs("what ?", encode=False, **given))
    assert torch.equal(got, want)


def test_a_tower_that_may_look_across_frames_gets_the_whole_video(
    loaded: Any, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded("llava_onevision")
    monkeypatch.setattr(type(families.get(model.model)), "separate_grids", False)
    with vlmfast.accelerate(model.model) as fast:
        answered(model.model, model.inputs("what ?", video=clip, select="uniform:8"))
        assert "llava_onevision is not known" in fast.report.notes[0] and "pieces" not in fast.report.read


def test_several_questions_and_other_grids_are_read_whole(
    loaded: Any, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded("qwen3_vl")
    with vlmfast.accelerate(model.model) as fast:
        model.model.generate(**model.inputs(["what ?", "who ?"], video=clip), max_new_tokens=1)
        assert "several questions" in fast.report.notes[0] and "pieces" not in fast.report.read
        monkeypatch.setattr(model.processor.video_processor, "size", {"shortest_edge": 6000, "longest_edge": 8000})
        inputs = model.inputs("what ?", video=clip, select="uniform:16", size="full")
        model.model.generate(**inputs, max_new_tokens=1)
        assert "scales parts of it otherwise" in fast.report.notes[0] and "pieces" not in fast.report.read
    calls: list[int] = []
    hook = tower_calls(model.model, calls)
    model.inputs("what ?", video=clip)
    hook.remove()
    assert not calls, "a model that is not accelerated encodes in its call alone"


# -- whose the features are --------------------------------------------------------------------------------------------


def test_features_serve_one_call_and_only_the_tower_they_were_made_by(loaded: Any, clip: Path) -> None:
    model, given = loaded("qwen2_5_vl"), {"video": clip, "select": "uniform:8"}
    calls: list[int] = []
    with vlmfast.accelerate(model.model) as fast:
        inputs = model.inputs("what ?", **given)
        first, _ = answered(model.model, inputs)
        hook = tower_calls(model.model, calls)
        second, _ = answered(model.model, inputs)
        assert len(calls) == 1 and torch.equal(first, second), "taken once; a second call encodes again"

        inputs = model.inputs("what ?", **given)
        weight = next(families.get(model.model).tower(model.model).parameters())
        with torch.no_grad():
            weight.mul_(1.5)
        calls.clear()
        other, _ = answered(model.model, inputs)
        assert len(calls) == 1 and not torch.equal(first, other) and "encoded again" in fast.report.notes[0]
        with torch.no_grad():
            weight.div_(1.5)

        inputs = model.inputs("what ?", **given)
    with vlmfast.accelerate(model.model, prune=VidCom2(keep=0.5)) as fast:
        calls.clear()
        answered(model.model, inputs)
        assert len(calls) == 1 and "encoded again" in fast.report.notes[0]
        calls.clear()
        inputs = model.inputs("what ?", **given)
        num_pieces = len(calls)
        model.model(**inputs)  # with gradients
        assert len(calls) == num_pieces + 1
    hook.remove()


def test_a_call_for_another_layer_of_the_tower_encodes_again(loaded: Any, clip: Path) -> None:
    model, calls, given = loaded("llava_next_video"), [], {"video": clip, "select": "uniform:8"}
    options = {"vision_feature_layer": -1, "max_new_tokens": 2, "do_sample": False}
    with vlmfast.accelerate(model.model) as fast:
        want = model.model.generate(**model.inputs("what ?", encode=False, **given), **options)
        hook = tower_calls(model.model, calls)
        inputs = model.inputs("what ?", **given)
        got = model.model.generate(**inputs, **options)
        hook.remove()
        assert calls == [2, 2, 2, 2, 8] and torch.equal(got, want)
        assert "other features of the tower" in " ".join(fast.report.notes)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "llava_next_video"])
def test_half_precision_comes_by_pieces_too(family: str, clip: Path) -> None:
    """The processor of LLaVA-NeXT-Video looks at pixel values through numpy, which knows no bfloat16."""
    model, processor = tiny.build(family).bfloat16(), tiny.processor(family)
    with vlmfast.accelerate(model) as fast:
        inputs = media.read_inputs(model, processor, "what ?", video=clip, select="uniform:8")
        assert inputs["pixel_values_videos"].dtype == torch.bfloat16
        answered(model, inputs)
        assert fast.report.read["pieces"] == 4
        whole = media.read_inputs(model, processor, "what ?", video=clip, select="uniform:8", encode=False)
        assert all(torch.equal(whole[name], inputs[name]) for name in whole.keys() | inputs.keys())


def test_the_last_call_stays_the_last_call(loaded: Any, clip: Path) -> None:
    """Reading the next question's video changes nothing of what a handle knows about the last one."""
    model = loaded("qwen2_5_vl")
    with vlmfast.accelerate(model.model, prune=VidCom2(keep=0.5)) as fast:
        answered(model.model, model.inputs("what ?", video=clip, select="uniform:8"))
        request, kept = fast.request, fast.request.kept_tokens
        model.inputs("what ?", video=clip, select="uniform:16")
        assert fast.request is request and request.kept_tokens == kept > 0


# -- the thread --------------------------------------------------------------------------------------------------------


def test_frames_are_decoded_while_the_tower_works(loaded: Any, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call of the tower ends only when the next piece was decoded; never more than three pieces are ahead."""
    model, decoded, lead, second_piece = loaded("qwen2_5_vl"), [], [], threading.Event()

    def counted(*args: Any) -> Any:
        for frame in fetch(*args):
            decoded.append(len(decoded))
            if len(decoded) > 4:
                second_piece.set()
            yield frame

    monkeypatch.setattr("vlmfast.video.decoders.fetch", counted)
    calls: list[int] = []

    def encoded(*args: Any) -> None:
        assert second_piece.wait(20), "nothing was decoded while the tower worked"
        calls.append(1)
        lead.append(len(decoded) - 4 * len(calls))

    with vlmfast.accelerate(model.model):
        hook = families.get(model.model).tower(model.model).register_forward_pre_hook(encoded)
        model.inputs("what ?", video=clip, select="uniform:16")
        hook.remove()
    assert len(calls) == 4 and len(decoded) == 16 and max(lead) <= 3 * 4


def test_an_error_of_the_thread_is_the_same_line(loaded: Any, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("qwen2_5_vl")

    def damaged(*args: Any) -> Any:
        for number, frame in enumerate(fetch(*args)):
            if number == 6:
                raise UserError("clip.mp4 is damaged after 0.20 s")
            yield frame

    lines = set()
    monkeypatch.setattr("vlmfast.video.decoders.fetch", damaged)
    with vlmfast.accelerate(model.model):
        for encode_it in (False, True):
            with refused("clip.mp4") as caught:
                model.inputs("what ?", video=clip, select="uniform:16", encode=encode_it)
            lines.add(str(caught.value))
        assert len(lines) == 1
        monkeypatch.undo()
        monkeypatch.setattr(read_ahead, "LEAST", 1)
        own = model.processor.video_processor.preprocess

        def broken(videos: Any, **options: Any) -> Any:
            if videos[0].device.type != "meta":
                raise ValueError("no such thing")
            return own(videos, **options)

        monkeypatch.setattr(model.processor.video_processor, "preprocess", broken)
        with refused("does not take these media", "no such thing"):
            model.inputs("what ?", video=clip, select="uniform:8")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_ends_the_thread(error: type[BaseException], loaded: Any, clip: Path) -> None:
    model = loaded("qwen2_5_vl")

    def interrupted(*args: Any) -> None:
        raise error

    with vlmfast.accelerate(model.model, prune=VidCom2(keep=0.5)) as fast:
        request = fast.requests.current
        hook = families.get(model.model).tower(model.model).register_forward_pre_hook(interrupted)
        with pytest.raises(error):
            model.inputs("what ?", video=clip, select="uniform:16")
        hook.remove()
        assert fast.requests.current is request
        answered(model.model, model.inputs("what ?", video=clip, select="uniform:16"))
        assert fast.report.read["pieces"] == 4


def test_what_comes_ahead_is_in_order_and_its_maker_is_closed() -> None:
    closed = threading.Event()

    def make(stopped: threading.Event) -> Any:
        try:
            yield from range(100)
        finally:
            closed.set()

    with ahead(make) as numbers:
        assert list(numbers) == list(range(100))
    assert closed.is_set()
    closed.clear()
    with ahead(make) as numbers:
        assert next(numbers) == 0
    assert closed.is_set()


# -- the report, the device, the command -------------------------------------------------------------------------------


class Watch:
    def __init__(self, seconds: float) -> None:
        self.seconds = lambda: seconds


def test_what_is_hidden_is_what_two_took_more_than_the_clock() -> None:
    reading = Reading(Watch(0.1), 8, (4, 4), (2, 2), 300.0, 100.0, 4, Watch(0.5), Watch(0.7), 20.0)  # type: ignore[arg-type]
    told = reading.json()
    assert told["processor_ms"] == pytest.approx(200) and told["hidden_ms"] == pytest.approx(500 + 500 - 720)
    assert reading.milliseconds() == pytest.approx(720) and told["pieces"] == 4
    reading.whole = Watch(0.2)  # type: ignore[assignment]
    assert reading.json()["hidden_ms"] == pytest.approx(500), "no more than all of it"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next_video"])
def test_on_a_gpu_the_processor_works_there(family: str, clip: Path) -> None:
    """On the pretend device: frames go there as bytes, the pieces' logits are those of the whole and of the CPU."""
    processor, given = tiny.processor(family), {"video": clip, "select": "uniform:8"}
    model, plan = tiny.build(family), {"tower": "fast"} if family == "qwen2_5_vl" else {}
    with vlmfast.accelerate(model, **plan):
        want, _ = answered(model, media.read_inputs(model, processor, "what ?", **given))
    with PretendCuda(capability=(9, 0)):
        there = to_cuda(tiny.build(family))
        with vlmfast.accelerate(there, **plan) as fast:
            whole, _ = answered(there, media.read_inputs(there, processor, "what ?", encode=False, **given))
            parts, _ = answered(there, media.read_inputs(there, processor, "what ?", **given))
            assert fast.report.read["pieces"] == 4
    whole, parts = to_host(whole), to_host(parts)
    assert torch.equal(whole, parts) and torch.allclose(parts, want, atol=1e-4)
    assert np.array_equal(parts.argmax(-1), want.argmax(-1))
