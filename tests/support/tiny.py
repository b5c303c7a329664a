"""Tiny random models of every family, inputs for them and checkpoint folders: offline, fp32, in no time.

One vocabulary serves all families, so hand-built ids, the tokenizer and the models agree:
0 pad, 1 bos, 2 eos, 3 vision start, 4 vision end, 5 image placeholder, 6 video placeholder, 7... text.

    model = tiny.build("qwen2_5_vl")
    batch = tiny.inputs("qwen2_5_vl", media=("image", "video"), batch=2)
    model.generate(**batch, max_new_tokens=4, do_sample=False)

Weights are drawn large (randn / sqrt(fan_in) * 1.5): with the usual 0.02 every model says the same token for
ever and equality tests prove nothing.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB, HIDDEN, PATCH = 320, 64, 4
PAD, BOS, EOS, VISION_START, VISION_END, IMAGE, VIDEO, FIRST_TEXT = range(8)
QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"]
LLAVA = ["llava", "llava_next", "llava_next_video", "llava_onevision"]
FAMILIES = QWEN + LLAVA
HYBRID = ["qwen3_5", "qwen3_5_moe"]  # every other layer keeps a recurrent state: no drafts, no streams
MROPE = QWEN + HYBRID
TILED = ["internvl", "idefics3", "smolvlm"]  # images as equal tiles; built and fed here, no processor
VIDEO_FAMILIES = [*QWEN, "llava_next_video", "llava_onevision"]
TILE = 16  # side in pixels of a LLaVA tile: 4 x 4 patches
PINPOINTS = [[16, 32], [32, 16], [32, 32]]
PINPOINTS_ONEVISION = [[16, 16], *PINPOINTS]
SIZES = [(24, 32), (16, 24), (32, 16)]  # (height, width) of the first, second, third image of a row
CLASS = {
    "qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL",
    "qwen3_vl_moe": "Qwen3VLMoe", "qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe",
    "llava": "Llava", "llava_next": "LlavaNext", "llava_next_video": "LlavaNextVideo",
    "llava_onevision": "LlavaOnevision",
    "internvl": "InternVL", "idefics3": "Idefics3", "smolvlm": "SmolVLM",
}  # fmt: skip


# ---------------------------------------------------------------- models


def _config(family: str, text: dict[str, Any], vision: dict[str, Any], top: dict[str, Any]) -> Any:
    txt: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD,
    }  # fmt: skip
    vis: dict[str, Any]
    if family in MROPE:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
        vis = {"depth": 2, "num_heads": 2, "in_channels": 3, "patch_size": PATCH}
        vis |= {"spatial_merge_size": 2, "temporal_patch_size": 2}
        if family == "qwen2_vl":
            vis |= {"embed_dim": 32, "hidden_size": HIDDEN, "mlp_ratio": 2}
        else:
            vis |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": HIDDEN}
        if family == "qwen2_5_vl":
            vis |= {"tokens_per_second": 2, "window_size": 16, "fullatt_block_indexes": [1]}
        if family.startswith("qwen3_vl"):
            txt["head_dim"] = 16
            rope |= {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
            vis |= {"depth": 3, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
        if family in HYBRID:
            txt |= {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"] * 2}
            txt |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
            txt |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
            rope |= {"mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.5}
            vis["num_position_embeddings"] = 16
        if family.endswith("moe"):
            txt |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
        if family == "qwen3_5_moe":
            txt["shared_expert_intermediate_size"] = 48
        txt["rope_parameters"] = rope
        cfg = {"image_token_id": IMAGE, "video_token_id": VIDEO}
        cfg |= {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    elif family in TILED:
        vis = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        txt["model_type"] = "qwen2" if family == "internvl" else "llama"
        cfg = {"image_token_id": IMAGE}
        if family == "internvl":
            vis |= {"model_type": "internvl_vision", "image_size": [TILE, TILE], "patch_size": [PATCH, PATCH]}
            cfg |= {"image_seq_length": 4, "downsample_ratio": 0.5}
        else:
            vis |= {"image_size": TILE, "patch_size": PATCH}
            cfg |= {"scale_factor": 2, "pad_token_id": PAD}
    else:
        onevision = family == "llava_onevision"
        vis = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2 if onevision else 3}
        vis |= {"num_attention_heads": 2, "patch_size": PATCH, "image_size": TILE}
        vis |= {"model_type": "siglip_vision_model" if onevision else "clip_vision_model"}
        vis |= {"vision_use_head": False} if onevision else {"projection_dim": 32}
        txt["model_type"] = "qwen2" if onevision else "llama"
        cfg = {"image_token_index": IMAGE}
        if family in VIDEO_FAMILIES:
            cfg |= {"video_token_index": VIDEO}
        if onevision:
            cfg |= {"image_grid_pinpoints": PINPOINTS_ONEVISION}
        else:
            cfg |= {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
            cfg |= {"image_seq_length": 16} if family == "llava" else {"image_grid_pinpoints": PINPOINTS}
    cls = getattr(transformers, CLASS[family] + "Config")
    return cls(text_config=txt | text, vision_config=vis | vision, **(cfg | top))


def _rescale(model: torch.nn.Module, seed: int) -> None:
    """Draws every parameter anew, in name order: the weights depend on the seed and nothing else."""
    gen = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        x = torch.randn(p.shape, generator=gen)
        if p.ndim > 1:
            fan_in = p.shape[-1] if ".experts." in name else p[0].numel()
            x = x / math.sqrt(fan_in) * 1.5
        elif "norm" in name and name.endswith("weight"):
            x = p.data + 0.1 * x  # ones, or zeros where the norm itself adds the one
        else:
            x = 0.2 * x
        p.data.copy_(x)


@cache
def _master(family: str, seed: int, key: str) -> Any:
    text, vision, config = json.loads(key)
    cls = getattr(transformers, CLASS[family] + "ForConditionalGeneration")
    model = cls(_config(family, text, vision, config))
    _rescale(model, seed)
    model.lm_head.weight.data[:FIRST_TEXT] = 0  # so that no placeholder or EOS is ever said
    model.generation_config.eos_token_id = None  # fixed lengths
    model.generation_config.pad_token_id = PAD
    return model.float().eval().requires_grad_(False)


def build(family: str, seed: int = 0, *, vision: dict | None = None, config: dict | None = None, **text: Any) -> Any:
    """A fresh copy of the tiny `family` model with the weights of `seed`: fp32, eval, no gradients, no EOS.

    `**text`, `vision` and `config` override fields of the text, vision and top-level config, e.g.
    `build("llava", num_hidden_layers=2)`. Every call returns its own copy: hooks and edits stay there.
    """
    return copy.deepcopy(_master(family, seed, json.dumps([text, vision or {}, config or {}])))


# ---------------------------------------------------------------- inputs


def _anyres(family: str, size: tuple[int, int]) -> tuple[int, int]:
    """(tiles, placeholders) of one image of `size` (height, width), LLaVA-NeXT and OneVision: one base tile,
    the tiles of the best-fitting grid without the padding, and a newline after every row."""
    from transformers.image_processing_utils import select_best_resolution

    pins = PINPOINTS_ONEVISION if family == "llava_onevision" else PINPOINTS
    best_h, best_w = select_best_resolution(list(size), pins)
    rows, cols = best_h // PATCH, best_w // PATCH
    (h, w), side = size, TILE // PATCH
    if w / h > cols / rows:
        rows -= (rows - int(round(h * (cols / w), 7))) // 2 * 2
    else:
        cols -= (cols - int(round(w * (rows / h), 7))) // 2 * 2
    return 1 + best_h // TILE * (best_w // TILE), side * side + rows * (cols + 1)


def _text(gen: torch.Generator, n: int) -> list[int]:
    return torch.randint(FIRST_TEXT, VOCAB, (n,), generator=gen).tolist()


def _image(family: str, gen: torch.Generator, size: tuple[int, int], single: bool) -> tuple[list[int], dict[str, Any]]:
    """Ids and tensors of one image; `single`: the only one of its row (OneVision tiles only those)."""
    h, w = size
    if family in MROPE:
        gh, gw = h // PATCH, w // PATCH
        # an image is one frame shown twice
        one = torch.randn(gh * gw, 3, 1, PATCH * PATCH, generator=gen).expand(-1, -1, 2, -1)
        ids = [VISION_START, *[IMAGE] * (gh * gw // 4), VISION_END]
        return ids, {"pixel_values": one.reshape(gh * gw, -1), "image_grid_thw": torch.tensor([[1, gh, gw]])}
    if family in TILED:  # three tiles of 4 x 4 patches, shuffled into 2 x 2 columns, text markers between them
        ids = [i for _ in range(3) for i in [VISION_START, *[IMAGE] * 4, VISION_END]]
        px = torch.randn(3, 3, TILE, TILE, generator=gen)
        return ids, {"pixel_values": px if family == "internvl" else px[None]}
    if family == "llava":
        return [IMAGE] * 16, {"pixel_values": torch.randn(1, 3, TILE, TILE, generator=gen)}
    tiles, n = _anyres(family, size) if single or family != "llava_onevision" else (1, 17)
    px = torch.randn(1, tiles, 3, TILE, TILE, generator=gen)
    return [IMAGE] * n, {"pixel_values": px, "image_sizes": torch.tensor([[h, w]])}


def _video(
    family: str, gen: torch.Generator, size: tuple[int, int], frames: int, fps: float
) -> tuple[list[int], dict[str, Any]]:
    """Ids and tensors of one video of `frames` frames sampled at `fps`."""
    if family not in MROPE:
        # 4 x 4 patches pooled 2 x 2; OneVision ends with a newline
        n = frames * 4 + (family == "llava_onevision")
        return [VIDEO] * n, {"pixel_values_videos": torch.randn(1, frames, 3, TILE, TILE, generator=gen)}
    gt, gh, gw = frames // 2, size[0] // PATCH, size[1] // PATCH
    out: dict[str, Any] = {"pixel_values_videos": torch.randn(gt * gh * gw, 3 * 2 * PATCH * PATCH, generator=gen)}
    out["video_grid_thw"] = torch.tensor([[gt, gh, gw]])
    per = gh * gw // 4
    if family.startswith("qwen3"):  # each frame pair: the timestamp as text, then its own start and end
        ids = [i for _ in range(gt) for i in [*_text(gen, 3), VISION_START, *[VIDEO] * per, VISION_END]]
        return ids, out
    if family == "qwen2_5_vl":
        out["second_per_grid_ts"] = torch.tensor([2 / fps])
    return [VISION_START, *[VIDEO] * (gt * per), VISION_END], out


def _row(family: str, media: Sequence[str], text: int, size: Any, frames: int, fps: float, seed: int) -> dict[str, Any]:
    gen = torch.Generator().manual_seed(seed)
    ids, parts = [BOS, *_text(gen, 2)], []
    single = list(media).count("image") == 1
    for k, kind in enumerate(media):
        if kind == "image":
            new, part = _image(family, gen, size or SIZES[k % len(SIZES)], single)
        else:
            new, part = _video(family, gen, size or (16, 24), frames, fps)
        parts.append(part)
        ids += [*new, *_text(gen, 1)]
    ids += _text(gen, text)
    row = _join(parts)
    if family == "llava_onevision" and "pixel_values" in row:
        row["batch_num_images"] = torch.tensor([list(media).count("image")])
    row["input_ids"] = torch.tensor([ids])
    row["attention_mask"] = torch.ones_like(row["input_ids"])
    if family in MROPE:
        row["mm_token_type_ids"] = (row["input_ids"] == IMAGE).long() + 2 * (row["input_ids"] == VIDEO).long()
    return row


def _join(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Media tensors of several items one after the other; tile stacks are zero-padded to the longest."""
    out: dict[str, Any] = {}
    for key in {k: None for p in parts for k in p}:
        values = [p[key] for p in parts if key in p]
        if key == "pixel_values" and values[0].ndim == 5:
            most = max(v.shape[1] for v in values)
            values = [torch.cat([v, v.new_zeros(len(v), most - v.shape[1], *v.shape[2:])], 1) for v in values]
        out[key] = torch.cat(values)
    return out


