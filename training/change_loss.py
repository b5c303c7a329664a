"""Trains the early text layers to notice change: an auxiliary loss on the hidden states of visual tokens.

The tower encodes one second at a time; only the text layers can compare seconds and notice that something has appeared
or is gone. Answers supervise that once per question, this loss once per token. A linear reader, used in training only,
predicts from text layer `LAYER` for every visual token what happens there, in which second, in which of the nine places
it lies, whether the light flashes, and which character of a written string is the first in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training import mention_loss
from training.vision_pretraining import char_token
from vlmfast.pocket.scenes import DIRECTIONS, PLACES, Obj, Scene

LAYER = 2
LISTENED = (LAYER, mention_loss.LAYER)
WEIGHT = 0.3  # of the side task in the loss
NOTHING, STAYS, COMES, GONE = range(4)
EVENT = torch.tensor([0.05, 0.15, 4.0, 2.0])  # weight of each: one token in a hundred tells that something comes
CHANGE = 3.0  # weight of the event beside place and second
SECONDS = 64
RANK = torch.tensor([0.05, 1.0, 1.0, 1.0, 1.0])  # weight: no character begins here, or the first, second, ...
LIT = torch.tensor([0.2, 1.0])
HEADS = (len(EVENT), SECONDS, len(PLACES), len(RANK), len(LIT))


def shown(obj: Obj, second: int) -> bool:
    """Is the object drawn in the frames of this second?"""
    return obj.t_in <= second < obj.t_out and second not in obj.blinks


def token_of(obj: Obj, second: int, scene: Scene, rows: int, columns: int) -> tuple[int, int] | None:
    """(row, column) of the token that holds the object's middle during this second."""
    step_x, step_y = DIRECTIONS.get(obj.move, (0.0, 0.0))
    distance = obj.travel * (second + 0.25) / max(scene.frames / scene.fps, 1e-6)
    column, row = int((obj.x + step_x * distance) * columns), int((obj.y + step_y * distance) * rows)
    return (row, column) if 0 <= column < columns and 0 <= row < rows else None


def events(scenes: Sequence[Scene], grid: tuple[int, int, int]) -> Tensor:
    """What happens at each visual token, int64 (B, t, h, w); a grid step is one second."""
    labels = torch.full((len(scenes), *grid), NOTHING)
    for scene_index, scene in enumerate(scenes):
        for obj in scene.objects:  # a later object covers an earlier one
            for second in range(grid[0]):
                visible_before = second > 0 and shown(obj, second - 1)
                if shown(obj, second):
                    position = token_of(obj, second, scene, *grid[1:])
                    event = STAYS if visible_before or not second else COMES
                elif visible_before:
                    position, event = token_of(obj, second - 1, scene, *grid[1:]), GONE
                else:
                    continue
                if position is not None:
                    labels[scene_index, second, position[0], position[1]] = event
    return labels


def ranks(scenes: Sequence[Scene], rows: int, columns: int) -> Tensor:
    """1 + the number of the first character whose middle lies in each token, 0 for none: int64 (B, rows * columns)."""
    labels = torch.zeros(len(scenes), rows, columns, dtype=torch.long)
    for scene_index, scene in enumerate(scenes):
        for text in scene.texts:
            for character_index in reversed(range(len(text.string))):
                labels[(scene_index, *char_token(text, character_index, scene, rows, columns))] = character_index + 1
    return labels.flatten(1)


class Insight:
    """The side task of one training run; the reader is not kept."""

    def __init__(self, model: Any, device: torch.device, lr: float) -> None:
        text_model = model.model.language_model
        hidden_size = model.config.get_text_config().hidden_size
        event_reader = torch.nn.Sequential(torch.nn.RMSNorm(hidden_size), torch.nn.Linear(hidden_size, sum(HEADS)))
        self.reader = torch.nn.ModuleDict({"seen": event_reader, "said": mention_loss.reader(hidden_size)}).to(device)
        self.opt = torch.optim.AdamW(self.reader.parameters(), lr=lr)
        self.hidden: dict[int, Tensor] = {}
        for layer_index in LISTENED:
            text_model.layers[layer_index].register_forward_hook(partial(self._see, layer_index))

    def _see(self, layer_index: int, module: Any, args: tuple, output: Any) -> None:
        self.hidden[layer_index] = output[0] if isinstance(output, tuple) else output

    def loss(
        self, scenes: Sequence[Scene], grid: tuple[int, int, int], first: int, ids: Tensor, labels: Tensor
    ) -> Tensor:
        """Loss on the last forward's hidden states; visual tokens begin at column `first` of every row.

        ids, labels (B, S): the chats, for what their questions mention.
        """
        mention_part = mention_loss.loss(self.reader["said"], self.hidden[mention_loss.LAYER], ids, labels, scenes)
        return mention_part + self._seen(scenes, grid, first)

    def _seen(self, scenes: Sequence[Scene], grid: tuple[int, int, int], first: int) -> Tensor:
        hidden, (num_frames, height, width) = self.hidden[LAYER], grid
        event_labels = events(scenes, grid).flatten(1).to(hidden.device)
        predicted = self.reader["seen"](hidden[:, first : first + num_frames * height * width].float())
        event_logits, second_logits, place_logits, rank_logits, flash_logits = predicted.split(HEADS, -1)
        loss = F.cross_entropy(event_logits.flatten(0, 1), event_labels.flatten(), weight=EVENT.to(event_labels.device))
        loss = loss * (CHANGE if num_frames > 1 else 1.0)
        row_third, column_third = torch.arange(height) * 3 // height, torch.arange(width) * 3 // width
        device = event_labels.device
        places = (row_third[:, None] * 3 + column_third).flatten().repeat(num_frames)
        places = places.to(device).expand_as(event_labels)
        seconds = torch.arange(num_frames).repeat_interleave(height * width).clamp(max=SECONDS - 1)
        seconds = seconds.to(device).expand_as(event_labels)
        occupied = event_labels > NOTHING
        if bool(occupied.any()):
            loss = loss + 0.5 * F.cross_entropy(place_logits[occupied], places[occupied])
            if num_frames > 1:
                loss = loss + 0.5 * F.cross_entropy(second_logits[occupied], seconds[occupied])
        if num_frames == 1:
            rank_labels = ranks(scenes, height, width).to(device).flatten()
            loss = loss + F.cross_entropy(rank_logits.flatten(0, 1), rank_labels, weight=RANK.to(device))
        else:
            flashes = [-1 if scene.flash is None else scene.flash for scene in scenes]
            flash_labels = (seconds == torch.tensor(flashes, device=device)[:, None]).long().flatten()
            loss = loss + F.cross_entropy(flash_logits.flatten(0, 1), flash_labels, weight=LIT.to(device))
        return WEIGHT * loss

    def step(self) -> None:
        """After the backward pass."""
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        self.hidden.clear()
