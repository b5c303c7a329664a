"""DTD: drops tokens that repeat the previous frame; how many stay depends on the video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor
from torch.nn.functional import pad

from vlmfast.core import VisualTokens
from vlmfast.encode.base import Pruner, like_previous_frame, ranked
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
        return pad(like_previous_frame(tokens), (0, 0, 1, 0), value=-2.0).flatten()

    def select_body(self, tokens: VisualTokens, budget: int) -> Tensor:
        repeated, num_frames = self.repeated(tokens), tokens.frames
        min_kept = tokens.n // num_frames + self.floor * (num_frames - 1)
        changed_counts = (repeated <= self.threshold).view(num_frames, -1).sum(1).clamp(min=self.floor)
        budget = min(tokens.n, max(min_kept, self.least, min(budget, int(changed_counts.sum()))))
        return ranked(-repeated, tokens.frame, budget, self.floor, None, tokens.frame_size)
