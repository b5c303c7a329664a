"""Downsample: the call that runs is the one that the processor would have made of smaller frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from pretend_cuda import PretendCuda, to_cuda, to_host
from torch import Tensor

import vlmfast
from vlmfast.core import Unsupported, UserError, VisualTokens
from vlmfast.decode import Exact, ModelDraft, PromptLookup, Speculate
from vlmfast.encode import Downsample
from vlmfast.families.patches import PatchLayout
from vlmfast.prefill import SnapKV
from vlmfast.stream import StreamSession

LAYOUT = PatchLayout(tiny.PATCH, 2, 2)
NEW = {"max_new_tokens": 4, "do_sample": False}


def picture(height: int, width: int) -> Tensor:
    """(3, height, width) uint8, smooth but for one edge."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 9 + y / 7), np.cos(x / 11), np.sin(y / 5)]
    image = np.stack([127 + 100 * wave for wave in waves])
    image[:, :, width // 2 :] *= 0.6
    return torch.from_numpy(image.clip(0, 255).astype(np.uint8))


def processed(family: str, kind: str, pixels: int, rows: int = 1) -> dict[str, Any]:
    """What the family's processor makes of a picture, or of a clip of four, with so many pixels at most."""
    p = tiny.processor(family)
    size = {"shortest_edge": 64, "longest_edge": pixels}
    token = p.tokenizer.image_token if kind == "image" else p.tokenizer.video_token
    around = "{}" if kind == "video" and family.startswith("qwen3") else "<|vision_start|>{}<|vision_end|>"
    texts = [around.format(token) + text for text in ("what is in it ?", "describe the red cat on it ?")[:rows]]
    if kind == "image":
        return p(
            text=texts, images=[picture(64, 96)] * rows, images_kwargs={"size": size}, return_tensors="pt", padding=True
        )
    frames = torch.stack([picture(64, 96).roll(5 * i, 2) for i in range(4)])
    more = {"size": size, "do_sample_frames": False}
    if family.startswith("qwen3"):
        more["video_metadata"] = [{"fps": 2.0, "total_num_frames": 4, "frames_indices": list(range(4))}] * rows
    return p(text=texts, videos=[frames] * rows, videos_kwargs=more, return_tensors="pt", padding=True)


def tokens(model: Any, inputs: dict[str, Any], **more: Any) -> Tensor:
    """The new tokens, (B, 4)."""
    return model.generate(**inputs, **NEW, **more)[:, -4:]


@pytest.mark.parametrize("grid", [(1, 8, 12), (3, 4, 6)])
def test_patches_become_frames_and_patches_again(grid: tuple[int, int, int]) -> None:
    t, h, w = grid
    patches = torch.randn(t * h * w, 3 * 2 * tiny.PATCH**2)
    frames = LAYOUT.frames_of(patches, grid)
    assert frames.shape == (2 * t, 3, 4 * h, 4 * w)
    assert torch.equal(LAYOUT.patches_of(frames), patches)
    # the second merge group of the first row: its first patch begins 8 pixels to the right
    assert torch.equal(frames[0, :, :4, 8:12].flatten(), patches[4].view(3, 2, 16)[:, 0].flatten())


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.75, 0.99])
def test_the_grid_keeps_no_more_than_asked(keep: float) -> None:
    for grid in ((1, 8, 12), (4, 20, 10), (1, 2, 2), (2, 2, 40)):
        t, h, w = LAYOUT.smaller(grid, keep)
        assert t == grid[0] and h % 2 == w % 2 == 0 and h >= 2 and w >= 2
        assert h * w <= max(keep * grid[1] * grid[2], 4 * max(1, max(grid[1:]) / 2 * keep**0.5))
    assert LAYOUT.smaller((1, 16, 24), 0.25) == (1, 8, 12)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_it_is_the_processors_own_smaller_picture(family: str, kind: str) -> None:
    """The same grid and prompt as of a processor with a quarter of the pixels, and about the same pixels."""
    per = 64 * 96 * (4 if kind == "video" and family == "qwen3_vl" else 1)  # Qwen3-VL's limit is of a whole clip
    large, small = processed(family, kind, per), processed(family, kind, per // 4)
    name = "pixel_values" if kind == "image" else "pixel_values_videos"
    seen: list[dict[str, Any]] = []
    model = tiny.build(family)
    with vlmfast.accelerate(model, prune=Downsample(keep=0.25)) as fast:
        inner = fast._generate
        fast._generate = lambda request, f, args, call: (seen.append(dict(call)), inner(request, f, args, call))[1]  # type: ignore
        got = model.generate(**large, **NEW)
        report = fast.report.encode
    (call,) = seen
    assert torch.equal(call["input_ids"], small["input_ids"])
    assert torch.equal(call[f"{kind}_grid_thw"], small[f"{kind}_grid_thw"])
    far = (call[name] - small[name]).abs()
    assert far.mean() < 0.02 and far.max() < 0.2, (far.mean(), far.max())
    assert torch.equal(got[:, : large["input_ids"].shape[1]], large["input_ids"])
    assert torch.equal(got[:, -4:], tokens(model, {**small, name: call[name]}))
    n = int((large["input_ids"] == (tiny.IMAGE if kind == "image" else tiny.VIDEO)).sum())
    assert (report["visual_tokens"], report["kept_tokens"]) == (n, n // 4)


def by_hand(inputs: dict[str, Any], keep: float) -> dict[str, Any]:
    """The same inputs with frames resized and one placeholder a token left, row by row."""
    out, ids = dict(inputs), inputs["input_ids"]
    stays = torch.ones_like(ids, dtype=torch.bool)
    for kind, token in (("image", tiny.IMAGE), ("video", tiny.VIDEO)):
        name = "pixel_values" if kind == "image" else "pixel_values_videos"
        if name not in inputs:
            continue
        pixels, grids, at, marks = [], [], 0, []
        for t, h, w in inputs[f"{kind}_grid_thw"].tolist():
            to = LAYOUT.smaller((t, h, w), keep)
            pixels.append(LAYOUT.resized(inputs[name][at : at + t * h * w], (t, h, w), to))
            at, grids = at + t * h * w, [*grids, to]
            marks += ([True] * (to[1] * to[2] // 4) + [False] * ((h * w - to[1] * to[2]) // 4)) * t
        out[name], out[f"{kind}_grid_thw"] = torch.cat(pixels), torch.tensor(grids)
        stays[ids == token] = torch.tensor(marks)
    stays &= inputs["attention_mask"].bool()
    most = int(stays.sum(1).max())
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        rows = [inputs[name][row][stays[row]] for row in range(len(ids))]
        out[name] = torch.stack([torch.cat([r.new_zeros(most - len(r)), r]) for r in rows])
    return out


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kv": {"kv": SnapKV(keep=0.5, sinks=1, recent=2)},
    "lookup": {"speculate": Speculate(PromptLookup(), Exact(), length=3)},
    "reuse": {"reuse": "64MiB"},
}


@pytest.mark.parametrize("family", tiny.MROPE)
@pytest.mark.parametrize("name", CALLS)
def test_a_call_equals_one_of_smaller_media(family: str, name: str) -> None:
    """Image and video in one prompt, two rows of unequal length; with what may run beside it."""
    if family in tiny.HYBRID and name != "plain":
        pytest.skip("a recurrent state takes no drafts and no prefix; policies are held by the other families")
    batch = 1 if name in ("lookup", "reuse") else 2
    inputs = tiny.inputs(family, media=("image", "video"), batch=batch, size=(32, 48), pad=2)
    want = None
    for plan in (CALLS[name], CALLS[name] | {"prune": Downsample(keep=0.5)}):
        model = tiny.build(family)
        with vlmfast.accelerate(model, **plan):
            got = [tokens(model, inputs if "prune" in plan else by_hand(inputs, 0.5)) for _ in range(2)]
        assert torch.equal(got[0], got[1])
        want = got[0] if want is None else want
    assert torch.equal(got[0], want)


@pytest.mark.parametrize("option", [{"cache_implementation": "static"}, {"num_beams": 2}, {"num_return_sequences": 2}])
def test_it_serves_what_transformers_serves(option: dict[str, Any]) -> None:
    inputs = tiny.inputs("qwen2_5_vl", media=("image",), size=(32, 48))
    model = tiny.build("qwen2_5_vl")
    if "num_return_sequences" in option:
        option = option | {"num_beams": 2}
    want = tokens(model, by_hand(inputs, 0.5), **option)
    with vlmfast.accelerate(model, prune=Downsample(keep=0.5)):
        got = model.generate(**inputs, **NEW, **option)
    assert torch.equal(got[:, -4:], want) and (got[:, :-4] == inputs["input_ids"]).all()


def test_a_later_turn_over_the_cache() -> None:
    inputs = tiny.inputs("qwen3_vl", media=("video",), size=(32, 48), batch=2)
    more = torch.tensor([[30, 31, 32]]).expand(2, -1)

    def turns(model: Any, inputs: dict[str, Any]) -> Tensor:
        first = model.generate(**inputs, **NEW, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, more], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 7, dtype=torch.long)], 1)
        cache = {"past_key_values": first.past_key_values}
        second = model.generate(input_ids=ids, attention_mask=mask, **cache, **NEW)
        assert torch.equal(second[:, : ids.shape[1]], ids)
        return second[:, inputs["input_ids"].shape[1] :]

    model = tiny.build("qwen3_vl")
    want = turns(model, by_hand(inputs, 0.5))
    with vlmfast.accelerate(model, prune=Downsample(keep=0.5)):
        assert torch.equal(turns(model, inputs), want)
        cache = model.generate(**inputs, **NEW, return_dict_in_generate=True).past_key_values
        with pytest.raises(Unsupported, match="new media over a cache"):
            model.generate(**inputs, past_key_values=cache, **NEW)


