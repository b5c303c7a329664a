"""KeyDiff: keep the keys that point away from the average key (arXiv 2504.15364). Attention-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from vlmfast.prefill.base import KVPolicy, Row


def distinctness(keys: Tensor) -> Tensor:
    """Minus the cosine between a key and the mean of the normalised keys of its head: (Hk, n, D) -> (Hk, n) float32."""
    unit_keys = normalize(keys.float(), dim=-1)
    mean_key = normalize(unit_keys.mean(1, keepdim=True), dim=-1, eps=1e-8)
    return -(unit_keys * mean_key).sum(-1)


@dataclass(frozen=True)
class KeyDiff(KVPolicy):
    """Score = how unlike the mean key of its head a key is (`distinctness`)."""

    name: ClassVar[str] = "keydiff"
    stacks: ClassVar[bool] = True

    def score(self, row: Row) -> Tensor:
        return distinctness(row.keys)
