"""Target-attention-guided pruning of a draft's visual tokens (SpecVLM, arXiv 2508.16201)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.core import StageDidNotFire, Unsupported, VisualTokens
from vlmfast.fields import Fraction, Method, PositiveInt, Share
from vlmfast.kernels import ranking


@dataclass(frozen=True)
class TargetAttention(Method):
    """The draft keeps what the target attended to: `ModelDraft(model, prune=TargetAttention())`, or in `SelfDraft`.

    A visual token's score is the attention the target's text after the media pays it in the prefill (mean over layers,
    heads and the last `queries` text columns). First the fewest tokens that hold `share` of an item's score are kept,
    at most the budget `keep`; the rest of the budget goes evenly over those left (paper: 0.1, 0.4, all text).
    Ours: budget and share hold per image or video, and survivors keep their original positions. What the target itself
    pruned scores 0. The output stays the acceptance rule's: lossless with a lossless rule. Separators survive.
    """

    keep: Fraction = 0.1
    share: Share = 0.4
    queries: PositiveInt = 64
    name: ClassVar[str] = "targetattention"
    after_block: ClassVar[None] = None
    needs: ClassVar[tuple[str, ...]] = ()

    def select(self, tokens: VisualTokens) -> Tensor:
        """It knows nothing by itself: `guided_by` a target it does."""
        raise Unsupported(
            f"{self.name} reads the target's attention and prunes a draft only, as ModelDraft(prune=...) or "
            "SelfDraft(prune=...): use another pruner here (uniform, vidcom2)"
        )

    def guided_by(self, scores: Tensor | None) -> GuidedPruner:
        """The pruner of one prompt. scores: (n,) of all its visual tokens in order; None = the target saw none."""
        return GuidedPruner(self, scores)

    def choose(self, scores: Tensor) -> Tensor:
        """scores (n,) of one item -> kept indices (K,) int64, strictly ascending, K = max(1, round(keep * n))."""
        num_tokens = scores.shape[0]
        budget = max(1, round(self.keep * num_tokens))
        ranked_indices = ranking(scores)
        cumulative_score = scores[ranked_indices].double().cumsum(0)
        num_highest = int((cumulative_score < self.share * cumulative_score[-1]).sum()) + 1 if self.share > 0 else 0
        num_highest = min(num_highest, budget)
        remaining = ranked_indices[num_highest:].sort().values
        num_even = budget - num_highest
        even_places = torch.arange(num_even, device=scores.device) * len(remaining) // max(1, num_even)
        return torch.cat([ranked_indices[:num_highest], remaining[even_places]]).sort().values


class GuidedPruner:
    """`TargetAttention` with one prompt's scores: items come in the order of their placeholders, kind by kind."""

    after_block = None
    needs: tuple[str, ...] = ()

    def __init__(self, config: TargetAttention, scores: Tensor | None) -> None:
        self.config, self.keep, self.scores, self.at = config, config.keep, scores, 0

    def select(self, tokens: VisualTokens) -> Tensor:
        """Kept indices (K,) int64, strictly ascending, separators included."""
        if self.scores is None or self.at + tokens.n > len(self.scores):
            raise StageDidNotFire("the draft holds visual tokens that the target's prefill was not seen to look at")
        scores = self.scores[self.at : self.at + tokens.n].to(tokens.features.device)
        self.at += tokens.n
        if tokens.protected is None:
            return self.config.choose(scores)
        unprotected = (~tokens.protected).nonzero()[:, 0]
        kept_indices = unprotected[self.config.choose(scores[unprotected])]
        return torch.cat([kept_indices, tokens.protected.nonzero()[:, 0]]).sort().values
