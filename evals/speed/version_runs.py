"""What `evals.speed.versions` runs in each process: a list of names on stdout, then a sample per name asked on stdin.

The package is whichever is on the path, so only names that have been public since version 0.1 are used, and nothing of
`evals`. Arguments: this file, the folder that the package must come from, "quick".
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import vlmfast

FILE, TREE, QUICK = Path(sys.argv[1]), Path(sys.argv[2]).resolve(), "quick" in sys.argv[3:]
assert Path(vlmfast.__file__).resolve().is_relative_to(TREE), f"{vlmfast.__file__} is not of {TREE}"
ROOT = FILE.resolve().parents[2]
Run = Callable[[], dict[str, float]]


def shapes_module() -> Any:
    """The shapes of this tree, in every process: an earlier package has them elsewhere."""
    spec = importlib.util.spec_from_file_location("shapes", ROOT / "vlmfast" / "bench" / "shapes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["shapes"] = module
    spec.loader.exec_module(module)
    return module


def numbers(report: Any, *names: str) -> dict[str, float]:
    """Those of the report's fields that it has."""
    flat = {**report.encode, **report.prefill, **report.decode}
    return {name: float(flat[name]) for name in names if flat.get(name) is not None}


def asked(model: Any, inputs: dict[str, Any], new: int, names: tuple[str, ...], **stages: Any) -> Run:
    """One call of `generate` under these stages."""

    def run() -> dict[str, float]:
        with vlmfast.accelerate(model, **stages) as fast:
            start = time.perf_counter()
            model.generate(**inputs, max_new_tokens=new, do_sample=False)
            total = (time.perf_counter() - start) * 1e3
        return {**numbers(fast.report, *names), "total_ms": total}

    return run


def real_widths() -> dict[str, Run]:
    """Every pruner and every policy at its defaults over 2,048 visual tokens of the width of Qwen2.5-VL-3B."""
    from vlmfast.encode import METHODS as PRUNERS
    from vlmfast.prefill import METHODS as POLICIES

    shapes = shapes_module()
    size: dict[str, Any] = {"grid": (2, 8, 8), "text": 16, "hidden": 256, "heads": 4} if QUICK else {}
    shape = replace(
        shapes.QWEN_3B, layers=3, intermediate=1024, vocab=8192, depth=2, vision_hidden=256, vision_intermediate=512,
        vision_heads=4, full_attention=(1,), **size,
    )  # fmt: skip
    dtype = "float32" if QUICK else "bfloat16" if half_is_fast() else "float32"
    model, inputs = shapes.build(shape, 0, dtype), shapes.clip(shape, 0, dtype)
    runs = {"call plain": asked(model, inputs, 9, ("prefill_ms", "ttft_ms", "decode_ms_per_token"))}
    for name, pruner in PRUNERS.items():
        stage = pruner() if name in ("dtd", "pixelprune") else pruner(keep=0.25)
        runs[f"choose {name}"] = asked(model, inputs, 1, ("select_ms", "ttft_ms"), prune=stage)
    inside = PRUNERS["vidcom2"](keep=0.25, after_block=1)
    runs["choose vidcom2, after block 1"] = asked(model, inputs, 1, ("select_ms", "ttft_ms"), prune=inside)
    for name, policy in POLICIES.items():
        wanted = ("compress_ms", "ttft_ms", "decode_ms_per_token")
        runs[f"policy {name}"] = asked(model, inputs, 9, wanted, kv=policy(keep=0.1))
    return runs


def half_is_fast() -> bool:
    """Does this CPU multiply bfloat16? Asked here, since an earlier package cannot say."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def trained() -> dict[str, Run]:
    """The pocket pair, of this tree's weights in every process: captions by our loop, and a stream."""
    from PIL import Image, ImageDraw
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vlmfast import StreamSession
    from vlmfast.decode import Exact, Loose, ModelDraft, Speculate

    folder = ROOT / "vlmfast" / "pocket" / "weights"
    target, watching, small = (
        AutoModelForImageTextToText.from_pretrained(folder / name).float().eval()
        for name in ("target", "target", "draft")  # an open stream keeps its model to itself
    )
    processor = AutoProcessor.from_pretrained(folder / "target")
    picture = Image.new("RGB", (64, 64), "black")
    ImageDraw.Draw(picture).rectangle((8, 8, 24, 24), fill="red")
    ImageDraw.Draw(picture).ellipse((36, 30, 56, 50), fill="blue")
    words = [{"type": "image"}, {"type": "text", "text": "describe the picture"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": words}], add_generation_prompt=True)
    inputs = dict(processor(text=[prompt], images=[picture], return_tensors="pt"))
    draft, wanted, new = ModelDraft(small, prune=None), ("decode_ms_per_token",), 4 if QUICK else 48
    speculated = {"plain loop": Speculate(), "lossless": Speculate(draft, Exact()), "loose": Speculate(draft, Loose())}
    runs = {f"decode {n}": asked(target, inputs, new, wanted, speculate=s) for n, s in speculated.items()}
    frames = torch.randint(0, 255, (8, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    frames = frames.repeat(1 if QUICK else 8, 1, 1, 1)

    def pushed() -> tuple[Any, float]:
        session = StreamSession(watching, processor, redundancy=None)
        start = time.perf_counter()
        session.push(frames)
        return session, (time.perf_counter() - start) * 1e3

    kept, _ = pushed()

    def push() -> dict[str, float]:
        session, taken = pushed()
        session.close()
        return {"encode_ms": taken}

    def question() -> dict[str, float]:
        start = time.perf_counter()
        kept.ask("what colour is the circle", max_new_tokens=4, do_sample=False)
        taken = (time.perf_counter() - start) * 1e3
        kept.new_conversation()
        return {"total_ms": taken}

    return runs | {"stream push": push, "stream ask": question}


def say(value: Any) -> None:
    """One line that the other side knows from a library's own words."""
    print("@" + json.dumps(value), flush=True)


def serve() -> None:
    """Names, then samples, one line of JSON each."""
    with torch.inference_mode():
        runs = real_widths() | trained()
        say(list(runs))
        for line in sys.stdin:
            say(runs[line.strip()]())


serve()
