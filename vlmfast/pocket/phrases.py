"""The grammar of descriptions: phrases with slots for facts, drawn from a seed and read back by the same rules.

A phrase is words; `<rule>` stands for any phrase of that rule, `{slot}` for a fact. `draw` picks freely among the
phrases whose facts are given, `read` finds the sentence of the grammar that a text is and the facts in it. Both use the
same rules, so that what can be said can be read. Every word is one token of the pocket tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from vlmfast.pocket.scenes import BACKGROUNDS, COLOUR_NAMES, DIRECTIONS, NEEDLE, PLACES, SHAPES, SIZES, WORDS, Rng

#: slot -> what is said: what it means. Numbers that are written out in digits are read by `DIGITS`.
SLOTS: dict[str, dict[str, str]] = {
    "number": {f"{number} objects": number for number in ("two", "three", "four", "five", "six")},
    "background": {kind: kind for kind in BACKGROUNDS},
    "size": {size: size for size in SIZES},
    "place": {place: place for place in PLACES},
    "direction": {direction: direction for direction in DIRECTIONS},
    "blinks": {"1 time": "1", **{f"{number} times": str(number) for number in range(2, 10)}},
    "stays": dict.fromkeys(("stays", "stays still", "stays there", "does not move", "stays all the time"), "stays"),
    "briefly": dict.fromkeys(
        ("shows up briefly", "is shown briefly", "is there only briefly", "is there for a short time"), "briefly"
    ),
    "word": {word: word for word in WORDS},
    "picture": dict.fromkeys(("picture", "image"), "picture"),
    "clip": dict.fromkeys(("clip", "video"), "clip"),
}
NAMES = {f"{colour} {shape}": f"{colour} {shape}" for colour in COLOUR_NAMES for shape in (*SHAPES, NEEDLE)}
SLOTS |= dict.fromkeys(("name", "earlier", "later"), NAMES)
DIGITS = ("arrival", "departure", "digits")  # a second, a second, a written number

RULES: dict[str, tuple[str, ...]] = {
    "medium": ("{picture}", "{clip}"),
    "this": ("this", "the"),
    "a": ("a", "one"),
    "contains": ("shows", "contains", "has"),
    "see": ("there is", "we see", "we find", "one can see", "one can find", "you can see", "i see"),
    "see several": ("there are", "we see", "we find", "one can see", "one can find", "you can see", "i see"),
    "here": ("here", "in <this> <medium>", "on this <medium>"),
    "lead": ("", "", "here ,", "next ,", "now ,", "then ,", "and", "as you can see ,"),
    "where": ("at the {place}", "on the {place}", "at the {place} of <this> <medium>", "on the {place} of it all"),
    "that": ("that", "which", ", which"),
    "does": (
        "{stays}",
        "{briefly}",
        "moves {direction}", "is moving {direction}", "moves {direction} all the time",
        "appears at second {arrival}", "first appears at second {arrival}", "is there from second {arrival} on",
        "leaves at second {departure}", "leaves again at second {departure}",
        "leaves <this> <medium> at second {departure}",
        "blinks {blinks}", "blinks {blinks} in all", "blinks {blinks} in <this> <medium>",
    ),
}  # fmt: skip
#: The sentences: kind -> phrases. Each ends with a full stop, which is not written here.
SENTENCES: dict[str, tuple[str, ...]] = {
    "opening": (
        "<this> <medium> <contains> {number} on a {background} background",
        "<here> <see several> {number} on a {background} background",
        "on a {background} background <see several> {number}",
        "<this> <medium> <contains> {number} and the background is {background}",
        "there are {number} in <this> <medium> , all on a {background} background",
    ),
    "number": (
        "<this> <medium> <contains> {number}",
        "<here> <see several> {number}",
        "there are {number} in <this> <medium>",
        "what we see here are {number}",
    ),
    "background": (
        "the background is {background}",
        "the background of <this> <medium> is {background}",
        "all this is shown on a {background} background",
        "they are all on a {background} background",
        "<this> <medium> has a {background} background",
    ),
    "object": (
        "<lead> <see> <a> {size} {name} <where>",
        "<lead> <where> <see> <a> {size} {name}",
        "<lead> <where> is <a> {size} {name}",
        "<lead> the object <where> is <a> {size} {name}",
        "<lead> what we see <where> is <a> {size} {name}",
        "<lead> <a> {size} {name} is <where>",
        "<lead> <a> {size} {name} is shown <where>",
    ),
    "acting object": (
        "<lead> <where> <see> <a> {size} {name} <that> <does>",
        "<lead> <where> is <a> {size} {name} <that> <does>",
        "<lead> the object <where> is <a> {size} {name} <that> <does>",
        "<lead> <see> <a> {size} {name} <where> and it <does>",
        "<lead> <a> {size} {name} is <where> and it <does>",
        "<lead> <where> <a> {size} {name} <does>",
    ),
    "it": ("it <does>", "this object <does>", "this one <does>", "as we can see , it <does>"),
    "named": ("the {name} <does>", "and the {name} <does>", "as for the {name} , it <does>", "then the {name} <does>"),
    "order": (
        "first the {earlier} appears , then the {later}",
        "the {earlier} appears before the {later}",
        "the {later} appears after the {earlier}",
        "the {earlier} is there before the {later} appears",
        "the {later} appears only after the {earlier}",
    ),
    "written": (
        "the number {digits} is written on <this> <medium>", "the word {word} is written on <this> <medium>",
        "the number {digits} is shown on it", "the word {word} is shown on it",
        "one can read the number {digits}", "one can read the word {word}",
        "the text says {digits}", "the text says {word}",
    ),
    "filler": (
        "this is all that one can see",
        "there is no other thing in <this> <medium>",
        "that is what <this> <medium> shows",
        "now we look at all the objects",
        "here is what we can see and say about it",
        "this is <a> <medium> like any other",
        "it looks like <a> short <medium> of the day",
        "please look at it again",
        "i have no more to say about <this> <medium>",
    ),
}  # fmt: skip

#: How facts are told in a sentence that no rule makes; which object comes before which takes a whole one.
FRAGMENTS = (
    "{number}", "{background} background", "background is {background}", "{size} {name}", "{name}", "at the {place}",
    "on the {place}", "<does>", "number {digits}", "says {digits}", "word {word}", "says {word}",
)  # fmt: skip

_PART = re.compile(r"<([^>]+)>|\{(\w+)\}|(\S+)")
Found = list[tuple[str, str]]  # (slot, what it means), in the order in which they are said


def draw(kind: str, values: Mapping[str, str], rng: Rng) -> str:
    """A sentence of `kind` with its full stop. values: of each slot what it means; the phrase is one that says them."""
    return " ".join(f"{_drawn(SENTENCES[kind], values, rng)} .".split())


def _drawn(phrases: tuple[str, ...], values: Mapping[str, str], rng: Rng) -> str:
    words = []
    for rule, slot, word in _PART.findall(rng.pick([phrase for phrase in phrases if _can_say(phrase, values)])):
        if rule:
            words.append(_drawn(RULES[rule], values, rng))
        elif slot in DIGITS:
            words.append(values[slot])
        elif slot:
            words.append(rng.pick([said for said, meaning in SLOTS[slot].items() if meaning == values[slot]]))
        else:
            words.append(word)
    return " ".join(words)


def _can_say(phrase: str, values: Mapping[str, str]) -> bool:
    """Are all facts of the phrase given? Of a rule, one phrase is enough."""
    return all(
        (not slot or slot in values) and (not rule or any(_can_say(other, values) for other in RULES[rule]))
        for rule, slot, _ in _PART.findall(phrase)
    )


@lru_cache(maxsize=1)
def _fragments() -> tuple[re.Pattern[str], list[str]]:
    slots: list[str] = []
    return re.compile(rf"\b{_any_of(FRAGMENTS, slots)}"), slots


@lru_cache(maxsize=1)
def _patterns() -> dict[str, tuple[re.Pattern[str], list[str]]]:
    """Sentence kind -> a pattern of words with a space after each, and the slot of each of its groups."""
    patterns = {}
    for kind, phrases in SENTENCES.items():
        slots: list[str] = []
        patterns[kind] = (re.compile(_any_of(phrases, slots)), slots)
    return patterns


def _any_of(phrases: tuple[str, ...], slots: list[str]) -> str:
    return f"(?:{'|'.join(_pattern(phrase, slots) for phrase in phrases)})"


def _pattern(phrase: str, slots: list[str]) -> str:
    pattern = ""
    for rule, slot, word in _PART.findall(phrase):
        if rule:
            pattern += _any_of(RULES[rule], slots)
        elif slot:
            slots.append(slot)
            said = r"\d+" if slot in DIGITS else "|".join(sorted(SLOTS[slot], key=len, reverse=True))
            pattern += f"({said}) "
        else:
            pattern += f"{word} "
    return pattern


def read(sentence: str) -> tuple[str, Found] | None:
    """The kind of a sentence (words with one space between, no full stop) and its facts; None: not of this grammar."""
    for kind, (pattern, slots) in _patterns().items():
        match = pattern.fullmatch(f"{sentence} ")
        if match:
            return kind, _found(match, slots)
    return None


def read_fragments(sentence: str) -> Found:
    """The facts that stand in a sentence of another grammar."""
    pattern, slots = _fragments()
    return [found for match in pattern.finditer(f"{sentence} ") for found in _found(match, slots)]


def _found(match: re.Match[str], slots: list[str]) -> Found:
    said = [(slot, text) for slot, text in zip(slots, match.groups()) if text is not None]
    return [(slot, text if slot in DIGITS else SLOTS[slot][text]) for slot, text in said]
