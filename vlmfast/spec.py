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


def parse(text: str) -> dict[str, Any]:
    """{"method": name, field: value, ...} of a spec. Raises UserError saying what is wrong with it, and where."""
    return _whole(text, lambda reader: reader.spec(end=""))


def fields(text: str) -> dict[Any, Any]:
    """{field: value, ...} of fields without a method's name: `visual=2000,new=64`."""
    return _whole(text, lambda reader: reader.fields({}, end=""))


def items(text: str) -> list[Any]:
    """The values of a list without its brackets: `vidcom2-25,(vidcom2:keep=0.25,least=384)`."""
    return _whole(f"[{text}]", lambda reader: reader.items())


def _whole(text: str, read: Callable[[_Reader], Any]) -> Any:
    if not isinstance(text, str):
        raise UserError(f"a spec is text such as vidcom2:keep=0.25, not {shown(text)}")
    if len(text) > LENGTH:
        raise UserError(f"the spec {shown(text)} has {len(text)} characters, more than {LENGTH}: use a plan file")
    reader = _Reader(text)
    out = read(reader)
    if reader.peek():
        raise reader.wrong("unmatched bracket or quote")
    return out


class _Reader:
    """Reads one spec from left to right."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth = text, 0, 0

    def wrong(self, what: str) -> UserError:
        rest = f" at {shown(self.text[self.at :], 24)}" if self.at < len(self.text) else ""
        return UserError(
            f"{what}{rest} in {shown(self.text)}: write name:field=value,field=value, lists as [1,2], a method with "
            "fields of its own in round brackets"
        )

    def peek(self) -> str:
        """The next character that is no blank, "" at the end."""
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def take(self, mark: str) -> bool:
        """Step over `mark` if it comes next."""
        if not mark or self.peek() != mark:
            return False
        self.at += 1
        return True

    def inside(self) -> None:
        self.depth += 1
        if self.depth > DEPTH:
            raise self.wrong(f"more than {DEPTH} brackets inside each other")

    def spec(self, end: str) -> dict[Any, Any]:
        """`name` or `name:fields`, up to `end` or the end of the text."""
        found = re.compile(r"[^:,\[\]()\"=]*").match(self.text, self.at)
        assert found is not None
        name, self.at = found[0].strip(), found.end()
        if not name:
            raise self.wrong("a method's name is missing")
        out: dict[Any, Any] = {"method": name}
        return self.fields(out, end) if self.take(":") else out

    def fields(self, out: dict[Any, Any], end: str) -> dict[Any, Any]:
        """`out` with the fields up to `end`."""
        named = len(out)
        while self.peek() not in ("", end):
            if self.take(","):  # an empty field says nothing
                continue
            key: Any = FIRST
            if found := FIELD.match(self.text, self.at):
                key, self.at = found[1], found.end()
            elif len(out) > named or "=" in BARE.match(self.text, self.at)[0]:  # type: ignore[index]
                raise self.wrong("what follows is not field=value,")
            if key in out:
                raise self.wrong(f"field {shown(key)} is given twice")
            out[key] = self.value()
            if self.peek() not in ("", ",", end):
                raise self.wrong("no comma after a value")
        return out

    def value(self) -> Any:
        mark = self.peek()
        if mark == '"':
            return self.quoted()
        if mark == "(":
            return self.group()
        if mark == "[":
            return self.items()
        found = BARE.match(self.text, self.at)
        assert found is not None
        self.at = found.end()
        return literal(found[0].strip())

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
        values: list[Any] = []
        while not self.take("]"):
            if values and not self.take(","):
                raise self.wrong("a list is not closed")
            values.append(self.value())
            if self.peek() not in (",", "]"):
                raise self.wrong("a list is not closed")
        self.depth -= 1
        return values


def literal(text: str) -> Any:
    """A number, a constant, or the text itself. Digits without end stay text: no field takes them."""
    if text.lower() in CONSTANTS:
        return CONSTANTS[text.lower()]
    if len(text) <= 400 and (found := NUMBER.fullmatch(text)):
        return float(text) if found[2] or found[3] or text[:1] == "." else int(text)
    return text


# ---------------------------------------------------------------- plain data -> objects


def read(what: str, text: str, kinds: Mapping[str, type], nested: Nested = lambda field: {}, depth: int = 0) -> Any:
    """The object of a spec. what: how errors call it ("retriever"); kinds: what it may be, by name; nested: what the
    fields of it may hold."""
    return build(what, parse(text), kinds, nested, text, depth)


def build(
    what: str, data: Any, kinds: Mapping[str, type], nested: Nested = lambda field: {}, text: str = "", depth: int = 0
) -> Any:
    """The object of {"method": name, field: value, ...}. text: where the data comes from, for errors.

    Raises UserError for a name or a field that is not known, with the closest one that is.
    """
    name = data.get("method")
    if not isinstance(name, str) or name not in kinds:
        raise unknown(what, name, kinds, text)
    if depth > DEPTH:
        raise UserError(f"{what}: more than {DEPTH} methods inside each other")
    return fill(name, kinds[name], {k: v for k, v in data.items() if k != "method"}, nested, text, depth)


def fill(
    name: str, kind: type, given: Mapping[Any, Any], nested: Nested = lambda field: {}, text: str = "", depth: int = 0
) -> Any:
    """An object of class `kind`, which errors call `name`, from its fields' plain data."""
    hints = field_types(kind)
    known = {f.name: f for f in dataclasses.fields(kind) if f.init}
    first = next(iter(known), "")
    if FIRST in given and first in given:
        raise UserError(f"{name}: {first} is given twice, first without its name{place(text)}")
    given = current({first if key is FIRST else key: value for key, value in given.items()}, hints)
    for key in given:
        if key not in known:
            raise unknown(f"field of {name}", key, known, text)
    for key, f in known.items():
        if key not in given and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"{name} needs {key}=: its fields are {', '.join(sorted(known))}")
    return kind(**{k: _held(k, v, hints[k], nested, text, depth) for k, v in given.items()})


