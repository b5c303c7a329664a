"""Shapes and devices by name, requests from text."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmfast import spec
from vlmfast.core import UserError
from vlmfast.roofline.cost import Device, Request, Shape

DEVICES = {
    "h200": Device("H200", 989e12, 4.8e12),
    "h100": Device("H100 SXM", 989e12, 3.35e12),
    "a100": Device("A100 80GB", 312e12, 2.04e12),
    "l4": Device("L4", 121e12, 0.3e12),
    "rtx4090": Device("RTX 4090", 165e12, 1.01e12),
}

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
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    if vision is None:
        raise UserError(f"{name} ({config.model_type}) has no vision_config: roofline is about vision-language models")
    if getattr(text, "num_experts", None):
        raise UserError(
            f"{name} ({config.model_type}) is a mixture of experts, whose cost is not counted here: no floor"
        )
    if "linear_attention" in (getattr(text, "layer_types", None) or ()):
        raise UserError(
            f"{name} ({config.model_type}) has layers with a recurrent state, whose cost is not counted here: no floor"
        )
    d = getattr(vision, "embed_dim", None) if config.model_type == "qwen2_vl" else None
    d = d or vision.hidden_size
    depth = getattr(vision, "depth", None) or vision.num_hidden_layers
    ffn = getattr(vision, "intermediate_size", None) or d * int(getattr(vision, "mlp_ratio", 4))
    gated = config.model_type == "qwen2_5_vl"
    full = getattr(vision, "fullatt_block_indexes", None)
    merge = getattr(vision, "spatial_merge_size", 2 if config.model_type == "llava_onevision" else 1) ** 2
    time = getattr(vision, "temporal_patch_size", 1)
    return Shape(
        Path(name).name, text.num_hidden_layers, text.hidden_size, text.intermediate_size, text.num_attention_heads,
        text.num_key_value_heads, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        text.vocab_size, depth, d, ffn, 3 if gated else 2, depth - len(full) if full is not None else 0,
        (getattr(vision, "window_size", 112) // vision.patch_size) ** 2, merge, 3 * time * vision.patch_size**2,
    )  # fmt: skip


def _from_record(c: dict[str, Any]) -> Shape:
    try:
        return Shape(
            c["name"], c["layers"], c["hidden"], c["intermediate"], c["heads"], c["kv_heads"],
            c["hidden"] // c["heads"], c["vocab"], c["depth"], c["vision_hidden"], c["vision_intermediate"],
            windowed=c["depth"] - len(c["full_attention"]), patch_values=6 * c["patch"] ** 2,
        )  # fmt: skip
    except KeyError as e:
        raise UserError(
            f"the result file's config has no field {e.args[0]!r}: only speed suites of whole models do"
        ) from None


def device_of(name: str) -> Device:
    """A listed device; "cpu" and "auto" are measured here and now."""
    if name in DEVICES:
        return DEVICES[name]
    if name not in ("cpu", "cuda", "auto"):
        raise UserError(f"unknown device {name!r}; known: auto, cpu, cuda, {', '.join(DEVICES)}")
    import torch

    cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"no CUDA device here: name a listed one ({', '.join(DEVICES)}), or cpu")
    return measured("cuda" if cuda else "cpu")


def measured(
    device: str, seconds: float = 1.0, dtype: str = "bfloat16", clock: Callable[[], float] = time.perf_counter
) -> Device:
    """Peak rates of this machine: the best of repeated matrix products in `dtype`, and of copies (read + written).

    Each takes about `seconds` by `clock`: the matrices grow only while the machine is fast enough for larger ones.
    """
    import torch

    largest, size = (8192, 2**30) if device.startswith("cuda") else (2048, 2**27)

    def once(work: Any) -> float:
        before = clock()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return clock() - before

    def best(work: Any) -> float:
        start = clock()
        times = [once(work)]
        while len(times) < 3 or clock() - start < seconds:
            times.append(once(work))
            if clock() - start > 2 * seconds:
                break
        return min(times)

    side = 128
    while True:
        a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
        product = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
        once(product)  # the first product of a size is slow
        if side >= largest or 8 * once(product) > seconds / 4:
            break
        side *= 2
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    gpu = device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if gpu else f"this CPU, {torch.get_num_threads()} threads"
    flops, rate = 2 * side**3 / best(product), 2 * size / best(lambda: target.copy_(source))
    return Device(name, flops, rate, f"measured, {dtype}")


def parse(tokens: str) -> Request:
    """`2000` (visual tokens) or `visual=2000,text=100,new=64,batch=1,frames=8`."""
    request: Request = spec.fill("--tokens", Request, spec.fields(tokens), text=tokens)
    return request
