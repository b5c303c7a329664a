"""What happens in a scene of the pocket world: objects, texts, backgrounds and their timetable.

A scene is plain data drawn from a seed; `render` turns it into pixels, `questions` and `captions` into text.
Coordinates are fractions of the width (x, rightwards) and of the height (y, downwards); radii and dot sizes are
fractions of the shorter side; times are seconds from the first frame. Events fall on whole seconds, because at the
usual 2 frames per second one second is one temporal patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

T = TypeVar("T")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 38, 38),
    "green": (38, 168, 60),
    "blue": (42, 78, 224),
    "yellow": (238, 218, 48),
    "purple": (150, 46, 190),
    "orange": (246, 138, 26),
    "white": (246, 246, 246),
    "black": (16, 16, 16),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
NEEDLE = "star"  # a shape that only ever shows up briefly
SIZES = ("small", "large")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
BACKGROUNDS = ("plain", "striped", "checkered", "cloudy")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
WORDS = ("sun", "cat", "dog", "tea", "ice", "map", "key", "box", "fox", "owl")
COLOUR_NAMES = tuple(COLOURS)
#: (colour, shape) pairs that never occur in the train split: one per shape, each with another colour.
HELD_OUT = frozenset((COLOUR_NAMES[i], SHAPES[(5 * i + 2) % 6]) for i in range(6))

_MASK = (1 << 64) - 1


def mix(*parts: int) -> int:
    """Hash integers into one 63-bit seed (splitmix64), so that neighbouring seeds give unrelated streams."""
    mixed = 0x9E3779B97F4A7C15
    for part in parts:
        mixed = (mixed ^ (part & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & _MASK
        mixed ^= mixed >> 31
    return mixed & (_MASK >> 1)


class Rng:
    """A small random source on top of `torch.Generator` (CPU), the same on every machine and device.

    Numbers are drawn in blocks because one call into torch per number would cost more than the renderer.
    """

    def __init__(self, *parts: int) -> None:
        self._gen = torch.Generator().manual_seed(mix(*parts))
        self._pool: list[float] = []

    def u(self, low: float = 0.0, high: float = 1.0) -> float:
        """Uniform number in [low, high)."""
        if not self._pool:
            self._pool = torch.rand(256, generator=self._gen, dtype=torch.float64).tolist()
        return low + (high - low) * self._pool.pop()

    def n(self, stop: int) -> int:
        """Uniform integer in [0, stop)."""
        return int(self.u() * stop)

    def pick(self, items: Sequence[T], weights: Sequence[float] | None = None) -> T:
        """One of `items`, uniformly or by `weights`."""
        if weights is None:
            return items[self.n(len(items))]
        remaining = self.u() * sum(weights)
        for item, weight in zip(items, weights):
            remaining -= weight
            if remaining < 0:
                return item
        return items[-1]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """A copy of `items` in random order."""
        copied = list(items)
        for last in range(len(copied) - 1, 0, -1):
            chosen = self.n(last + 1)
            copied[last], copied[chosen] = copied[chosen], copied[last]
        return copied


@dataclass
class Obj:
    """One object and its timetable. `blinks` are the whole seconds in which it is not drawn."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float
    cell: int  # index into PLACES of the place where it starts
    move: str = ""  # direction, or empty
    travel: float = 0.0  # fraction of the side covered over the whole clip
    t_in: float = 0.0
    t_out: float = 1e9
    blinks: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass
class Text:
    """A rendered string; `dot` is the size of one font dot."""

    string: str
    x: float
    y: float
    dot: float
    white: bool
    t_in: float = 0.0
    t_out: float = 1e9


@dataclass
class Background:
    """A muted texture: `rgb` base in 0..255, sinusoidal or blotchy modulation of `amplitude`."""

    kind: str
    rgb: tuple[float, float, float]
    amplitude: float
    angle: float
    freq: float
    phase: float
    noise: list[float]  # 36 values in [-1, 1], a 6 x 6 field
    t_in: float = 0.0


@dataclass
class Scene:
    """Everything that is needed to draw the frames and to ask about them."""

    height: int
    width: int
    frames: int
    fps: float
    objects: list[Obj]
    texts: list[Text] = field(default_factory=list)
    backgrounds: list[Background] = field(default_factory=list)
    specks: list[tuple[float, float, float, float]] = field(default_factory=list)  # x, y, radius, grey 0..255
    flash: int | None = None  # the second in which the light flashes: everything behind the objects is bright

    @property
    def still(self) -> bool:
        return self.frames == 1

    @property
    def seconds(self) -> int:
        return max(1, round(self.frames / self.fps))


