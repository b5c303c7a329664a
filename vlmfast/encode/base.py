"""The base of every pruner: a method scores visual tokens, the base turns the scores into a set of kept tokens.

Selection happens here only: the budget, the floor per frame, the ascending order, the separators that always stay.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vlmfast.core import Unsupported, UserError, VisualTokens
from vlmfast.fields import Fraction, Method, NonNegativeInt, Range
from vlmfast.kernels import by_parts, ranking

# a tower block's index, or a share of the tower's depth
Block = NonNegativeInt | Annotated[float, Range(0, 1, "both")] | Literal["auto"] | None


@dataclass(frozen=True)
class Pruner(Method):
    """Keeps a fraction `keep` of the visual tokens of each image or video.

    keep: fraction kept, in (0, 1]. floor: tokens every frame keeps at least (the budget grows to hold it).
    least: tokens the image or video keeps at least, so that a small one passes whole.
    after_block: None prunes at the tower's output; k prunes inside the tower, before block k, so that block k and those
    after it see fewer tokens (Qwen towers); a float below 1 is a share of the tower's depth; "auto" is a quarter of the
    depth where the tower allows it, and the output elsewhere (the report says which).
    A subclass implements `score`, or `select_body` where tokens are chosen as a set.
    """

    keep: Fraction = 0.25
    floor: NonNegativeInt = 1
    after_block: Block = None
    least: NonNegativeInt = 0

    name: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ("features",)
    video_only: ClassVar[bool] = False
    attention_layers: ClassVar[tuple[int, ...]] = (-1,)  # of the tower, where `needs` has "tower_attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        missing = sorted({"tower_attention", "question", "rope"} & set(self.needs))
        if self.after_block is not None and missing:
            raise UserError(
                f"{self.name} needs {missing[0]}, which is not known inside the tower: leave after_block=None, "
                "or use a pruner of features (vidcom2, maxmin, evs)"
            )

    def need(self, tokens: VisualTokens, field_name: str) -> Tensor:
        """tokens.attention, .question, .rope or .pixels; raises Unsupported where the caller had none to give."""
        value: Tensor | None = getattr(tokens, field_name)
        if value is None:
            raise Unsupported(
                f"{self.name} needs {field_name}, which is not known here: "
                "use a pruner of features (vidcom2, maxmin, evs)"
            )
        return value

    def score(self, tokens: VisualTokens) -> Tensor:
        """(N,) float scores of the unprotected tokens; higher is kept."""
        raise NotImplementedError

    def frame_budgets(self, tokens: VisualTokens, budget: int) -> Tensor | None:
        """(t,) int64 tokens per frame, summing to `budget`; None = one ranking over the whole item."""
        return None

    def budget(self, tokens: VisualTokens) -> int:
        """Number of tokens kept: round(keep * N), at least one, `least`, and enough for the floor of every frame."""
        num_tokens = tokens.n
        return min(num_tokens, max(1, round(self.keep * num_tokens), self.floor * tokens.frames, self.least))

    def select(self, tokens: VisualTokens) -> Tensor:
        """Kept indices (K,) int64, strictly ascending, separators included."""
        if self.keep >= 1 or (self.video_only and not tokens.video):
            return torch.arange(tokens.n, device=tokens.features.device)
        unprotected, unprotected_indices = without_separators(tokens)
        kept_indices = self.select_body(unprotected, self.budget(unprotected))
        if unprotected_indices is None or tokens.protected is None:
            return kept_indices.sort().values
        return torch.cat([unprotected_indices[kept_indices], tokens.protected.nonzero()[:, 0]]).sort().values

    def select_body(self, tokens: VisualTokens, budget: int) -> Tensor:
        """`budget` distinct indices in any order; the default ranks by `score` under floor and frame budgets."""
        scores = self.score(tokens).float()
        if scores.shape != (tokens.n,):
            raise RuntimeError(f"{type(self).__name__}.score returned {tuple(scores.shape)} for {tokens.n} tokens")
        return ranked(scores, tokens.frame, budget, self.floor, self.frame_budgets(tokens, budget), tokens.frame_size)

    def select_bodies(self, tokens: VisualTokens, budgets: list[int]) -> list[Tensor]:
        """`select_body` for several budgets."""
        return [self.select_body(tokens, budget) for budget in budgets]


def without_separators(tokens: VisualTokens) -> tuple[VisualTokens, Tensor | None]:
    """The tokens without their protected rows, and the indices of those that stay (None: there are no separators)."""
    if tokens.protected is None:
        return tokens, None
    unprotected_indices = (~tokens.protected).nonzero()[:, 0]
    unprotected = dataclasses.replace(
        tokens,
        features=tokens.features[unprotected_indices],
        frame=tokens.frame[unprotected_indices],
        protected=None,
        positions=None if tokens.positions is None else tokens.positions[:, unprotected_indices],
        attention=None if tokens.attention is None else tokens.attention[..., unprotected_indices],
        rope=None if tokens.rope is None else tokens.rope[:, unprotected_indices],
    )
    return unprotected, unprotected_indices


def ranked(
    score: Tensor, frame: Tensor, budget: int, floor: int, per_frame: Tensor | None, frame_size: int | None = None
) -> Tensor:
    """Indices (budget,) int64 of the highest scores; each frame's best `floor` (or `per_frame` quota) come first.

    score (N,) float; frame (N,) int64, ascending; per_frame (t,) int64 or None; frame_size: tokens of every frame where
    that is known. No host sync: being among the best of its frame moves a token ahead of all that are not.
    """
    quotas = None if per_frame is None else per_frame[None]
    return ranked_for_each(ranking(score), frame, [budget], floor, quotas, frame_size)[0]


def ranked_for_each(
    best_first: Tensor, frame: Tensor, budgets: list[int], floor: int, quotas: Tensor | None, frame_size: int | None
) -> list[Tensor]:
    """`ranked` for several budgets at once.

    best_first: (N,) int64, the indices in the order of their scores. quotas: (budgets, t) int64 per frame or None.
    """
    num_tokens = len(best_first)
    # places in that order, frames ascending and best first within each
    sorted_frame, by_frame = frame[best_first].sort(stable=True)
    if frame_size is not None:
        by_frame = by_frame.view(-1, frame_size)
    rank_in_frame = torch.arange(by_frame.shape[-1], device=best_first.device)
    if frame_size is None:
        rank_in_frame.sub_(torch.searchsorted(sorted_frame, sorted_frame))
    sort_key = torch.add(by_frame, rank_in_frame < floor, alpha=-4 * num_tokens)[None]
    if quotas is not None:
        quotas = quotas if min(budgets) >= floor * quotas.shape[1] else quotas.clamp(min=floor)
        quotas = quotas[:, sorted_frame] if frame_size is None else quotas[..., None]
        sort_key = torch.add(sort_key, rank_in_frame < quotas, alpha=-2 * num_tokens)
    in_order = sort_key.flatten(1).argsort()[:, : max(budgets)].expand(len(budgets), -1)
    chosen = best_first[by_frame.flatten()[in_order]]
    return [row[:budget] for row, budget in zip(chosen, budgets, strict=True)]


def like_previous_frame(tokens: VisualTokens) -> Tensor:
    """(t - 1, n) float32 cosine of every token to the one at the same place in the previous frame."""

    def cosines(current: Tensor, previous: Tensor) -> Tensor:
        return cosine_similarity(current.float(), previous.float(), dim=-1)

    by_frame = tokens.features.view(tokens.frames, -1, tokens.features.shape[-1])
    return by_parts(cosines, by_frame[1:], by_frame[:-1])


def frame_means(features: Tensor, frame: Tensor, num_frames: int, frame_size: int | None = None) -> Tensor:
    """(t, D) mean feature of each frame. features (N, D), frame (N,) int64; frame_size as in `ranked`."""
    feature_sums = features.new_zeros(num_frames, features.shape[1]).index_add_(0, frame, features)
    if frame_size is not None:
        return feature_sums / frame_size
    token_counts = features.new_zeros(num_frames).index_add_(0, frame, features.new_ones(len(frame)))
    return feature_sums / token_counts.clamp(min=1)[:, None]


def largest_remainder(shares: Tensor, total: int | Tensor) -> Tensor:
    """(t,) int64 parts proportional to shares (t,) that sum to total exactly, rounded by largest remainder.

    total: whole numbers (k, 1) give the parts (k, t) of each.
    """
    exact_parts = shares / shares.sum() * total
    parts = exact_parts.long()
    num_missing = total - parts.sum(-1, keepdim=True)
    largest_first = ranking(exact_parts - parts)
    return parts + (largest_first.argsort() < num_missing)
