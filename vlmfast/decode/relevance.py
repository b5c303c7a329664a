"""How much a text position is about what is seen: cosine to visual hidden states (LVSpec, arXiv 2604.05650)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmfast.runtime.cache_state import VisualMemory, cache_state, put_cache_state


def collect(
    hidden: Tensor | None, cache: Any, input_ids: Tensor, visual_ids: list[int], top: int, layer: int = -1
) -> VisualMemory | None:
    """The memory of this prompt, or None when it holds no visual column.

    hidden (1, P, D): output of decoder layer `layer` for the columns that reached it in this prefill. A turn without
    new media keeps the memory of the turns before it, which travels on the cache.
    """
    before = cache_state(cache).visual
    if hidden is None:
        return before
    logical = _logical(cache, hidden.shape[1], layer).to(input_ids.device)
    place = logical + input_ids.shape[1] - cache.get_seq_length()  # ids may begin after what the cache held
    tokens = input_ids[0, place.clamp(min=0)].masked_fill((logical < 0) | (place < 0), -1)
    visual = torch.isin(tokens, torch.tensor(visual_ids, device=tokens.device))
    states = hidden[0, visual.to(hidden.device)]
    if states.shape[0] == 0:
        return before
    memory = VisualMemory(states, top)
    if before is not None and before.states.shape[-1] == states.shape[-1]:
        memory = VisualMemory(torch.cat([before.states, memory.states]), top)
    put_cache_state(cache, visual=memory)
    return memory


def _logical(cache: Any, n: int, layer: int) -> Tensor:
    """(n,) int64, the logical columns of the last n physical ones at a layer; -1 on padding."""
    cuts = cache_state(cache).cuts  # columns dropped between layers
    at = max((c for c in cuts if layer < 0 or c <= layer), default=None)
    if at is not None:
        return cuts[at].index[0, -n:]
    columns = cache_state(cache).columns  # columns dropped before the language model
    if columns is not None and columns.index.shape[1] >= n:
        return columns.index[0, -n:]
    length = cache.get_seq_length()
    return torch.arange(length - n, length)
