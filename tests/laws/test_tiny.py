"""The other tests stand on the tiny models, so they must behave like real checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

IMAGES = [(), ("image",), ("image", "image")]
VIDEOS = [("video",), ("image", "video"), ("video", "image", "image")]
CASES = [(f, m) for f in tiny.FAMILIES for m in IMAGES + (VIDEOS if f in tiny.VIDEO_FAMILIES else [])]
NAMES = [f"{f}-{'+'.join(m) or 'text'}" for f, m in CASES]


def answer(model, inputs, n=4):
    """The n new tokens, (B, n)."""
    return model.generate(**inputs, max_new_tokens=n, do_sample=False)[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize(("family", "media"), CASES, ids=NAMES)
def test_batch_rows_equal_rows_alone(family, media):
    """Left padding changes nothing, and every call says exactly four tokens."""
    model = tiny.build(family)
    batch = tiny.inputs(family, media, batch=2, pad=3)
    assert batch["attention_mask"].min() == 0, "the rows should need padding"
    out = answer(model, batch)
    assert out.shape == (2, 4)
    for r, row in enumerate(tiny.rows(family, media, batch=2)):
        assert torch.equal(out[r], answer(model, row)[0]), f"row {r}"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_rows_with_different_media(family):
    mixed = [("image", "image"), (), ("image",)]
    if family in tiny.VIDEO_FAMILIES:
        mixed += [("video", "image"), ("video",)]
    model = tiny.build(family)
    out = answer(model, tiny.inputs(family, mixed))
    for r, row in enumerate(tiny.rows(family, mixed)):
        assert torch.equal(out[r], answer(model, row)[0]), f"row {r}: {mixed[r]}"


def _processed(family, media):
    """What the real processor makes of media of the sizes that tiny.inputs uses, with random pixels."""
    rng, proc, kwargs = np.random.default_rng(0), tiny.processor(family), {}
    images = [rng.integers(0, 255, (*tiny.SIZES[k], 3), np.uint8) for k, m in enumerate(media) if m == "image"]
    if images:
        kwargs["images"] = [images]
    if "video" in media:
        meta = {"total_num_frames": 4, "fps": 2.0, "frames_indices": [0, 1, 2, 3]}
        kwargs["videos"] = [rng.integers(0, 255, (4, 3, 16, 24), np.uint8)] * media.count("video")
        kwargs |= {
            "videos_kwargs": {"do_sample_frames": False},
            "video_metadata": [meta] * media.count("video"),
        }
    content = [{"type": m} for m in media] + [{"type": "text", "text": "what color is the cat ?"}]
    text = proc.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    return proc(text=[text], return_tensors="pt", **kwargs)


@pytest.mark.parametrize(("family", "media"), CASES, ids=NAMES)
def test_inputs_are_what_the_processor_gives(family, media):
    """Same keys, dtypes and media shapes as the HF processor, and as many special tokens of each kind."""
    real, ours = _processed(family, media), tiny.inputs(family, media)
    assert set(real) == set(ours)
    for key, value in ours.items():
        assert value.dtype == real[key].dtype, key
        if key not in ("input_ids", "attention_mask", "mm_token_type_ids"):  # the text differs in length
            assert value.shape == real[key].shape, key
            if value.dtype == torch.int64 or key == "second_per_grid_ts":
                assert torch.equal(value, real[key]), key
    for token in (tiny.VISION_START, tiny.VISION_END, tiny.IMAGE, tiny.VIDEO):
        assert (ours["input_ids"] == token).sum() == (real["input_ids"] == token).sum(), token
    if "mm_token_type_ids" in ours:
        for kind, token in ((1, tiny.IMAGE), (2, tiny.VIDEO)):
            for side in (ours, real):
                assert torch.equal(side["mm_token_type_ids"] == kind, side["input_ids"] == token)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_media_matter(family):
    """Other pixels, other logits, by more than noise: else equality tests would prove nothing."""
    model = tiny.build(family)
    keys = {"image": "pixel_values", "video": "pixel_values_videos"}
    for kind in ["image"] + ["video"] * (family in tiny.VIDEO_FAMILIES):
        one = tiny.inputs(family, (kind,))
        other = {**one, keys[kind]: torch.randn_like(one[keys[kind]])}
        assert (model(**one).logits[0, -1] - model(**other).logits[0, -1]).abs().max() > 0.5


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_copies_are_separate_and_seeds_matter(family):
    one, same, other = tiny.build(family), tiny.build(family), tiny.build(family, seed=1)
    inputs = tiny.inputs(family)
    before = one(**inputs).logits
    assert torch.equal(before, same(**inputs).logits)
    assert not torch.allclose(before, other(**inputs).logits)
    same.lm_head.weight.zero_()
    assert torch.equal(before, one(**inputs).logits)
    assert len(tiny.build(family, num_hidden_layers=2).model.language_model.layers) == 2


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_folder_round_trip(family, tmp_path):
    """The Auto classes load what save() wrote, and answer alike."""
    folder = tiny.save(family, tmp_path / family)
    media = ("video", "image") if family in tiny.VIDEO_FAMILIES else ("image",)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    assert type(model) is type(tiny.build(family)) and model.dtype == torch.float32
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is type(tiny.processor(family))
    inputs = tiny.inputs(family, media)
    assert torch.equal(answer(model, inputs), answer(tiny.build(family), inputs))
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a red ball"}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    batch = processor(text=[text], images=[np.full((24, 32, 3), 90, np.uint8)], return_tensors="pt")
    assert isinstance(processor.batch_decode(answer(model, batch))[0], str)
