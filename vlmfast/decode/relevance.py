"""How much a text position is about what is seen: cosine to visual hidden states (LVSpec, arXiv 2604.05650)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.core import Kind


class VisualMemory:
    """The target's hidden states of the visual columns, normalised once: (n_v, D) in the model's dtype."""

    def __init__(self, states: Tensor, top: int) -> None:
        self.states = F.normalize(states.float(), dim=-1).to(states.dtype)
        self.top = min(top, states.shape[0])

    def score(self, hidden: Tensor) -> Tensor:
        """hidden (n, D) of text positions -> (n,) float32: mean of the `top` highest cosines."""
        cosine = F.normalize(hidden.float(), dim=-1).to(self.states.dtype) @ self.states.T
        return cosine.float().topk(self.top, -1).values.mean(-1)


def collect(
    hidden: Tensor | None, cache: Any, input_ids: Tensor, visual_ids: list[int], top: int
) -> VisualMemory | None:
    """The memory of this prompt, or None when it holds no visual column.

    hidden (1, P, D): output of one decoder layer for the columns that entered in this prefill. Which of them are visual
    says `cache.vlmfast_columns` where columns are tracked, else the placeholder ids. A turn without new media keeps the
    memory of the turns before it, which travels on the cache.
    """
    before: VisualMemory | None = getattr(cache, "vlmfast_visual", None)
    if hidden is None:
        return before
    n = hidden.shape[1]
    columns = getattr(cache, "vlmfast_columns", None)
    if columns is not None and columns.kinds.shape[1] >= n:
        visual = columns.kinds[0, -n:] == Kind.VISUAL
    else:
        visual = torch.isin(input_ids[0, -n:], torch.tensor(visual_ids, device=input_ids.device))
    states = hidden[0, visual.to(hidden.device)]
    if before is not None and before.states.shape[-1] == hidden.shape[-1]:
        if states.shape[0] == 0:
            return before
        states = torch.cat([before.states, F.normalize(states.float(), dim=-1).to(states.dtype)])
    if states.shape[0] == 0:
        return None
    memory = VisualMemory(states, top)
    cache.vlmfast_visual = memory
    return memory