def rows(
    family: str, media: Sequence[Any] = ("image",), batch: int = 1, text: int | Sequence[int] = 6,
    size: tuple[int, int] | None = None, frames: int = 4, fps: float = 2.0, seed: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of `inputs(...)` with the same arguments, each as inputs of its own without padding.

    media   kinds in order, such as ("image", "video") or (); a list of such tuples gives one per row
            (then `batch` does not count)
    text    text tokens after the media: row r has `text + 2 * r`, or one number per row
    size    (height, width) in pixels, multiples of 8, of every item; default: images differ
    frames  frames per video (even), sampled at `fps` per second
    """
    per_row = list(media) if media and not isinstance(media[0], str) else [media] * batch
    lengths = [text + 2 * r for r in range(len(per_row))] if isinstance(text, int) else list(text)
    known = FAMILIES + HYBRID + TILED
    assert family in known, f"no tiny model of {family!r}; there are {known}"
    assert {m for r in per_row for m in r} <= {"image", "video"}, f"image or video, got {media}"
    assert family in VIDEO_FAMILIES + HYBRID or not any("video" in r for r in per_row), f"{family} takes no video"
    assert frames % 2 == 0, f"an even number of frames, got {frames}"
    assert size is None or size[0] % 8 == size[1] % 8 == 0, f"a size in steps of 8, got {size}"
    zipped = enumerate(zip(per_row, lengths, strict=True))
    return [_row(family, m, n, size, frames, fps, 1000 * seed + r) for r, (m, n) in zipped]


def inputs(family: str, media: Sequence[Any] = ("image",), batch: int = 1, pad: int = 0, **more: Any) -> dict[str, Any]:
    """What the family's processor would hand to `generate`: ids (B, S) int64, attention_mask, media tensors.

    Arguments as in `rows`. Rows differ in length; shorter ones are padded on the LEFT with attention_mask 0,
    and `pad` adds that many further padding columns to every row.
    """
    alone = rows(family, media, batch, **more)
    longest = max(r["input_ids"].shape[1] for r in alone) + pad
    row_keys = ("input_ids", "attention_mask", "mm_token_type_ids")
    out = _join([{k: v for k, v in r.items() if k not in row_keys} for r in alone])
    for key in row_keys:
        if key in alone[0]:
            fill = [r[key].new_full((1, longest - r[key].shape[1]), PAD) for r in alone]
            out[key] = torch.cat([torch.cat([f, r[key]], 1) for f, r in zip(fill, alone, strict=True)])
    return out


# ---------------------------------------------------------------- processors and checkpoint folders

_NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
_CORPUS = [
    "describe the image and the video . what color is the cat ? a red ball on the table",
    "the quick brown fox jumps over the lazy dog 0 1 2 3 4 5 6 7 8 9 user assistant system",
] * 20
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% elif c['type'] == 'video' %}VIDEO"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(family: str) -> Any:
    """A byte-level BPE tokenizer of VOCAB tokens whose special ids are the constants above; pads left."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    image, video = ("<|image_pad|>", "<|video_pad|>") if family in MROPE else ("<image>", "<video>")
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[*_NAMES, image, video], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tok.train_from_iterator(_CORPUS, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tok, padding_side="left",
        pad_token=_NAMES[0], bos_token=_NAMES[1], eos_token=_NAMES[2],
        extra_special_tokens={"image_token": image, "video_token": video},
    )  # fmt: skip
    assert len(fast) == VOCAB, f"the tokenizer came out with {len(fast)} tokens"
    return fast


def processor(family: str) -> Any:
    """A real HF processor that fits `build(family)`, chat template included."""
    t, tok = transformers, tokenizer(family)
    vision = "<|vision_start|>{}<|vision_end|>" if family in MROPE else "{}\n"
    # Qwen3-VL's processor writes start and end for every frame
    around = "{}" if family.startswith("qwen3") else vision
    template = _TEMPLATE.replace("IMAGE", vision.format(tok.image_token))
    template = template.replace("VIDEO", around.format(tok.video_token))
    kwargs: dict[str, Any] = {"tokenizer": tok, "chat_template": template}
    if family in MROPE:
        pixels: dict[str, Any] = {"patch_size": PATCH, "size": {"shortest_edge": 256, "longest_edge": 1024}}
        clip = t.Qwen3VLVideoProcessor if family.startswith("qwen3") else t.Qwen2VLVideoProcessor
        kwargs["image_processor"] = t.Qwen2VLImageProcessor(**pixels)
        pixels["size"] = {"shortest_edge": 256, "longest_edge": 16384}  # of a whole clip, not of a frame
        kwargs["video_processor"] = clip(**pixels)
        name = "Qwen3VL" if family.startswith("qwen3") else CLASS[family]
        return getattr(t, name + "Processor")(**kwargs)
    if family == "llava_onevision":
        kwargs |= {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
        square: dict[str, Any] = {"size": {"height": TILE, "width": TILE}}
        pins = {"image_grid_pinpoints": PINPOINTS_ONEVISION}
    else:
        kwargs |= {"patch_size": PATCH, "vision_feature_select_strategy": "default"}
        kwargs |= {"num_additional_image_tokens": 1}
        square = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
        pins = {"image_grid_pinpoints": PINPOINTS}
    if family == "llava":
        kwargs["image_processor"] = t.CLIPImageProcessor(**square)
    else:
        image = "LlavaNext" if family == "llava_next_video" else CLASS[family]
        kwargs["image_processor"] = getattr(t, image + "ImageProcessor")(**square, **pins)
    if family in VIDEO_FAMILIES:
        kwargs["video_processor"] = getattr(t, CLASS[family] + "VideoProcessor")(**square)
    return getattr(t, CLASS[family] + "Processor")(**kwargs)


def save(family: str, folder: str | Path, seed: int = 0, **overrides: Any) -> Path:
    """Writes model and processor to `folder`, loadable offline by the Auto classes; returns the folder."""
    build(family, seed, **overrides).save_pretrained(folder)
    processor(family).save_pretrained(folder)
    return Path(folder)
