"""The parts of a decoder step of static shape, in plain torch: the specification of `triton_step`.

Rounded where a module or operator of transformers rounds. Shapes: B rows, n new tokens a row, R = B * n; the cache of
one layer is keys and values (B, Hk, capacity, Dh), or both as int8 with float32 scales (B, Hk, capacity) each, see
`reference.quantise`; `length` (B * Hk,) int64 counts the columns that each head of a row holds and lies on the device.
No shape depends on data, nothing is read on the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.kernels.reference import quantise

Scales = tuple[Tensor, Tensor] | None  # of keys and values that are stored as int8


def norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension, in float32 where the input is narrower."""
    float_hidden = hidden.float() if hidden.dtype.itemsize < 4 else hidden
    return weight * (float_hidden * torch.rsqrt(float_hidden.pow(2).mean(-1, keepdim=True) + eps)).to(hidden.dtype)


def add_norm(residual: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """residual (R, D) and what a layer adds to it, (R, D) or None -> their sum, and the norm of the sum."""
    residual = residual if added is None else residual + added
    return residual, norm(residual, weight, eps)


def rope(
    qkv: Tensor, keys: Tensor, values: Tensor, length: Tensor, at: Tensor, cos: Tensor, sin: Tensor, n: int,
    q_norm: Tensor | None, k_norm: Tensor | None, eps: float, scales: Scales = None,
) -> Tensor:  # fmt: skip
    """Norm and rotate queries and keys; write keys and values to columns length .. length + n - 1 of the cache.

    qkv (R, (H + 2 Hk) Dh); at (B,) int64: the row of the tables that holds the first new token's rotation; cos, sin
    (B, T, Dh), the first half of sin negated; q_norm, k_norm (Dh,) or None -> the queries (R, H Dh).
    """
    batch, num_kv_heads, _, head_size = keys.shape
    num_heads = qkv.shape[1] // head_size - 2 * num_kv_heads
    queries, new_keys, new_values = qkv.view(batch, n, -1, head_size).split([num_heads, num_kv_heads, num_kv_heads], 2)
    if q_norm is not None and k_norm is not None:
        queries, new_keys = norm(queries, q_norm, eps), norm(new_keys, k_norm, eps)
    steps, rows = torch.arange(n, device=qkv.device), torch.arange(batch, device=qkv.device)[:, None]
    row_cos, row_sin = (table[rows, at[:, None] + steps][:, :, None] for table in (cos, sin))
    half = head_size // 2
    queries, new_keys = (heads * row_cos + torch.roll(heads, half, -1) * row_sin for heads in (queries, new_keys))
    columns = (length.view(batch, num_kv_heads, 1) + steps)[..., None].expand(batch, num_kv_heads, n, head_size)
    for i, (buffer, new_columns) in enumerate(((keys, new_keys.transpose(1, 2)), (values, new_values.transpose(1, 2)))):
        if scales is not None:
            new_columns, new_scales = quantise(new_columns)
            scales[i].scatter_(2, columns[..., 0], new_scales)
        buffer.scatter_(2, columns, new_columns)
    return queries.reshape(batch * n, num_heads * head_size)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, length: Tensor, n: int, scale: float, splits: int = 1,
    scales: Scales = None,
) -> Tensor:  # fmt: skip
    """q (R, H Dh): the j-th new token of a row attends to columns 0 .. length + j of each head -> (R, H Dh).

    splits: in how many parts a kernel reads the columns; of no account here.
    """
    batch, num_kv_heads, capacity, head_size = keys.shape
    packed = q.view(batch, n, num_kv_heads, -1, head_size).permute(0, 2, 3, 1, 4)
    last_column = length.view(batch, num_kv_heads, 1) + torch.arange(n, device=q.device)
    visible = torch.arange(capacity, device=q.device) <= last_column[..., None]
    mask, queries = visible.repeat(1, 1, packed.shape[2], 1), packed.reshape(batch, num_kv_heads, -1, head_size)
    if scales is not None:
        queries = queries if q.dtype == torch.float64 else queries.float()
        keys, values = (
            part * own[..., None].to(queries.dtype) for part, own in zip((keys, values), scales, strict=True)
        )
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale).to(q.dtype)
    return attended.reshape(packed.shape).permute(0, 3, 1, 2, 4).reshape(batch * n, -1)


def gate(joined: Tensor) -> Tensor:
    """joined (R, 2 I) -> silu(first half) * second half, (R, I)."""
    gates, ups = joined.chunk(2, -1)
    return F.silu(gates) * ups
