"""MixKV: importance where a head's keys differ, diversity where they repeat each other (arXiv 2510.20707)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from vlmfast.fields import PositiveInt
from vlmfast.prefill.base import KVPolicy, Row


@dataclass(frozen=True)
class MixKV(KVPolicy):
    """Score = r diversity + (1 - r) importance, with r the redundancy of the head.

    importance: window attention plus the norm of the value, rescaled to [0, 1] and to the mean of the attention
    diversity: minus the cosine between a key and the head's mean key, rescaled alike
    redundancy: mean cosine between two different keys of the head, clipped to [0, 1]; for unit keys k that is
    (|sum k|^2 - n) / (n (n - 1)). The paper's code reads it from an offline file; here it is the prompt's

    queries: text queries observed, the last ones (paper 32)
    """

    name: ClassVar[str] = "mixkv"
    stacks: ClassVar[bool] = True
    queries: PositiveInt = 32

    def redundancy(self, keys: Tensor) -> Tensor:
        """(Hk,) float32 in [0, 1] of unit keys (Hk, n, Dh)."""
        num_columns = keys.shape[1]
        return ((keys.sum(1).square().sum(-1) - num_columns) / max(1, num_columns * (num_columns - 1))).clamp(0, 1)

    def score(self, row: Row) -> Tensor:
        attention = row.relevance()
        unit_keys = normalize(row.keys.float(), dim=-1)
        mean_key = normalize(unit_keys.mean(1, keepdim=True), dim=-1)
        importance = attention + _rescaled(row.values.float().norm(dim=-1), attention)
        diversity = _rescaled(-(unit_keys * mean_key).sum(-1), importance)
        redundancy_weight = self.redundancy(unit_keys)[:, None]
        return redundancy_weight * diversity + (1 - redundancy_weight) * importance


def _rescaled(scores: Tensor, reference: Tensor) -> Tensor:
    """x (Hk, n) moved to [0, 1] per head, then scaled so that its mean is that of `like`."""
    lowest, highest = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    scores = (scores - lowest) / (highest - lowest).clamp(min=1e-12)
    return scores * reference.mean(1, keepdim=True) / scores.mean(1, keepdim=True).clamp(min=1e-12)
