"""What a method object is made of: fields that are checked against their annotations when the object is built.

A method is a frozen dataclass that derives from `Method`, directly or through the base of its stage. The annotation
says what a field takes: `int`, `float`, `bool`, `str`, `Literal[...]`, `tuple[int, ...]`, another method, a union of
those, or a number in a `Range`: `Fraction`, `PositiveInt` and the others below. What holds between several fields is
the method's own, in its `__post_init__`, after `super().__post_init__()`.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import functools
import math
import numbers
import types
import typing
from typing import Annotated, Any, Literal, Union

from torch import nn

from vlmfast.core import UserError, shown

MOST = 2**53  # whole numbers beyond are not exact as floats, and no count or seed needs them
WRONG = object()  # what a value that does not fit becomes
WORDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    type(None): "none",
    nn.Module: "a model",
}


@dataclasses.dataclass(frozen=True)
class Range:
    """What a number may be: from `least` to `most`, without the ends that are `open`; None is no end. odd: not even."""

    least: float | None = None
    most: float | None = None
    open: Literal["", "least", "most", "both"] = ""
    odd: bool = False

    def holds(self, value: Any) -> bool:
        low = self.least is None or value > self.least or (value == self.least and self.open not in ("least", "both"))
        high = self.most is None or value < self.most or (value == self.most and self.open not in ("most", "both"))
        return low and high and not (self.odd and value % 2 == 0)

    def __str__(self) -> str:
        parts = []
        if self.least is not None:
            parts.append(f"{'above' if self.open in ('least', 'both') else 'at least'} {self.least:g}")
        if self.most is not None:
            parts.append(f"{'below' if self.open in ('most', 'both') else 'at most'} {self.most:g}")
        return ", ".join([*parts, *(["odd"] if self.odd else [])])


@dataclasses.dataclass(frozen=True)
class Ascending:
    """Numbers of layers: at least one, from 1 on, each above the one before."""

    def holds(self, value: Any) -> bool:
        return len(value) > 0 and value[0] >= 1 and list(value) == sorted(set(value))

    def __str__(self) -> str:
        return "ascending from 1 on"


Fraction = Annotated[float, Range(0, 1, "least")]  # what is kept of something: never nothing
Share = Annotated[float, Range(0, 1)]
PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
OddInt = Annotated[int, Range(1, odd=True)]  # a width with a middle
PositiveFloat = Annotated[float, Range(0, None, "least")]
NonNegativeFloat = Annotated[float, Range(0)]
Layers = Annotated[tuple[int, ...], Ascending()]


class Method:
    """Base of every method object. Raises UserError naming the field when a value is not what its annotation says."""

    def __post_init__(self) -> None:
        kind = type(self)
        where = getattr(kind, "name", "") or getattr(kind, "title", "") or kind.__name__
        hints = field_types(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if field.init:
                value = getattr(self, field.name)
                fitted = checked(field.name, value, hints[field.name], where, field.default)
                if fitted is not value:
                    object.__setattr__(self, field.name, fitted)

    def check_model(self, layers: int, heads: int, axes: int) -> None:
        """Raise Unsupported where a field asks for what the model lacks, before anything is installed on it.

        layers: decoder layers; heads: key heads of each; axes: of a position, 1, or 3 under M-RoPE.
        """


class Options(Method):
    """Base of a group of fields that has no name in texts: what a method calls `advanced`, a task's options.

    title: what errors call it.
    """

    name: typing.ClassVar[str] = ""
    title: typing.ClassVar[str] = ""


def nested(holder: Any) -> collections.abc.Iterator[Method]:
    """The methods in a plan or a method, itself included, down to the last."""
    if isinstance(holder, Method):
        yield holder
    if dataclasses.is_dataclass(holder) and not isinstance(holder, type):
        for field in dataclasses.fields(holder):
            yield from nested(getattr(holder, field.name))


def checked(name: str, value: Any, hint: Any, where: str = "", example: Any = None) -> Any:
    """The value as the annotation `hint` has it: 1 for a float is 1.0, a list is a tuple. Raises UserError otherwise.

    where: what the value was given to; example: a value that would do.
    """
    fitted = fit(value, hint)
    if fitted is not WRONG:
        return fitted
    place = f" in {where}" if where else ""
    good = isinstance(example, (int, float, str)) or (isinstance(example, tuple) and example)
    hope = f", e.g. {name}={str(example).lower() if isinstance(example, bool) else example}" if good else ""
    raise UserError(f"{name}={shown(value)}{place}: {name} must be {words(hint)}{hope}")


def fit(value: Any, hint: Any) -> Any:
    """The value in the type that `hint` names, or WRONG. No text becomes a number, and true is none either."""
    if hint is Any:
        return value
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        fitted = fit(value, inner[0])
        return fitted if fitted is not WRONG and inner[1].holds(fitted) else WRONG
    if origin in (Union, types.UnionType):
        fitted = [f for part in inner if (f := fit(value, part)) is not WRONG]
        exact = [f for f in fitted if type(f) is type(value)]  # 1 stays 1 where both int and float are allowed
        return (exact or fitted or [WRONG])[0]
    if origin is Literal:
        return value if any(type(value) is type(known) and value == known for known in inner) else WRONG
    if origin is tuple:
        return _fit_tuple(value, inner)
    if origin is collections.abc.Callable:
        return value if callable(value) else WRONG
    if hint is bool:
        return value if isinstance(value, bool) else WRONG
    if hint in (int, float):
        return _fit_number(value, hint)
    return value if isinstance(value, hint) else WRONG


def _fit_number(value: Any, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return WRONG
    if isinstance(value, numbers.Integral):
        return kind(value) if abs(int(value)) <= MOST else WRONG
    return float(value) if kind is float and math.isfinite(value) else WRONG


def _fit_tuple(value: Any, inner: tuple[Any, ...]) -> Any:
    if not isinstance(value, (list, tuple)):
        return WRONG
    endless = len(inner) == 2 and inner[1] is Ellipsis
    if not endless and len(value) != len(inner):
        return WRONG
    parts = tuple(fit(v, inner[0] if endless else inner[i]) for i, v in enumerate(value))
    return WRONG if any(p is WRONG for p in parts) else parts


def words(hint: Any) -> str:
    """What an annotation takes, in plain words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return f"{words(inner[0])} {inner[1]}"
    if origin in (Union, types.UnionType):
        return " or ".join(words(part) for part in inner)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}" if len(inner) > 1 else repr(inner[0])
    if origin is tuple:
        nested = typing.get_origin(inner[0]) is tuple
        return f"a list of {'pairs of numbers' if nested else words(inner[0]).removeprefix('a ') + 's'}"
    if origin is collections.abc.Callable:
        return "a function"
    return WORDS.get(hint) or f"a {getattr(hint, '__name__', hint)}"


def field_types(kind: type) -> dict[str, Any]:
    """The annotation of every field of a class."""
    return _types(kind)  # type: ignore[arg-type]


@functools.cache
def _types(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def options_of(hint: Any) -> Any:
    """The class of options that a field of this annotation holds; None where it holds none."""
    return hint if isinstance(hint, type) and issubclass(hint, Options) else None


def takes_list(hint: Any) -> bool:
    """Does a field of this annotation hold a list?"""
    parts = () if typing.get_origin(hint) is tuple else typing.get_args(hint)
    return typing.get_origin(hint) is tuple or any(takes_list(part) for part in parts)


def unknown(what: str, name: Any, known: collections.abc.Iterable[str], text: str = "") -> UserError:
    """The error for a name that is none of those known, with the closest of them. text: where it stands."""
    names = list(known)
    close = difflib.get_close_matches(name, names, 1) if isinstance(name, str) else []
    hope = f", did you mean {close[0]}?" if close else ""
    return UserError(
        f"unknown {what} {shown(name)}{place(text) if text != name else ''}{hope}; known: {', '.join(names)}"
    )


def place(text: str) -> str:
    """Where in what came in an error lies, for its message."""
    return f" in {shown(text)}" if text else ""
