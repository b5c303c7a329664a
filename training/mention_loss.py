"""Teach the words of a question to find what they name: a side task on the text's hidden states, in training only.

An answer tells once per question whether a "red circle" was looked up rightly, and of "is there a red circle ?" it
tells one bit that nothing but the whole search explains: presence stayed at chance for 35,000 rows. This tells it at
every mention. At each colour or shape word of a question, and where it names a second or the flash, a throw-away reader
after text layer `LAYER` says how many objects are meant and, where it is one, its place, colour, shape, way, when it
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
    out = {batches.ids_of(c)[0]: (c, "") for c in COLOUR_NAMES}
    for shape in FORMS:
        plural = shape + ("es" if shape == "cross" else "s")
        out |= {ids[0]: ("", shape) for ids in (batches.ids_of(shape), batches.ids_of(plural)) if len(ids) == 1}
    return out


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
            at = scene.flash if self.second < 0 else self.second
            brief = self.second < 0  # the flash is asked about what shows up with it and goes
            found = [o for o in scene.objects if o.t_in == at and o.t_in >= 1 and (o.t_out == o.t_in + 1 or not brief)]
        else:
            found = [o for o in scene.objects if self.colour in ("", o.colour) and self.shape in ("", o.shape)]
        if self.shape == NEEDLE or (self.colour and self.shape):
            return found
        return [o for o in found if o.shape != NEEDLE]  # counts, times and lone attributes are of ordinary objects


def meant(ids: list[int], asked: list[bool]) -> list[Mention]:
    """Every mention in one row, in order.

    ids: token ids; asked: is the token part of a question? At a colour only the colour is known, at a shape after it
    both are; a number after "second" is a time at its last digit.
    """
    words, numbers, out = _words(), _digits(), []
    second, flashes, number = (batches.ids_of(w)[0] for w in ("second", "flashes", "number"))
    run = ""  # the digits after "second" so far
    for i, token in enumerate(ids):
        if not asked[i]:
            continue
        if token in words:
            colour, shape = words[token]
            if shape and i and asked[i - 1]:
                colour = words.get(ids[i - 1], ("", ""))[0]
            out.append(Mention(i, colour, shape))
        elif token == flashes:
            out.append(Mention(i, second=-1))
        elif token == number:
            out.append(Mention(i, number=True))
        if token in numbers and i and (run or ids[i - 1] == second):
            run += numbers[token]
            if i + 1 == len(ids) or ids[i + 1] not in numbers:
                out.append(Mention(i, second=int(run)))
        else:
            run = ""
    return out


@lru_cache(maxsize=1)
def _digits() -> dict[int, str]:
    return {batches.ids_of(d)[0]: d for d in "0123456789"}


def label(mention: Mention, scene: Scene) -> list[int]:
    """What is true of the objects that are meant, in the order of `KINDS`."""
    if mention.number:
        written = next((t.string for t in scene.texts if t.string.isdigit()), None)
        known = [OPEN] * CHARACTERS if written is None else [GLYPHS.index(c) for c in written.ljust(CHARACTERS)]
        return [*[OPEN] * OF_OBJECTS, *known]
    found = mention.objects(scene)
    about = _about(found[0]) if len(found) == 1 else [OPEN] * (OF_OBJECTS - 1)
    return [min(len(found), MOST), *about, *[OPEN] * CHARACTERS]


def _about(obj: Obj) -> list[int]:
    return [
        obj.cell, COLOUR_NAMES.index(obj.colour), FORMS.index(obj.shape), WAYS.index(obj.move),
        min(int(obj.t_in), SECONDS - 1), min(len(obj.blinks), MOST),
    ]  # fmt: skip


def reader(width: int) -> torch.nn.Module:
    """The throw-away reader of hidden states (..., width)."""
    return torch.nn.Sequential(torch.nn.RMSNorm(width), torch.nn.Linear(width, sum(n for n, _ in KINDS.values())))


def loss(read: torch.nn.Module, hidden: Tensor, ids: Tensor, labels: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Loss on hidden states (B, S, D) of chats `ids` (B, S) about `scenes`; `labels` (B, S) are -100 in questions."""
    where: list[tuple[int, int]] = []
    true: list[list[int]] = []
    for row, (tokens, answers, scene) in enumerate(zip(ids.tolist(), labels.tolist(), scenes)):
        for mention in meant(tokens, [a < 0 for a in answers]):
            where.append((row, mention.column))
            true.append(label(mention, scene))
    if not where:
        return hidden.new_zeros(())
    at, what = torch.tensor(where, device=hidden.device), torch.tensor(true, device=hidden.device)
    parts = read(hidden[at[:, 0], at[:, 1]].float()).split([n for n, _ in KINDS.values()], -1)
    total = hidden.new_zeros((), dtype=torch.float32)
    for i, (logits, (_, weight)) in enumerate(zip(parts, KINDS.values())):
        known = what[:, i] != OPEN
        if bool(known.any()):
            total = total + weight * F.cross_entropy(logits[known], what[known, i])
    return WEIGHT * total
