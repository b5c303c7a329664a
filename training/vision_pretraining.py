"""Teach the vision tower to see before the language part listens.

Every visual token must tell what has its middle there: an object's shape, colour, size and movement, up to two written
characters, or nothing. This needs the tower alone, a fraction of the price of a full step, and supervises every token
of every picture. Learnt through answers alone, shapes had not appeared after 35,000 pictures; this way they did within
minutes.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.nn import functional as F

from training import batches, checkpoint
from vlmfast.pocket.render import FONT, render
from vlmfast.pocket.scenes import COLOUR_NAMES, DIRECTIONS, NEEDLE, SHAPES, SIZES, Rng, Scene, Text, moving, still

FRESH = 20  # steps in which only the reader learns
NOWHERE = -100  # label of what a token cannot tell: the colour of no object
GLYPHS = ("", *FONT)
KINDS: dict[str, tuple[str, ...]] = {
    "shape": ("", *SHAPES, NEEDLE),
    "colour": COLOUR_NAMES,
    "size": SIZES,
    "move": ("", *DIRECTIONS),
    "first": GLYPHS,
    "second": GLYPHS,
}
WEIGHTS = {"shape": 2.0, "colour": 1.0, "size": 0.3, "move": 1.0, "first": 2.0, "second": 1.0}
NOTHING = {"shape": 0.2, "first": 0.05, "second": 0.05}  # weight of the commonest answer


def targets(scenes: list[Scene], at: float, rows: int, columns: int) -> torch.Tensor:
    """Labels (B * rows * columns, 6) of all visual tokens at second `at`, in the order of `KINDS`."""
    out = torch.full((len(scenes), rows, columns, len(KINDS)), NOWHERE)
    out[..., 0] = out[..., 4] = out[..., 5] = 0
    for number, scene in enumerate(scenes):
        for obj in scene.objects:
            if not (obj.t_in <= at < obj.t_out) or any(b <= at < b + 1 for b in obj.blinks):
                continue
            dx, dy = DIRECTIONS.get(obj.move, (0.0, 0.0))
            done = obj.travel * (at + 0.25) / max(scene.frames / scene.fps, 1e-6)
            column, row = int((obj.x + dx * done) * columns), int((obj.y + dy * done) * rows)
            if 0 <= column < columns and 0 <= row < rows:  # a later object covers an earlier one
                said = (obj.shape, obj.colour, obj.size, obj.move)
                out[number, row, column, :4] = torch.tensor([k.index(v) for k, v in zip(KINDS.values(), said)])
        for text in scene.texts:
            for i, char in enumerate(text.string):
                slots = out[(number, *char_token(text, i, scene, rows, columns))]
                slots[5 if slots[4] else 4] = GLYPHS.index(char)
    return out.flatten(0, 2)


def char_token(text: Text, i: int, scene: Scene, rows: int, columns: int) -> tuple[int, int]:
    """(row, column) of the token that holds the middle of character `i`."""
    x = text.x + (6 * i + 2.5 - 3 * len(text.string)) * text.dot * min(scene.height, scene.width) / scene.width
    return int(text.y * rows), min(int(x * columns), columns - 1)


class VisionReader:
    """Trains `model.model.visual` through a throw-away linear reader; `step` is one small batch."""

    def __init__(self, model: Any, device: torch.device, rows: int = 64) -> None:
        width = model.config.get_text_config().hidden_size
        self.visual, self.device, self.rows, self.steps = model.model.visual, device, rows, 0
        reader = torch.nn.Sequential(torch.nn.RMSNorm(width), torch.nn.Linear(width, sum(map(len, KINDS.values()))))
        self.reader = reader.to(device)
        # the reader is an end, like a language model's head: AdamW, not Muon
        self.both = torch.nn.ModuleDict({"visual": self.visual, "lm_head": self.reader})
        self.opts = checkpoint.optimizers(self.both, 1.0)

    def step(self, number: int, lr: float) -> dict[str, float]:
        """One step at rate `lr` on batch `number`; the share of what is there that was read rightly."""
        rng = Rng(1, 1004, number)
        at, clips = float(rng.n(4)), number % 3 == 0
        side = {2: 96, 5: 128, 10: 96, 13: 192}.get(number % 16, 64)
        size, rows = (side, side), max(8, self.rows * 64 * 64 // side**2)
        if clips:
            scenes = [moving(Rng(1, 1005, number, i), "train", size, 4 + number % 5, "motion") for i in range(rows)]
        else:
            scenes = [still(Rng(1, 1006, number, i), "train", size, (1, 6), text=0.5) for i in range(rows)]
        frames = render(scenes, self.device, times=[at, at + 0.5] if clips else None)
        pixels, grid = batches.patchify(frames)
        what = targets(scenes, at if clips else 0.0, grid[1] // 2, grid[2] // 2).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            grids = torch.tensor([grid] * len(scenes), device=self.device)
            tokens = self.visual(pixels, grid_thw=grids).pooler_output.float()
        if self.steps < FRESH:  # a reader that knows nothing yet has nothing to teach
            tokens = tokens.detach()
        read = dict(zip(KINDS, self.reader(tokens).split([len(k) for k in KINDS.values()], -1)))
        loss = torch.zeros((), device=self.device)
        for i, (name, logits) in enumerate(read.items()):
            rare = torch.ones(logits.shape[-1], device=self.device)
            rare[0] = NOTHING.get(name, 1.0)
            loss = loss + WEIGHTS[name] * F.cross_entropy(logits, what[:, i], weight=rare, ignore_index=NOWHERE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.both.parameters(), 1.0)
        checkpoint.set_rate(self.opts, lr * (3.0 if self.steps < FRESH else 1.0))
        for opt in self.opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        self.steps += 1
        return {name: right(logits, what[:, i], name in NOTHING) for i, (name, logits) in enumerate(read.items())}

    def train(self, seconds: float, lr: float, log: Any, offset: int = 0) -> None:
        """Steps for about `seconds`, with a short warm-up and a decay; `offset` is the first batch number."""
        spent = 0.0
        seen: list[dict[str, float]] = []
        while spent < seconds:
            begun = time.monotonic()
            share = min(1.0, (self.steps + 1) / 30) * min(1.0, max(0.05, 2 * (1 - spent / seconds)))
            seen.append(self.step(offset + self.steps, lr * share))
            spent += min(time.monotonic() - begun, 30.0)
            if self.steps % 40 == 0:
                log.write(eyes=self.steps, seconds=round(spent), **shares(seen))
                seen.clear()


def right(logits: torch.Tensor, what: torch.Tensor, nothing: bool) -> float:
    """Share of the labelled tokens (n,) with the right likeliest answer; label 0 left out where it means nothing."""
    asked = what > 0 if nothing else what != NOWHERE
    return float((logits.argmax(-1) == what)[asked].float().mean())


def shares(seen: list[dict[str, float]]) -> dict[str, float]:
    """Mean of what `VisionReader.step` returned, by name; steps that asked nothing of a kind do not count."""
    return {n: float(torch.tensor([s[n] for s in seen]).nanmean()) for n in KINDS}
