"""From a question to its working set: which blocks, at which positions, as one cache the model answers over.

ReKV's two passes (arXiv 2503.00540): the bare question runs through the layers and chooses blocks layer by layer (its
own keys and values are thrown away); then the whole prompt reads [init tokens, chosen blocks] at fresh positions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmfast.runtime.compat import CACHE
from vlmfast.runtime.late_rope import cos_sin, rotate, running
from vlmfast.runtime.stream_cache import ProbeCache, work_cache
from vlmfast.stream import positions
from vlmfast.stream.archive.segments import BlockLost
from vlmfast.stream.archive.store import Store
from vlmfast.stream.blocks import Block
from vlmfast.stream.encoder import Encoder
from vlmfast.stream.retrievers import Internal, Retriever, View, top


@dataclass
class Context:
    """What an answer reads. ids: prompt tokens after the video; start: position of the first of them (or of OneVision's
    newline before them); weights: {block: share of the layers that chose it}."""

    cache: Any
    ids: list[int]
    start: int
    past: int  # logical columns in the cache before the prompt
    weights: dict[int, float]
    stats: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class _Enough(Exception):
    """All layers that choose have been asked; those above need not run."""


class WorkingSet:
    """Builds contexts over one encoder and its store. contiguous: renumber positions; after: "model" | "max"."""

    def __init__(self, encoder: Encoder, store: Store, contiguous: bool, after: str) -> None:
        self.encoder, self.store, self.contiguous = encoder, store, contiguous
        self.after_max = encoder.layout.after_max or after == "max"
        self.vision = encoder.vision
        self.lost: list[str] = []
        self._made: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}  # of the context being built
        self._turns: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}  # cos and sin by blocks, likewise

    def begin(self) -> None:
        """Forget what was gathered for the question before."""
        self.lost, self._made, self._turns = [], {}, {}

    # -- which ---------------------------------------------------------------------------------------------------------

    def choose(self, retriever: Retriever | None, blocks: list[Block], question: str) -> tuple[list[list[Block]], str]:
        """The blocks of every layer, ascending, and how they were chosen."""
        layers = len(self.encoder.cache.layers)
        if retriever is None or not blocks:
            return [blocks] * layers, "window"
        view = View(blocks, self.store.reps)
        if retriever.fits(view):
            return [blocks] * layers, "everything fits"
        if isinstance(retriever, Internal):
            return self._internal(retriever, view, question), retriever.name
        chosen = [blocks[i] for i in retriever.select(view, question).tolist()]
        return [chosen] * layers, retriever.name

    def _internal(self, retriever: Internal, view: View, question: str) -> list[list[Block]]:
        """Pass 1: the bare question, layer by layer."""
        chosen: list[list[Block]] = []
        layers = len(self.encoder.cache.layers)
        if retriever.scope == "shared":
            scores = self.scores(retriever, view, question, retriever.asked(layers))
            return [self._best(retriever, view, retriever.combine(scores))] * layers

        def choose(layer: int, queries: Tensor) -> list[Block]:
            chosen.append(self._best(retriever, view, retriever.layer_scores(view, layer, queries)))
            return chosen[-1]

        self._probe(question, choose)
        return chosen

    def scores(self, retriever: Internal, view: View, question: str, layers: list[int]) -> list[Tensor]:
        """(N,) scores of the bare question, alone before the video, at each of `layers` (ascending)."""
        out: list[Tensor] = []

        def score(layer: int, queries: Tensor) -> list[Block]:
            if layer in layers:
                out.append(retriever.layer_scores(view, layer, queries))
            if layer == layers[-1]:
                raise _Enough
            return []

        with suppress(_Enough):
            self._probe(question, score)
        return out

    def _probe(self, question: str, choose: Callable[[int, Tensor], list[Block]]) -> None:
        """Run the bare question through the layers; each reads the blocks that `choose` gives it for its queries."""
        embeds = self.vision.embed(self.vision.encode(question))[None]
        axes, n = self.encoder.layout.axes, embeds.shape[1]

        def fetch(layer: int, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            blocks = choose(layer, queries)
            keys, values = self.gather(layer, blocks)
            start = self.text_start(blocks)
            return keys, values, torch.arange(start, start + n).expand(axes, -1)

        ProbeCache(self.vision.text, fetch).forward(self.vision.model, embeds, axes)

    @staticmethod
    def _best(retriever: Internal, view: View, scores: Tensor) -> list[Block]:
        return [view.blocks[i] for i in top(scores, view.tokens, retriever.frames, retriever.tokens).tolist()]

    # -- where ---------------------------------------------------------------------------------------------------------

    def text_start(self, blocks: list[Block]) -> int:
        """Position of what follows the blocks."""
        layout, origin = self.encoder.layout, self.encoder.origin
        return positions.end(blocks, origin, self.contiguous, layout.timed, self.after_max, self.encoder.span)

    def _raw(self, layer: int, block: Block) -> tuple[Tensor, Tensor] | None:
        """Un-rotated keys and values of a block: exact from the window, else from the store; None when it is lost."""
        held = self.encoder.window_layer(block, layer)
        if held is not None:
            return held
        init = self.encoder.cache.layers[layer].raw
        if block.id not in self.store.blocks:
            return None
        try:
            k, v = self.store.layer(block.id, layer, init.dtype)
        except BlockLost as e:
            self.lost.append(str(e))
            return None
        return k.to(init.device), v.to(init.device)

    def gather(self, layer: int, blocks: list[Block]) -> tuple[Tensor, Tensor]:
        """Rotated keys and values (Hk, n, Dh) of [init tokens, blocks] at one layer; made once per context."""
        wanted = (layer, *(b.id for b in blocks))
        if wanted in self._made:
            return self._made[wanted]
        held, base = self.encoder.cache.layers[layer], self.encoder.base
        keys, values, there = [held.raw[:, :base]], [held.val[:, :base]], []
        for block in blocks:
            raw = self._raw(layer, block)
            if raw is not None:
                keys.append(raw[0])
                values.append(raw[1])
                there.append(block)
        raw_keys = torch.cat(keys, 1)
        ids = tuple(b.id for b in there)
        if ids not in self._turns:
            init = torch.arange(base).expand(self.encoder.layout.axes, -1)
            at = torch.cat([init, positions.place(there, self.encoder.origin, self.contiguous)], 1)
            self._turns[ids] = cos_sin(self.vision.text, at, raw_keys)
        self._made[wanted] = rotate(raw_keys, *self._turns[ids]), torch.cat(values, 1)
        return self._made[wanted]

    def context(
        self, retriever: Retriever | None, blocks: list[Block], question: str, ids: list[int], dense: bool
    ) -> Context:
        """The working set for prompt `ids` about `question`. dense: a plain cache (all layers of one length)."""
        clock = time.perf_counter()
        self.begin()
        per_layer, how = self.choose(retriever, blocks, question)
        chosen = time.perf_counter()
        layers = [self.gather(i, blocks) for i, blocks in enumerate(per_layer)]
        if self.lost:  # what one layer lost is gone for all of them
            there = self.store.blocks.keys() | self.encoder.offsets.keys()
            per_layer = [[b for b in blocks if b.id in there] for blocks in per_layer]
            layers = [self.gather(i, blocks) for i, blocks in enumerate(per_layer)]
        start = max(self.text_start(blocks) for blocks in per_layer)
        self._made, self._turns = {}, {}
        closing = self.vision.closing().shape[0]
        cache = work_cache(layers, dense, room=len(ids) + closing + 256)
        weights: dict[int, float] = {}
        for blocks_ in per_layer:
            for block in blocks_:
                weights[block.id] = weights.get(block.id, 0.0) + 1 / len(per_layer)
        size = [k.shape[1] for k, _ in layers]
        stats = {
            "retrieve": how, "retrieved_blocks": sum(len(b) for b in per_layer) / len(per_layer),
            "context_tokens": sum(size) / len(size), "select_ms": (chosen - clock) * 1e3,
            "fetch_ms": (time.perf_counter() - chosen) * 1e3,
        }  # fmt: skip
        notes = [f"skipped: {x}" for x in dict.fromkeys(self.lost)]
        return Context(cache, ids, start, max(size), weights, stats, notes)

    # -- the prompt ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, context: Context) -> None:
        """Feed all of the prompt but its last token, OneVision's newline first."""
        embeds = torch.cat([self.vision.closing(), self.vision.embed(context.ids[:-1])])[None]
        if not embeds.shape[1]:
            return
        n = embeds.shape[1]
        at = torch.arange(context.start, context.start + n, device=embeds.device)[None]
        ids = at.expand(self.encoder.layout.axes, 1, -1) if self.encoder.layout.axes > 1 else at
        self.vision.text(inputs_embeds=embeds, position_ids=ids, **{CACHE: context.cache}, use_cache=True)  # type: ignore[operator]
        context.start += n
        context.past += n

    def inputs(self, context: Context) -> dict[str, Any]:
        """Keyword arguments for `model.generate` that continue with the last token of the prompt."""
        device = self.vision.device
        pad = self.vision.tokenizer.pad_token_id or 0
        tail = context.ids[-min(len(context.ids), context.past + 1) :]
        ids = torch.tensor([[pad] * (context.past + 1 - len(tail)) + tail], device=device)
        at = torch.full(ids.shape, context.start, dtype=torch.long, device=device)
        axes = self.encoder.layout.axes
        return {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: context.cache,
            "position_ids": at.expand(axes, 1, -1).clone() if axes > 1 else at,
        }  # fmt: skip

    @torch.no_grad()
    def logits(self, context: Context, dense: bool) -> Tensor:
        """(V,) float32 logits after the prompt; spends the context."""
        with reading(self.vision, dense):
            self.prefill(context)
            last = self.inputs(context)
            ids = last["input_ids"][:, -1:]
            out = self.vision.text(  # type: ignore[operator]
                inputs_embeds=self.vision.embed(ids[0].tolist())[None], position_ids=last["position_ids"][..., -1:],
                **{CACHE: context.cache}, use_cache=True,
            )  # fmt: skip
        return self.vision.model.get_output_embeddings()(out.last_hidden_state)[0, -1].float()  # type: ignore[operator]


def reading(vision: Any, dense: bool) -> Any:
    """Our attention for our caches; a plain cache is read by the model's own."""
    from contextlib import nullcontext

    return nullcontext() if dense else running(vision.model, vision.text, late=False)


def cache_bytes(cache: Any) -> int:
    """Fast bytes of a working set."""
    total = 0
    for layer in cache.layers:
        if hasattr(layer, "nbytes"):
            held = layer.nbytes()
            total += held["fast"] if isinstance(held, dict) else held
        else:
            total += 2 * layer.keys.numel() * layer.keys.element_size()
    return total
