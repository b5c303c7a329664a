"""The parts of a decoder step of static shape, in plain torch: the specification of `triton_step`.

Rounded where a module or operator of transformers rounds. Shapes: B rows, n new tokens a row, R = B * n; the cache of
one layer is keys and values (B, Hk, capacity, Dh); `length` (B * Hk,) int64 counts the columns that each head of a row
holds and lies on the device. No shape depends on data, nothing is read on the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension, in float32 where x is narrower."""
    wide = x.float() if x.dtype.itemsize < 4 else x
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_norm(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (R, D) and what a layer adds to it, (R, D) or None -> their sum, and the norm of the sum."""
    x = x if y is None else x + y
    return x, norm(x, weight, eps)


def rope(
    qkv: Tensor, keys: Tensor, values: Tensor, length: Tensor, at: Tensor, cos: Tensor, sin: Tensor, n: int,
    q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    """Norm and rotate queries and keys; write keys and values to columns length .. length + n - 1 of the cache.

    qkv (R, (H + 2 Hk) Dh); at (B,) int64: the row of the tables that holds the first new token's rotation; cos, sin
    (B, T, Dh), the first half of sin negated; q_norm, k_norm (Dh,) or None -> the queries (R, H Dh).
    """
    b, hk, _, dh = keys.shape
    h = qkv.shape[1] // dh - 2 * hk
    q, k, v = qkv.view(b, n, -1, dh).split([h, hk, hk], 2)
    if q_norm is not None and k_norm is not None:
        q, k = norm(q, q_norm, eps), norm(k, k_norm, eps)
    steps, rows = torch.arange(n, device=qkv.device), torch.arange(b, device=qkv.device)[:, None]
    c, s = (table[rows, at[:, None] + steps][:, :, None] for table in (cos, sin))
    q, k = (x * c + torch.roll(x, dh // 2, -1) * s for x in (q, k))
    where = (length.view(b, hk, 1) + steps)[..., None].expand(b, hk, n, dh)
    keys.scatter_(2, where, k.transpose(1, 2))
    values.scatter_(2, where, v.transpose(1, 2))
    return q.reshape(b * n, h * dh)


def attend(q: Tensor, keys: Tensor, values: Tensor, length: Tensor, n: int, scale: float, splits: int = 1) -> Tensor:
    """q (R, H Dh): the j-th new token of a row attends to columns 0 .. length + j of each head -> (R, H Dh).

    splits: in how many parts a kernel reads the columns; of no account here.
    """
    b, hk, capacity, dh = keys.shape
    packed = q.view(b, n, hk, -1, dh).permute(0, 2, 3, 1, 4)
    last = length.view(b, hk, 1) + torch.arange(n, device=q.device)
    seen = (torch.arange(capacity, device=q.device) <= last[..., None]).repeat(1, 1, packed.shape[2], 1)
    out = F.scaled_dot_product_attention(packed.reshape(b, hk, -1, dh), keys, values, attn_mask=seen, scale=scale)
    return out.reshape(packed.shape).permute(0, 3, 1, 2, 4).reshape(b * n, -1)


def gate(joined: Tensor) -> Tensor:
    """joined (R, 2 I) -> silu(first half) * second half, (R, I)."""
    first, second = joined.chunk(2, -1)
    return F.silu(first) * second
