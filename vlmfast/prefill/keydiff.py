"""KeyDiff: keep the keys that point away from the average key (arXiv 2504.15364). Attention-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from vlmfast.prefill.base import KVPolicy, Row


@dataclass(frozen=True)
class KeyDiff(KVPolicy):
    """Score = minus the cosine between a key and the mean of the normalised keys of its head."""

    name: ClassVar[str] = "keydiff"

    def score(self, row: Row) -> Tensor:
        keys = row.keys.float()
        anchor = normalize(keys, dim=-1).mean(1, keepdim=True)
        return -cosine_similarity(keys, anchor, dim=-1)
