"""Questions about a scene and their answers, one function per kind.

`ask(kind, scene, rng, want)` returns `(question, answer)`, or None when the scene offers no such question (or none with
the answer `want`). Answers are drawn before scenes are, uniformly over `answers(kind, ...)`, so that no kind can be
answered from the wording alone: guessing earns the share of the commonest answer and no more.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from vlmfast.pocket.scenes import COLOUR_NAMES, DIRECTIONS, HELD_OUT, NEEDLE, PLACES, SHAPES, WORDS, Obj, Rng, Scene

QA = tuple[str, str]

STILL_KINDS = ("presence", "colour", "shape", "count", "relation", "location", "digits")
CLIP_KINDS = ("motion", "order", "when", "what-when", "how-often", "needle", "during", "follow-up")
KINDS = (*STILL_KINDS, *CLIP_KINDS, "caption", "describe")  # a kind's place seeds its samples: new ones come last
RELATIONS = ("left", "right", "above", "below")
COUNTS = ("1", "2", "3", "4")


def answers(kind: str, seconds: int) -> list[str] | None:
    """The closed set of answers of a kind (None: open, as digit strings and object names are)."""
    by_kind: dict[str, list[str]] = {
        "presence": ["yes", "no"],
        "colour": list(COLOUR_NAMES),
        "shape": list(SHAPES),
        "count": list(COUNTS[:3]),
        "relation": list(RELATIONS),
        "location": list(PLACES),
        "motion": list(DIRECTIONS),
        "needle": list(COLOUR_NAMES),
        "when": [f"second {number}" for number in range(1, seconds)],
        "how-often": [str(number) for number in range(1, min(4, seconds // 2) + 1)],
    }
    return by_kind.get(kind)


def _only(objects: list[Obj], attribute: str) -> list[Obj]:
    values = [getattr(obj, attribute) for obj in objects]
    return [obj for obj in objects if values.count(getattr(obj, attribute)) == 1]


def _plain(scene: Scene) -> list[Obj]:
    return [obj for obj in scene.objects if obj.shape != NEEDLE]


def _choose(rng: Rng, options: list[QA], wanted: str | None) -> QA | None:
    options = [option for option in options if wanted is None or option[1] == wanted]
    return rng.pick(options) if options else None


def _presence(scene: Scene, rng: Rng, wanted: str | None) -> QA | None:
    objects, split = _plain(scene), "test" if any((o.colour, o.shape) in HELD_OUT for o in scene.objects) else "train"
    wanted = wanted or rng.pick(("yes", "no"))
    obj = rng.pick(objects)
    named_parts = rng.pick(("both", "both", "colour", "shape"))
    present = {
        "both": {(o.colour, o.shape) for o in objects},
        "colour": {(o.colour, "") for o in objects},
        "shape": {("", o.shape) for o in objects},
    }[named_parts]
    target = (obj.colour if named_parts != "shape" else "", obj.shape if named_parts != "colour" else "")
    if wanted == "no":  # the nearest wrong thing: one attribute of a present object changed
        for _ in range(20):
            colour, shape = target
            if named_parts == "colour" or (named_parts == "both" and rng.u() < 0.5):
                colour = rng.pick(COLOUR_NAMES)
            else:
                shape = rng.pick(SHAPES)
            if (colour, shape) not in present and (split == "test" or (colour, shape) not in HELD_OUT):
                target = (colour, shape)
                break
        else:
            return None
    description = " ".join(word for word in target if word) + (" object" if named_parts == "colour" else "")
    return rng.pick(("is there a {} ?", "do you see a {} ?"), (0.7, 0.3)).format(description), wanted


def _colour(scene: Scene, rng: Rng, wanted: str | None) -> QA | None:
    unique = _only(_plain(scene), "shape")
    return _choose(rng, [(f"what colour is the {obj.shape} ?", obj.colour) for obj in unique], wanted)


def _shape(scene: Scene, rng: Rng, wanted: str | None) -> QA | None:
    unique = _only(_plain(scene), "colour")
    return _choose(rng, [(f"what shape is the {obj.colour} object ?", obj.shape) for obj in unique], wanted)


def _count(scene: Scene, rng: Rng, wanted: str | None) -> QA | None:
    objects = _plain(scene)
    options = [("how many objects are there ?", str(len(objects)))]
    for attribute, noun in (("colour", "{} objects"), ("shape", "{}s")):
        values = [getattr(obj, attribute) for obj in objects]
        options += [
            (f"how many {noun.format(value).replace('crosss', 'crosses')} are there ?", str(values.count(value)))
            for value in dict.fromkeys(values)
        ]
    option_group = rng.n(3)  # the form comes before the answer, so that the form says nothing about the answer
    option_groups = [
        options[:1],
        [option for option in options if "objects" in option[0]][1:],
        [option for option in options if "objects" not in option[0]],
    ]
    return _choose(rng, option_groups[option_group], wanted)


def _relation(scene: Scene, rng: Rng, wanted: str | None) -> QA | None:
    options = []
    for subject in scene.objects:
        for reference in scene.objects:
            right, down = subject.x - reference.x, subject.y - reference.y
            larger, smaller = max(abs(right), abs(down)), min(abs(right), abs(down))
            if subject is reference or larger < 0.25 or smaller > 0.55 * larger:  # no diagonal cases
                continue
            sideways, upright = "left" if right < 0 else "right", "above" if down < 0 else "below"
            direction = sideways if abs(right) > abs(down) else upright
            options.append((f"where is the {subject.name} from the {reference.name} ?", direction))
    return _choose(rng, options, wanted)


def _location(scene: Scene, rng: Rng, wanted: str | None) -> QA | None:
    options = [(f"where is the {obj.name} ?", PLACES[obj.cell]) for obj in scene.objects]
    options += [(f"where is the {obj.shape} ?", PLACES[obj.cell]) for obj in _only(_plain(scene), "shape")]
    return _choose(rng, options, wanted)


def _digits(scene: Scene, rng: Rng, wanted: str | None) -> QA | None:
    options = [("what number is shown ?", written.string) for written in scene.texts if written.string not in WORDS]
    return _choose(rng, options, wanted)


def _motion(scene: Scene, rng: Rng, wanted: str | None) -> QA | None:
    movers = [obj for obj in scene.objects if obj.move]
    return _choose(rng, [(f"which way does the {obj.name} move ?", obj.move) for obj in movers], wanted)


def _arrivals(scene: Scene) -> list[Obj]:
    return [obj for obj in _plain(scene) if 1 <= obj.t_in < scene.seconds]  # to stay, or for a second


def _order(scene: Scene, rng: Rng, wanted: str | None) -> QA | None:
    arrivals = _arrivals(scene)
    if len(arrivals) < 2:
        return None
    first_named, second_named = rng.shuffled(arrivals)[:2]
    if wanted in ("a", "b") and (wanted == "a") != (first_named.t_in < second_named.t_in):
        first_named, second_named = second_named, first_named
    earliest = first_named if first_named.t_in < second_named.t_in else second_named
    return f"what appears first , the {first_named.name} or the {second_named.name} ?", earliest.name


def _when(scene: Scene, rng: Rng, wanted: str | None) -> QA | None:
    options = [(f"when does the {obj.name} appear ?", f"second {int(obj.t_in)}") for obj in _arrivals(scene)]
    return _choose(rng, options, wanted)


def _what_when(scene: Scene, rng: Rng, wanted: str | None) -> QA | None:
    return _choose(rng, [(f"what appears at second {int(obj.t_in)} ?", obj.name) for obj in _arrivals(scene)], wanted)


def _how_often(scene: Scene, rng: Rng, wanted: str | None) -> QA | None:
    blinking = [obj for obj in scene.objects if obj.blinks]
    return _choose(rng, [(f"how often does the {obj.name} blink ?", str(len(obj.blinks))) for obj in blinking], wanted)


def _needle(scene: Scene, rng: Rng, wanted: str | None) -> QA | None:
    needles = [obj for obj in scene.objects if obj.shape == NEEDLE]
    return _choose(rng, [(f"what colour is the {NEEDLE} ?", obj.colour) for obj in needles], wanted)


def _during(scene: Scene, rng: Rng, wanted: str | None) -> QA | None:
    arrived = [obj for obj in _plain(scene) if scene.flash is not None and obj.t_in == scene.flash]
    flash_objects = [obj for obj in arrived if obj.t_out == obj.t_in + 1]
    return _choose(rng, [("what is shown when the light flashes ?", obj.name) for obj in flash_objects], wanted)


def follow_up(scene: Scene, rng: Rng, want: str | None = None) -> tuple[QA, QA] | None:
    """Two turns: one that names an object, and one that asks about "it" what the first does not tell."""
    options: list[tuple[QA, QA]] = []
    for attribute in ("shape", "colour"):
        for obj in _only(_plain(scene), attribute):
            first_question = (f"what colour is the {obj.shape} ?", obj.colour)
            if attribute == "colour":
                first_question = (f"what shape is the {obj.colour} object ?", obj.shape)
            options.append((first_question, ("where is it ?", PLACES[obj.cell])))
            if obj.move:
                options.append((first_question, ("which way does it move ?", obj.move)))
            if obj in _arrivals(scene):
                options.append((first_question, ("when does it appear ?", f"second {int(obj.t_in)}")))
    options = [option for option in options if want is None or option[1][1] == want]
    return rng.pick(options) if options else None


def _follow_up(scene: Scene, rng: Rng, wanted: str | None) -> QA | None:
    questions = follow_up(scene, rng, wanted)
    return questions[1] if questions else None


ASK: dict[str, Callable[[Scene, Rng, str | None], QA | None]] = {
    "presence": _presence,
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "relation": _relation,
    "location": _location,
    "digits": _digits,
    "motion": _motion,
    "order": _order,
    "when": _when,
    "what-when": _what_when,
    "how-often": _how_often,
    "needle": _needle,
    "during": _during,
    "follow-up": _follow_up,
}


def turns(kind: str, scene: Scene, rng: Rng, want: str | None = None) -> list[QA] | None:
    """`ask` with the turns that come before the question, oldest first; the last is the one asked."""
    if kind == "follow-up":
        questions = follow_up(scene, rng, want)
        return list(questions) if questions else None
    question = ask(kind, scene, rng, want)
    return [question] if question else None


def ask(kind: str, scene: Scene, rng: Rng, want: str | None = None) -> QA | None:
    """One question of `kind` about `scene` with its answer; None when the scene has none (with the answer `want`)."""
    return ASK[kind](scene, rng, want)


def subjects(question: str) -> set[tuple[str, str]]:
    """The (colour, shape) pairs that a question names, to tell held-out combinations apart."""
    words = question.split()
    return {(colour, shape) for colour, shape in pairwise(words) if colour in COLOUR_NAMES and shape in SHAPES}
