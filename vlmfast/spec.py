"""The text form of every method, plan and option: one grammar, one reader, one writer.

    spec   = name [":" fields]                    vidcom2:keep=0.25
    fields = [value | field] {"," field}          a value alone, in front, is the first field's: uniform:16
    field  = key "=" value
    value  = number | true | false | none | word | "text" | list | group
    list   = "[" [value {"," value}] "]"          pyramiddrop:layers=[8,16,24]
    group  = "(" spec ")" | "(" field {"," field} ")"

A group holds a method with fields of its own, `speculate:draft=(selfdraft:prune=(uniform:keep=0.3)),length=3`, or
options that have no name, `hybridkv:advanced=(theta=0.8,chunk=8)`. A method without fields may stand by its name:
`draft=promptlookup`. Text with a comma, a bracket or a quote stands in double quotes, as in JSON. Sizes in bytes are
numbers, or words such as 2GB and 512MiB (`core.parse_bytes`). A whole plan: `plan:prune=(vidcom2:keep=0.4),kv=snapkv`.

`parse` gives the form of a plan file, {"method": name, field: value, ...}; `build` makes the object of that; `read`
does both; `write` is the way back, and writes an object in one way only. Plans and their stages, retrievers, frame
selections, tasks and the rows of evaluations are all read here.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from vlmfast.core import UserError, shown, to_json
from vlmfast.fields import WRONG, field_types, fit, options_of, place, takes_list, unknown

DEPTH = 16  # methods and lists inside each other
LENGTH = 10_000  # characters of a spec
FIRST = 0  # the key of a value that stands alone: no key of JSON
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
CONSTANTS = {"none": None, "null": None, "true": True, "false": False}
BARE = re.compile(r"[^,\[\]()\"]*")
FIELD = re.compile(r"\s*([\w-]+)\s*=")
PLAIN = re.compile(r"[A-Za-z_./~][\w./~:=@-]*", re.ASCII)  # text that needs no quotes
Nested = Callable[[str], Mapping[str, type]]  # a field's name -> the methods it may hold, by name


# ---------------------------------------------------------------- text -> plain data


def parse(spec_text: str) -> dict[str, Any]:
    """{"method": name, field: value, ...} of a spec. Raises UserError saying what is wrong with it, and where."""
    return _whole(spec_text, lambda reader: reader.spec(end=""))


def fields(spec_text: str) -> dict[Any, Any]:
    """{field: value, ...} of fields without a method's name: `visual=2000,new=64`."""
    return _whole(spec_text, lambda reader: reader.fields({}, end=""))


def items(list_text: str) -> list[Any]:
    """The values of a list without its brackets: `vidcom2-25,(vidcom2:keep=0.25,least=384)`."""
    return _whole(f"[{list_text}]", lambda reader: reader.items())


def _whole(spec_text: str, read_part: Callable[[_Reader], Any]) -> Any:
    if not isinstance(spec_text, str):
        raise UserError(f"a spec is text such as vidcom2:keep=0.25, not {shown(spec_text)}")
    if len(spec_text) > LENGTH:
        length = f"{len(spec_text)} characters, more than {LENGTH}"
        raise UserError(f"the spec {shown(spec_text)} has {length}: use a plan file")
    reader = _Reader(spec_text)
    result = read_part(reader)
    if reader.peek():
        raise reader.wrong("unmatched bracket or quote")
    return result