def background(rng: Rng, t_in: float = 0.0) -> Background:
    """Mid-grey with a slight tint: every object colour, black and white included, stands out."""
    grey = rng.u(85, 165)
    rgb = tuple(grey + rng.u(-14, 14) for _ in range(3))
    return Background(
        rng.pick(BACKGROUNDS),
        (rgb[0], rgb[1], rgb[2]),
        rng.u(14, 26),
        rng.u(0, 3.14159),
        rng.u(2.5, 4.5),
        rng.u(0, 6.28),
        [rng.u(-1, 1) for _ in range(36)],
        t_in,
    )


def combos(rng: Rng, count: int, split: str) -> list[tuple[str, str]]:
    """`count` different (colour, shape) pairs; held-out ones only in the test split, there about every second one.

    Half of the time several objects share one attribute, so that counting and hard negatives make sense.
    """
    shared = rng.n(4)  # 0: one colour shared, 1: one shape shared, else nothing forced
    colour, shape = rng.pick(COLOUR_NAMES), rng.pick(SHAPES)
    num_shared = 1 + rng.n(min(count, 4))  # six of a colour would need a held-out pair
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        pair = (rng.pick(COLOUR_NAMES), rng.pick(SHAPES))
        if split == "test" and rng.u() < 0.45:
            pair = rng.pick(sorted(HELD_OUT))
        if shared == 0 and len(pairs) < num_shared:
            pair = (colour, pair[1])
        elif shared == 1 and len(pairs) < num_shared:
            pair = (pair[0], shape)
        if pair in pairs or (split == "train" and pair in HELD_OUT):
            continue
        pairs.append(pair)
    return rng.shuffled(pairs)


def unit(rng: Rng, side: int) -> float:
    """Scale of things in a picture of `side` pixels: they keep their size in pixels, as things in a wider view do."""
    return 64 * rng.u(1.0, 1.25) / side if side > 64 else 1.0


