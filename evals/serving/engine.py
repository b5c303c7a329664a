"""vLLM's engine in this process, asked the questions of a task; the tests of the plugin use it too."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmfast.bench.task import Clip, Sample

HERE = {  # one process, one thread, no network, little memory
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip


@dataclass
class Answer:
    """text; prompt_tokens; ids and logprobs of the new tokens."""

    text: str
    prompt_tokens: int
    ids: list[int]
    logprobs: list[float]


def start(model: str, plugin: str | None, **options: Any) -> Any:
    """A vLLM `LLM`. plugin: the text of VLMFAST, None for vLLM without the plugin. One engine per process.

    options: of `LLM`, in front of those that suit small models.
    """
    for name, value in HERE.items():
        os.environ.setdefault(name, value)
    os.environ.pop("VLMFAST", None)
    if plugin is not None:
        os.environ["VLMFAST"] = plugin
    from vllm import LLM

    small = {
        "dtype": "float32", "max_model_len": 4096, "enforce_eager": True, "seed": 0, "block_size": 32,
        "limit_mm_per_prompt": {"image": 4, "video": 4}, "disable_log_stats": True,
    }  # fmt: skip
    return LLM(model=model, **small | options)


def prompt(processor: Any, sample: Sample, asked: Any = None) -> dict[str, Any]:
    """What `LLM.generate` takes for a question. asked: the request's own `vlmfast`, or None."""
    images, videos, content = [], [], []
    for item in sample.media:
        if isinstance(item, Clip):
            videos.append(video_of(item))
        else:
            images.append(item)
        content.append({"type": "video" if isinstance(item, Clip) else "image"})
    turns = [{"role": "user", "content": [*content, {"type": "text", "text": sample.question}]}]
    media = {name: items for name, items in (("image", images), ("video", videos)) if items}
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    out: dict[str, Any] = {"prompt": text, "multi_modal_data": media}
    return out | ({} if asked is None else {"mm_processor_kwargs": {"vlmfast": asked}})


def plain(rule: Any) -> dict[str, Any]:
    """A pruner as the JSON of a request."""
    from vlmfast.core import to_json

    made: dict[str, Any] = to_json(rule)
    return made


def video_of(clip: Clip) -> tuple[Any, dict[str, Any]]:
    """Frames and what is known of them, as vLLM takes a video that is decoded already."""
    count = len(clip.frames)
    known = {
        "fps": clip.fps, "duration": count / clip.fps, "total_num_frames": count, "frames_indices": list(range(count)),
        "video_backend": "pyav", "do_sample_frames": False,
    }  # fmt: skip
    return clip.frames, known


def ask(llm: Any, prompts: Sequence[dict[str, Any]], tokens: int = 12, whole: bool = False) -> list[Answer]:
    """Greedy answers, all prompts at once. whole: of exactly so many tokens."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=tokens, logprobs=0, ignore_eos=whole)
    answers = []
    for made in llm.generate(list(prompts), greedy, use_tqdm=False):
        first = made.outputs[0]
        logprobs = [next(iter(each.values())).logprob for each in first.logprobs]
        answers.append(Answer(first.text.strip(), len(made.prompt_token_ids), list(first.token_ids), logprobs))
    return answers
