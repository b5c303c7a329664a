"""Relevance of text positions to the media: cosine to visual hidden states (LVSpec, arXiv 2604.05650)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmfast import families
from vlmfast.decode.accept import Relevance, RelevanceOptions, Rule
from vlmfast.runtime.cache_state import VisualMemory, cache_state, logical_columns, put_cache_state
from vlmfast.runtime.fast_decoder import Layers
from vlmfast.runtime.stepper import Stepper
from vlmfast.runtime.transfers import true_places

Memories = tuple[VisualMemory | None, ...]  # of every row, None = it holds no visual column


def layers_of(model: Any, rule: Rule) -> Layers:
    """The decoder layer, from 0, whose output a rule reads, alone in a tuple; an empty one where it reads none."""
    return (rule.relevance_options().layer % len(families.get(model).layers(model)),) if rule.visual else ()


def open_relevances(model: Any, rule: Rule, input_ids: Tensor, target: Stepper, notes: list[str]) -> Relevances | None:
    """What scores the relevance of a call's drafted positions; None for a rule that asks for none, and where no row
    holds visual tokens, which is noted.

    input_ids (B, L) int64; target: after its prefill, which recorded the layer of `layers_of`.
    """
    if not rule.visual:
        return None
    placeholders, options = list(families.get(model).visual_ids(model).values()), rule.relevance_options()
    (layer,) = layers_of(model, rule)
    memories = collect(target.hidden.get(layer), target.cache, input_ids, placeholders, options.top, layer)
    num_without = memories.count(None)
    if num_without == len(memories):
        notes.append(f"speculate: no visual tokens, {rule.name} verified strictly")
        return None
    if num_without:
        rows = f"{num_without} of {len(memories)} rows"
        notes.append(f"speculate: no visual tokens in {rows}, {rule.name} verified them strictly")
    return Relevances(memories, options, layer)


class Relevances:
    """Relevance of the drafted positions of every row. options: how it is measured; layer: whose output it reads."""

    def __init__(self, memories: Memories, options: RelevanceOptions, layer: int) -> None:
        self.memories, self.options, self.layer = memories, options, layer
        self.past: list[list[Tensor]] = [[] for _ in memories]  # of every row's earlier positions, where they count

    def of(self, outputs: dict[int, Tensor], lengths: list[int]) -> list[tuple[Relevance | None, Tensor | None]]:
        """outputs: (B, n, D) of layers in the step that verifies, lengths: tokens drafted of every row -> `relevance`
        and `past_relevance` of every row's `accept.Round`. Where earlier positions count, all rows are read at once."""
        hidden = outputs[self.layer]
        first = 1 if self.options.offset == "self" else 0
        scores = [
            partial(memory.score, hidden[row, first : first + length]) if memory is not None and length else None
            for row, (memory, length) in enumerate(zip(self.memories, lengths, strict=True))
        ]
        scored = [row for row, score in enumerate(scores) if score is not None]
        found: list[tuple[Relevance | None, Tensor | None]] = [(score, None) for score in scores]
        if self.options.scope == "running" and scored:
            together = torch.cat([score() for score in scores if score is not None]).cpu()
            for row, relevance in zip(scored, together.split([lengths[row] for row in scored]), strict=True):
                found[row] = relevance, torch.cat(self.past[row]) if self.past[row] else None
                self.past[row].append(relevance)
        return found


def collect(
    hidden: Tensor | None, cache: Any, input_ids: Tensor, visual_ids: list[int], top: int, layer: int = -1
) -> Memories:
    """The memory of every row of this prompt.

    hidden (B, P, D): output of decoder layer `layer` for the columns that reached it in this prefill; input_ids (B, L).
    A row without new media keeps its memory of the turns before, which is kept on the cache.
    """
    earlier = cache_state(cache).visual or (None,) * input_ids.shape[0]
    if hidden is None:
        return earlier
    columns = logical_columns(cache, hidden.shape[1], layer).to(input_ids.device).expand(input_ids.shape[0], -1)
    # ids may begin after the columns that the cache held before
    id_columns = columns + input_ids.shape[1] - cache.get_seq_length()
    column_ids = input_ids.gather(1, id_columns.clamp(min=0))
    column_ids = column_ids.masked_fill((columns < 0) | (id_columns < 0), -1)
    is_visual = torch.isin(column_ids, torch.tensor(visual_ids, device=column_ids.device)).to(hidden.device)
    rows = zip(hidden, is_visual, is_visual.sum(1).tolist(), earlier, strict=True)  # one wait for all rows
    memories = tuple(
        _memory(row_hidden[true_places(row_is_visual, count)], row_earlier, top)
        for row_hidden, row_is_visual, count, row_earlier in rows
    )
    if any(memory is not None for memory in memories):
        put_cache_state(cache, visual=memories)
    return memories


def _memory(visual_states: Tensor, earlier: VisualMemory | None, top: int) -> VisualMemory | None:
    """The memory of one row: visual_states (n_v, D) of this prefill after those of the turns before."""
    if visual_states.shape[0] == 0:
        return earlier
    memory = VisualMemory(visual_states, top)
    if earlier is not None and earlier.states.shape[-1] == visual_states.shape[-1]:
        memory = VisualMemory(torch.cat([earlier.states, memory.states]), top)
    return memory
