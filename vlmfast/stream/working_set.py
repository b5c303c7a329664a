"""The working set of a question: the blocks brought back, at new positions, as the cache that is answered over.

ReKV's two passes (arXiv 2503.00540): first the bare question runs through the layers, and each layer chooses blocks.
Then the whole prompt is prefilled over [init tokens, chosen blocks] at new positions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmfast.runtime import transfers
from vlmfast.runtime.compat import CACHE
from vlmfast.runtime.late_rope import cos_sin, rotate, running
from vlmfast.runtime.stream_cache import ProbeCache, work_cache
from vlmfast.stream.archive.segments import BlockLost
from vlmfast.stream.archive.store import Store
from vlmfast.stream.blocks import Block, BlockInput, PackedLayer, block_positions, joined, text_position, unpack
from vlmfast.stream.encoder import Encoder
from vlmfast.stream.levels import Level
from vlmfast.stream.newest_blocks import Recent
from vlmfast.stream.prefill_again import PrefilledAgain
from vlmfast.stream.rerank import reranked
from vlmfast.stream.retrievers import Candidates, Internal, Recency, Retriever
from vlmfast.stream.unpack_on_device import unpack_on_device


@dataclass
class WorkingSet:
    """What an answer is read from. cache: keys and values of the init tokens and the chosen blocks. ids: prompt tokens
    after the video; start: position of the first of them (or of OneVision's newline before them); weights: {block id:
    share of the layers that chose it}."""

    cache: Any
    ids: list[int]
    start: int
    past: int  # logical columns in the cache
    weights: dict[int, float]
    stats: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    fed: int = 0  # of `ids`, those in the cache


class _Enough(Exception):
    """All layers that choose have scored."""


class WorkingSetBuilder:
    """Builds working sets over one encoder and its store. contiguous: renumber positions; after: "model" | "max"."""

    def __init__(self, encoder: Encoder, store: Store, contiguous: bool, after: str) -> None:
        self.encoder, self.vision, self.store, self.contiguous = encoder, encoder.vision, store, contiguous
        self.after_max = encoder.layout.after_max or after == "max"
        self.lost: list[str] = []
        self.again = PrefilledAgain(encoder, store, contiguous)
        self._gathered: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}  # by layer and blocks, for one question
        self._rotations: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}  # cos and sin by blocks, likewise

    def begin(self) -> None:
        """Forget what was gathered for the question before."""
        self.lost, self._gathered, self._rotations = [], {}, {}
        self.again.forget()

    # -- which ---------------------------------------------------------------------------------------------------------

    def choose(
        self, retriever: Retriever | None, blocks: list[Block], question: str, recent: Recent | None = None
    ) -> tuple[list[list[Block]], str]:
        """The blocks of every layer, ascending, and how they were chosen. recent: what is read besides."""
        layers = self.encoder.num_layers
        if retriever is None or not blocks:
            return [blocks] * layers, "window" if retriever is None else "everything fits"
        if isinstance(retriever, Internal) and retriever.scope == "shared" and recent and retriever.present is not None:
            return self._internal_or_present(retriever, blocks, question, recent)
        candidates = Candidates(blocks, self.store.representatives)
        if retriever.fits(candidates):
            return [blocks] * layers, "everything fits"
        if isinstance(retriever, Internal):
            return self._internal(retriever, candidates, question), retriever.name
        chosen = [blocks[index] for index in retriever.select(candidates, question).tolist()]
        return [chosen] * layers, retriever.name

    def _internal(self, retriever: Internal, candidates: Candidates, question: str) -> list[list[Block]]:
        """Pass 1: the bare question, layer by layer."""
        chosen: list[list[Block]] = []
        if retriever.scope == "shared":
            scores = self._shared(retriever, candidates, question)
            return [self._choose(retriever, candidates, scores)] * self.encoder.num_layers

        def choose(layer: int, queries: Tensor) -> list[Block]:
            (on_host,) = transfers.read_back([queries])  # once a layer: what it reads decides the next one's queries
            scores = retriever.layer_scores(candidates, layer, on_host)
            scores = reranked(self.store, candidates, scores, [(layer, on_host)], retriever, self.lost)
            chosen.append(self._choose(retriever, candidates, scores))
            return chosen[-1]

        self._probe(question, choose)
        return chosen

    def _internal_or_present(
        self, retriever: Internal, blocks: list[Block], question: str, recent: Recent
    ) -> tuple[list[list[Block]], str]:
        """As `choose`, the present's blocks scored among the others: the newest where the question is about them."""
        candidates = Candidates(blocks)
        if retriever.fits(candidates):
            return [blocks] * self.encoder.num_layers, "everything fits"
        present = [block for block in recent.blocks if block.id in self.store.blocks]
        together = Candidates([*blocks, *present], self.store.representatives)
        scores = self._shared(retriever, together, question)
        if retriever.about_present(scores, len(present)):
            newest = Recency(retriever.frames, retriever.tokens).select(candidates, question).tolist()
            return [[blocks[index] for index in newest]] * self.encoder.num_layers, "the present"
        return [self._choose(retriever, candidates, scores[: len(blocks)])] * self.encoder.num_layers, retriever.name

    def _shared(self, retriever: Internal, candidates: Candidates, question: str) -> Tensor:
        """(N,) scores for all layers: by representatives, after comparing the keys of the best of those."""
        queries = self.queries(question, retriever.layers_of(self.encoder.num_layers))
        scores = retriever.combine([retriever.layer_scores(candidates, *of_layer) for of_layer in queries])
        return reranked(self.store, candidates, scores, queries, retriever, self.lost)

    def queries(self, question: str, layers: list[int]) -> list[tuple[int, Tensor]]:
        """Queries (Hk, G, q, Dh) of the bare question, alone before the video, at each of `layers` (ascending)."""
        seen: list[Tensor] = []

        def see(layer: int, queries: Tensor) -> list[Block]:
            if layer in layers:
                seen.append(queries)
            if layer == layers[-1]:
                raise _Enough
            return []

        with suppress(_Enough):
            self._probe(question, see)
        return list(zip(layers, transfers.read_back(seen), strict=True))

    def _probe(self, question: str, choose: Callable[[int, Tensor], list[Block]]) -> None:
        """Run the bare question through the layers; each reads the blocks that `choose` gives it for its queries."""
        embeds = self.vision.embed(self.vision.text_ids(question))[None]
        axes, num_tokens = self.encoder.layout.axes, embeds.shape[1]

        def fetch(layer: int, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            blocks = choose(layer, queries)
            keys, values = self.gather(layer, blocks)
            start = self.text_start(blocks)
            return keys, values, torch.arange(start, start + num_tokens).expand(axes, -1)

        # each layer places the question behind what it reads
        nowhere = torch.zeros(axes, 1, num_tokens, dtype=torch.long, device=embeds.device)
        self.vision.forward(ProbeCache(self.vision.text, fetch), embeds, nowhere)

    @staticmethod
    def _choose(retriever: Internal, candidates: Candidates, scores: Tensor) -> list[Block]:
        return [candidates.blocks[index] for index in retriever.choose(candidates, scores).tolist()]

    # -- where ---------------------------------------------------------------------------------------------------------

    def text_start(self, blocks: list[Block]) -> int:
        """Position of what follows the blocks."""
        layout, origin = self.encoder.layout, self.encoder.window.origin
        extent = self.encoder.first_extent
        return text_position(blocks, origin, self.contiguous, layout.timed, self.after_max, extent)

    def _stored(self, layer: int, blocks: list[Block], like: Tensor) -> list[tuple[Block, Tensor, Tensor]]:
        """Un-rotated keys and values of blocks: exact from the window, else from the store or made again of its
        features; without those lost."""
        self.lost += self.again.prefill(blocks)
        unpacked_layers: dict[int, tuple[Tensor, Tensor]] = {}
        packed: dict[int, PackedLayer] = {}
        for block in blocks:
            exact_layer = self.again.layer(block, layer) or self.encoder.window.block_layer(block, layer)
            if exact_layer is not None:
                unpacked_layers[block.id] = exact_layer
            elif block.id in self.store.blocks and block.level < Level.FEATURES:
                try:
                    packed[block.id] = self.store.packed_layer(block.id, layer)
                except BlockLost as e:
                    self.lost.append(str(e))
        if packed and like.is_cuda:
            unpacked = unpack_on_device(list(packed.values()), like.dtype, like.device)
        else:
            unpacked = [unpack(packed_layer, like.dtype) for packed_layer in packed.values()]
        unpacked_layers |= zip(packed, unpacked, strict=True)
        return [(block, *unpacked_layers[block.id]) for block in blocks if block.id in unpacked_layers]

    def gather(self, layer: int, blocks: list[Block]) -> tuple[Tensor, Tensor]:
        """Rotated keys and values (Hk, n, Dh) of [init tokens, blocks] at one layer; made once per question."""
        gather_key = (layer, *(block.id for block in blocks))
        if gather_key in self._gathered:
            return self._gathered[gather_key]
        window = self.encoder.window
        init_keys, init_values = window.init_layer(layer)
        stored = self._stored(layer, blocks, init_keys)
        stored_blocks = [block for block, _, _ in stored]
        keys = torch.cat([init_keys, *(block_keys for _, block_keys, _ in stored)], 1)
        values = torch.cat([init_values, *(block_values for _, _, block_values in stored)], 1)
        ids = tuple(block.id for block in stored_blocks)
        if ids not in self._rotations:
            init = torch.arange(window.num_init).expand(window.axes, -1)
            positions = torch.cat([init, block_positions(stored_blocks, window.origin, self.contiguous)], 1)
            self._rotations[ids] = cos_sin(self.vision.text, positions, keys)
        self._gathered[gather_key] = rotate(keys, *self._rotations[ids]), values
        return self._gathered[gather_key]

    def build(
        self, retriever: Retriever | None, blocks: list[Block], question: str, ids: list[int], plain_cache: bool,
        recent: Recent | None = None,
    ) -> WorkingSet:  # fmt: skip
        """The working set of `question`, with prompt tokens `ids`, out of candidates `blocks`. plain_cache: all layers
        of one length, in stock cache layers. recent: what it holds besides, in any case."""
        start_time = time.perf_counter()
        self.begin()
        recent, anyway = recent or Recent(), {block.id for block in (recent or Recent()).blocks}
        blocks = [block for block in blocks if block.id not in anyway]
        per_layer, chosen_by = self.choose(retriever, blocks, question, recent)
        per_layer = [[*chosen, *recent.stored] for chosen in per_layer]
        chosen = time.perf_counter()
        if len(self.again):  # layers chose one after the other: now those of all of them together
            self._gathered = {}
            self.again.forget()
        every_block = {block.id: block for of_layer in per_layer for block in of_layer}
        self.lost += self.again.prefill([every_block[index] for index in sorted(every_block)])
        layers = [self.gather(index, blocks) for index, blocks in enumerate(per_layer)]
        if self.lost:  # what one layer lost is gone for all of them
            stored_ids = self.store.blocks.keys() | self.encoder.window.first_column.keys()
            per_layer = [[block for block in blocks if block.id in stored_ids] for blocks in per_layer]
            layers = [self.gather(index, blocks) for index, blocks in enumerate(per_layer)]
        whole = [grid.block for grid in recent.whole]
        start = max(self.text_start([*blocks, *whole]) for blocks in per_layer)
        num_again = len(self.again)
        self.again.forget()
        self._gathered, self._rotations = {}, {}
        closing = self.vision.closing().shape[0]
        num_recent = sum(block.num_tokens for block in whole)
        cache = work_cache(layers, plain_cache, room=num_recent + len(ids) + closing + 256)
        fetched_time = time.perf_counter()
        self._prefill_recent(cache, recent.whole, per_layer, plain_cache)
        weights: dict[int, float] = {}
        for of_layer in per_layer:
            for block in of_layer:
                weights[block.id] = weights.get(block.id, 0.0) + 1 / len(per_layer)
        weights |= {block.id: 1.0 for block in whole}
        lengths = [keys.shape[1] + num_recent for keys, _ in layers]
        stats = {
            "retrieve": chosen_by, "retrieved_blocks": sum(len(block) for block in per_layer) / len(per_layer),
            "recent_blocks": len(recent),
            "prefilled_again_blocks": num_again, "context_tokens": sum(lengths) / len(lengths),
            "select_ms": (chosen - start_time) * 1e3, "fetch_ms": (fetched_time - chosen) * 1e3,
            "recent_ms": (time.perf_counter() - fetched_time) * 1e3,
        }  # fmt: skip
        notes = [f"skipped: {lost}" for lost in dict.fromkeys(self.lost)]
        return WorkingSet(cache, ids, start, max(lengths), weights, stats, notes)

    @torch.no_grad()
    def _prefill_recent(
        self, cache: Any, grids: list[BlockInput], per_layer: list[list[Block]], plain_cache: bool
    ) -> None:
        """Feed grids behind the blocks of every layer, at positions behind those of the layer that reaches farthest."""
        if not grids:
            return
        first_origin, whole_blocks = self.encoder.window.origin, [grid.block for grid in grids]
        placed = (block_positions([*blocks, *whole_blocks], first_origin, self.contiguous) for blocks in per_layer)
        embeddings, deepstack = joined(grids, self.vision.device)
        behind = [positions[:, -len(embeddings) :] for positions in placed]
        with reading(self.vision, plain_cache):
            positions = max(behind, key=lambda positions: int(positions[0, 0]))
            self.vision.forward(cache, embeddings[None], positions[:, None], **deepstack)

    # -- the prompt ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, working_set: WorkingSet) -> None:
        """Feed all of the prompt but its last token, OneVision's newline first."""
        embeds = torch.cat([self.vision.closing(), self.vision.embed(working_set.ids[:-1])])
        working_set.fed = len(working_set.ids) - 1
        num_fed = len(embeds)
        if not num_fed:
            return
        positions = torch.arange(working_set.start, working_set.start + num_fed).expand(self.encoder.layout.axes, 1, -1)
        self.vision.forward(working_set.cache, embeds[None], positions)
        working_set.start += num_fed
        working_set.past += num_fed

    def inputs(self, working_set: WorkingSet) -> dict[str, Any]:
        """Keyword arguments for `model.generate` that continue with what the cache lacks of the prompt."""
        device = self.vision.device
        pad_id = self.vision.tokenizer.pad_token_id or 0
        num_left = len(working_set.ids) - working_set.fed
        tail_ids = working_set.ids[-min(len(working_set.ids), working_set.past + num_left) :]
        ids = torch.tensor([[pad_id] * (working_set.past + num_left - len(tail_ids)) + tail_ids], device=device)
        positions = torch.full(ids.shape, working_set.start, dtype=torch.long, device=device)
        positions[:, -num_left:] += torch.arange(num_left, device=device)
        axes = self.encoder.layout.axes
        return {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: working_set.cache,
            "position_ids": positions.expand(axes, 1, -1).clone() if axes > 1 else positions,
        }  # fmt: skip

    @torch.no_grad()
    def logits(self, working_set: WorkingSet, plain_cache: bool) -> Tensor:
        """(V,) float32 logits after the prompt; spends the working_set."""
        with reading(self.vision, plain_cache):
            self.prefill(working_set)
            last_inputs = self.inputs(working_set)
            embeds = self.vision.embed(last_inputs["input_ids"][0, -1:].tolist())
            positions = last_inputs["position_ids"][..., -1:].view(-1, 1, 1)
            hidden = self.vision.forward(working_set.cache, embeds[None], positions)[0]
        return self.vision.model.get_output_embeddings()(hidden)[-1].float()  # type: ignore[operator]


def reading(vision: Any, plain_cache: bool) -> Any:
    """Our attention for our caches; a plain cache is read by the model's own."""
    return nullcontext() if plain_cache else running(vision.model, vision.text)


def cache_bytes(cache: Any) -> int:
    """Fast bytes of a working set."""
    total = 0
    for layer in cache.layers:
        if hasattr(layer, "nbytes"):
            size = layer.nbytes()
            total += size["fast"] if isinstance(size, dict) else size
        else:
            total += 2 * layer.keys.numel() * layer.keys.element_size()
    return total
