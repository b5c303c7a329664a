"""Retrievers: which stored blocks a question brings back. Pure functions on scores, one small class per rule.

A retriever's budget is a number of blocks (`frames`, temporal grids) or of tokens (`tokens`), or both. Candidates are
the blocks left by the question's time filter, in stream order; every choice is returned ascending.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast import spec
from vlmfast.core import UserError, shown
from vlmfast.fields import Method, NonNegativeInt, PositiveInt, Share
from vlmfast.kernels import ranking
from vlmfast.stream.archive.representatives import RepresentativeTable
from vlmfast.stream.blocks import Block
from vlmfast.stream.scenes import by_scene


@dataclass
class Candidates:
    """N blocks to choose from, in stream order; their seconds start, end (N,) float64 and tokens (N,) int64."""

    blocks: list[Block]
    representatives: RepresentativeTable | None = None

    def __post_init__(self) -> None:
        self.start = torch.tensor([block.start for block in self.blocks], dtype=torch.float64)
        self.end = torch.tensor([block.end for block in self.blocks], dtype=torch.float64)
        self.tokens = torch.tensor([block.num_tokens for block in self.blocks], dtype=torch.long)
        table = self.representatives
        self.slots = torch.zeros(0) if table is None else table.slots([block.id for block in self.blocks])

    def __len__(self) -> int:
        return len(self.blocks)


def within(best_first: Tensor, sizes: Tensor, frames: int | None, tokens: int | None) -> Tensor:
    """Indices (K,) ascending of the first candidates of an order (N,) that fit the budgets.

    With a token budget a candidate that does not fit is passed over; at least one is taken.
    """
    if tokens is None:
        return best_first[:frames].sort().values
    chosen: list[int] = []
    num_used = 0
    for index, size in zip(best_first.tolist(), sizes[best_first].tolist(), strict=True):
        if frames is not None and len(chosen) >= frames:
            break
        if num_used + size <= tokens or not chosen:
            chosen.append(index)
            num_used += size
        if num_used >= tokens:
            break
    return torch.tensor(sorted(chosen), dtype=torch.long)


def smoothed(scores: Tensor, sizes: Tensor, neighbours: int) -> Tensor:
    """Scores (N,), each averaged with those of `neighbours` blocks on either side, weighted by their tokens (N,).

    A block whose frame brought little new has few tokens, and a score of little meaning: its neighbours' counts for it
    too. neighbours=0 changes nothing.
    """
    if neighbours == 0 or len(scores) < 2:
        return scores
    weight = sizes.to(scores)
    kernel = torch.ones(1, 1, 2 * neighbours + 1, dtype=scores.dtype)
    weighted = torch.stack([scores * weight, weight])[:, None]
    weighted_sum, weight_sum = F.conv1d(weighted, kernel, padding=neighbours)[:, 0]
    return weighted_sum / weight_sum


@dataclass(frozen=True)
class Retriever(Method):
    """frames: most blocks brought back, None for no limit. tokens: most tokens brought back, None for no limit."""

    frames: PositiveInt | None = 16
    tokens: PositiveInt | None = None

    name: ClassVar[str] = ""
    per_layer: ClassVar[bool] = False  # does it choose by the queries of the layers?

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames is None and self.tokens is None:
            raise UserError(f"{type(self).__name__} needs a budget: frames=16, or tokens=2048")

    def fits(self, candidates: Candidates) -> bool:
        """Do all candidates fit the budget? Then there is nothing to choose."""
        return (self.frames is None or len(candidates) <= self.frames) and (
            self.tokens is None or int(candidates.tokens.sum()) <= self.tokens
        )

    def select(self, candidates: Candidates, question: str) -> Tensor:
        """Indices (K,) of the chosen candidates, ascending."""
        return self.choose(candidates, self.scores(candidates, question))

    def choose(self, candidates: Candidates, scores: Tensor) -> Tensor:
        """Indices (K,), ascending, of the best of the candidates by scores (N,), within the budget."""
        return within(self.order(candidates, scores), candidates.tokens, self.frames, self.tokens)

    def order(self, candidates: Candidates, scores: Tensor) -> Tensor:
        """(N,) the candidates, best first by scores (N,)."""
        return ranking(scores.double())

    def scores(self, candidates: Candidates, question: str) -> Tensor:
        """(N,) higher is brought back."""
        raise NotImplementedError


@dataclass(frozen=True)
class Internal(Retriever):
    """ReKV's internal retrieval (arXiv 2503.00540): every layer scores a block by the inner product of the bare
    question's queries and the block's representative (mean key), both un-rotated. Query heads of a group are summed on
    their key/value head.

    similarity: "cosine" (the paper), "inner" (its code) or "centred": cosine to the key less the mean key of all
    candidates, so that what all blocks share counts for none. query: "mean" of the question's tokens (ReKV), or "each"
    token by itself, standardised over the candidates, the best one counting. smooth: see `smoothed`. scope: "layer"
    chooses for every layer by itself; "shared" standardises the scores of `layers` (None: all; negative numbers from
    the end), averages them, and chooses once. present: in that scope, where the best block of the last `recent` seconds
    has at least this share of the best score, the question is about the present and the newest blocks are brought back,
    since old ones that resemble the present mislead the answer (0.8 where `layers` find what they should, see
    `layer_recall`); None brings back the best all the same. rerank: of so many blocks, the best by their
    representatives, every key is compared (`rerank.reranked`), which finds what is small in a frame; None compares no
    keys. scenes: the share of a frame that must be new for a scene to begin; whole scenes are then brought back
    (`scenes.by_scene`, 0.5 for cuts); None brings back blocks one by one.
    """

    similarity: Literal["cosine", "inner", "centred"] = "cosine"
    query: Literal["mean", "each"] = "mean"
    smooth: NonNegativeInt = 0
    scope: Literal["layer", "shared"] = "layer"
    layers: tuple[int, ...] | None = None
    present: Share | None = None
    rerank: PositiveInt | None = None
    scenes: Share | None = None

    name: ClassVar[str] = "internal"
    per_layer: ClassVar[bool] = True

    def check_model(self, layers: int, heads: int, axes: int) -> None:
        self.layers_of(layers)

    def layer_scores(self, candidates: Candidates, layer: int, queries: Tensor) -> Tensor:
        """(N,) scores at one layer of a question's queries (Hk, G, q, Dh)."""
        assert candidates.representatives is not None
        summed = queries.float().sum(1).transpose(0, 1)  # (q, Hk, Dh)
        if self.query == "mean":
            summed = summed.mean(0, keepdim=True)
        scores = candidates.representatives.products(
            layer, summed, candidates.slots, centred=self.similarity == "centred"
        )
        if self.similarity != "inner":
            scores = scores / candidates.representatives.norms_of(
                layer, candidates.slots, self.similarity == "centred"
            ).clamp(min=1e-6)
        if self.query == "each":
            scores = standardised(scores)
        return smoothed(scores.amax(0), candidates.tokens, self.smooth)

    def order(self, candidates: Candidates, scores: Tensor) -> Tensor:
        if self.scenes is None or not len(candidates):
            return super().order(candidates, scores)
        return by_scene(scores, candidates.blocks, self.scenes)

    def layers_of(self, count: int) -> list[int]:
        """The layers, of `count`, whose scores are combined, ascending. Raises UserError for one that is not there."""
        wanted = range(count) if self.layers is None else self.layers
        not_there = [layer_index for layer_index in wanted if not -count <= layer_index < count]
        if not_there or not wanted:
            raise UserError(f"layers={shown(self.layers)} in internal: this model's layers are 0 to {count - 1}")
        return sorted({layer_index % count for layer_index in wanted})

    def about_present(self, scores: Tensor, recent: int) -> bool:
        """Do scores (N,) say that the question is about the last `recent` of their blocks?"""
        if self.present is None or not 0 < recent < len(scores):
            return False
        return float(scores[-recent:].max()) >= self.present * float(scores.max())

    def combine(self, scores: list[Tensor]) -> Tensor:
        """(N,) from the scores of the layers that were asked: mean of the standardised ones."""
        return standardised(torch.stack(scores)).mean(0)


