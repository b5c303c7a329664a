"""Descriptions: the facts of a scene in freely varying sentences, and a score that is blind to wording.

`describe` draws which sentence says what, their order and every phrase from a seed (`vlmfast.pocket.phrases` has the
grammar); `read_description` finds the facts that any such text states and which of its sentences are none of the
grammar; `score_description` compares them with the scene's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import combinations, pairwise

from vlmfast.pocket.captions import Fact
from vlmfast.pocket.phrases import draw, read, read_fragments
from vlmfast.pocket.scenes import NEEDLE, PLACES, Obj, Rng, Scene

FEWEST, MOST = 60, 150  # tokens of a description; every word, digit and mark is one
COUNTS = ("no", "one", "two", "three", "four", "five", "six")
SAID = re.compile(r"\d|[a-z]+|[.,]")  # the tokens of a text that the grammar made


def behaviour(obj: Obj, seconds: int) -> tuple[str, str]:
    """What the object does in a clip, as (slot, meaning)."""
    if obj.shape == NEEDLE or 0 < obj.t_in < obj.t_out < seconds:
        return "briefly", "briefly"
    if obj.move:
        return "direction", obj.move
    if obj.t_in > 0:
        return "arrival", str(int(obj.t_in))
    if obj.t_out < seconds:
        return "departure", str(int(obj.t_out))
    return ("blinks", str(len(obj.blinks))) if obj.blinks else ("stays", "stays")


def arrivals(scene: Scene) -> list[str]:
    """Names of what comes after the beginning, in that order; the needle counts where nothing else comes with it."""
    coming = [obj for obj in scene.objects if 1 <= obj.t_in < scene.seconds]
    seconds = [obj.t_in for obj in coming]
    coming = [obj for obj in coming if obj.shape != NEEDLE or seconds.count(obj.t_in) == 1]
    return [obj.name for obj in sorted(coming, key=lambda obj: obj.t_in)]


def description_facts(scene: Scene) -> frozenset[Fact]:
    """What a description must say: the number of objects and the background; of each object its colour and shape, size
    and place; in clips what each does and, of any two that come later, which comes first; what is written."""
    stated: set[Fact] = {("number", COUNTS[len(scene.objects)]), ("background", scene.backgrounds[0].kind)}
    for obj in scene.objects:
        stated |= {("object", obj.name), ("size", obj.name, obj.size), ("place", obj.name, PLACES[obj.cell])}
        if not scene.still:
            stated.add(("does", obj.name, *behaviour(obj, scene.seconds)))
    stated |= {("order", earlier, later) for earlier, later in combinations(arrivals(scene), 2)}
    return frozenset(stated | {("text", text.string) for text in scene.texts})


def describe(scene: Scene, rng: Rng) -> str:
    """Describe the scene in `FEWEST` to `MOST` tokens; the facts are the scene's, everything else is drawn."""
    for _ in range(500):
        text = " ".join(_sentences(scene, rng))
        if FEWEST <= len(SAID.findall(text)) <= MOST:
            return text
    raise ValueError(f"no description of {FEWEST} to {MOST} tokens of a scene with {len(scene.objects)} objects")


def _sentences(scene: Scene, rng: Rng) -> list[str]:
    medium = {"picture": "picture"} if scene.still else {"clip": "clip"}
    number = {**medium, "number": COUNTS[len(scene.objects)]}
    background = {**medium, "background": scene.backgrounds[0].kind}
    tail: list[str] = []
    if rng.u() < 0.5:
        head = [draw("opening", number | background, rng)]
    else:
        head = [draw("number", number, rng)]
        (head if rng.u() < 0.4 else tail).append(draw("background", background, rng))
    objects = sorted(scene.objects, key=lambda obj: (obj.cell, obj.x))
    for obj in objects if rng.u() < 0.5 else reversed(objects):
        values = {**medium, "name": obj.name, "size": obj.size, "place": PLACES[obj.cell]}
        does = {} if scene.still else dict([behaviour(obj, scene.seconds)])
        said_how = rng.pick(("acting object", "it", "named"), (0.5, 0.3, 0.2)) if does else "object"
        if said_how == "acting object":
            head.append(draw("acting object", values | does, rng))
            continue
        head.append(draw("object", values, rng))
        if said_how == "it":
            head[-1] += " " + draw("it", medium | does, rng)  # nothing may come between
        elif said_how == "named":
            tail.append(draw("named", {**medium, "name": obj.name, **does}, rng))
    tail += [draw("order", {"earlier": earlier, "later": later}, rng) for earlier, later in pairwise(arrivals(scene))]
    for text in scene.texts:
        tail.append(draw("written", {**medium, "digits" if text.string.isdigit() else "word": text.string}, rng))
    sentences = head + rng.shuffled(tail)
    for _ in range(rng.n(4)):
        sentences.insert(rng.n(len(sentences) + 1), draw("filler", medium, rng))
    return sentences


