"""Teach the early text layers to see change: a side task on the hidden states of visual tokens, in training only.

A tower sees one second at a time. That something has appeared, or is gone, is known only to whoever compares seconds:
the text layers. Answers tell them so once per question; this tells them once per token. A throw-away reader after text
layer `LAYER` says of every visual token what happens there, in which second, in which of the nine places it lies,
whether the light flashes, and which character of a written string is the first in it.
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
    dx, dy = DIRECTIONS.get(obj.move, (0.0, 0.0))
    done = obj.travel * (second + 0.25) / max(scene.frames / scene.fps, 1e-6)
    column, row = int((obj.x + dx * done) * columns), int((obj.y + dy * done) * rows)
    return (row, column) if 0 <= column < columns and 0 <= row < rows else None


def events(scenes: Sequence[Scene], grid: tuple[int, int, int]) -> Tensor:
    """What happens at each visual token, int64 (B, t, h, w); a grid step is one second."""
    out = torch.full((len(scenes), *grid), NOTHING)
    for number, scene in enumerate(scenes):
        for obj in scene.objects:  # a later object covers an earlier one
            for second in range(grid[0]):
                before = second > 0 and shown(obj, second - 1)
                if shown(obj, second):
                    where, what = token_of(obj, second, scene, *grid[1:]), STAYS if before or not second else COMES
                elif before:
                    where, what = token_of(obj, second - 1, scene, *grid[1:]), GONE
                else:
                    continue
                if where is not None:
                    out[number, second, where[0], where[1]] = what
    return out


def ranks(scenes: Sequence[Scene], rows: int, columns: int) -> Tensor:
    """1 + the number of the first character whose middle lies in each token, 0 for none: int64 (B, rows * columns)."""
    out = torch.zeros(len(scenes), rows, columns, dtype=torch.long)
    for number, scene in enumerate(scenes):
        for text in scene.texts:
            for i in reversed(range(len(text.string))):
                out[(number, *char_token(text, i, scene, rows, columns))] = i + 1
    return out.flatten(1)


class Insight:
    """The side task of one training run; the reader is not kept."""

    def __init__(self, model: Any, device: torch.device, lr: float) -> None:
        text = model.model.language_model
        width = model.config.get_text_config().hidden_size
        seen = torch.nn.Sequential(torch.nn.RMSNorm(width), torch.nn.Linear(width, sum(HEADS)))
        self.reader = torch.nn.ModuleDict({"seen": seen, "said": mention_loss.reader(width)}).to(device)
        self.opt = torch.optim.AdamW(self.reader.parameters(), lr=lr)
        self.hidden: dict[int, Tensor] = {}
        for at in LISTENED:
            text.layers[at].register_forward_hook(partial(self._see, at))

    def _see(self, at: int, module: Any, args: tuple, output: Any) -> None:
        self.hidden[at] = output[0] if isinstance(output, tuple) else output

    def loss(
        self, scenes: Sequence[Scene], grid: tuple[int, int, int], first: int, ids: Tensor, labels: Tensor
    ) -> Tensor:
        """Loss on the last forward's hidden states; visual tokens begin at column `first` of every row.

        ids, labels (B, S): the chats, for what their questions mention.
        """
        said = mention_loss.loss(self.reader["said"], self.hidden[mention_loss.LAYER], ids, labels, scenes)
        return said + self._seen(scenes, grid, first)

    def _seen(self, scenes: Sequence[Scene], grid: tuple[int, int, int], first: int) -> Tensor:
        hidden, (t, h, w) = self.hidden[LAYER], grid
        what = events(scenes, grid).flatten(1).to(hidden.device)
        read = self.reader["seen"](hidden[:, first : first + t * h * w].float())
        event, second, place, rank, lit = read.split(HEADS, -1)
        loss = F.cross_entropy(event.flatten(0, 1), what.flatten(), weight=EVENT.to(what.device))
        loss = loss * (CHANGE if t > 1 else 1.0)
        row, column = torch.arange(h) * 3 // h, torch.arange(w) * 3 // w
        places = (row[:, None] * 3 + column).flatten().repeat(t).expand_as(what.cpu()).to(what.device)
        seconds = torch.arange(t).repeat_interleave(h * w).clamp(max=SECONDS - 1).expand_as(what.cpu()).to(what.device)
        there = what > NOTHING
        if bool(there.any()):
            loss = loss + 0.5 * F.cross_entropy(place[there], places[there])
            if t > 1:
                loss = loss + 0.5 * F.cross_entropy(second[there], seconds[there])
        if t == 1:
            order = ranks(scenes, h, w).to(what.device)
            loss = loss + F.cross_entropy(rank.flatten(0, 1), order.flatten(), weight=RANK.to(what.device))
        else:
            flash = torch.tensor([-1 if s.flash is None else s.flash for s in scenes], device=what.device)
            bright = (seconds == flash[:, None]).long()
            loss = loss + F.cross_entropy(lit.flatten(0, 1), bright.flatten(), weight=LIT.to(what.device))
        return WEIGHT * loss

    def step(self) -> None:
        """After the backward pass."""
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        self.hidden.clear()
