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


def build(family: str, folder: Path) -> None:
    """A tiny checkpoint that vLLM's kernels take."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    if family == "qwen3_vl":
        rope |= {"mrope_section": [8, 4, 4], "mrope_interleaved": True}
    text: dict[str, Any] = HEAD | ({"rope_parameters": rope} if family in tiny.MROPE else {})
    tiny.save(family, folder, **text | ({"head_dim": 32} if family == "qwen3_vl" else {}))


def media(family: str) -> list[list[Any]]:
    """What each question is about: a picture, a clip, and where positions are M-RoPE's two items at once."""

    def pixels(*shape: int) -> Any:
        return np.random.default_rng(len(shape) + shape[-2]).integers(0, 255, (*shape, 3), dtype=np.uint8)

    picture, other, clip = pixels(48, 32), pixels(32, 40), Clip(pixels(8, 32, 48), 2.0)
    out: list[list[Any]] = [[picture], [clip]]
    return out + ([[picture, other], [clip, picture]] if family in tiny.MROPE else [])


def kept_in_place(runner: Runner, sample: Sample, rule: Any) -> str:
    """The answer of the library, every token at its place in the unpruned prompt."""
    inputs = runner.inputs([sample])
    with vlmfast.accelerate(runner.model, Plan(prune=rule)):
        made = runner.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return decoded(runner, made[0, inputs["input_ids"].shape[1] :])


def kept_moved_up(runner: Runner, sample: Sample, rule: Any) -> str:
    """The answer where what stays moves together: the library's rows, positions counted without gaps."""
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
    return decoded(runner, made[0])


def decoded(runner: Runner, ids: Any) -> str:
    return str(runner.processor.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def main(family: str, folder: Path) -> None:
    build(family, folder)
    loaded = loading.load(str(folder), "float32", "cpu")
    runner = Runner(loaded.model, loaded.processor, family)
    samples = [
        Sample(str(i), "what color is it ?", [""], items, lambda _: 0.0) for i, items in enumerate(media(family))
    ]
    expected = kept_in_place if family in tiny.MROPE else kept_moved_up
    specs = [*SPECS, *(["downsample:keep=0.5"] if family in ("qwen2_vl", "qwen2_5_vl") else [])]
    rules = {spec: None if spec == "none" else parse("prune", spec) for spec in specs}
    theirs = {spec: [expected(runner, sample, rule) for sample in samples] for spec, rule in rules.items()}
    llm = engine.start(str(folder), "none", max_num_batched_tokens=512)
    out = {}
    for spec in specs:
        request = {"method": None} if spec == "none" else engine.plain(rules[spec])
        prompts = [
            engine.prompt(loaded.processor, sample, {**request, "positions": "transformers"}) for sample in samples
        ]
        ours = engine.ask(llm, prompts, TOKENS)
        out[spec] = {
            "ours": [each.text for each in ours],
            "theirs": theirs[spec],
            "tokens": [a.prompt_tokens for a in ours],
        }
    print(json.dumps(out))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
