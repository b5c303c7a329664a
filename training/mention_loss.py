"""Trains the words of a question to find what they name: an auxiliary loss on the text's hidden states.

An answer supervises once per question whether a "red circle" was found, and "is there a red circle ?" gives one bit
only: presence stayed at chance for 35,000 rows. This loss supervises every mention. At each colour or shape word of a
question, and where it names a second or the flash, a linear reader, used in training only, predicts from text layer
`LAYER` how many objects are meant and, where it is one, its place, colour, shape, way, when it
comes and how often it blinks; and where it asks for a number, which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from training import batches
from training.vision_pretraining import GLYPHS as FONT
from vlmfast.pocket.scenes import COLOUR_NAMES, DIRECTIONS, NEEDLE, PLACES, SHAPES, Obj, Scene

LAYER = 3
WEIGHT = 0.3  # of the side task in the loss
OPEN = -100  # label of what a mention leaves open
MOST, SECONDS, CHARACTERS = 4, 64, 4
FORMS = (*SHAPES, NEEDLE)
GLYPHS = (" ", *FONT[1:])  # a space where the string has ended
WAYS = ("", *DIRECTIONS)
KINDS: dict[str, tuple[int, float]] = {  # classes and weight of each
    "count": (MOST + 1, 1.0), "place": (len(PLACES), 1.0), "colour": (len(COLOUR_NAMES), 0.5),
    "shape": (len(FORMS), 0.5), "move": (len(WAYS), 0.5), "arrives": (SECONDS, 0.7), "blinks": (MOST + 1, 0.5),
    **{f"character {i}": (len(GLYPHS), 0.7) for i in range(CHARACTERS)},
}  # fmt: skip
OF_OBJECTS = len(KINDS) - CHARACTERS


@lru_cache(maxsize=1)
def _words() -> dict[int, tuple[str, str]]:
    """Token id -> (colour, "") or ("", shape); plurals name the shape too."""
    named = {batches.ids_of(colour)[0]: (colour, "") for colour in COLOUR_NAMES}
    for shape in FORMS:
        plural = shape + ("es" if shape == "cross" else "s")
        named |= {ids[0]: ("", shape) for ids in (batches.ids_of(shape), batches.ids_of(plural)) if len(ids) == 1}
    return named


@dataclass(frozen=True)
class Mention:
    """What a word of a question names: objects of a colour, of a shape or of both, what comes at a second (-1: when the
    light flashes), or the number that is written."""

    column: int
    colour: str = ""
    shape: str = ""
    second: int | None = None
    number: bool = False

    def objects(self, scene: Scene) -> list[Obj]:
        """The objects of the scene that are meant."""
        if self.second is not None:
            start_second = scene.flash if self.second < 0 else self.second
            only_brief = self.second < 0  # the flash is asked about what shows up with it and goes
            arriving = [obj for obj in scene.objects if obj.t_in == start_second and obj.t_in >= 1]
            matching = [obj for obj in arriving if obj.t_out == obj.t_in + 1 or not only_brief]
        else:
            matching = [
                obj for obj in scene.objects if self.colour in ("", obj.colour) and self.shape in ("", obj.shape)
            ]
        if self.shape == NEEDLE or (self.colour and self.shape):
            return matching
        # counts, times and lone attributes are of ordinary objects
        return [obj for obj in matching if obj.shape != NEEDLE]


def meant(ids: list[int], asked: list[bool]) -> list[Mention]:
    """Every mention in one row, in order.

    ids: token ids; asked: is the token part of a question? At a colour only the colour is known, at a shape after it
    both are; a number after "second" is a time at its last digit.
    """
    words, digit_ids, mentions = _words(), _digits(), []
    second, flashes, number = (batches.ids_of(word)[0] for word in ("second", "flashes", "number"))
    second_digits = ""  # the digits after "second" so far
    for column, token in enumerate(ids):
        if not asked[column]:
            continue
        if token in words:
            colour, shape = words[token]
            if shape and column and asked[column - 1]:
                colour = words.get(ids[column - 1], ("", ""))[0]
            mentions.append(Mention(column, colour, shape))
        elif token == flashes:
            mentions.append(Mention(column, second=-1))
        elif token == number:
            mentions.append(Mention(column, number=True))
        if token in digit_ids and column and (second_digits or ids[column - 1] == second):
            second_digits += digit_ids[token]
            if column + 1 == len(ids) or ids[column + 1] not in digit_ids:
                mentions.append(Mention(column, second=int(second_digits)))
        else:
            second_digits = ""
    return mentions


@lru_cache(maxsize=1)
def _digits() -> dict[int, str]:
    return {batches.ids_of(digit)[0]: digit for digit in "0123456789"}


def label(mention: Mention, scene: Scene) -> list[int]:
    """What is true of the objects that are meant, in the order of `KINDS`."""
    if mention.number:
        numbers = [text.string for text in scene.texts if text.string.isdigit()]
        character_labels = [OPEN] * CHARACTERS
        if numbers:
            character_labels = [GLYPHS.index(character) for character in numbers[0].ljust(CHARACTERS)]
        return [*[OPEN] * OF_OBJECTS, *character_labels]
    meant_objects = mention.objects(scene)
    object_labels = _about(meant_objects[0]) if len(meant_objects) == 1 else [OPEN] * (OF_OBJECTS - 1)
    return [min(len(meant_objects), MOST), *object_labels, *[OPEN] * CHARACTERS]


def _about(obj: Obj) -> list[int]:
    return [
        obj.cell, COLOUR_NAMES.index(obj.colour), FORMS.index(obj.shape), WAYS.index(obj.move),
        min(int(obj.t_in), SECONDS - 1), min(len(obj.blinks), MOST),
    ]  # fmt: skip


def reader(width: int) -> torch.nn.Module:
    """The throw-away reader of hidden states (..., width)."""
    num_classes = sum(count for count, _ in KINDS.values())
    return torch.nn.Sequential(torch.nn.RMSNorm(width), torch.nn.Linear(width, num_classes))


def loss(read: torch.nn.Module, hidden: Tensor, ids: Tensor, labels: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Loss on hidden states (B, S, D) of chats `ids` (B, S) about `scenes`; `labels` (B, S) are -100 in questions."""
    positions: list[tuple[int, int]] = []
    mention_labels: list[list[int]] = []
    for row_index, (tokens, answers, scene) in enumerate(zip(ids.tolist(), labels.tolist(), scenes)):
        for mention in meant(tokens, [answer_label < 0 for answer_label in answers]):
            positions.append((row_index, mention.column))
            mention_labels.append(label(mention, scene))
    if not positions:
        return hidden.new_zeros(())
    label_tensor = torch.tensor(mention_labels, device=hidden.device)
    row_indices, columns = torch.tensor(positions, device=hidden.device).unbind(1)
    num_classes = [count for count, _ in KINDS.values()]
    predicted = read(hidden[row_indices, columns].float()).split(num_classes, -1)
    total_loss = hidden.new_zeros((), dtype=torch.float32)
    for kind_index, (logits, (_, weight)) in enumerate(zip(predicted, KINDS.values())):
        known = label_tensor[:, kind_index] != OPEN
        if bool(known.any()):
            total_loss = total_loss + weight * F.cross_entropy(logits[known], label_tensor[known, kind_index])
    return WEIGHT * total_loss
