"""DTD: drops tokens that repeat the previous frame; how many stay depends on the video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from vlmfast.core import VisualTokens
from vlmfast.encode.base import Pruner
from vlmfast.fields import Fraction, Range


@dataclass(frozen=True)
class DTD(Pruner):
    """Differential token dropping of TimeChat-Online (arXiv 2504.17343): a token goes when its cosine to the token at
    the same place in the previous frame is above `threshold`; the first frame stays whole. Causal: a frame is judged
    without the frames after it. Video only: images pass unpruned.

    keep is a ceiling here: what exceeds it loses its most repeated tokens first. (With a fixed fraction instead of a
    threshold the rule is `EVS`.) One host sync per video, to learn the count.
    """

    keep: Fraction = 0.5
    threshold: Annotated[float, Range(-1, 1)] = 0.5
    name: ClassVar[str] = "dtd"
    video_only: ClassVar[bool] = True

    def repeated(self, tokens: VisualTokens) -> Tensor:
        """(N,) cosine to the same place in the previous frame; -2 in the first frame."""
        features = tokens.features.view(tokens.frames, -1, tokens.features.shape[-1]).float()
        return pad(cosine_similarity(features[1:], features[:-1], dim=-1), (0, 0, 1, 0), value=-2.0).flatten()

    def budget(self, tokens: VisualTokens) -> int:
        tokens_per_frame = tokens.n // tokens.frames
        min_kept = tokens_per_frame + self.floor * (tokens.frames - 1)
        changed_counts = (self.repeated(tokens) <= self.threshold).view(tokens.frames, -1).sum(1).clamp(min=self.floor)
        return min(tokens.n, max(min_kept, self.least, min(super().budget(tokens), int(changed_counts.sum()))))

    def score(self, tokens: VisualTokens) -> Tensor:
        return -self.repeated(tokens)
