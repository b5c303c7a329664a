"""The GPU suite's kernel check and stream ingest."""

from __future__ import annotations

import time
from typing import Any

from evals.shapes import Shape


def kernels(device: str) -> list[dict[str, Any]]:
    """The ragged kernel that this device picks against float64: its error at most twice that of plain torch in bf16."""
    import torch

    from vlmfast import kernels as k

    out = []
    cases = [(1, 28, 4, 128, 1, 0), (8, 28, 4, 128, 1, 1), (1, 16, 2, 128, 8, 2), (2, 6, 2, 32, 16, 3)]
    for batch, heads, kv_heads, size, queries, seed in cases:
        g = torch.Generator().manual_seed(seed)
        rows = batch * kv_heads
        longest = 4096 if device != "cpu" else 256
        lengths = [int(n) for n in torch.randint(queries, longest, (rows,), generator=g)]
        offsets = [sum(lengths[:i]) for i in range(rows)]
        keys, values = (torch.randn(sum(lengths), size, generator=g).bfloat16().to(device) for _ in range(2))
        query = torch.randn(batch, heads, queries, size, generator=g).bfloat16().to(device)
        kv = k.Ragged(keys, values, list(range(rows)), offsets, lengths, rows)
        scale = size**-0.5
        got = k.ragged_attention(query, kv, scale, torch.empty_like(query)).double()
        exact, plain = _dense(query, kv, scale, torch.float64), _dense(query, kv, scale, torch.bfloat16)
        error, plain_error = float((got - exact).abs().max()), float((plain - exact).abs().max())
        case = f"{batch}x{heads}/{kv_heads}x{size}, {queries} queries, up to {max(lengths)} columns"
        out.append({"case": case, "error": error, "plain_error": plain_error, "ok": error <= 2 * plain_error + 1e-6})
    return out


def _dense(query: Any, kv: Any, scale: float, dtype: Any) -> Any:
    """Head by head with matmuls and a softmax in `dtype`, as float64."""
    import torch

    batch, heads, queries, _ = query.shape
    group = batch * heads // kv.total
    flat = query.reshape(batch * heads, queries, -1).to(dtype)
    out = torch.zeros(*flat.shape[:2], kv.values.shape[-1], dtype=torch.float64, device=query.device)
    for row, at, n in zip(kv.rows, kv.offsets, kv.lengths, strict=True):
        keys, values = kv.keys[at : at + n].to(dtype), kv.values[at : at + n].to(dtype)
        last = torch.arange(n, device=query.device) <= torch.arange(n - queries, n, device=query.device)[:, None]
        for head in range(row * group, (row + 1) * group):
            scores = (flat[head] @ keys.T * scale).masked_fill(~last, float("-inf"))
            out[head] = (scores.softmax(-1) @ values).double()
    return out.view(batch, heads, queries, -1)


def ingest(model: Any, device: str, shape: Shape, dry: bool) -> dict[str, Any]:
    """Frames per second that a stream session takes in, 16 x 16 tokens a frame pair (dry: toy frames)."""
    import torch

    from vlmfast.stream import StreamSession

    side = 2 * shape.patch * (4 if dry else 16)
    frames, step = (8, 4) if dry else (128, 16)
    try:
        processor = _processor(model, shape.patch)
        g = torch.Generator().manual_seed(0)
        clip = torch.randint(0, 255, (frames, side, side, 3), dtype=torch.uint8, generator=g).numpy()
        session = StreamSession(model, processor, retrieve=None, redundancy=None)
        try:
            session.push(clip[:step])
            _wait(device)
            start = time.perf_counter()
            for at in range(step, frames, step):
                session.push(clip[at : at + step])
            _wait(device)
            seconds = time.perf_counter() - start
        finally:
            session.close()
    except Exception as e:
        return {"failed": f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"}
    return {"fps": round((frames - step) / seconds, 2), "frames": frames - step, "side": side}


def _wait(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


def _processor(model: Any, patch: int) -> Any:
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
