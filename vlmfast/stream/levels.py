"""Levels of an archived block, from full to one representative, and the schedule by which a block coarsens with age.

`coarsen="age:four_bit=60,features=300"`: keys and values as `keep_as` says for a minute, in 4 bits until five minutes,
then only the features that the language model was given; a block brought back is prefilled again from those
(`prefill_again.py`). `keys=[2,3]` keeps the keys of the layers that choose beside them. At the last level the visual
features of a block are one, their mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Any, ClassVar

from vlmfast import spec
from vlmfast.core import UserError, shown
from vlmfast.fields import Method, NonNegativeFloat


class Level(IntEnum):
    """What is kept of a block; a larger one is coarser."""

    FULL = 0  # keys and values, as `keep_as` says
    FOUR_BIT = 1  # keys and values in 4 bits
    FEATURES = 2  # what the language model was given, without keys and values
    REPRESENTATIVE = 3  # the mean of its visual features


@dataclass(frozen=True)
class ByAge(Method):
    """A block is kept at a level from that many seconds after its end on; None never uses the level.

    A limit of RAM or disk makes blocks coarser earlier, the oldest first, down to the coarsest level named here, before
    any is given up. keys: layers whose keys stay, in 4 bits, beside the features (negative numbers from the end): name
    those of `Internal(layers=, rerank=)`, which else compares such blocks by their representatives. Raises UserError
    for ages that decrease with coarser levels.
    """

    four_bit: NonNegativeFloat | None = None
    features: NonNegativeFloat | None = None
    representative: NonNegativeFloat | None = None
    keys: tuple[int, ...] | None = None

    name: ClassVar[str] = "age"

    def __post_init__(self) -> None:
        super().__post_init__()
        used_levels = self.ages
        if not used_levels:
            raise UserError("coarsen=age names no level: give four_bit=, features= or representative= in seconds")
        for (finer, finer_age), (coarser, coarser_age) in pairwise(used_levels):
            if coarser_age < finer_age:
                raise UserError(
                    f"coarsen: {coarser.name.lower()}={coarser_age:g} lies before {finer.name.lower()}={finer_age:g}: "
                    "a block would grow with age; give ages in seconds that do not decrease from level to level"
                )
        if self.keys and self.features is None:
            raise UserError("coarsen: keys= stay beside the features of a block: give features= in seconds")

    def check_model(self, layers: int, heads: int, axes: int) -> None:
        """Raise UserError for keys of a layer that is not there."""
        self.searched(layers)

    def searched(self, count: int) -> tuple[int, ...]:
        """The layers, of `count`, whose keys stay beside features, ascending."""
        wanted = self.keys or ()
        if any(not -count <= layer_index < count for layer_index in wanted):
            raise UserError(f"keys={shown(wanted)} in coarsen: this model's layers are 0 to {count - 1}")
        return tuple(sorted({layer_index % count for layer_index in wanted}))

    @property
    def ages(self) -> list[tuple[Level, float]]:
        """The levels that are used, ascending, and from which age on."""
        all_levels = ((level, getattr(self, level.name.lower())) for level in list(Level)[1:])
        return [(level, age) for level, age in all_levels if age is not None]

    @property
    def keeps_features(self) -> bool:
        """Are features stored from the start?"""
        return self.ages[-1][0] >= Level.FEATURES

    def level(self, age: float) -> Level:
        """The level of a block that ended `age` seconds ago."""
        return max((level for level, begins in self.ages if age >= begins), default=Level.FULL)


def parse(text: Any) -> ByAge | None:
    """A schedule from itself, None or "none" (blocks stay as they are), or its text; see `spec`."""
    if text is None or text == "none" or isinstance(text, ByAge):
        return None if text == "none" else text
    schedule: ByAge = spec.read("schedule of coarsen=", text, {ByAge.name: ByAge})
    return schedule