def _held(key: str, value: Any, hint: Any, nested: Nested, text: str, depth: int) -> Any:
    """What a field is given, with the methods and options in it built."""
    options = options_of(hint)
    if options and isinstance(value, dict) and "method" not in value:
        return fill(key, options, value, nested, text, depth + 1)
    kinds = nested(key)
    if kinds and isinstance(value, dict):
        return build(f"{key} method", value, kinds, nested, text, depth + 1)
    if kinds and isinstance(value, str) and by_name(hint):
        return read(f"{key} method", value, kinds, nested, depth + 1)
    return value


def by_name(hint: Any) -> bool:
    """Is text in such a field a method's spec, and nothing else?"""
    return hint is Any or fit("", hint) is WRONG


def current(given: dict[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as they are spelled today: the one place that knows how plans, records and texts spelled them before.

    Fields that are now `advanced` stood beside the others; lists were joined with a plus, or were one number.
    """
    advanced = options_of(hints.get("advanced"))
    inner = {f.name for f in dataclasses.fields(advanced)} - set(hints) if advanced else set()
    out = {key: value for key, value in given.items() if key not in inner}
    if len(out) < len(given):
        if not isinstance(held := out.get("advanced", {}), dict):
            raise UserError(f"advanced={shown(held)}: give its fields in round brackets, advanced=(field=value)")
        out["advanced"] = {key: value for key, value in given.items() if key in inner} | held
    for key, value in out.items():
        parts = [literal(part) for part in str(value).split("+")] if type(value) in (str, int) else []
        if parts and takes_list(hints.get(key)) and all(type(part) is int for part in parts):
            out[key] = parts
    return out


# ---------------------------------------------------------------- objects -> text


def write(method: Any) -> str:
    """The spec of a method object: the fields that are not at their defaults. `read` gives back the object.

    Raises UserError for what has no text form: models and functions.
    """
    return _spec(to_json(method), method)


def _spec(data: dict[str, Any], method: Any) -> str:
    hints = field_types(type(method))
    usual = {f.name: _usual(f) for f in dataclasses.fields(method)}
    fields = [
        f"{key}={_value(value, getattr(method, key), hints[key])}"
        for key, value in data.items()
        if key != "method" and getattr(method, key) != usual[key]
    ]
    return ":".join(filter(None, (data.get("method"), ",".join(fields))))


def _usual(field: dataclasses.Field) -> Any:
    """A field's value where none is given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _value(value: Any, source: Any, hint: Any) -> str:
    if isinstance(value, dict):
        text = _spec(value, source)
        return text if text == value.get("method") and by_name(hint) else f"({text})"
    if isinstance(value, list):
        return "[" + ",".join(_value(v, None, str) for v in value) + "]"
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) and value.lower() not in CONSTANTS else json.dumps(value)
    return "none" if value is None else json.dumps(value)
