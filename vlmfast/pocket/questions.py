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
KINDS = (*STILL_KINDS, *CLIP_KINDS, "caption")
RELATIONS = ("left", "right", "above", "below")
COUNTS = ("1", "2", "3", "4")


def answers(kind: str, seconds: int) -> list[str] | None:
    """The closed set of answers of a kind (None: open, as digit strings and object names are)."""
    table: dict[str, list[str]] = {
        "presence": ["yes", "no"],
        "colour": list(COLOUR_NAMES),
        "shape": list(SHAPES),
        "count": list(COUNTS[:3]),
        "relation": list(RELATIONS),
        "location": list(PLACES),
        "motion": list(DIRECTIONS),
        "needle": list(COLOUR_NAMES),
        "when": [f"second {k}" for k in range(1, seconds)],
        "how-often": [str(k) for k in range(1, min(4, seconds // 2) + 1)],
    }
    return table.get(kind)


def _only(objects: list[Obj], attribute: str) -> list[Obj]:
    values = [getattr(o, attribute) for o in objects]
    return [o for o in objects if values.count(getattr(o, attribute)) == 1]


def _plain(scene: Scene) -> list[Obj]:
    return [o for o in scene.objects if o.shape != NEEDLE]


def _choose(rng: Rng, options: list[QA], want: str | None) -> QA | None:
    options = [o for o in options if want is None or o[1] == want]
    return rng.pick(options) if options else None


def _presence(scene: Scene, rng: Rng, want: str | None) -> QA | None:
    objects, split = _plain(scene), "test" if any((o.colour, o.shape) in HELD_OUT for o in scene.objects) else "train"
    want = want or rng.pick(("yes", "no"))
    obj = rng.pick(objects)
    form = rng.pick(("both", "both", "colour", "shape"))
    present = {
        "both": {(o.colour, o.shape) for o in objects},
        "colour": {(o.colour, "") for o in objects},
        "shape": {("", o.shape) for o in objects},
    }[form]
    target = (obj.colour if form != "shape" else "", obj.shape if form != "colour" else "")
    if want == "no":  # the nearest wrong thing: one attribute of a present object changed
        for _ in range(20):
            c, s = target
            if form == "colour" or (form == "both" and rng.u() < 0.5):
                c = rng.pick(COLOUR_NAMES)
            else:
                s = rng.pick(SHAPES)
            if (c, s) not in present and (split == "test" or (c, s) not in HELD_OUT):
                target = (c, s)
                break
        else:
            return None
    words = " ".join(w for w in target if w) + (" object" if form == "colour" else "")
    return rng.pick(("is there a {} ?", "do you see a {} ?"), (0.7, 0.3)).format(words), want


def _colour(scene: Scene, rng: Rng, want: str | None) -> QA | None:
    return _choose(rng, [(f"what colour is the {o.shape} ?", o.colour) for o in _only(_plain(scene), "shape")], want)


def _shape(scene: Scene, rng: Rng, want: str | None) -> QA | None:
    return _choose(
        rng, [(f"what shape is the {o.colour} object ?", o.shape) for o in _only(_plain(scene), "colour")], want
    )


def _count(scene: Scene, rng: Rng, want: str | None) -> QA | None:
    objects = _plain(scene)
    options = [("how many objects are there ?", str(len(objects)))]
    for attribute, noun in (("colour", "{} objects"), ("shape", "{}s")):
        values = [getattr(o, attribute) for o in objects]
        options += [
            (f"how many {noun.format(v).replace('crosss', 'crosses')} are there ?", str(values.count(v)))
            for v in dict.fromkeys(values)
        ]
    form = rng.n(3)  # the form comes before the answer, so that the form says nothing about the answer
    kinds = [options[:1], [o for o in options if "objects" in o[0]][1:], [o for o in options if "objects" not in o[0]]]
    return _choose(rng, kinds[form], want)


def _relation(scene: Scene, rng: Rng, want: str | None) -> QA | None:
    options = []
    for a in scene.objects:
        for b in scene.objects:
            dx, dy = a.x - b.x, a.y - b.y
            big, small = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
            if a is b or big < 0.25 or small > 0.55 * big:  # no diagonal cases
                continue
            word = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
            options.append((f"where is the {a.name} from the {b.name} ?", word))
    return _choose(rng, options, want)


def _location(scene: Scene, rng: Rng, want: str | None) -> QA | None:
    options = [(f"where is the {o.name} ?", PLACES[o.cell]) for o in scene.objects]
    options += [(f"where is the {o.shape} ?", PLACES[o.cell]) for o in _only(_plain(scene), "shape")]
    return _choose(rng, options, want)


def _digits(scene: Scene, rng: Rng, want: str | None) -> QA | None:
    options = [("what number is shown ?", t.string) for t in scene.texts if t.string not in WORDS]
    return _choose(rng, options, want)


def _motion(scene: Scene, rng: Rng, want: str | None) -> QA | None:
    return _choose(rng, [(f"which way does the {o.name} move ?", o.move) for o in scene.objects if o.move], want)


def _arrivals(scene: Scene) -> list[Obj]:
    return [o for o in _plain(scene) if 1 <= o.t_in < scene.seconds]  # to stay, or for a second


def _order(scene: Scene, rng: Rng, want: str | None) -> QA | None:
    late = _arrivals(scene)
    if len(late) < 2:
        return None
    a, b = rng.shuffled(late)[:2]
    if want in ("a", "b") and (want == "a") != (a.t_in < b.t_in):
        a, b = b, a
    first = a if a.t_in < b.t_in else b
    return f"what appears first , the {a.name} or the {b.name} ?", first.name


def _when(scene: Scene, rng: Rng, want: str | None) -> QA | None:
    return _choose(rng, [(f"when does the {o.name} appear ?", f"second {int(o.t_in)}") for o in _arrivals(scene)], want)


def _what_when(scene: Scene, rng: Rng, want: str | None) -> QA | None:
    return _choose(rng, [(f"what appears at second {int(o.t_in)} ?", o.name) for o in _arrivals(scene)], want)


def _how_often(scene: Scene, rng: Rng, want: str | None) -> QA | None:
    return _choose(
        rng, [(f"how often does the {o.name} blink ?", str(len(o.blinks))) for o in scene.objects if o.blinks], want
    )


def _needle(scene: Scene, rng: Rng, want: str | None) -> QA | None:
    return _choose(
        rng, [(f"what colour is the {NEEDLE} ?", o.colour) for o in scene.objects if o.shape == NEEDLE], want
    )


def _during(scene: Scene, rng: Rng, want: str | None) -> QA | None:
    lit = [o for o in _plain(scene) if scene.flash is not None and o.t_in == scene.flash and o.t_out == o.t_in + 1]
    return _choose(rng, [("what is shown when the light flashes ?", o.name) for o in lit], want)


def follow_up(scene: Scene, rng: Rng, want: str | None = None) -> tuple[QA, QA] | None:
    """Two turns: one that names an object, and one that asks about "it" what the first does not tell."""
    options: list[tuple[QA, QA]] = []
    for attribute in ("shape", "colour"):
        for obj in _only(_plain(scene), attribute):
            turn = (f"what colour is the {obj.shape} ?", obj.colour)
            if attribute == "colour":
                turn = (f"what shape is the {obj.colour} object ?", obj.shape)
            options.append((turn, ("where is it ?", PLACES[obj.cell])))
            if obj.move:
                options.append((turn, ("which way does it move ?", obj.move)))
            if obj in _arrivals(scene):
                options.append((turn, ("when does it appear ?", f"second {int(obj.t_in)}")))
    options = [o for o in options if want is None or o[1][1] == want]
    return rng.pick(options) if options else None


def _follow_up(scene: Scene, rng: Rng, want: str | None) -> QA | None:
    found = follow_up(scene, rng, want)
    return found[1] if found else None


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
        found = follow_up(scene, rng, want)
        return list(found) if found else None
    asked = ask(kind, scene, rng, want)
    return [asked] if asked else None


def ask(kind: str, scene: Scene, rng: Rng, want: str | None = None) -> QA | None:
    """One question of `kind` about `scene` with its answer; None when the scene has none (with the answer `want`)."""
    return ASK[kind](scene, rng, want)


def subjects(question: str) -> set[tuple[str, str]]:
    """The (colour, shape) pairs that a question names, to tell held-out combinations apart."""
    words = question.split()
    return {(a, b) for a, b in pairwise(words) if a in COLOUR_NAMES and b in SHAPES}