@dataclass(frozen=True)
class Reading:
    """What a text says: its facts, how many sentences it has, and those that the grammar cannot have made there."""

    facts: frozenset[Fact]
    sentences: int
    ungrammatical: tuple[str, ...]

    @property
    def grammatical(self) -> float:
        """The share of its sentences that the grammar can have made there; 0 of none."""
        return 1 - len(self.ungrammatical) / self.sentences if self.sentences else 0.0


def read_description(text: str) -> Reading:
    """Read a description in whatever phrasing. A sentence is ungrammatical where no rule makes it, where it has no end,
    where it only says again what was said, and where "it" has nothing to stand for. What it states counts even so, as
    far as its words tell."""
    text = re.sub(r"(?<=\d)\s+(?=\d)", "", re.sub(r"([.,])", r" \1 ", re.sub(r"[^a-z0-9., ]", " ", text.lower())))
    sentences = [" ".join(sentence.split()) for sentence in text.split(".")]
    stated: set[Fact] = set()
    ungrammatical = []
    latest = ""  # the object that "it" stands for
    for index, sentence in enumerate(sentences[:-1] if not sentences[-1] else sentences):
        found = read(sentence) if index < len(sentences) - 1 else None  # the last one has no end
        kind, slots = ("", read_fragments(sentence)) if found is None else found
        hangs = kind == "it" and not latest
        latest = next((meaning for slot, meaning in slots if slot == "name"), latest if kind else "")
        said = _stated(slots, latest)
        if hangs or not kind or (kind != "filler" and said <= stated):
            ungrammatical.append(sentence)
        stated |= said
    return Reading(_with_implied(stated), len(sentences) - (not sentences[-1]), tuple(ungrammatical))


def _stated(slots: list[tuple[str, str]], name: str) -> set[Fact]:
    """The facts of one sentence. name: of the object that it is about; "" where none is known."""
    stated: set[Fact] = set()
    by_slot = dict(slots)
    for slot, meaning in slots:
        if slot in ("number", "background"):
            stated.add((slot, meaning))
        elif slot in ("digits", "word"):
            stated.add(("text", meaning))
        elif slot == "name":
            stated.add(("object", meaning))
        elif slot in ("size", "place") and name:
            stated.add((slot, name, meaning))
        elif slot in ("stays", "briefly", "direction", "arrival", "departure", "blinks") and name:
            stated.add(("does", name, slot, meaning))
    if "earlier" in by_slot:
        stated.add(("order", by_slot["earlier"], by_slot["later"]))
    return stated


def _with_implied(stated: set[Fact]) -> frozenset[Fact]:
    """With what follows: a before b and b before c say a before c."""
    before = {fact[1:] for fact in stated if fact[0] == "order"}
    while True:
        more = {(a, d) for a, b in before for c, d in before if b == c and a != d} - before
        if not more:
            return frozenset(stated | {("order", *pair) for pair in before})
        before |= more


def score_description(text: str, expected: frozenset[Fact]) -> dict[str, float]:
    """Precision, recall and F1 of the facts that `text` states against `expected`, and `grammatical`: the share of its
    sentences that the grammar makes (0 of none)."""
    reading = read_description(text)
    num_correct = len(reading.facts & expected)
    precision, recall = num_correct / max(1, len(reading.facts)), num_correct / max(1, len(expected))
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(1e-9, precision + recall),
        "grammatical": reading.grammatical,
    }