def standardised(scores: Tensor) -> Tensor:
    """Scores (R, N), each of the R lists with mean 0 and deviation 1 over its N candidates."""
    if scores.shape[1] < 2:
        return torch.zeros_like(scores)
    return (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True).clamp(min=1e-9)


@dataclass(frozen=True)
class External(Retriever):
    """Any encoder pair with one space (CLIP, SigLIP): frames are embedded when pushed, the question when asked.

    frames_to: (T, H, W, 3) uint8 -> (T, E); text_to: str -> (E,). Ranks by cosine.
    """

    frames_to: Callable[[Tensor], Tensor] | None = None
    text_to: Callable[[str], Tensor] | None = None

    name: ClassVar[str] = "external"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames_to is None or self.text_to is None:
            raise UserError("External needs frames_to= and text_to=: the two halves of a CLIP-like encoder")

    def scores(self, candidates: Candidates, question: str) -> Tensor:
        assert candidates.representatives is not None and self.text_to is not None
        stored = candidates.representatives.embedding(candidates.slots)
        if stored is None:
            raise UserError("nothing was embedded: give External to StreamSession(retrieve=...) before pushing frames")
        return F.cosine_similarity(stored, self.text_to(question).float().reshape(1, -1).cpu(), dim=-1)


@dataclass(frozen=True)
class Recency(Retriever):
    """The newest blocks ("recency"): a control."""

    name: ClassVar[str] = "recency"

    def scores(self, candidates: Candidates, question: str) -> Tensor:
        return torch.arange(len(candidates), dtype=torch.float64)


