"""The cuts of a real shape that the suites time, and the FLOPs and bytes that each stage cannot do without."""

from __future__ import annotations

from dataclasses import replace

from vlmfast.bench.shapes import QWEN_3B, QWEN_3B_TWELFTH, QWEN_7B, Shape, build, clip, fill
from vlmfast.roofline import cost as roofline

__all__ = [
    "QWEN_3B", "QWEN_3B_SIXTH", "QWEN_3B_TWELFTH", "QWEN_7B", "SMALL", "TOY", "Shape", "build",
    "clip", "encode_cost", "fill", "prefill_cost",
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
SMALL = replace(
    QWEN_3B,
    name="a decoder of 0.5B behind the tower of Qwen2.5-VL",
    layers=24,
    hidden=896,
    intermediate=4864,
    heads=14,
    note="the widths of Qwen2.5-0.5B, as a draft; no checkpoint of Qwen2.5-VL has them",
)
TOY = Shape("toy", 3, 256, 512, 4, 2, 1000, 3, 128, 256, 4, (2,), (2, 8, 8), 16)


def encode_cost(shape: Shape, kept: int, after_block: int | None, resized: bool = False) -> tuple[float, float]:
    """FLOPs and bytes (bf16 weights) of the tower when blocks from `after_block` on see `kept` of the tokens.

    resized: the pixels of `kept` tokens are all that it sees.
    """
    request = replace(_request(shape), visual=kept) if resized else _request(shape)
    cost = roofline.encode(_counted(shape), request, kept, after_block)
    return cost.flops, cost.bytes


def prefill_cost(shape: Shape, kept: int, cuts: tuple[tuple[int, float], ...] = ()) -> tuple[float, float]:
    """FLOPs and bytes (bf16 weights, written keys and values) of the decoder over the text and `kept` visual tokens.

    cuts: ((layer, fraction of all visual tokens that go on from it), ...) of a method between layers; then `kept` is
    what is left at the end.
    """
    cost = roofline.prefill(_counted(shape), _request(shape), shape.visual if cuts else kept, cuts=cuts)
    return cost.flops, cost.bytes


def _counted(shape: Shape) -> roofline.Shape:
    full = len(shape.full_attention)
    return roofline.Shape(
        shape.name, shape.layers, shape.hidden, shape.intermediate, shape.heads, shape.kv_heads,
        shape.hidden // shape.heads, shape.vocab, shape.depth, shape.vision_hidden, shape.vision_intermediate,
        windowed=shape.depth - full, patch_values=6 * shape.patch**2,
    )  # fmt: skip


def _request(shape: Shape) -> roofline.Request:
    return roofline.Request(shape.visual, shape.text + 2, frames=shape.grid[0])
