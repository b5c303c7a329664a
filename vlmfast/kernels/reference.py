"""Plain-torch specification of every kernel: short, float32 or better inside, slow. Others are tested against it.

Ragged storage. A *row* is one (batch row, key/value head) pair, ``r = b * Hk + h``. Rows of different lengths lie one
after the other in flat buffers; whatever lies between the end of one row and the start of the next is never read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Ragged:
    """Keys and values of some rows in flat storage; entry i describes row ``rows[i]``."""

    keys: Tensor  # (T, D), in the model's dtype, or int8
    values: Tensor  # (T, Dv)
    rows: list[int]  # which of the B * Hk rows each entry is
    offsets: list[int]  # first slot of each entry
    lengths: list[int]  # columns held by each entry
    total: int  # B * Hk, rows of the layer (this storage may hold only some of them)
    key_scale: Tensor | None = None  # (T,) float32, int8 storage only: key = int8 * scale
    value_scale: Tensor | None = None  # (T,) float32
    bias: Tensor | None = None  # (T,) float32 added to the scores, log n for a slot that stands for n columns
    finite: bool = False  # slots of no entry hold finite numbers, so they may be read and given no weight

    def __len__(self) -> int:
        return len(self.rows)


def quantise(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per vector: vectors (..., D) -> int8 (..., D) and float32 scales (...); |error| <= scale / 2."""
    scale = vectors.float().abs().amax(-1).clamp(min=1e-12) / 127
    return (vectors.float() / scale[..., None]).round().clamp(-127, 127).to(torch.int8), scale


def dequantise(quantised: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of `quantise`: int8 (..., D) and scales (...) -> dtype (..., D)."""
    return (quantised.float() * scale[..., None]).to(dtype)


def ragged_attention(
    query: Tensor, kv: Ragged, scaling: float, out: Tensor, lse: Tensor | None = None, causal: bool = True
) -> Tensor:
    """Attention of the last q columns of every row over all its columns.

    query (B, H, q, D): query t of a row of length n sees its columns 0 ... n - q + t (causal within the last q), or all
    of them where not `causal` (the storage then holds earlier columns only).
    out   (B, H, q, Dv): the heads of the rows in `kv` are written, all others left as they are; returned.
    lse   (B, H, q) float32, likewise: the log of the sum of exponentials, by which two parts of a row are joined.
    """
    batch, num_heads, num_queries, head_size = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    group_size = batch * num_heads // kv.total
    grouped_queries = query.reshape(kv.total, group_size, num_queries, head_size)
    grouped_out = out.view(kv.total, group_size, num_queries, out.shape[-1])
    for row, offset, length in zip(kv.rows, kv.offsets, kv.lengths, strict=True):
        keys, values = kv.keys[offset : offset + length].to(dtype), kv.values[offset : offset + length].to(dtype)
        if kv.key_scale is not None and kv.value_scale is not None:
            keys = keys * kv.key_scale[offset : offset + length, None].to(dtype)
            values = values * kv.value_scale[offset : offset + length, None].to(dtype)
        scores = grouped_queries[row].to(dtype) @ keys.T * scaling
        if kv.bias is not None:
            scores += kv.bias[offset : offset + length]
        hidden = torch.ones(num_queries, length, dtype=torch.bool, device=keys.device).triu(length - num_queries + 1)
        scores = scores.masked_fill(hidden & causal, float("-inf"))
        grouped_out[row] = (scores.softmax(-1) @ values).to(out.dtype)
        if lse is not None:
            lse.view(kv.total, group_size, num_queries)[row] = scores.logsumexp(-1).to(lse.dtype)
    return out


def window_attention(query: Tensor, keys: Tensor, scaling: float, visible: Tensor | None = None) -> Tensor:
    """Softmax weights of the last W queries over all L columns, causal: (B, H, W, L) float32.

    query (B, H, W, D), keys (B, Hk, L, D), both rotated; `visible` (B, L) bool hides padding columns.
    """
    batch, num_heads, num_queries, head_size = query.shape
    num_kv_heads, length = keys.shape[1], keys.shape[2]
    packed = query.reshape(batch, num_kv_heads, num_heads // num_kv_heads * num_queries, head_size).float()
    scores = (packed @ keys.float().transpose(-1, -2)) * scaling
    scores = scores.view(batch, num_heads, num_queries, length)
    hidden = torch.ones(num_queries, length, dtype=torch.bool, device=keys.device).triu(length - num_queries + 1)
    scores = scores.masked_fill(hidden, float("-inf"))
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None, None, :], float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0)


def window_mean(query: Tensor, keys: Tensor, scaling: float, visible: Tensor | None, queries: Tensor) -> Tensor:
    """Mean of `window_attention` over the queries that count: (B, H, 1, L) float32. queries (B, W) bool."""
    weights = window_attention(query, keys, scaling, visible) * queries[:, None, :, None]
    return weights.sum(2, keepdim=True) / queries.sum(1)[:, None, None, None]


def chunk_scores(query: Tensor, representatives: Tensor) -> Tensor:
    """Upper estimate of how much each chunk of keys matters to a group of queries: (R, C) float32.

    query (R, G, D). representatives (R, C, D) are mean keys, score = max over the group of q . mean; or (R, C, 2, D),
    element-wise (min, max) of the chunk's keys, score = max over the group of the Quest bound
    sum_d max(q_d min_d, q_d max_d) >= q . k for every key of the chunk.
    """
    if representatives.ndim == 3:
        return (query.float() @ representatives.float().transpose(1, 2)).amax(1)
    minima, maxima = representatives.float().unbind(2)
    queries = query.float()
    bounds = queries.clamp(max=0) @ minima.transpose(1, 2) + queries.clamp(min=0) @ maxima.transpose(1, 2)
    return bounds.amax(1)