@dataclass(frozen=True)
class RecentOnly(Retriever):
    """The last `recent` seconds and nothing else ("recent-only"; SimpleStream, arXiv 2604.02317): a control."""

    name: ClassVar[str] = "recent-only"

    def fits(self, candidates: Candidates) -> bool:
        return False

    def select(self, candidates: Candidates, question: str) -> Tensor:
        return torch.zeros(0, dtype=torch.long)


@dataclass(frozen=True)
class UniformRetriever(Retriever):
    """Blocks spread evenly over the candidates ("uniform"): a control."""

    name: ClassVar[str] = "uniform"

    def select(self, candidates: Candidates, question: str) -> Tensor:
        count = min(len(candidates), self.frames or len(candidates))
        while True:
            index = (
                torch.linspace(0, len(candidates) - 1, count).round().long().unique()
                if count > 1
                else torch.zeros(1).long()
            )
            if count == 1 or self.tokens is None or int(candidates.tokens[index].sum()) <= self.tokens:
                return index
            excess = int(candidates.tokens[index].sum()) / self.tokens
            count = max(1, min(count - 1, int(count / excess)))


@dataclass(frozen=True)
class RandomRetriever(Retriever):
    """Blocks at random ("random"), the same ones for the same seed and number of candidates: a control."""

    seed: int = 0

    name: ClassVar[str] = "random"

    def scores(self, candidates: Candidates, question: str) -> Tensor:
        return torch.rand(len(candidates), generator=torch.Generator().manual_seed(self.seed + len(candidates)))


@dataclass(frozen=True)
class Oracle(Retriever):
    """The blocks in the given (start, end) seconds, where the evidence is known to be: the upper control. What is left
    of the budget goes to the blocks nearest to them."""

    spans: tuple[tuple[float, float], ...] = ()

    name: ClassVar[str] = "oracle"

    def scores(self, candidates: Candidates, question: str) -> Tensor:
        if not self.spans:
            raise UserError("Oracle needs spans=((start, end), ...): the seconds where the evidence lies")
        distance = torch.full((len(candidates),), float("inf"), dtype=torch.float64)
        for start, end in self.spans:
            span_distance = torch.maximum(start - candidates.end + 1e-9, candidates.start - end + 1e-9).clamp(min=0)
            distance = torch.minimum(distance, span_distance)
        return -distance


METHODS: dict[str, type[Retriever]] = {
    kind.name: kind for kind in (Internal, External, Recency, RecentOnly, UniformRetriever, RandomRetriever, Oracle)
}


def parse(text: Any) -> Retriever | None:
    """A retriever from itself, None or "none" (the window alone), or its text, as in
    `internal:similarity=centred,scope=shared,layers=[2,3]`; see `spec`."""
    if text is None or isinstance(text, Retriever):
        return text
    retriever: Retriever | None = None if text == "none" else spec.read("retriever", text, METHODS)
    return retriever
