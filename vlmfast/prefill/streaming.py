"""StreamingLLM: the first columns and the last ones (arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.prefill.base import KVPolicy, Row


@dataclass(frozen=True)
class StreamingLLM(KVPolicy):
    """Attention sinks plus the most recent columns; reads neither keys nor attention."""

    name: ClassVar[str] = "streamingllm"
    stacks: ClassVar[bool] = True

    def score(self, row: Row) -> Tensor:
        return torch.arange(row.n, device=row.keys.device).float().expand(row.keys.shape[0], -1)
