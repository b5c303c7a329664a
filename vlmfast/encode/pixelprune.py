"""PixelPrune: drops patches that their neighbours predict, before the vision tower runs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.core import UserError, VisualTokens
from vlmfast.encode.base import Block, Pruner, ranked
from vlmfast.fields import Fraction, NonNegativeFloat
from vlmfast.kernels import by_parts, in_parts
from vlmfast.runtime.transfers import to_device


@dataclass(frozen=True)
class PixelPrune(Pruner):
    """PixelPrune (arXiv 2604.00886), for documents and screens: the edge predictor of JPEG-LS over merged patches.

    Each is predicted from its left, upper and upper-left neighbours A, B, C: as B where C is like A and not like B (a
    vertical edge), else as A; along the first row and column from the only neighbour there is. It goes when no value of
    it is further than `threshold` from the prediction; later ones are predicted from what was predicted, so errors do
    not add up. threshold 0 drops exact repeats only. Values are the processor's normalised ones (Qwen3-VL: black to
    white is 2). Frames of a video are judged one by one. Qwen towers only.

    keep is a ceiling, by default without effect: what exceeds it loses its best predicted first. Patches leave before
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
        errors = self.error(tokens)
        unpredicted = (errors > self.threshold).view(tokens.frames, -1).sum(1).clamp(min=self.floor)
        return ranked(errors, tokens.frame, min(budget, max(int(unpredicted.sum()), self.least)), self.floor, None)

    def error(self, tokens: VisualTokens) -> Tensor:
        """(N,) float32, largest distance of each token's pixels from their prediction; inf at the start of a frame."""
        pixels = self.need(tokens, "pixels")
        num_frames, height, width = tokens.grid
        token_index = torch.arange(num_frames * height * width, device=pixels.device).view(num_frames, height, width)
        if self.threshold == 0:  # predictions are exact copies: all tokens at once
            return self._repeats(pixels, token_index).flatten()
        num_places = height * width
        place = torch.arange(num_places).view(height, width)  # on the host
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        left, above = place - (column > 0).long(), place - width * (row > 0)
        corner = above - (column > 0).long()
        # where there is one neighbour only, it stands for the other
        left, above = torch.where(column > 0, left, above), torch.where(row > 0, above, left)
        diagonal = (row + column).flatten()
        order = diagonal.argsort(stable=True)  # a diagonal depends on the two before it only
        diagonal_ends = torch.bincount(diagonal).cumsum(0).tolist()
        neighbours = to_device(torch.stack([left, above, corner]).flatten(1)[:, order], pixels.device)
        order = to_device(order, pixels.device)
        source = token_index.view(num_frames, num_places).clone()  # the token whose pixels predict later ones
        tokens_in_order = source[:, order]
        errors_in_order = torch.full(source.shape, float("inf"), device=pixels.device)
        for start, end in pairwise(diagonal_ends):
            sources = source[:, neighbours[:, start:end]]  # of the left, upper and upper-left neighbour
            to_left, to_above = _distance(pixels, sources[:, 2:], sources[:, :2]).unbind(1)
            edge = (to_left <= self.threshold) & (to_above > self.threshold)
            predictor = torch.where(edge, sources[:, 1], sources[:, 0])
            current = tokens_in_order[:, start:end]
            errors_in_order[:, start:end] = difference = _distance(pixels, current, predictor)
            source[:, order[start:end]] = torch.where(difference > self.threshold, current, predictor)
        return errors_in_order[:, order.argsort()].flatten()

    def _repeats(self, pixels: Tensor, token_index: Tensor) -> Tensor:
        """`error` where only exact repeats are dropped. token_index (t, h, w): each token's row of pixels (N, P)."""
        _, height, width = token_index.shape
        rows, columns = torch.arange(height, device=pixels.device)[:, None], torch.arange(width, device=pixels.device)
        row_above, column_before = (rows - 1).clamp(min=0), (columns - 1).clamp(min=0)
        left, above = token_index[:, rows, column_before], token_index[:, row_above, columns]
        corner = token_index[:, row_above, column_before]
        edge = (_distance(pixels, corner, left) <= 0) & (_distance(pixels, corner, above) > 0)
        predictor = torch.where((edge & (rows > 0)) | (columns == 0), above, left)
        errors = _distance(pixels, token_index, predictor)
        errors[:, 0, 0] = float("inf")
        return errors


def _distance(pixels: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Largest absolute difference between two sets of rows of pixels (N, P), in float32; indices alike in shape."""

    def distance(first: Tensor, second: Tensor) -> Tensor:
        return (pixels[first].float() - pixels[second].float()).abs_().amax(-1)

    if not in_parts(pixels, max(first.numel(), second.numel()) * pixels.shape[-1]):
        return distance(first, second)
    first, second = torch.broadcast_tensors(first, second)
    return by_parts(distance, first.flatten(), second.flatten(), numbers_per_row=pixels.shape[-1]).view(first.shape)
