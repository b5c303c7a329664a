"""Queries of a prompt's last columns, made again as an attention module itself makes them."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from vlmfast.families.base import queries


def window_queries(module: Any, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """Rotated queries (B, H, W, Dh) of the last W columns, as the attention module itself makes them.

    hidden (B, W, D) is what the module received; position_embeddings its full-length cos and sin.
    """
    return rotated_queries(module, projected_queries(module, hidden), position_embeddings)


def projected_queries(module: Any, hidden: Tensor) -> Tensor:
    """Queries (B, H, W, Dh) of hidden (B, W, D) before their rotation."""
    projected = queries(module, hidden)
    return (module.q_norm(projected) if hasattr(module, "q_norm") else projected).transpose(1, 2)


def rotated_queries(module: Any, projected: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """Rotated queries (B, H, W, Dh) of the last W columns; projected as `projected_queries` gives them."""
    cos, sin = (table[..., -projected.shape[2] :, :] for table in position_embeddings)
    apply_rotation = sys.modules[type(module).__module__].apply_rotary_pos_emb  # the family's own
    return apply_rotation(projected, projected[:, :1], cos, sin)[0]
