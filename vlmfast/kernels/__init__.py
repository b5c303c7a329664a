"""Kernels: `reference` is the specification, `cpu` and `triton_ragged` are its fast twins, chosen here by device."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vlmfast.core import UserError
from vlmfast.kernels import cpu, greedy, reference
from vlmfast.kernels.cpu import chunk_scores, window_attention, window_mean
from vlmfast.kernels.parts import by_parts, in_parts
from vlmfast.kernels.ranking import highest, lowest_first, ranking, ranks
from vlmfast.kernels.reference import Ragged, dequantise, quantise
from vlmfast.kernels.vision import fused, gated, gated_over, rms_norm, rotated, rotated_text

Backend = Literal["reference", "cpu", "triton"]


def ragged_attention(
    query: Tensor,
    kv: Ragged,
    scaling: float,
    out: Tensor,
    backend: Backend | None = None,
    lse: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """Attention of (B, H, q, D) queries over ragged rows, see `reference.ragged_attention`.

    backend None picks Triton on CUDA where it takes the shapes (`triton_ragged.supports`), else grouped dense calls;
    parts of rows (`lse`, not `causal`) are read by grouped dense calls.
    Raises UserError for a backend that does not exist or does not take these shapes.
    """
    if not len(kv):
        return out
    if backend is None:
        backend = "cpu"
        if query.is_cuda and lse is None and causal:
            from vlmfast.kernels import triton_ragged

            backend = "triton" if triton_ragged.supports(query, kv) else "cpu"
    if backend == "reference":
        return reference.ragged_attention(query, kv, scaling, out, lse, causal)
    if backend == "cpu":
        return cpu.ragged_attention(query, kv, scaling, out, lse, causal)
    if backend == "triton":
        from vlmfast.kernels import triton_ragged

        if not triton_ragged.supports(query, kv) or lse is not None or not causal:
            raise UserError(
                "the Triton kernel takes groups of 128 queries (64 if heads exceed 128), heads of 256 in float16, "
                "bfloat16 or float32, no bias, whole rows; "
                f"got {list(query.shape)} {query.dtype}; use backend='cpu'"
            )
        return triton_ragged.ragged_attention(query, kv, scaling, out)
    raise UserError(f"backend={backend!r} does not exist: choose reference, cpu or triton")


__all__ = [
    "Backend",
    "Ragged",
    "by_parts",
    "chunk_scores",
    "dequantise",
    "fused",
    "gated",
    "gated_over",
    "greedy",
    "highest",
    "in_parts",
    "lowest_first",
    "quantise",
    "ragged_attention",
    "ranking",
    "ranks",
    "rms_norm",
    "rotated",
    "rotated_text",
    "window_attention",
    "window_mean",
]