class _Reader:
    """Reads one spec from left to right."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth = text, 0, 0

    def wrong(self, problem: str) -> UserError:
        location = f" at {shown(self.text[self.at :], 24)}" if self.at < len(self.text) else ""
        return UserError(
            f"{problem}{location} in {shown(self.text)}: write name:field=value,field=value, lists as [1,2], a method "
            "with fields of its own in round brackets"
        )

    def peek(self) -> str:
        """The next character that is no blank, "" at the end."""
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def take(self, character: str) -> bool:
        """Step over `mark` if it comes next."""
        if not character or self.peek() != character:
            return False
        self.at += 1
        return True

    def inside(self) -> None:
        self.depth += 1
        if self.depth > DEPTH:
            raise self.wrong(f"more than {DEPTH} brackets inside each other")

    def spec(self, end: str) -> dict[Any, Any]:
        """`name` or `name:fields`, up to `end` or the end of the text."""
        name_match = re.compile(r"[^:,\[\]()\"=]*").match(self.text, self.at)
        assert name_match is not None
        name, self.at = name_match[0].strip(), name_match.end()
        if not name:
            raise self.wrong("a method's name is missing")
        plain_data: dict[Any, Any] = {"method": name}
        return self.fields(plain_data, end) if self.take(":") else plain_data

    def fields(self, plain_data: dict[Any, Any], end: str) -> dict[Any, Any]:
        """`plain_data` with the fields up to `end` added."""
        num_before = len(plain_data)
        while self.peek() not in ("", end):
            if self.take(","):  # an empty field says nothing
                continue
            key: Any = FIRST
            if key_match := FIELD.match(self.text, self.at):
                key, self.at = key_match[1], key_match.end()
            elif len(plain_data) > num_before or "=" in BARE.match(self.text, self.at)[0]:  # type: ignore[index]
                raise self.wrong("what follows is not field=value,")
            if key in plain_data:
                raise self.wrong(f"field {shown(key)} is given twice")
            plain_data[key] = self.value()
            if self.peek() not in ("", ",", end):
                raise self.wrong("no comma after a value")
        return plain_data

    def value(self) -> Any:
        first_character = self.peek()
        if first_character == '"':
            return self.quoted()
        if first_character == "(":
            return self.group()
        if first_character == "[":
            return self.items()
        value_match = BARE.match(self.text, self.at)
        assert value_match is not None
        self.at = value_match.end()
        return literal(value_match[0].strip())

    def quoted(self) -> str:
        try:
            value, self.at = json.JSONDecoder().raw_decode(self.text, self.at)
        except ValueError:
            raise self.wrong("text in quotes does not end") from None
        return value

    def group(self) -> dict[Any, Any]:
        self.take("(")
        self.inside()
        value = self.fields({}, end=")") if FIELD.match(self.text, self.at) else self.spec(end=")")
        if not self.take(")"):
            raise self.wrong("a round bracket is not closed")
        self.depth -= 1
        return value

    def items(self) -> list[Any]:
        self.take("[")
        self.inside()
        elements: list[Any] = []
        while not self.take("]"):
            if elements and not self.take(","):
                raise self.wrong("a list is not closed")
            elements.append(self.value())
            if self.peek() not in (",", "]"):
                raise self.wrong("a list is not closed")
        self.depth -= 1
        return elements


def literal(text: str) -> Any:
    """A number, a constant, or the text itself. Digits without end stay text: no field takes them."""
    if text.lower() in CONSTANTS:
        return CONSTANTS[text.lower()]
    if len(text) <= 400 and (number_match := NUMBER.fullmatch(text)):
        return float(text) if number_match[2] or number_match[3] or text[:1] == "." else int(text)
    return text


# ---------------------------------------------------------------- plain data -> objects


def read(
    error_name: str, text: str, methods: Mapping[str, type], nested_methods: Nested = lambda field: {}, depth: int = 0
) -> Any:
    """The object of a spec. error_name: how errors call it ("retriever"); methods: what it may be, by name;
    nested_methods: what a field may hold, by name."""
    return build(error_name, parse(text), methods, nested_methods, text, depth)


def build(
    error_name: str, plain_data: Any, methods: Mapping[str, type], nested_methods: Nested = lambda field: {},
    source: str = "", depth: int = 0,
) -> Any:  # fmt: skip
    """The object of {"method": name, field: value, ...}. source: the text that the data comes from, for errors.

    Raises UserError for a name or a field that is not known, with the closest one that is.
    """
    method_name = plain_data.get("method")
    if not isinstance(method_name, str) or method_name not in methods:
        raise unknown(error_name, method_name, methods, source)
    if depth > DEPTH:
        raise UserError(f"{error_name}: more than {DEPTH} methods inside each other")
    given = {key: value for key, value in plain_data.items() if key != "method"}
    return fill(method_name, methods[method_name], given, nested_methods, source, depth)


def fill(
    name: str, method_class: type, given: Mapping[Any, Any], nested_methods: Nested = lambda field: {},
    text: str = "", depth: int = 0,
) -> Any:  # fmt: skip
    """An object of `method_class`, which errors call `name`, from its fields' plain data."""
    annotations = field_types(method_class)
    known_fields = {known.name: known for known in dataclasses.fields(method_class) if known.init}
    first_field = next(iter(known_fields), "")
    if FIRST in given and first_field in given:
        raise UserError(f"{name}: {first_field} is given twice, first without its name{place(text)}")
    given = current({first_field if key is FIRST else key: value for key, value in given.items()}, annotations)
    for key in given:
        if key not in known_fields:
            raise unknown(f"field of {name}", key, known_fields, text)
    for key, known_field in known_fields.items():
        no_default = known_field.default is known_field.default_factory is dataclasses.MISSING
        if key not in given and no_default:
            raise UserError(f"{name} needs {key}=: its fields are {', '.join(sorted(known_fields))}")
    arguments = {key: _built(key, value, annotations[key], nested_methods, text, depth) for key, value in given.items()}
    return method_class(**arguments)


