"""Teach the vision tower to see before the language part listens.

A visual token that holds the middle of an object must tell its colour, shape, size and which way it moves. This needs
the tower alone, a fraction of the price of a full step, and supervises every object of every picture. Learnt through
answers alone, shapes had not appeared after 35,000 pictures; this way they did within minutes.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.nn import functional as F

from vlmfast.pocket import batches, state
from vlmfast.pocket.render import render
from vlmfast.pocket.scenes import COLOUR_NAMES, DIRECTIONS, NEEDLE, SHAPES, SIZES, Rng, Scene, moving, still

FRESH = 20  # steps in which only the reader learns
WEIGHTS = (2.0, 1.0, 0.3, 1.0)
KINDS = ((*SHAPES, NEEDLE), COLOUR_NAMES, SIZES, ("", *DIRECTIONS))


def targets(scenes: list[Scene], at: float, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token indices (n,) into the flat visual tokens of the batch, and the four labels (n, 4) of the objects there."""
    where, what = [], []
    for number, scene in enumerate(scenes):
        taken: dict[int, list[int]] = {}
        for obj in scene.objects:
            if not (obj.t_in <= at < obj.t_out) or any(b <= at < b + 1 for b in obj.blinks):
                continue
            dx, dy = DIRECTIONS.get(obj.move, (0.0, 0.0))
            done = obj.travel * (at + 0.25) / max(scene.frames / scene.fps, 1e-6)
            column, row = int((obj.x + dx * done) * columns), int((obj.y + dy * done) * rows)
            if 0 <= column < columns and 0 <= row < rows:
                token = (number * rows + row) * columns + column
                taken[token] = [k.index(v) for k, v in zip(KINDS, (obj.shape, obj.colour, obj.size, obj.move))]
        where += list(taken)
        what += list(taken.values())
    return torch.tensor(where), torch.tensor(what)


class Eyes:
    """Trains `model.model.visual` through a throw-away linear reader; `step` is one small batch."""

    def __init__(self, model: Any, device: torch.device, rows: int = 64) -> None:
        width = model.config.get_text_config().hidden_size
        self.visual, self.device, self.rows, self.steps = model.model.visual, device, rows, 0
        reader = torch.nn.Sequential(torch.nn.RMSNorm(width), torch.nn.Linear(width, sum(map(len, KINDS))))
        self.reader = reader.to(device)
        # the reader is an end, like a language model's head: AdamW, not Muon
        self.both = torch.nn.ModuleDict({"visual": self.visual, "lm_head": self.reader})
        self.opts = state.optimizers(self.both, 1.0)

    def step(self, number: int, lr: float) -> torch.Tensor:
        """One step at rate `lr` on batch `number`; the share of (shape, colour, size, movement) read rightly (4,)."""
        rng = Rng(1, 1004, number)
        at, clips = float(rng.n(4)), number % 3 == 0
        size = (64, 64) if number % 8 else (96, 96)
        if clips:
            scenes = [moving(Rng(1, 1005, number, i), "train", size, 4, "motion") for i in range(self.rows)]
        else:
            scenes = [still(Rng(1, 1006, number, i), "train", size, (3, 6), text=0.2) for i in range(self.rows)]
        frames = render(scenes, self.device, times=[at, at + 0.5] if clips else None)
        pixels, grid = batches.patchify(frames)
        where, what = targets(scenes, at if clips else 0.0, grid[1] // 2, grid[2] // 2)
        where, what = where.to(self.device), what.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            grids = torch.tensor([grid] * self.rows, device=self.device)
            tokens = self.visual(pixels, grid_thw=grids).pooler_output[where].float()
        if self.steps < FRESH:  # a reader that knows nothing yet has nothing to teach
            tokens = tokens.detach()
        read = self.reader(tokens).split([len(k) for k in KINDS], -1)
        loss = sum(w * F.cross_entropy(r, what[:, i]) for i, (w, r) in enumerate(zip(WEIGHTS, read)))
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.both.parameters(), 1.0)
        for opt, factor in zip(self.opts, (state.MUON, 1.0)):
            for group in opt.param_groups:
                group["lr"] = lr * factor * (3.0 if self.steps < FRESH else 1.0)
            opt.step()
            opt.zero_grad(set_to_none=True)
        self.steps += 1
        return torch.stack([(r.argmax(-1) == what[:, i]).float().mean() for i, r in enumerate(read)]).detach()

    def train(self, seconds: float, lr: float, log: Any, offset: int = 0) -> None:
        """Steps for about `seconds`, with a short warm-up and a decay; `offset` is the first batch number."""
        spent, seen = 0.0, []
        while spent < seconds:
            begun = time.monotonic()
            share = min(1.0, (self.steps + 1) / 30) * min(1.0, max(0.05, 2 * (1 - spent / seconds)))
            seen.append(self.step(offset + self.steps, lr * share))
            spent += min(time.monotonic() - begun, 30.0)
            if self.steps % 40 == 0:
                log.write(eyes=self.steps, seconds=round(spent), **shares(seen))
                seen.clear()


def shares(seen: list[torch.Tensor]) -> dict[str, float]:
    """Mean of what `Eyes.step` returned, by name."""
    return {n: float(v) for n, v in zip(("shape", "colour", "size", "move"), torch.stack(seen).mean(0))}
