"""PixelPrune: drop the patches that their neighbours foretell, before the vision tower sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.core import UserError, VisualTokens
from vlmfast.encode.base import Block, Pruner, ranked
from vlmfast.fields import Fraction, NonNegativeFloat


@dataclass(frozen=True)
class PixelPrune(Pruner):
    """PixelPrune (arXiv 2604.00886), for documents and screens: the edge predictor of JPEG-LS over merged patches.

    Each is predicted from its left, upper and upper-left neighbours A, B, C: as B where C is like A and not like B (a
    vertical edge), else as A; along the first row and column from the only neighbour there is. It goes when no value of
    it is further than `threshold` from the prediction; later ones are predicted from what was predicted, so errors do
    not add up. threshold 0 drops exact repeats only. Values are the processor's normalised ones (Qwen3-VL: black to
    white is 2). Frames of a video are judged one by one. Qwen towers only.

    keep is a ceiling, by default out of the way: what exceeds it loses its best foretold first. Patches leave before
    block 0; the patch embedding, one product, still runs over all. One host sync per item, to learn the count.
    """

    keep: Fraction = 0.9999
    after_block: Block = 0
    threshold: NonNegativeFloat = 0.0
    name: ClassVar[str] = "pixelprune"
    needs: ClassVar[tuple[str, ...]] = ("pixels",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.after_block != 0:
            raise UserError(f"pixelprune looks at pixels, before the tower: after_block={self.after_block} must be 0")

    def select_body(self, tokens: VisualTokens, budget: int) -> Tensor:
        error = self.error(tokens)
        wrong = (error > self.threshold).view(tokens.frames, -1).sum(1).clamp(min=self.floor)
        return ranked(error, tokens.frame, min(budget, max(int(wrong.sum()), self.least)), self.floor, None)

    def error(self, tokens: VisualTokens) -> Tensor:
        """(N,) float32, largest distance of each token's pixels from their prediction; inf at the start of a frame."""
        x = self.need(tokens, "pixels")
        t, h, w = tokens.grid
        at = torch.arange(t * h * w, device=x.device).view(t, h, w)
        if self.threshold == 0:  # what stands for a token equals it: every token by its own neighbours, all at once
            return self._repeats(x, at).flatten()
        source = at.clone()  # whose pixels stand for each token, once it is settled
        error = torch.full((t, h, w), float("inf"), device=x.device)
        for d in range(1, h + w - 1):  # a diagonal depends on the two before it only
            rows = torch.arange(max(0, d - w + 1), min(h, d + 1), device=x.device)
            columns = d - rows
            left = source[:, rows, (columns - 1).clamp(min=0)]
            above = source[:, (rows - 1).clamp(min=0), columns]
            corner = source[:, (rows - 1).clamp(min=0), (columns - 1).clamp(min=0)]
            edge = (_distance(x, corner, left) <= self.threshold) & (_distance(x, corner, above) > self.threshold)
            first_row, first_column = rows == 0, columns == 0
            guess = torch.where((edge & ~first_row) | first_column, above, left)
            here = at[:, rows, columns]
            error[:, rows, columns] = off = _distance(x, here, guess)
            source[:, rows, columns] = torch.where(off > self.threshold, here, guess)
        return error.flatten()

    def _repeats(self, x: Tensor, at: Tensor) -> Tensor:
        """`error` where only exact repeats are foretold. at (t, h, w): each token's row of x."""
        _, h, w = at.shape
        rows, columns = torch.arange(h, device=x.device)[:, None], torch.arange(w, device=x.device)
        up, back = (rows - 1).clamp(min=0), (columns - 1).clamp(min=0)
        left, above, corner = at[:, rows, back], at[:, up, columns], at[:, up, back]
        edge = (_distance(x, corner, left) <= 0) & (_distance(x, corner, above) > 0)
        error = _distance(x, at, torch.where((edge & (rows > 0)) | (columns == 0), above, left))
        error[:, 0, 0] = float("inf")
        return error


def _distance(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Largest absolute difference between rows a and b of x (N, P), in float32; a and b alike in shape."""
    return (x[a].float() - x[b].float()).abs().amax(-1)
