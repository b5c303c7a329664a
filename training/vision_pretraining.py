"""Trains the vision tower alone, before the language part: every visual token predicts what it shows.

Each predicts what has its middle there: an object's shape, colour, size and movement, up to two written
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
    labels = torch.full((len(scenes), rows, columns, len(KINDS)), NOWHERE)
    labels[..., 0] = labels[..., 4] = labels[..., 5] = 0
    for scene_index, scene in enumerate(scenes):
        for obj in scene.objects:
            if not (obj.t_in <= at < obj.t_out) or any(blink <= at < blink + 1 for blink in obj.blinks):
                continue
            step_x, step_y = DIRECTIONS.get(obj.move, (0.0, 0.0))
            distance = obj.travel * (at + 0.25) / max(scene.frames / scene.fps, 1e-6)
            column, row = int((obj.x + step_x * distance) * columns), int((obj.y + step_y * distance) * rows)
            if 0 <= column < columns and 0 <= row < rows:  # a later object covers an earlier one
                described = (obj.shape, obj.colour, obj.size, obj.move)
                indices = [kind_values.index(value) for kind_values, value in zip(KINDS.values(), described)]
                labels[scene_index, row, column, :4] = torch.tensor(indices)
        for text in scene.texts:
            for position, character in enumerate(text.string):
                token_labels = labels[(scene_index, *char_token(text, position, scene, rows, columns))]
                token_labels[5 if token_labels[4] else 4] = GLYPHS.index(character)
    return labels.flatten(0, 2)


def char_token(text: Text, character_index: int, scene: Scene, rows: int, columns: int) -> tuple[int, int]:
    """(row, column) of the token that holds the middle of character `i`."""
    offset = 6 * character_index + 2.5 - 3 * len(text.string)  # in font dots, from the middle of the text
    centre_x = text.x + offset * text.dot * min(scene.height, scene.width) / scene.width
    return int(text.y * rows), min(int(centre_x * columns), columns - 1)


class VisionReader:
    """Trains `model.model.visual` through a throw-away linear reader; `step` is one small batch."""

    def __init__(self, model: Any, device: torch.device, rows: int = 64) -> None:
        hidden_size = model.config.get_text_config().hidden_size
        self.visual, self.device, self.rows, self.steps = model.model.visual, device, rows, 0
        num_outputs = sum(map(len, KINDS.values()))
        reader = torch.nn.Sequential(torch.nn.RMSNorm(hidden_size), torch.nn.Linear(hidden_size, num_outputs))
        self.reader = reader.to(device)
        # the reader is an end, like a language model's head: AdamW, not Muon
        self.both = torch.nn.ModuleDict({"visual": self.visual, "lm_head": self.reader})
        self.opts = checkpoint.optimizers(self.both, 1.0)

    def step(self, number: int, lr: float) -> dict[str, float]:
        """One step at rate `lr` on batch `number`; the share of what is there that was read rightly."""
        rng = Rng(1, 1004, number)
        second, is_clip = float(rng.n(4)), number % 3 == 0
        side = {2: 96, 5: 128, 10: 96, 13: 192}.get(number % 16, 64)
        size, rows = (side, side), max(8, self.rows * 64 * 64 // side**2)
        if is_clip:
            sources = [Rng(1, 1005, number, row_index) for row_index in range(rows)]
            scenes = [moving(rng, "train", size, 4 + number % 5, "motion") for rng in sources]
        else:
            sources = [Rng(1, 1006, number, row_index) for row_index in range(rows)]
            scenes = [still(rng, "train", size, (1, 6), text=0.5) for rng in sources]
        frames = render(scenes, self.device, times=[second, second + 0.5] if is_clip else None)
        pixels, grid = batches.patchify(frames)
        true_labels = targets(scenes, second if is_clip else 0.0, grid[1] // 2, grid[2] // 2).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            grids = torch.tensor([grid] * len(scenes), device=self.device)
            tokens = self.visual(pixels, grid_thw=grids).pooler_output.float()
        if self.steps < FRESH:  # a reader that knows nothing yet has nothing to teach
            tokens = tokens.detach()
        predicted = dict(zip(KINDS, self.reader(tokens).split(list(map(len, KINDS.values())), -1)))
        loss = torch.zeros((), device=self.device)
        for kind_index, (name, logits) in enumerate(predicted.items()):
            class_weights = torch.ones(logits.shape[-1], device=self.device)
            class_weights[0] = NOTHING.get(name, 1.0)
            labels = true_labels[:, kind_index]
            loss = loss + WEIGHTS[name] * F.cross_entropy(logits, labels, weight=class_weights, ignore_index=NOWHERE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.both.parameters(), 1.0)
        checkpoint.set_rate(self.opts, lr * (3.0 if self.steps < FRESH else 1.0))
        for optimizer in self.opts:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        pairs = zip(predicted.items(), true_labels.unbind(1), strict=True)
        return {name: right(logits, labels, name in NOTHING) for (name, logits), labels in pairs}

    def train(self, seconds: float, lr: float, log: Any, offset: int = 0) -> None:
        """Steps for about `seconds`, with a short warm-up and a decay; `offset` is the first batch number."""
        seconds_spent = 0.0
        results: list[dict[str, float]] = []
        while seconds_spent < seconds:
            started = time.monotonic()
            rate_share = min(1.0, (self.steps + 1) / 30) * min(1.0, max(0.05, 2 * (1 - seconds_spent / seconds)))
            results.append(self.step(offset + self.steps, lr * rate_share))
            seconds_spent += min(time.monotonic() - started, 30.0)
            if self.steps % 40 == 0:
                log.write(eyes=self.steps, seconds=round(seconds_spent), **shares(results))
                results.clear()


def right(logits: torch.Tensor, labels: torch.Tensor, nothing: bool) -> float:
    """Share of the labelled tokens (n,) with the right likeliest answer; label 0 left out where it means nothing."""
    is_labelled = labels > 0 if nothing else labels != NOWHERE
    return float((logits.argmax(-1) == labels)[is_labelled].float().mean())


def shares(results: list[dict[str, float]]) -> dict[str, float]:
    """Mean of what `VisionReader.step` returned, by name; steps that asked nothing of a kind do not count."""
    return {kind: float(torch.tensor([result[kind] for result in results]).nanmean()) for kind in KINDS}
