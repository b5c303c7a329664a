"""Shapes and devices by name, requests from text."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmfast import spec
from vlmfast.core import UserError
from vlmfast.roofline.cost import Request, Shape
from vlmfast.runtime.devices import DEVICES, Device

SHAPES = {
    "qwen2.5-vl-3b": Shape("Qwen2.5-VL-3B", 36, 2048, 11008, 16, 2, 128, 151936, 32, 1280, 3420, windowed=28),
    "qwen2.5-vl-7b": Shape("Qwen2.5-VL-7B", 28, 3584, 18944, 28, 4, 128, 152064, 32, 1280, 3420, windowed=28),
    "qwen2.5-vl-72b": Shape("Qwen2.5-VL-72B", 80, 8192, 29568, 64, 8, 128, 152064, 32, 1280, 3456, windowed=28),
    "qwen2-vl-7b": Shape("Qwen2-VL-7B", 28, 3584, 18944, 28, 4, 128, 152064, 32, 1280, 5120, v_mats=2),
    "qwen3-vl-8b": Shape("Qwen3-VL-8B", 36, 4096, 12288, 32, 8, 128, 151936, 27, 1152, 4304, v_mats=2,
                         patch_values=1536),
    "llava-onevision-7b": Shape("LLaVA-OneVision-7B", 28, 3584, 18944, 28, 4, 128, 152064, 26, 1152, 4304, v_mats=2,
                                merge=4, patch_values=588),
}  # fmt: skip


def shape_of(model: str | dict[str, Any]) -> Shape:
    """The shape of a listed name, a folder with a config.json, a hub id in the cache, or a result file's `config`."""
    if isinstance(model, dict):
        return _from_record(model)
    if model.lower() in SHAPES:
        return SHAPES[model.lower()]
    from huggingface_hub.utils import logging
    from transformers import AutoConfig

    logging.set_verbosity_error()  # what goes wrong on the way to the hub is said once, below

    folder = model
    if model == "pocket":
        from vlmfast import pocket

        folder = pocket.path()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # transformers lets through whatever a broken config.json makes it raise
        raise UserError(
            f"no config of {model!r}: give a folder with config.json, or one of {', '.join(SHAPES)}"
        ) from None
    return _from_config(model, config)


def _from_config(name: str, config: Any) -> Shape:
    text_config, vision_config = config.get_text_config(), getattr(config, "vision_config", None)
    if vision_config is None:
        raise UserError(f"{name} ({config.model_type}) has no vision_config: roofline is about vision-language models")
    if getattr(text_config, "num_experts", None):
        raise UserError(
            f"{name} ({config.model_type}) is a mixture of experts, whose cost is not counted here: no floor"
        )
    if "linear_attention" in (getattr(text_config, "layer_types", None) or ()):
        raise UserError(
            f"{name} ({config.model_type}) has layers with a recurrent state, whose cost is not counted here: no floor"
        )
    vision_hidden = getattr(vision_config, "embed_dim", None) if config.model_type == "qwen2_vl" else None
    vision_hidden = vision_hidden or vision_config.hidden_size
    depth = getattr(vision_config, "depth", None) or vision_config.num_hidden_layers
    mlp_ratio = int(getattr(vision_config, "mlp_ratio", 4))
    vision_ffn = getattr(vision_config, "intermediate_size", None) or vision_hidden * mlp_ratio
    gated = config.model_type == "qwen2_5_vl"
    full_layers = getattr(vision_config, "fullatt_block_indexes", None)
    default_merge = 2 if config.model_type == "llava_onevision" else 1
    patches_per_token = getattr(vision_config, "spatial_merge_size", default_merge) ** 2
    head_size = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    window = (getattr(vision_config, "window_size", 112) // vision_config.patch_size) ** 2
    temporal_patch = getattr(vision_config, "temporal_patch_size", 1)
    return Shape(
        Path(name).name, text_config.num_hidden_layers, text_config.hidden_size, text_config.intermediate_size,
        text_config.num_attention_heads, text_config.num_key_value_heads, head_size, text_config.vocab_size, depth,
        vision_hidden, vision_ffn, 3 if gated else 2, depth - len(full_layers) if full_layers is not None else 0,
        window, patches_per_token, 3 * temporal_patch * vision_config.patch_size**2,
    )  # fmt: skip


def _from_record(config: dict[str, Any]) -> Shape:
    try:
        return Shape(
            config["name"], config["layers"], config["hidden"], config["intermediate"], config["heads"],
            config["kv_heads"], config["hidden"] // config["heads"], config["vocab"], config["depth"],
            config["vision_hidden"], config["vision_intermediate"],
            windowed=config["depth"] - len(config["full_attention"]), patch_values=6 * config["patch"] ** 2,
        )  # fmt: skip
    except KeyError as error:
        raise UserError(
            f"the result file's config has no field {error.args[0]!r}: only speed suites of whole models do"
        ) from None


def device_of(name: str) -> Device:
    """A listed device; "cpu" and "auto" are measured here and now."""
    if name in DEVICES:
        return DEVICES[name]
    if name not in ("cpu", "cuda", "auto"):
        raise UserError(f"unknown device {name!r}; known: auto, cpu, cuda, {', '.join(DEVICES)}")
    import torch

    use_cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"no CUDA device here: name a listed one ({', '.join(DEVICES)}), or cpu")
    return measured("cuda" if use_cuda else "cpu")


def measured(
    device: str, seconds: float = 1.0, dtype: str = "bfloat16", clock: Callable[[], float] = time.perf_counter
) -> Device:
    """Peak rates of this machine: the best of repeated matrix products in `dtype`, and of copies (read + written).

    Each takes about `seconds` by `clock`: the matrices grow only while the machine is fast enough for larger ones.
    """
    import torch

    largest_side, copy_bytes = (8192, 2**30) if device.startswith("cuda") else (2048, 2**27)

    def once(work: Any) -> float:
        started = clock()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return clock() - started

    def best(work: Any) -> float:
        started = clock()
        seconds_taken = [once(work)]
        while len(seconds_taken) < 3 or clock() - started < seconds:
            seconds_taken.append(once(work))
            if clock() - started > 2 * seconds:
                break
        return min(seconds_taken)

    matrix_side = 128
    while True:
        left, right = (torch.randn(matrix_side, matrix_side, device=device).to(getattr(torch, dtype)) for _ in range(2))
        product = functools.partial(torch.mm, left, right, out=torch.empty_like(left))
        once(product)  # the first product of a size is slow
        if matrix_side >= largest_side or 8 * once(product) > seconds / 4:
            break
        matrix_side *= 2
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    on_gpu = device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if on_gpu else f"this CPU, {torch.get_num_threads()} threads"
    flops, bandwidth = 2 * matrix_side**3 / best(product), 2 * copy_bytes / best(lambda: target.copy_(source))
    return Device(name, flops, bandwidth, f"measured, {dtype}")


def parse(tokens: str) -> Request:
    """`2000` (visual tokens) or `visual=2000,text=100,new=64,batch=1,frames=8`."""
    request: Request = spec.fill("--tokens", Request, spec.fields(tokens), text=tokens)
    return request
