"""Captions: fixed facts in freely chosen filler words, and the score that counts the facts only."""

from __future__ import annotations

import re

from vlmfast.pocket.scenes import COLOUR_NAMES, DIRECTIONS, NEEDLE, PLACES, SHAPES, SIZES, Obj, Rng, Scene

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
_LEAD = ("the picture shows", "here we see", "this image contains")
_LEAD_CLIP = ("the clip shows", "here we see", "this video contains")
_THERE = ("there is", "we find", "one can see")
_FREE = (0.62, 0.23, 0.15)  # skewed, so that the likeliest wording is well defined

Fact = tuple[str, ...]


def _sorted(scene: Scene) -> list[Obj]:
    return sorted(scene.objects, key=lambda o: (o.cell, o.x))


def _does(obj: Obj, seconds: int) -> str:
    if obj.shape == NEEDLE or 0 < obj.t_in < obj.t_out < seconds:
        return "shows up briefly"
    if obj.move:
        return f"moves {obj.move}"
    if obj.t_in > 0:
        return f"appears at second {int(obj.t_in)}"
    if obj.t_out < seconds:
        return f"leaves at second {int(obj.t_out)}"
    if obj.blinks:
        return f"blinks {len(obj.blinks)} times"
    return "stays"


def caption(scene: Scene, rng: Rng) -> str:
    """Describe the scene in reading order of the places; the filler words are drawn from `rng`, the facts are not."""
    count = len(scene.objects)
    lead = rng.pick(_LEAD if scene.still else _LEAD_CLIP, _FREE)
    parts = [
        f"{lead} {_NUMBERS[count]} object{'s' if count != 1 else ''} on a {scene.backgrounds[0].kind} background ."
    ]
    for obj in _sorted(scene):
        there = rng.pick(_THERE, _FREE)
        tail = "" if scene.still else f" that {_does(obj, scene.seconds)}"
        parts.append(f"at the {PLACES[obj.cell]} {there} a {obj.size} {obj.name}{tail} .")
    for text in scene.texts:
        noun = "number" if text.string.isdigit() else "word"
        parts.append(f"the {noun} {text.string} is written on it .")
    return " ".join(parts)


def facts(scene: Scene) -> frozenset[Fact]:
    """What a caption must say: the number of objects, and of each its place, size and what it does; the text."""
    out: set[Fact] = {("number", _NUMBERS[len(scene.objects)])}
    for obj in scene.objects:
        out |= {("object", obj.name), ("place", obj.name, PLACES[obj.cell]), ("size", obj.name, obj.size)}
        if not scene.still:
            out.add(("does", obj.name, _does(obj, scene.seconds)))
    out |= {("text", t.string) for t in scene.texts}
    return frozenset(out)


_OBJECT = re.compile(
    rf"at the ({'|'.join(sorted(PLACES, key=len, reverse=True))})\b[^.]*? a ({'|'.join(SIZES)})"
    rf" ({'|'.join(COLOUR_NAMES)})"
    rf" ({'|'.join((*SHAPES, NEEDLE))})(?: that (shows up briefly|moves (?:{'|'.join(DIRECTIONS)})|"
    r"(?:appears|leaves) at second [\d]+|blinks \d+ times|stays))?"
)
_NUMBER = re.compile(rf"\b({'|'.join(_NUMBERS)}) objects?\b")
_TEXT = re.compile(r"the (?:number|word) ([a-z0-9]+) is")


def normalise(text: str) -> str:
    """Lower case, no punctuation but full stops, digits of one number together (the tokenizer spells them out)."""
    text = re.sub(r"[^a-z0-9. ]", " ", text.lower())
    text = re.sub(r"(?<=\d)\s+(?=\d)", "", text)
    return re.sub(r"\s+", " ", text).strip()


def read_facts(text: str) -> frozenset[Fact]:
    """The facts that a caption states; what cannot be parsed states nothing."""
    text = normalise(text)
    out: set[Fact] = {("number", m) for m in _NUMBER.findall(text)}
    for place, size, colour, shape, does in _OBJECT.findall(text):
        name = f"{colour} {shape}"
        out |= {("object", name), ("place", name, place), ("size", name, size)}
        if does:
            out.add(("does", name, does))
    return frozenset(out | {("text", m) for m in _TEXT.findall(text)})


def score_caption(text: str, expected: frozenset[Fact]) -> dict[str, float]:
    """Precision, recall and F1 of the facts in `text` against `expected`."""
    said = read_facts(text)
    hit = len(said & expected)
    precision, recall = hit / max(1, len(said)), hit / max(1, len(expected))
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / max(1e-9, precision + recall)}
