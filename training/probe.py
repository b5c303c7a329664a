"""Held-out accuracy during training: one teacher-forced forward per batch.

A greedy answer is right exactly when the likeliest token is the expected one at every position of the answer, end
included, so no generation is needed. Captions and descriptions are given as the share of tokens predicted.
"""

from __future__ import annotations

from typing import Any

import torch

from training import batches, curriculum
from vlmfast.pocket import world

_COST = {"needle": 0.25, "describe": 0.25}  # share of the questions spent on expensive kinds


class Probe:
    """A fixed set of `count` test questions per kind, drawn once and kept."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._kept: dict[str, list[world.Sample]] = {}

    def samples(self, kind: str) -> list[world.Sample]:
        """The questions of one kind."""
        if kind not in self._kept:
            num_questions = max(1, int(self.count * _COST.get(kind, 1.0)))
            self._kept[kind] = [world.sample(kind, 500_000 + number, "test") for number in range(num_questions)]
        return self._kept[kind]

    @torch.no_grad()
    def measure(self, model: Any, rows: int, device: torch.device) -> dict[str, float]:
        """Accuracy per kind (clips only once they are trained)."""
        kinds = (
            [k for k in world.KINDS if rows > 1000 * curriculum.CLIPS_FROM or k not in world.CLIP_KINDS]
            if self.count
            else []
        )
        was_training, result = model.training, {}
        model.eval()
        for kind in kinds:
            num_right = num_total = 0
            items = self.samples(kind)
            for start in range(0, len(items), 32):
                batch_items = items[start : start + 32]
                hits, tokens = teacher_forced(model, batch_items, device, fast=True)
                if kind in world.FREE_TEXT:
                    num_right += sum(tokens)
                    num_total += sum(len(batches.ids_of(item.answer)) + 1 for item in batch_items)
                else:
                    num_right, num_total = num_right + sum(hits), num_total + len(batch_items)
            result[kind] = round(num_right / num_total, 3)
        model.train(was_training)
        return result


@torch.no_grad()
def teacher_forced(
    model: Any, items: list[world.Sample], device: torch.device, blank: bool = False, fast: bool = False
) -> tuple[list[bool], list[int]]:
    """For samples of one frame shape: is each answer exactly the greedy one, and how many of its tokens are."""
    frames = torch.stack([item.frames for item in items]).to(device)
    if blank:
        frames = torch.full_like(frames, 127)
    chats = [[*item.before, (item.question, item.answer)] for item in items]
    batch = batches.tensors(model, frames, chats, items[0].fps, device)
    labels = batch.pop("labels")
    is_assistant = batch["input_ids"] == batches.ids_of("assistant")[0]
    # where the answer of the last turn begins
    last_answer = is_assistant.shape[1] - 1 - is_assistant.flip(1).int().argmax(1)
    labels[torch.arange(labels.shape[1], device=labels.device) < last_answer[:, None]] = -100
    with torch.autocast(device.type, torch.bfloat16, enabled=fast):
        predicted = model(**batch, use_cache=False).logits[:, :-1].argmax(-1)
    is_answer = labels[:, 1:] >= 0
    is_right = (predicted == labels[:, 1:]) & is_answer
    return (is_right.sum(1) == is_answer.sum(1)).tolist(), is_right.sum(1).tolist()
