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
    return sorted(scene.objects, key=lambda obj: (obj.cell, obj.x))


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
    num_objects = len(scene.objects)
    opening = rng.pick(_LEAD if scene.still else _LEAD_CLIP, _FREE)
    plural = "s" if num_objects != 1 else ""
    ground = scene.backgrounds[0].kind
    sentences = [f"{opening} {_NUMBERS[num_objects]} object{plural} on a {ground} background ."]
    for obj in _sorted(scene):
        verb_phrase = rng.pick(_THERE, _FREE)
        behaviour = "" if scene.still else f" that {_does(obj, scene.seconds)}"
        sentences.append(f"at the {PLACES[obj.cell]} {verb_phrase} a {obj.size} {obj.name}{behaviour} .")
    for text in scene.texts:
        text_kind = "number" if text.string.isdigit() else "word"
        sentences.append(f"the {text_kind} {text.string} is written on it .")
    return " ".join(sentences)


def facts(scene: Scene) -> frozenset[Fact]:
    """What a caption must say: the number of objects, and of each its place, size and what it does; the text."""
    stated: set[Fact] = {("number", _NUMBERS[len(scene.objects)])}
    for obj in scene.objects:
        stated |= {("object", obj.name), ("place", obj.name, PLACES[obj.cell]), ("size", obj.name, obj.size)}
        if not scene.still:
            stated.add(("does", obj.name, _does(obj, scene.seconds)))
    stated |= {("text", written.string) for written in scene.texts}
    return frozenset(stated)


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
    stated: set[Fact] = {("number", matched) for matched in _NUMBER.findall(text)}
    for place, size, colour, shape, behaviour in _OBJECT.findall(text):
        object_name = f"{colour} {shape}"
        stated |= {("object", object_name), ("place", object_name, place), ("size", object_name, size)}
        if behaviour:
            stated.add(("does", object_name, behaviour))
    return frozenset(stated | {("text", matched) for matched in _TEXT.findall(text)})


def score_caption(text: str, expected: frozenset[Fact]) -> dict[str, float]:
    """Precision, recall and F1 of the facts in `text` against `expected`."""
    stated = read_facts(text)
    num_correct = len(stated & expected)
    precision, recall = num_correct / max(1, len(stated)), num_correct / max(1, len(expected))
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / max(1e-9, precision + recall)}
