"""Teach the words of a question to find what they name: a side task on the text's hidden states, in training only.

An answer tells once per question whether a "red circle" was looked up rightly, and of "is there a red circle ?" it
tells one bit that nothing but the whole search explains: presence stayed at chance for 35,000 rows. This tells it at
every mention. At each colour or shape word of a question a throw-away reader after text layer `LAYER` says how many
objects are meant and, where it is one, its place, colour, shape, way, when it comes and how often it blinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmfast.pocket import batches
from vlmfast.pocket.scenes import COLOUR_NAMES, DIRECTIONS, NEEDLE, PLACES, SHAPES, Obj, Scene

LAYER = 3
WEIGHT = 0.3  # of the side task in the loss
OPEN = -100  # label of what a mention leaves open
MOST, SECONDS = 4, 64
FORMS = (*SHAPES, NEEDLE)
WAYS = ("", *DIRECTIONS)
KINDS: dict[str, tuple[int, float]] = {  # classes and weight of each
    "count": (MOST + 1, 1.0), "place": (len(PLACES), 1.0), "colour": (len(COLOUR_NAMES), 0.5),
    "shape": (len(FORMS), 0.5), "move": (len(WAYS), 0.5), "arrives": (SECONDS, 0.7), "blinks": (MOST + 1, 0.5),
}  # fmt: skip


@lru_cache(maxsize=1)
def _words() -> dict[int, tuple[str, str]]:
    """Token id -> (colour, "") or ("", shape); plurals name the shape too."""
    out = {batches.ids_of(c)[0]: (c, "") for c in COLOUR_NAMES}
    for shape in FORMS:
        plural = shape + ("es" if shape == "cross" else "s")
        out |= {ids[0]: ("", shape) for ids in (batches.ids_of(shape), batches.ids_of(plural)) if len(ids) == 1}
    return out


def meant(ids: list[int], asked: list[bool]) -> list[tuple[int, str, str]]:
    """(column, colour, shape) of every mention in one row; a part that is not named is empty.

    ids: token ids; asked: is the token part of a question? At a colour only the colour is known, at a shape after it
    both are.
    """
    words, out = _words(), []
    for i, token in enumerate(ids):
        if token in words and asked[i]:
            colour, shape = words[token]
            if shape and i and asked[i - 1]:
                colour = words.get(ids[i - 1], ("", ""))[0]
            out.append((i, colour, shape))
    return out


def label(scene: Scene, colour: str, shape: str) -> list[int]:
    """What is true of the objects that a mention names, in the order of `KINDS`."""
    found = [o for o in scene.objects if colour in ("", o.colour) and shape in ("", o.shape)]
    if shape != NEEDLE and not (colour and shape):  # counts and lone attributes are asked of ordinary objects
        found = [o for o in found if o.shape != NEEDLE]
    return [min(len(found), MOST), *(_about(found[0]) if len(found) == 1 else [OPEN] * (len(KINDS) - 1))]


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
        for column, colour, shape in meant(tokens, [a < 0 for a in answers]):
            where.append((row, column))
            true.append(label(scene, colour, shape))
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
