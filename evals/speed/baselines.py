"""The baselines of every speed table, all of them what a user could really have.

`plain` is stock `generate`; `packed` is the same where one token's query heads share a key head as rows of one product,
which transformers leaves to torch's slow `enable_gqa` path; `plain_loop` our loop without a draft; `full` every column
under our storage and attention; `tower` the tower without its loops; `plain again` is plain once more, which shows what
chance does to a ratio. What a stage gains is read against the baseline that has everything else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlmfast.decode import Speculate
from vlmfast.plan import Plan
from vlmfast.prefill import Full, KVLayer
from vlmfast.runtime.attention import tag

NAME = "packed_sdpa"


def packed_product(query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Attention of one token: query (B, H, 1, D), key and value (B, Hk, n, D) -> (B, H, 1, D)."""
    b, heads, _, d = query.shape
    rows = query.reshape(b, key.shape[1], heads // key.shape[1], d)
    return scaled_dot_product_attention(rows, key, value, mask, scale=scaling).reshape(b, heads, 1, d)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    if query.shape[2] != 1 or attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    return packed_product(query, key, value, scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextlib.contextmanager
def packed(model: Any) -> Iterator[None]:
    """Inside the block the language model's attention to one token is packed; elsewhere and after it as it was."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def plans() -> dict[str, Any]:
    """Name -> what `accelerate` is given; None = stock. `packed` is stock inside `packed(model)`."""
    return {
        "plain": None, "packed": None, "tower": Plan(tower="fast"), "plain_loop": Plan(speculate=Speculate()),
        "full": Plan(kv=Full()),
    }  # fmt: skip


def scope(name: str, model: Any) -> contextlib.AbstractContextManager[None]:
    """What a baseline of this name runs in."""
    return packed(model) if name == "packed" else contextlib.nullcontext()


class Packed(KVLayer):
    """All columns stay in one growing tensor, attended to by packed sdpa."""

    mask: Tensor | None = None

    def compress(self, kept: Any, positions: Tensor | None = None) -> None:
        """Nothing to do: the prefill stays as it is."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            return super().update(key_states, value_states)
        q = key_states.shape[2]
        self.keys, self.values = torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(*self.mask.shape[:3], q)], 3)
        self.entered += q
        return tag(key_states, self), value_states

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        assert self.keys is not None and self.values is not None
        return packed_product(query, self.keys, self.values, scaling, self.mask)


class Masked(Packed):
    """Of its columns those are masked that AdaKV would remove: the kindest reading of the peers."""

    def compress(self, kept: Any, positions: Tensor | None = None) -> None:
        assert self.keys is not None
        b, hk, n, _ = self.keys.shape
        self.mask = torch.zeros(b * hk, n, dtype=torch.bool)
        for row, columns in enumerate(kept.keep):
            self.mask[row, columns] = True
        self.mask = self.mask.view(b, hk, 1, n)
