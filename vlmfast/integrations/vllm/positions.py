"""M-RoPE positions of a pruned prompt: text where it stands in the unpruned one, media where the grid has them.

vLLM makes positions before the tower has run, and asks again with the rows of each chunk of a prefill. Text is final
the first time. Rows of media carry their place in trailing columns, so that a row knows it wherever it goes: through
vLLM's caches, over chunks, to another process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfast.core import UserError

DIGIT = 256  # whole numbers up to 256 are exact in bfloat16, the type of the columns
COLUMNS = 6  # (t, h, w) relative to the item's start, each as two digits


@dataclass(frozen=True)
class Media:
    """An item in a prompt: its first column, its columns, and how far the text after it is from its start."""

    offset: int
    length: int
    advance: int


def columns_of(places: Tensor, like: Tensor) -> Tensor:
    """places (K, 3) int64 -> the columns (K, COLUMNS) that go behind rows, in the type of `like`."""
    return torch.cat([places // DIGIT, places % DIGIT], 1).to(like)


def places_of(columns: Tensor) -> Tensor:
    """The inverse of `columns_of`, (K, 3) int64."""
    return (columns[:, :3].float() * DIGIT + columns[:, 3:].float()).long()


def grid_places(grid: tuple[int, int, int], step: float = 1.0) -> Tensor:
    """(t * h * w, 3) int64 places of a grid's tokens. step: what one frame adds to t, cut to whole numbers."""
    num_frames, height, width = grid
    frame = (torch.arange(num_frames, dtype=torch.float64) * step).long()
    return torch.cartesian_prod(frame, torch.arange(height), torch.arange(width))


def stamped_places(is_token: Tensor, frame: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Where the columns of an unpruned video with time stamps are, relative to its start: (n + text, 3) int64.

    is_token: (n + text,) bool; frame: (n,) int64 of the tokens. Text goes on after a frame's longer side.
    """
    _, height, width = grid
    text_before, tokens_before = torch.cumsum(~is_token, 0), torch.cumsum(is_token, 0)
    frames_before = tokens_before // (height * width)
    frames_before[is_token] = frame
    places = (text_before - 1 + frames_before * max(height, width))[:, None].repeat(1, 3)
    places[is_token] += grid_places((1, height, width)).repeat(grid[0], 1) + 1
    return places


def advance(grid: tuple[int, int, int], step: float, positions: str) -> int:
    """How far the text after an item is from its start, unpruned. positions: "vllm" or "transformers"."""
    num_frames, height, width = grid
    if positions == "transformers":
        return max(height, width)
    return max(int((num_frames - 1) * step), height - 1, width - 1) + 1


def refuse_beyond_digits(farthest: int) -> None:
    """Raise UserError where an item reaches positions that its columns cannot hold."""
    if farthest >= DIGIT**2:
        raise UserError(
            f"a video that reaches {farthest} positions came in, {DIGIT**2 - 1} are the most here: take fewer frames"
        )


def prompt_positions(length: int, media: list[Media]) -> tuple[Tensor, int]:
    """(3, length) int64 and what to add to a column for its position after the prompt; media all at their start."""
    positions = torch.empty(length, dtype=torch.long)
    column = position = 0
    for item in media:
        num_text = item.offset - column
        positions[column : item.offset] = torch.arange(position, position + num_text)
        position += num_text
        column = item.offset + item.length
        positions[item.offset : column] = position
        position += item.advance
    positions[column:] = torch.arange(position, position + length - column)
    return positions.expand(3, -1).clone(), position - column


def with_places(positions: Tensor, is_media: Tensor, places: Tensor, first: int) -> tuple[Tensor, int]:
    """The positions with the rows of one chunk where they belong, and what to add to a column after the prompt.

    positions (3, L); is_media (L,) bool; places (K, 3) of the media columns from column `first` on. May be called again
    for the same rows: an item's start is read from the text in front of it.
    """
    positions = positions.clone()
    columns = is_media.nonzero()[:, 0]
    columns = columns[columns >= first][: len(places)]
    index = torch.arange(len(is_media), device=is_media.device)
    text_before = torch.where(is_media, -1, index).cummax(0).values[columns]
    start = torch.where(text_before < 0, 0, positions[0, text_before.clamp(min=0)] + 1)
    positions[:, columns] = (places.T.to(positions.device) + start).to(positions.dtype)
    return positions, int(positions[:, -1].max()) + 1 - positions.shape[1]