def _built(key: str, value: Any, annotation: Any, nested_methods: Nested, source: str, depth: int) -> Any:
    """The value of a field, with the methods and options in it built."""
    options = options_of(annotation)
    if options and isinstance(value, dict) and "method" not in value:
        return fill(key, options, value, nested_methods, source, depth + 1)
    methods = nested_methods(key)
    if methods and isinstance(value, dict):
        return build(f"{key} method", value, methods, nested_methods, source, depth + 1)
    if methods and isinstance(value, str) and by_name(annotation):
        return read(f"{key} method", value, methods, nested_methods, depth + 1)
    return value


def by_name(annotation: Any) -> bool:
    """Is text in such a field a method's spec, and nothing else?"""
    return annotation is Any or fit("", annotation) is WRONG


def current(given: dict[str, Any], annotations: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as they are spelled today: the one place that knows how plans, records and texts spelled them before.

    Fields that are now `advanced` stood beside the others; lists were joined with a plus, or were one number.
    """
    advanced = options_of(annotations.get("advanced"))
    advanced_fields = {field.name for field in dataclasses.fields(advanced)} - set(annotations) if advanced else set()
    current_fields = {key: value for key, value in given.items() if key not in advanced_fields}
    if len(current_fields) < len(given):
        if not isinstance(given_advanced := current_fields.get("advanced", {}), dict):
            hint = "give its fields in round brackets, advanced=(field=value)"
            raise UserError(f"advanced={shown(given_advanced)}: {hint}")
        beside = {key: value for key, value in given.items() if key in advanced_fields}
        current_fields["advanced"] = beside | given_advanced
    for key, value in current_fields.items():
        numbers = [literal(part) for part in str(value).split("+")] if type(value) in (str, int) else []
        if numbers and takes_list(annotations.get(key)) and all(type(part) is int for part in numbers):
            current_fields[key] = numbers
    return current_fields


# ---------------------------------------------------------------- objects -> text


def write(method: Any) -> str:
    """The spec of a method object: the fields that are not at their defaults. `read` gives back the object.

    Raises UserError for what has no text form: models and functions.
    """
    return _spec(to_json(method), method)


def _spec(plain_data: dict[str, Any], method: Any) -> str:
    annotations = field_types(type(method))
    defaults = {field.name: _usual(field) for field in dataclasses.fields(method)}
    field_texts = [
        f"{key}={_value(value, getattr(method, key), annotations[key])}"
        for key, value in plain_data.items()
        if key != "method" and getattr(method, key) != defaults[key]
    ]
    return ":".join(filter(None, (plain_data.get("method"), ",".join(field_texts))))


def _usual(field: dataclasses.Field) -> Any:
    """A field's value where none is given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _value(value: Any, source: Any, annotation: Any) -> str:
    if isinstance(value, dict):
        spec_text = _spec(value, source)
        return spec_text if spec_text == value.get("method") and by_name(annotation) else f"({spec_text})"
    if isinstance(value, list):
        return "[" + ",".join(_value(element, None, str) for element in value) + "]"
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) and value.lower() not in CONSTANTS else json.dumps(value)
    return "none" if value is None else json.dumps(value)