def place(rng: Rng, pair: tuple[str, str], cell: int, side: int = 64) -> Obj:
    """An object of this (colour, shape) somewhere near the middle of grid cell `cell` (0..8)."""
    size = rng.pick(SIZES)
    radius = (rng.u(0.085, 0.10) if size == "small" else rng.u(0.14, 0.16)) * unit(rng, side)
    jitter = 0.04 if side <= 64 else min(0.09, 0.15 - radius)
    centre_x = (cell % 3 + 0.5) / 3 + rng.u(-jitter, jitter)
    centre_y = (cell // 3 + 0.5) / 3 + rng.u(-jitter, jitter)
    return Obj(pair[0], pair[1], size, centre_x, centre_y, radius, cell)


def star_at(rng: Rng, cell: int, side: int) -> Obj:
    """The needle: a star of any colour; when it is shown is for the caller to say."""
    needle = place(rng, (rng.pick(COLOUR_NAMES), NEEDLE), cell, side)
    needle.radius, needle.size = rng.u(0.13, 0.16) * unit(rng, side), "large"
    return needle


def written(rng: Rng, string: str, row: int, side: int = 64) -> Text:
    """`string` in row 0..2 of the grid, at a random place that it fits in."""
    dot_size = (rng.u(0.024, 0.031) if len(string) > 3 else rng.u(0.026, 0.036)) * unit(rng, side)
    half_width = len(string) * 3 * dot_size
    centre_x = rng.u(half_width + 0.01, 0.99 - half_width)
    centre_y = (row + 0.5) / 3 + rng.u(-0.03, 0.03)
    return Text(string, centre_x, centre_y, dot_size, rng.u() < 0.5)


def still(rng: Rng, split: str, size: tuple[int, int], objects: tuple[int, int] = (1, 3), text: float = 0.2) -> Scene:
    """A picture with `objects[0]..objects[1]` objects, and with probability `text` a number or a word."""
    cells = list(range(9))
    texts = []
    if rng.u() < text:
        text_row = rng.n(3)
        string = "".join(str(rng.n(10)) for _ in range(2 + rng.n(3))) if rng.u() < 0.8 else rng.pick(WORDS)
        texts.append(written(rng, string, text_row, min(size)))
        cells = [cell for cell in cells if cell // 3 != text_row]
    num_objects = min(objects[0] + rng.n(objects[1] - objects[0] + 1), len(cells))
    pairs = combos(rng, num_objects, split)
    placed = [place(rng, pair, cell, min(size)) for pair, cell in zip(pairs, rng.shuffled(cells))]
    specks = [(rng.u(), rng.u(), rng.u(0.008, 0.02), rng.u(60, 190)) for _ in range(rng.n(6))]
    return Scene(size[0], size[1], 1, 2.0, placed, texts, [background(rng)], specks)


def set_moving(rng: Rng, obj: Obj) -> None:
    """Let the object cross the picture, starting on the side that leaves room for its way."""
    obj.move = rng.pick(list(DIRECTIONS))
    step_x, step_y = DIRECTIONS[obj.move]
    obj.travel = rng.u(0.45, 0.62)
    if step_x:  # start on the side that leaves room for the way; the row stays what it was
        obj.cell = obj.cell // 3 * 3 + (2 if step_x < 0 else 0)
        obj.x = (obj.cell % 3 + 0.5) / 3 + rng.u(-0.03, 0.03)
    else:
        obj.cell = obj.cell % 3 + (6 if step_y < 0 else 0)
        obj.y = (obj.cell // 3 + 0.5) / 3 + rng.u(-0.03, 0.03)


#: What an object may do in a clip, and how likely it is when a clip is made for a certain question kind.
ROLES = ("stay", "move", "appear", "leave", "blink", "show")
_FOCUS: dict[str, tuple[float, ...]] = {
    "motion": (1, 3, 0.5, 0.5, 0.5, 0),
    "when": (0.5, 1, 4, 0.7, 0.5, 0),
    "order": (0.2, 0.5, 6, 0.3, 0.3, 0),
    "what-when": (0.3, 0.7, 5, 0.5, 0.5, 0),
    "during": (0, 0, 0, 0, 0, 1),
    "how-often": (0.5, 0.7, 0.7, 0.5, 4, 0),
    "needle": (2, 1, 0.5, 0.3, 0.3, 0),
    "": (1, 2, 2.5, 0.7, 1.5, 0.5),
}


def moving(
    rng: Rng,
    split: str,
    size: tuple[int, int],
    seconds: int,
    focus: str = "",
    fps: float = 2.0,
    objects: tuple[int, int] = (1, 3),
) -> Scene:
    """A clip in which objects stay, move, appear, leave, blink or show up for a second; the scene behind may change."""
    cells = rng.shuffled(list(range(9)))
    fewest = max(objects[0], 2 if focus in ("order", "what-when", "during") else 1)
    num_objects = fewest + rng.n(max(objects[1], fewest) - fewest + 1)
    side = min(size)
    placed = [place(rng, pair, cell, side) for pair, cell in zip(combos(rng, num_objects, split), cells)]
    free_seconds = rng.shuffled(list(range(1, seconds)))  # no two events that a question may name share a second
    for obj in placed:
        role = rng.pick(ROLES, _FOCUS.get(focus, _FOCUS[""]))
        if role == "move":
            set_moving(rng, obj)
        elif role == "appear" and free_seconds:
            obj.t_in = float(free_seconds.pop())
        elif role == "leave" and free_seconds:
            obj.t_out = float(free_seconds.pop())
        elif role == "show" and free_seconds:
            obj.t_in = float(free_seconds.pop())
            obj.t_out = obj.t_in + 1
        elif role == "blink":
            # never two seconds in a row: each blink can be counted
            blink_seconds = list(range(1 + rng.n(2), seconds, 2))
            max_blinks = min(4, len(range(1, seconds, 2)))
            obj.blinks = tuple(sorted(rng.shuffled(blink_seconds)[: 1 + rng.n(max_blinks)]))
    if focus == "needle" or (not focus and seconds > 3 and rng.u() < 0.25):
        needle = star_at(rng, rng.pick(cells[num_objects:]), side)
        appears_at = 1 + rng.n(max(1, seconds - 2))
        needle.t_in, needle.t_out = float(appears_at), float(appears_at + (2 if seconds > 8 else 1))
        placed.append(needle)
    backgrounds = [background(rng)]
    if rng.u() < 0.3 and seconds > 2:
        backgrounds.append(background(rng, float(1 + rng.n(seconds - 1))))
    scene = Scene(size[0], size[1], round(seconds * fps), fps, placed, [], backgrounds)
    brief = [o for o in placed if o.t_out == o.t_in + 1 and o.shape != NEEDLE]
    if brief and (focus == "during" or rng.u() < 0.5):
        scene.flash = int(rng.pick(brief).t_in)
    return scene
