"""What a question over a stream costs as the stream grows, and what encoding it costs, at real shapes.

Layers of Qwen2.5-VL-3B with random weights. The archive is filled with synthetic blocks of 1, 10 and 60 minutes (one
block a second, 16 tokens kept of each, int8); every round asks each of them the same question, in turn, so that the
ratio of their latencies holds on a noisy machine. `encode` pushes frames of 224 x 224 with every token kept, and with a
quarter of them (`vidcom2` per grid), which is what dropping tokens before the language model saves. What a scene that
hardly moves saves is in `--suite ingest`.
"""

from __future__ import annotations

from typing import Any

from evals.speed.shapes import QWEN_3B_SIXTH, TOY, Shape, build
from vlmfast.bench import records, timing

SEED, ROUNDS, KEPT, FRAMES, TOKENS = 0, 7, 16, 16, 4
QUESTION = "what colour is the star and where does it move"


def run(quick: bool = False) -> dict[str, Any]:
    """Measure; returns the rows and what the head needs."""
    import torch

    from vlmfast.stream import Internal

    shape, rounds, minutes = (TOY, 2, (1, 3)) if quick else (QWEN_3B_SIXTH, ROUNDS, (1, 10, 60))
    torch.manual_seed(SEED)
    dtype = timing.half()
    model = build(shape, SEED, dtype)
    processor = processor_for(model, shape)
    sessions = {f"{m}min": filled(model, processor, m * 60) for m in minutes}
    shared = Internal(frames=FRAMES, scope="shared")
    asks = {name: asking(session, None) for name, session in sessions.items()}
    asks[f"{minutes[0]}min-again"] = asking(sessions[f"{minutes[0]}min"], None)  # a null: its ratio is chance
    asks[f"{minutes[-1]}min-shared"] = asking(sessions[f"{minutes[-1]}min"], shared)
    samples = timing.interleaved(asks, rounds, warmup=1)
    first = f"{minutes[0]}min"
    rows = []
    for name, taken in samples.items():
        vs = {} if name == first else {first: timing.ratios(samples[first], taken, ["total_ms", "select_ms"])}
        params = {"minutes": int(name.split("min")[0]), "frames": FRAMES, "kept_tokens_per_block": KEPT}
        way = {"shared": "internal-shared", "again": "internal again"}.get(name.partition("-")[2], "internal")
        rows.append(records.row(way, params=params, metrics=timing.medians(taken), vs=vs))
    pushes = {"encode": pushing(model, processor, None), "encode-25": pushing(model, processor, 0.25)}
    taken_by = timing.interleaved(pushes, max(2, rounds // 2), warmup=1)
    for name, taken in taken_by.items():
        vs = {} if name == "encode" else {"encode": timing.ratios(taken_by["encode"], taken, ["encode_ms"])}
        rows.append(records.row(name, params={"frames": 8}, metrics=timing.medians(taken), vs=vs))
    return {
        "config": {**shape.json(), "question": QUESTION, "blocks_per_second": 1, "keep_as": "int8"},
        "seed": SEED,
        "repeats": rounds,
        "device": "cpu",
        "dtype": dtype,
        "rows": rows,
        "show": [
            "total_ms",
            "select_ms",
            "fetch_ms",
            "prefill_ms",
            "decode_ms_per_token",
            "kv_host_bytes",
            "encode_ms",
        ],
    }


def processor_for(model: Any, shape: Shape) -> Any:
    """A Qwen processor of the shape's patch size around the pocket tokenizer, whose ids the model then uses."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    from vlmfast.pocket.models import CHAT_TEMPLATE, tokenizer

    words = tokenizer()
    for kind, token in (
        ("image_token_id", "<|image_pad|>"),
        ("video_token_id", "<|video_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"),
        ("vision_end_token_id", "<|vision_end|>"),
    ):
        setattr(model.config, kind, words.convert_tokens_to_ids(token))
    model.generation_config.eos_token_id = None
    common: dict[str, Any] = {
        "patch_size": shape.patch,
        "size": {"shortest_edge": 32 * 32, "longest_edge": 1024 * 1024},
    }
    video = Qwen2VLVideoProcessor(**common, cap_pixels_per_frame=False)
    return Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**common), words, video, chat_template=CHAT_TEMPLATE)


def filled(model: Any, processor: Any, blocks: int) -> Any:
    """A session whose archive holds so many synthetic blocks of one second each."""
    import torch

    from vlmfast.stream import Internal, StreamSession
    from vlmfast.stream.blocks import Block, BlockTensors

    session = StreamSession(model, processor, window=64, ram="4GiB", retrieve=Internal(frames=FRAMES))
    encoder = session.encoder
    layers, (hk, _, dh) = encoder.num_layers, encoder.window.cache.layers[0].raw.shape
    base, rel = encoder.window.num_init, session.vision.layout.grid(4, 4).to(torch.int16)
    encoder.first_extent = 4
    made = torch.randn(2, layers, hk, KEPT, dh, dtype=torch.bfloat16)
    for i in range(blocks):
        shift = torch.randn(layers, hk, 1, dh, dtype=torch.bfloat16)
        keys = made[0] + shift
        block = Block(i, float(i), i + 1.0, (base + 2 * i, base, base), (2, 0, 0), rel, 2)
        session.store.add(block, BlockTensors(keys, made[1], keys.float().mean(2)))
    encoder.progress.blocks = blocks
    return session


def asking(session: Any, retriever: Any) -> Any:
    """One question, as a run for `timing.interleaved`."""

    def once() -> timing.Sample:
        more = {} if retriever is None else {"retrieve": retriever}
        report = session.ask(QUESTION, max_new_tokens=TOKENS, do_sample=False, **more).report
        session.new_conversation()
        return {k: float(v) for k, v in report.items() if isinstance(v, (int, float))}

    return once


def pushing(model: Any, processor: Any, keep: float | None) -> Any:
    """Eight frames, of which nothing is the same, into a session, a fresh one every time."""
    import time

    import torch

    from vlmfast.encode import VidCom2
    from vlmfast.plan import Plan
    from vlmfast.stream import StreamSession

    frames = torch.randint(0, 255, (8, 224, 224, 3), dtype=torch.uint8)

    def once() -> timing.Sample:
        plan = None if keep is None else Plan(prune=VidCom2(keep=keep))
        session = StreamSession(model, processor, plan, redundancy=None, window=1024)
        start = time.perf_counter()
        session.push(frames)
        taken = time.perf_counter() - start
        stats = session.stats()
        return {
            "encode_ms": taken * 1e3, "fps": 8 / taken, "visual_tokens": float(stats["visual_tokens"]),
            "kept_tokens": float(stats["kept_tokens"]), "kv_fast_bytes": float(stats["kv_fast_bytes"]),
        }  # fmt: skip

    return once
