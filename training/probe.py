"""Held-out accuracy during training: one teacher-forced forward per batch.

A greedy answer is right exactly when the likeliest token is the expected one at every position of the answer, end
included, so no generation is needed. Captions are given as the share of tokens predicted.
"""

from __future__ import annotations

from typing import Any

import torch

from training import batches, curriculum
from vlmfast.pocket import world

_COST = {"needle": 0.25}  # share of the questions spent on expensive kinds


class Probe:
    """A fixed set of `count` test questions per kind, drawn once and kept."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._kept: dict[str, list[world.Sample]] = {}

    def samples(self, kind: str) -> list[world.Sample]:
        """The questions of one kind."""
        if kind not in self._kept:
            many = max(1, int(self.count * _COST.get(kind, 1.0)))
            self._kept[kind] = [world.sample(kind, 500_000 + i, "test") for i in range(many)]
        return self._kept[kind]

    @torch.no_grad()
    def measure(self, model: Any, rows: int, device: torch.device) -> dict[str, float]:
        """Accuracy per kind (clips only once they are trained)."""
        kinds = (
            [k for k in world.KINDS if rows > 1000 * curriculum.CLIPS_FROM or k not in world.CLIP_KINDS]
            if self.count
            else []
        )
        was, result = model.training, {}
        model.eval()
        for kind in kinds:
            right = total = 0
            items = self.samples(kind)
            for i in range(0, len(items), 32):
                part = items[i : i + 32]
                hits, tokens = teacher_forced(model, part, device, fast=True)
                if kind == "caption":
                    right, total = right + sum(tokens), total + sum(len(batches.ids_of(s.answer)) + 1 for s in part)
                else:
                    right, total = right + sum(hits), total + len(part)
            result[kind] = round(right / total, 3)
        model.train(was)
        return result


@torch.no_grad()
def teacher_forced(
    model: Any, items: list[world.Sample], device: torch.device, blank: bool = False, fast: bool = False
) -> tuple[list[bool], list[int]]:
    """For samples of one frame shape: is each answer exactly the greedy one, and how many of its tokens are."""
    frames = torch.stack([s.frames for s in items]).to(device)
    if blank:
        frames = torch.full_like(frames, 127)
    chats = [[*s.before, (s.question, s.answer)] for s in items]
    batch = batches.tensors(model, frames, chats, items[0].fps, device)
    labels = batch.pop("labels")
    speaks = batch["input_ids"] == batches.ids_of("assistant")[0]
    last = speaks.shape[1] - 1 - speaks.flip(1).int().argmax(1)  # where the turn that counts begins to be answered
    labels[torch.arange(labels.shape[1], device=labels.device) < last[:, None]] = -100
    with torch.autocast(device.type, torch.bfloat16, enabled=fast):
        guess = model(**batch, use_cache=False).logits[:, :-1].argmax(-1)
    asked = labels[:, 1:] >= 0
    good = (guess == labels[:, 1:]) & asked
    return (good.sum(1) == asked.sum(1)).tolist(), good.sum(1).tolist()