def test_what_looks_on_sees_the_whole_prompt() -> None:
    class Streamer:
        def __init__(self) -> None:
            self.pieces: list[list[int]] = []

        def put(self, value: Tensor) -> None:
            self.pieces.append(value.flatten().tolist())

        def end(self) -> None:
            self.pieces.append([])

    inputs = tiny.inputs("qwen2_5_vl", media=("image",), size=(32, 48))
    model, streamer, seen = tiny.build("qwen2_5_vl"), Streamer(), []

    def watch(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(ids.shape[1])
        return scores

    n = inputs["input_ids"].shape[1]
    with vlmfast.accelerate(model, prune=Downsample(keep=0.25)):
        out = model.generate(**inputs, max_length=n + 3, do_sample=False, streamer=streamer, logits_processor=[watch])
    assert out.shape[1] == n + 3 and seen == [n, n + 1, n + 2]
    assert [i for piece in streamer.pieces for i in piece] == out[0].tolist()


def test_keep_one_and_text_alone_are_left_alone() -> None:
    inputs = tiny.inputs("qwen2_5_vl", media=("image",))
    model = tiny.build("qwen2_5_vl")
    plain = model.generate(**inputs, **NEW)
    with vlmfast.accelerate(model, prune=Downsample(keep=1.0)) as fast:
        assert torch.equal(model.generate(**inputs, **NEW), plain)
        assert "bypassed" in fast.report.notes[0]
    text = tiny.inputs("qwen2_5_vl", media=())
    plain = model.generate(**text, **NEW)
    with vlmfast.accelerate(model, prune=Downsample(keep=0.25)) as fast:
        assert torch.equal(model.generate(text["input_ids"], attention_mask=text["attention_mask"], **NEW), plain)
        assert "no new visual tokens" in fast.report.notes[0]


def test_what_it_cannot_do_is_refused_in_one_line() -> None:
    model, inputs = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl", media=("image",))
    with pytest.raises(Unsupported, match="resize them before the processor"):
        vlmfast.accelerate(tiny.build("llava"), prune=Downsample())
    with pytest.raises(Unsupported, match="a draft gets no such call"):
        vlmfast.accelerate(model, speculate=Speculate(ModelDraft(tiny.build("qwen2_5_vl", seed=1), prune=Downsample())))
    with pytest.raises(UserError, match="keep=0"):
        Downsample(keep=0)
    with pytest.raises(Unsupported, match="generate"):
        Downsample().select(VisualTokens(torch.zeros(4, 2), torch.zeros(4).long(), (1, 2, 2)))
    with pytest.raises(UserError, match="a stream smaller frames"):
        StreamSession(model, tiny.processor("qwen2_5_vl"), plan=vlmfast.Plan(prune=Downsample()))
    with vlmfast.accelerate(model, prune=Downsample(keep=0.5)):
        with pytest.raises(Unsupported, match="position_ids="):
            model.generate(**inputs, position_ids=torch.zeros(3, 1, 4).long(), **NEW)
        with pytest.raises(UserError, match="do not match"):
            model.generate(**{**inputs, "input_ids": inputs["input_ids"][:, 6:], "attention_mask": None}, **NEW)
    assert torch.equal(model.generate(**inputs, **NEW), tiny.build("qwen2_5_vl").generate(**inputs, **NEW))


def test_on_the_pretend_device() -> None:
    inputs = tiny.inputs("qwen2_5_vl", media=("image", "video"), size=(32, 48))
    model = tiny.build("qwen2_5_vl")
    with vlmfast.accelerate(model, prune=Downsample(keep=0.5)):
        want = tokens(model, inputs)
    with PretendCuda():
        model = to_cuda(tiny.build("qwen2_5_vl"))
        with vlmfast.accelerate(model, prune=Downsample(keep=0.5)):
            assert torch.equal(to_host(tokens(model, to_cuda(dict(inputs)))), want)
