"""Models of real shapes with random weights, few of their layers, and clips for them.

Speed depends on shapes, not on what the weights have learned; nothing needs to be downloaded.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Qwen2.5-VL: text decoder, vision tower, and one clip (t, h, w) in visual tokens with its text tokens."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    depth: int
    vision_hidden: int
    vision_intermediate: int
    vision_heads: int
    full_attention: tuple[int, ...]
    grid: tuple[int, int, int]
    text: int = 64
    patch: int = 14
    note: str = ""

    @property
    def visual(self) -> int:
        time, height, width = self.grid
        return time * height * width

    def json(self) -> dict[str, Any]:
        """Plain-JSON form for the record."""
        return asdict(self)


QWEN_3B = Shape(
    "Qwen2.5-VL-3B", 36, 2048, 11008, 16, 2, 151936, 32, 1280, 3420, 16, (7, 15, 23, 31), (8, 16, 16)
)  # fmt: skip
QWEN_7B = Shape(
    "Qwen2.5-VL-7B", 28, 3584, 18944, 28, 4, 152064, 32, 1280, 3420, 16, (7, 15, 23, 31), (8, 16, 16),
    note="embedding and output head share their weights here, unlike the checkpoint; a step reads the head alone",
)  # fmt: skip
QWEN_3B_TWELFTH = replace(
    QWEN_3B,
    name="Qwen2.5-VL-3B, a twelfth of its layers",
    layers=3,
    depth=2,
    full_attention=(1,),
    note="text 36 -> 3 layers; vision 32 -> 2 blocks, one windowed and one with full attention: patch embedding and "
    "merger, which are not cut, make up for the missing two thirds of a block, so that the tower is 0.84 of the text "
    "FLOPs here and 0.85 in the whole model; after_block=1 is half of the tower's blocks",
)


def build(shape: Shape, seed: int = 0, dtype: str = "bfloat16", device: str = "cpu") -> Any:
    """The model, random weights, evaluation mode; made and drawn on the device itself."""
    import torch
    from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    head_size = shape.hidden // shape.heads
    rope_options: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6}
    rope_options["mrope_section"] = [head_size // 8, head_size * 3 // 16, head_size * 3 // 16]
    text_options = {
        "vocab_size": shape.vocab, "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "rope_parameters": rope_options,
    }  # fmt: skip
    vision_options = {
        "depth": shape.depth, "hidden_size": shape.vision_hidden, "intermediate_size": shape.vision_intermediate,
        "num_heads": shape.vision_heads, "out_hidden_size": shape.hidden, "patch_size": shape.patch, "in_channels": 3,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": shape.patch * 8, "tokens_per_second": 2,
        "fullatt_block_indexes": list(shape.full_attention),
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text_options,
        vision_config=vision_options,
        tie_word_embeddings=True,
        **dict(zip(IDS, (1, 2, 3, 4), strict=True)),
    )
    config._name_or_path = shape.name
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config).to(getattr(torch, dtype))
    model = model.to_empty(device=device).eval().requires_grad_(False)
    model.tie_weights()
    fill(model, torch.Generator(device).manual_seed(seed))
    restore_tables(model)
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0, do_sample=False)
    return model


def fill(model: Any, generator: Any) -> None:
    """Draw every parameter by the kind of its module: the scales of norms are 1, biases are small, and matrices are so
    large that what goes through them keeps its size."""
    from torch import nn

    drawn_addresses = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.data_ptr() in drawn_addresses:  # tied
                continue
            drawn_addresses.add(parameter.data_ptr())
            if name == "bias":
                parameter.normal_(0, 0.02, generator=generator)
            elif type(module).__name__.endswith("Norm"):
                parameter.fill_(1)
            elif isinstance(module, (nn.Linear, nn.Embedding, nn.Conv3d)):
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                raise TypeError(f"no rule for {name} of a {type(module).__name__}")


IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def restore_tables(model: Any) -> None:
    """Rotary tables are buffers that a model built without memory does not have: make them anew."""
    for module in model.modules():
        if "inv_freq" in module._buffers:
            device = module._buffers["inv_freq"].device
            rebuilt = type(module)(module.config) if hasattr(module, "config") else type(module)(module.dim)
            for name, buffer in rebuilt._buffers.items():
                module._buffers[name] = buffer.to(device)
            if "original_inv_freq" not in rebuilt._buffers and hasattr(rebuilt, "original_inv_freq"):
                module.original_inv_freq = rebuilt.original_inv_freq.to(device)


def clip(shape: Shape, seed: int = 0, dtype: str = "bfloat16", busy: float = 0.25) -> dict[str, Any]:
    """What a processor would hand to `generate` for one clip and a question after it.

    busy: share of the places that change from frame to frame; the background is constant, so that methods
    which drop predictable patches (evs, dtd, pixelprune) have something to drop.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    num_frames, height, width = shape.grid
    word_ids = torch.randint(5, shape.vocab, (shape.text,), generator=generator)
    num_before = shape.text // 4
    input_ids = torch.cat([word_ids[:num_before], torch.tensor([3] + [2] * shape.visual + [4]), word_ids[num_before:]])[
        None
    ]
    pixels = torch.randn(shape.visual, 4, 3 * 2 * shape.patch**2, generator=generator)
    changing = torch.rand(height * width, generator=generator).argsort() < int(busy * height * width)
    pixels[~changing.repeat(num_frames)] = 0.1
    pixels = pixels.flatten(0, 1)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == 2).int() * 2,
        "pixel_values_videos": pixels.to(getattr(torch, dtype)),
        "video_grid_thw": torch.tensor([[num_frames, 2 * height, 2 * width]]),
        "second_per_grid_ts": torch.tensor([1.0]),
    }
