"""Relevance of text positions to the media: cosine to visual hidden states (LVSpec, arXiv 2604.05650)."""

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
    new media keeps the memory of the turns before it, which is kept on the cache.
    """
    earlier_memory = cache_state(cache).visual
    if hidden is None:
        return earlier_memory
    logical_columns = _logical(cache, hidden.shape[1], layer).to(input_ids.device)
    # ids may begin after the columns that the cache held before
    id_columns = logical_columns + input_ids.shape[1] - cache.get_seq_length()
    column_ids = input_ids[0, id_columns.clamp(min=0)].masked_fill((logical_columns < 0) | (id_columns < 0), -1)
    is_visual = torch.isin(column_ids, torch.tensor(visual_ids, device=column_ids.device))
    visual_states = hidden[0, is_visual.to(hidden.device)]
    if visual_states.shape[0] == 0:
        return earlier_memory
    memory = VisualMemory(visual_states, top)
    if earlier_memory is not None and earlier_memory.states.shape[-1] == visual_states.shape[-1]:
        memory = VisualMemory(torch.cat([earlier_memory.states, memory.states]), top)
    put_cache_state(cache, visual=memory)
    return memory


def _logical(cache: Any, num_columns: int, layer: int) -> Tensor:
    """(num_columns,) int64, the logical columns of the last `num_columns` physical ones at a layer; -1 on padding."""
    layer_cuts = cache_state(cache).cuts  # columns dropped between layers
    last_cut = max((cut_layer for cut_layer in layer_cuts if layer < 0 or cut_layer <= layer), default=None)
    if last_cut is not None:
        return layer_cuts[last_cut].index[0, -num_columns:]
    columns = cache_state(cache).columns  # columns dropped before the language model
    if columns is not None and columns.index.shape[1] >= num_columns:
        return columns.index[0, -num_columns:]
    cache_length = cache.get_seq_length()
    return torch.arange(cache_length - num_columns, cache_length)
