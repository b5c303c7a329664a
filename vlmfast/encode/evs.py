"""EVS: keeps the tokens that changed most since the previous frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.core import UserError, VisualTokens
from vlmfast.encode.base import Pruner, like_previous_frame


@dataclass(frozen=True)
class EVS(Pruner):
    """Efficient Video Sampling (NVIDIA, arXiv 2510.14624): a token's score is its cosine distance to the token at the
    same place in the previous frame; the first frame is kept whole. Video only: images pass unpruned, or are left to
    `stills`, a pruner of features, whose own keep counts for them."""

    stills: Pruner | None = None
    name: ClassVar[str] = "evs"
    video_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stills is not None and set(self.stills.needs) != {"features"}:
            raise UserError(f"evs leaves images to a pruner of features, not {self.stills!r}: e.g. stills=VidCom2()")

    def select(self, tokens: VisualTokens) -> Tensor:
        if self.stills is not None and not tokens.video:
            return self.stills.select(tokens)
        return super().select(tokens)

    def budget(self, tokens: VisualTokens) -> int:
        tokens_per_frame = tokens.n // tokens.frames
        return min(tokens.n, max(super().budget(tokens), tokens_per_frame + self.floor * (tokens.frames - 1)))

    def score(self, tokens: VisualTokens) -> Tensor:
        change = 1 - like_previous_frame(tokens)
        first_frame = change.new_full((1, change.shape[1]), 3.0)  # above any cosine distance: always kept
        return torch.cat([first_frame, change]).flatten()
