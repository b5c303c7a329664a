"""The base of every pruner: a method scores visual tokens, the base turns scores into a kept set.

Selection is in this one place: the budget, the floor per frame, ascending order, separators that always survive.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from vlmfast.core import Unsupported, UserError, VisualTokens
from vlmfast.fields import Fraction, Method, NonNegativeInt, Range
from vlmfast.kernels import ranking

# a tower block's index, or a share of the tower's depth
Block = NonNegativeInt | Annotated[float, Range(0, 1, "both")] | Literal["auto"] | None


@dataclass(frozen=True)
class Pruner(Method):
    """Keeps a fraction `keep` of the visual tokens of each image or video.

    keep: fraction kept, in (0, 1]. floor: tokens every frame keeps at least (the budget grows to hold it).
    least: tokens the image or video keeps at least, so that a small one, which has little to spare, passes whole.
    after_block: None prunes at the tower's output; k prunes inside the tower, before block k, so that blocks k, k+1,
    ... run short (Qwen towers); a float below 1 is a share of the tower's depth; "auto" is a quarter of the depth where
    the tower can run short, and the output elsewhere (the report says which).
    Subclasses answer one question: `score`, or `select_body` for set methods.
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

    def need(self, tokens: VisualTokens, what: str) -> Tensor:
        """tokens.attention, .question, .rope or .pixels; raises Unsupported where the caller had none to give."""
        value: Tensor | None = getattr(tokens, what)
        if value is None:
            raise Unsupported(
                f"{self.name} needs {what}, which is not known here: use a pruner of features (vidcom2, maxmin, evs)"
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
        n = tokens.n
        return min(n, max(1, round(self.keep * n), self.floor * tokens.frames, self.least))

    def select(self, tokens: VisualTokens) -> Tensor:
        """Kept indices (K,) int64, strictly ascending, separators included."""
        if self.keep >= 1 or (self.video_only and not tokens.video):
            return torch.arange(tokens.n, device=tokens.features.device)
        inner, body = without_separators(tokens)
        kept = self.select_body(inner, self.budget(inner))
        if body is None or tokens.protected is None:
            return kept.sort().values
        return torch.cat([body[kept], tokens.protected.nonzero()[:, 0]]).sort().values

    def select_body(self, tokens: VisualTokens, budget: int) -> Tensor:
        """`budget` distinct indices in any order; the default ranks by `score` under floor and frame budgets."""
        score = self.score(tokens).float()
        if score.shape != (tokens.n,):
            raise RuntimeError(f"{type(self).__name__}.score returned {tuple(score.shape)} for {tokens.n} tokens")
        return ranked(score, tokens.frame, budget, self.floor, self.frame_budgets(tokens, budget))


def without_separators(tokens: VisualTokens) -> tuple[VisualTokens, Tensor | None]:
    """The tokens without their protected rows, and the indices of those that stay (None: there are no separators)."""
    if tokens.protected is None:
        return tokens, None
    body = (~tokens.protected).nonzero()[:, 0]
    inner = dataclasses.replace(
        tokens,
        features=tokens.features[body],
        frame=tokens.frame[body],
        protected=None,
        positions=None if tokens.positions is None else tokens.positions[:, body],
        attention=None if tokens.attention is None else tokens.attention[..., body],
        rope=None if tokens.rope is None else tokens.rope[:, body],
    )
    return inner, body


def ranked(score: Tensor, frame: Tensor, budget: int, floor: int, per_frame: Tensor | None) -> Tensor:
    """Top `budget` indices by score, each frame's best `floor` first (or its `per_frame` quota first).

    score, frame: (N,). No host sync: a token's rank inside its frame lifts it into a higher class of the top-k.
    """
    order = ranking(score)
    n = len(order)
    by_frame = order[frame[order].argsort(stable=True)]  # frames ascending, best first within each
    sorted_frame = frame[by_frame]
    rank = torch.arange(n, device=score.device).sub_(torch.searchsorted(sorted_frame, sorted_frame))
    place = order.argsort()[by_frame].add_(rank < floor, alpha=-2 * n)
    if per_frame is None:
        place.add_(rank < floor, alpha=-2 * n)
    else:
        place.add_(rank < per_frame.clamp(min=floor)[sorted_frame], alpha=-2 * n)
    return by_frame[place.argsort()[:budget]]


def frame_means(features: Tensor, frame: Tensor, t: int) -> Tensor:
    """(t, D) mean feature of each frame; works when frames differ in size."""
    total = features.new_zeros(t, features.shape[1]).index_add_(0, frame, features)
    count = features.new_zeros(t).index_add_(0, frame, features.new_ones(len(frame)))
    return total / count.clamp(min=1)[:, None]


def largest_remainder(share: Tensor, total: int) -> Tensor:
    """(t,) int64 parts proportional to share that sum to total exactly."""
    exact = share / share.sum() * total
    parts = exact.floor()
    missing = total - parts.sum()
    order = ranking(exact - parts)
    extra = torch.zeros_like(parts)
    extra[order] = (torch.arange(len(parts), device=parts.device) < missing).to(parts.dtype)
    return (parts + extra).long()
