"""The cuts of a real shape that the suites time, and the FLOPs and bytes that each stage cannot do without."""

from __future__ import annotations

from dataclasses import replace

from vlmfast.bench.shapes import QWEN_3B, QWEN_3B_TWELFTH, Shape, build, clip, fill

__all__ = [
    "QWEN_3B", "QWEN_3B_QUARTER", "QWEN_3B_SIXTH", "QWEN_3B_TWELFTH", "TOY", "Shape", "build", "clip", "encode_cost",
    "fill", "prefill_cost",
]  # fmt: skip

QWEN_3B_SIXTH = replace(
    QWEN_3B,
    name="Qwen2.5-VL-3B, a sixth of its layers",
    layers=6,
    depth=5,
    full_attention=(4,),
    note="text 36 -> 6 layers; vision 32 -> 5 blocks, one of them with full attention; the merger, which is not cut, "
    "makes up for the missing third of a block",
)
QWEN_3B_QUARTER = replace(
    QWEN_3B,
    name="Qwen2.5-VL-3B, a quarter of its layers",
    layers=9,
    depth=8,
    full_attention=(7,),
    note="text 36 -> 9 layers, vision 32 -> 8 blocks, one of them with full attention: exactly a quarter of both; "
    "patch embedding, merger and output head are not cut",
)
TOY = Shape("toy", 3, 256, 512, 4, 2, 1000, 3, 128, 256, 4, (2,), (2, 8, 8), 16)


def encode_cost(shape: Shape, kept: int, after_block: int | None) -> tuple[float, float]:
    """FLOPs and bytes (bf16 weights) of the tower when blocks from `after_block` on see `kept` of the tokens."""
    d, m = shape.vision_hidden, shape.vision_intermediate
    block = 4 * d * d + 3 * d * m
    patches, short = 4 * shape.visual, 4 * kept
    flops, frame = 2.0 * patches * 3 * 2 * shape.patch**2 * d, patches / shape.grid[0]
    for i in range(shape.depth):
        n = short if after_block is not None and i >= after_block else patches
        span = (frame if i in shape.full_attention else 64) * n / patches
        flops += 2.0 * n * block + 4.0 * n * span * d
    merged = kept if after_block is not None else shape.visual
    merger = (4 * d) ** 2 + 4 * d * shape.hidden
    flops += 2.0 * merged * merger
    return flops, 2.0 * (shape.depth * block + merger + 6 * shape.patch**2 * d)


def prefill_cost(shape: Shape, kept: int, cuts: tuple[tuple[int, float], ...] = ()) -> tuple[float, float]:
    """FLOPs and bytes (bf16 weights) of the text decoder over the text and `kept` visual tokens.

    cuts: ((layer, fraction of all visual tokens that go on from it), ...) of a method between layers; then `kept` is
    what is left at the end.
    """
    d, head, flops = shape.hidden, shape.hidden // shape.heads, 0.0
    layer = 2 * d * d + 2 * d * head * shape.kv_heads + 3 * d * shape.intermediate
    for i in range(shape.layers):
        share = next((f for at, f in reversed(cuts) if i >= at), 1.0)
        n = shape.text + 2 + (share * shape.visual if cuts else kept)
        flops += 2.0 * n * layer + 4.0 * n * n / 2 * d
    return flops, 2.0 * shape.layers * layer
