"""The GPU suite's part `stream`: frames a second that a session takes in, and the wait for an answer."""

from __future__ import annotations

import statistics
from typing import Any

from evals.gpu.run import Run, free, memory, model_of
from vlmfast.bench import timing


def stream(run: Run) -> None:
    """Frames a second that a session takes in, and the wait for an answer: the pocket model, then real shapes."""
    import torch

    from vlmfast import pocket

    for name, dtype in (("pocket", "bfloat16"), ("pocket, float32", "float32")):
        with run.trying(name):
            model, processing = pocket.load("target", dtype)
            session(run, name, model.to(run.device), processing, side=64, frames=16 if run.dry else 256)
            del model
        free(run.device)
    if run.late("3B shapes", 0 if run.dry else 15):
        return
    with run.trying(run.shape.name), torch.no_grad():
        model = model_of(run)
        side = 2 * run.shape.patch * (4 if run.dry else 16)
        session(run, run.shape.name, model, processor(model, run.shape.patch), side, 8 if run.dry else 96)


def session(run: Run, name: str, model: Any, processing: Any, side: int, frames: int) -> None:
    """One stream: frames in chunks, a quarter as many a pair at a time as a camera gives them, then the same question a
    few times."""
    import torch

    from vlmfast.stream import StreamSession

    step, pairs = max(2, frames // 8), frames + max(4, frames // 4)
    generator = torch.Generator().manual_seed(0)
    clip = torch.randint(0, 255, (pairs, side, side, 3), dtype=torch.uint8, generator=generator).numpy()
    memory(run, reset=True)
    with StreamSession(model, processing, redundancy=None) as live:

        def pushed(first: int, last: int, step: int) -> float:
            """Frames a second."""
            begin = timing.now(run.device)
            for at in range(first, last, step):
                live.push(clip[at : at + step])
            return (last - first) / (timing.now(run.device) - begin)

        live.push(clip[:step])
        metrics: dict[str, Any] = {"fps": pushed(step, frames, step), "frames": frames - step, "side": side}
        metrics["pairs_fps"] = pushed(frames, pairs, 2)
        run.add(name, metrics=metrics)
        took, reports = [], []
        for _ in range(2 if run.dry else 5):
            begin = timing.now(run.device)
            answer = live.ask("what happens in this video ?", max_new_tokens=4 if run.dry else 16)
            took.append((timing.now(run.device) - begin) * 1e3)
            reports.append(answer.report)
            live.new_conversation()
    metrics |= {"latency_ms": statistics.median(took[1:]), "warm_ms": took[0], **memory(run)}
    for key in ("select_ms", "fetch_ms", "prefill_ms", "decode_ms_per_token", "context_tokens"):
        values = [report[key] for report in reports[1:] if isinstance(report.get(key), (int, float))]
        if values:
            metrics[key] = statistics.median(values)
    words = {key: value for key, value in reports[-1].items() if isinstance(value, str)}
    run.add(name, metrics=metrics, said=words, notes=reports[-1].get("notes", []))


def processor(model: Any, patch: int) -> Any:
    """A Qwen2.5-VL processor over the pocket tokenizer; the model's placeholder ids become that tokenizer's."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    from vlmfast.pocket import models

    tokenizer = models.tokenizer()
    common: dict[str, Any] = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
    common["size"] = {"shortest_edge": 16 * patch**2, "longest_edge": 2**30}
    for name in ("image_pad", "video_pad", "vision_start", "vision_end"):
        field = name.replace("pad", "token_id") if name.endswith("pad") else f"{name}_token_id"
        setattr(model.config, field, tokenizer.convert_tokens_to_ids(f"<|{name}|>"))
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**common), tokenizer, Qwen2VLVideoProcessor(**common), chat_template=models.CHAT_TEMPLATE
    )
