"""Run by test_plugin_families.py, a process per family: vLLM and transformers side by side, as JSON.

    PYTHONPATH=.:tests/support python tests/vllm/vllm_family.py qwen3_vl FOLDER

The model is tiny and random, so that a wrong row or position anywhere changes the tokens that follow.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import tiny
import torch

import vlmfast
from evals.serving import engine
from vlmfast import loading
from vlmfast.bench.runner import Runner
from vlmfast.bench.task import Clip, Sample
from vlmfast.encode.base import Pruner
from vlmfast.plan import Plan, parse

TOKENS = 8
SPECS = ["none", "vidcom2:keep=0.5", "maxmin:keep=0.3", "uniform:keep=0.25", "evs:keep=0.7,stills=(maxmin:keep=0.5)"]
HEAD = {"num_attention_heads": 2, "num_key_value_heads": 1}  # heads of 32, the smallest that vLLM has on a CPU


def build(family: str, folder: Path) -> Any:
    """A tiny checkpoint that vLLM's kernels take, as the library loads it."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    if family == "qwen3_vl":
        rope |= {"mrope_section": [8, 4, 4], "mrope_interleaved": True}
    text: dict[str, Any] = HEAD | ({"rope_parameters": rope} if family in tiny.MROPE else {})
    tiny.save(family, folder, **text | ({"head_dim": 32} if family == "qwen3_vl" else {}))
    loaded = loading.load(str(folder), "float32", "cpu")
    if family == "llava_onevision":  # vLLM reads the names that published checkpoints have
        file = folder / "model.safetensors"
        weights = safetensors.torch.load_file(file)
        renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): weights[name] for name in weights}
        safetensors.torch.save_file(renamed, file, metadata={"format": "pt"})
    return loaded


def media(family: str) -> list[list[Any]]:
    """What each question is about: a picture, a clip, and where positions are M-RoPE's two items at once."""

    def pixels(*shape: int) -> Any:
        return np.random.default_rng(len(shape) + shape[-2]).integers(0, 255, (*shape, 3), dtype=np.uint8)

    picture, other, clip = pixels(48, 32), pixels(32, 40), Clip(pixels(8, 32, 48), 2.0)
    out: list[list[Any]] = [[picture], [clip]]
    return out + ([[picture, other], [clip, picture]] if family in tiny.MROPE else [])


def kept_in_place(runner: Runner, sample: Sample, rule: Any) -> list[int]:
    """The new tokens of the library, every token at its place in the unpruned prompt."""
    inputs = runner.inputs([sample])
    with vlmfast.accelerate(runner.model, Plan(prune=rule)):
        made = runner.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    new_tokens: list[int] = made[0, inputs["input_ids"].shape[1] :].tolist()
    return new_tokens


@torch.inference_mode()
def kept_moved_up(runner: Runner, sample: Sample, rule: Any) -> list[int]:
    """The new tokens where what stays moves together: the library's rows, positions counted without gaps."""
    model, inputs, seen = runner.model, runner.inputs([sample]), {}
    text = model.model.language_model
    hook = text.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model(**inputs)
    hook.remove()
    embeds, chosen, select = seen["inputs_embeds"], [], Pruner.select

    def spy(self: Any, tokens: Any) -> Any:
        chosen.append(select(self, tokens))
        return chosen[-1]

    Pruner.select = spy  # type: ignore[method-assign]
    with vlmfast.accelerate(model, Plan(prune=rule)):
        model(**inputs)
    Pruner.select = select  # type: ignore[method-assign]
    ids = inputs["input_ids"][0]
    is_media = (ids == tiny.IMAGE) | (ids == tiny.VIDEO)
    keep = ~is_media
    if chosen:
        keep[is_media.nonzero()[:, 0][chosen[0]]] = True
    else:
        keep[:] = True
    short = embeds[:, keep]
    made = model.generate(
        inputs_embeds=short, attention_mask=torch.ones(short.shape[:2]), max_new_tokens=TOKENS, do_sample=False
    )
    new_tokens: list[int] = made[0].tolist()
    return new_tokens


def main(family: str, folder: Path) -> None:
    loaded = build(family, folder)
    runner = Runner(loaded.model, loaded.processor, family)
    samples = [
        Sample(str(i), "what color is it ?", [""], items, lambda _: 0.0) for i, items in enumerate(media(family))
    ]
    expected = kept_in_place if family in tiny.MROPE else kept_moved_up
    specs = [*SPECS, *(["downsample:keep=0.5"] if family in ("qwen2_vl", "qwen2_5_vl") else [])]
    rules = {spec: None if spec == "none" else parse("prune", spec) for spec in specs}
    theirs = {spec: [expected(runner, sample, rule) for sample in samples] for spec, rule in rules.items()}
    # the tiny processors normalise pictures and clips by different means, which vLLM's models cannot
    llm = engine.start(str(folder), "none", max_num_batched_tokens=512, mm_device_do_normalize=False)
    out = {}
    for spec in specs:
        request = {"method": None} if spec == "none" else engine.plain(rules[spec])
        request["positions"] = "transformers"
        ours = engine.ask(llm, [engine.prompt(loaded.processor, sample, request) for sample in samples], TOKENS, True)
        tokens = [answer.prompt_tokens for answer in ours]
        out[spec] = {"ours": [answer.ids for answer in ours], "theirs": theirs[spec], "tokens": tokens}
    print(json.dumps(out))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
