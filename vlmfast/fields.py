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
WRONG = object()  # what `fit` returns for a value that does not fit
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
        low_end, high_end = self.open not in ("least", "both"), self.open not in ("most", "both")  # do they belong?
        above = self.least is None or value > self.least or (value == self.least and low_end)
        below = self.most is None or value < self.most or (value == self.most and high_end)
        return above and below and not (self.odd and value % 2 == 0)

    def __str__(self) -> str:
        phrases = []
        if self.least is not None:
            phrases.append(f"{'above' if self.open in ('least', 'both') else 'at least'} {self.least:g}")
        if self.most is not None:
            phrases.append(f"{'below' if self.open in ('most', 'both') else 'at most'} {self.most:g}")
        return ", ".join([*phrases, *(["odd"] if self.odd else [])])


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
    """Base of every method object. Raises UserError naming the field when a value is not what its annotation says.

    name: in texts and records; title: what errors call it where it has no name.
    """

    name: typing.ClassVar[str] = ""
    title: typing.ClassVar[str] = ""

    def __post_init__(self) -> None:
        method_name = self.name or self.title or type(self).__name__
        annotations = field_types(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if field.init:
                given = getattr(self, field.name)
                fitted = checked(field.name, given, annotations[field.name], method_name, field.default)
                if fitted is not given:
                    object.__setattr__(self, field.name, fitted)

    def check_model(self, layers: int, heads: int, axes: int) -> None:
        """Raise Unsupported where a field asks for what the model lacks, before anything is installed on it.

        layers: decoder layers; heads: key heads of each; axes: of a position, 1, or 3 under M-RoPE.
        """


class Options(Method):
    """Base of a group of fields that has no name in texts: what a method calls `advanced`, a task's options."""


def nested(holder: Any) -> collections.abc.Iterator[Method]:
    """The methods in a plan or a method, itself included, down to the last."""
    if isinstance(holder, Method):
        yield holder
    if dataclasses.is_dataclass(holder) and not isinstance(holder, type):
        for field in dataclasses.fields(holder):
            yield from nested(getattr(holder, field.name))


def check_methods(holders: collections.abc.Iterable[Any], layers: int, heads: int, axes: int) -> None:
    """Raise Unsupported where a method in the `holders` (plans, methods) asks for what a model of these sizes lacks."""
    for holder in holders:
        for method in nested(holder):
            method.check_model(layers, heads, axes)


def checked(name: str, value: Any, hint: Any, where: str = "", example: Any = None) -> Any:
    """The value as the annotation `hint` has it: 1 for a float is 1.0, a list is a tuple. Raises UserError otherwise.

    where: what the value was given to; example: a value that would do.
    """
    fitted = fit(value, hint)
    if fitted is not WRONG:
        return fitted
    given_to = f" in {where}" if where else ""
    has_example = isinstance(example, (int, float, str)) or (isinstance(example, tuple) and example)
    example_text = str(example).lower() if isinstance(example, bool) else str(example)
    suggestion = f", e.g. {name}={example_text}" if has_example else ""
    raise UserError(f"{name}={shown(value)}{given_to}: {name} must be {words(hint)}{suggestion}")


def fit(value: Any, hint: Any) -> Any:
    """The value in the type that `hint` names, or WRONG. No text becomes a number, and true is none either."""
    if hint is Any:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        fitted = fit(value, arguments[0])
        return fitted if fitted is not WRONG and arguments[1].holds(fitted) else WRONG
    if origin in (Union, types.UnionType):
        fitted = [candidate for argument in arguments if (candidate := fit(value, argument)) is not WRONG]
        # 1 stays 1 where both int and float are allowed
        same_type = [candidate for candidate in fitted if type(candidate) is type(value)]
        return (same_type or fitted or [WRONG])[0]
    if origin is Literal:
        return value if any(type(value) is type(allowed) and value == allowed for allowed in arguments) else WRONG
    if origin is tuple:
        return _fit_tuple(value, arguments)
    if origin is collections.abc.Callable:
        return value if callable(value) else WRONG
    if hint is bool:
        return value if isinstance(value, bool) else WRONG
    if hint in (int, float):
        return _fit_number(value, hint)
    return value if isinstance(value, hint) else WRONG


def _fit_number(value: Any, number_type: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return WRONG
    if isinstance(value, numbers.Integral):
        return number_type(value) if abs(int(value)) <= MOST else WRONG
    return float(value) if number_type is float and math.isfinite(value) else WRONG


def _fit_tuple(value: Any, arguments: tuple[Any, ...]) -> Any:
    if not isinstance(value, (list, tuple)):
        return WRONG
    endless = len(arguments) == 2 and arguments[1] is Ellipsis
    if not endless and len(value) != len(arguments):
        return WRONG
    fitted = tuple(fit(element, arguments[0] if endless else arguments[index]) for index, element in enumerate(value))
    return WRONG if any(element_fitted is WRONG for element_fitted in fitted) else fitted


def words(hint: Any) -> str:
    """What an annotation takes, in plain words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return f"{words(arguments[0])} {arguments[1]}"
    if origin in (Union, types.UnionType):
        return " or ".join(words(argument) for argument in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else repr(arguments[0])
    if origin is tuple:
        holds_pairs = typing.get_origin(arguments[0]) is tuple
        return f"a list of {'pairs of numbers' if holds_pairs else words(arguments[0]).removeprefix('a ') + 's'}"
    if origin is collections.abc.Callable:
        return "a function"
    return WORDS.get(hint) or f"a {getattr(hint, '__name__', hint)}"


def field_types(dataclass_type: type) -> dict[str, Any]:
    """The annotation of every field of a class."""
    return _types(dataclass_type)  # type: ignore[arg-type]


@functools.cache
def _types(dataclass_type: type) -> dict[str, Any]:
    return typing.get_type_hints(dataclass_type, include_extras=True)


def options_of(hint: Any) -> Any:
    """The class of options that a field of this annotation holds; None where it holds none."""
    return hint if isinstance(hint, type) and issubclass(hint, Options) else None


def takes_list(hint: Any) -> bool:
    """Does a field of this annotation hold a list?"""
    alternatives = () if typing.get_origin(hint) is tuple else typing.get_args(hint)
    return typing.get_origin(hint) is tuple or any(takes_list(alternative) for alternative in alternatives)


def unknown(what: str, name: Any, known: collections.abc.Iterable[str], source: str = "") -> UserError:
    """The error for a name that is none of those known, with the closest of them. source: the text it stands in."""
    known_names = list(known)
    closest = difflib.get_close_matches(name, known_names, 1) if isinstance(name, str) else []
    suggestion = f", did you mean {closest[0]}?" if closest else ""
    location = place(source) if source != name else ""
    return UserError(f"unknown {what} {shown(name)}{location}{suggestion}; known: {', '.join(known_names)}")


def place(source: str) -> str:
    """Where in what came in an error lies, for its message."""
    return f" in {shown(source)}" if source else ""
