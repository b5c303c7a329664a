"""The text form of method objects, and JSON read from a stranger: one parser for each, the only ones.

`name:field=value,field=value`. A value is a number, true, false, none, text, a list `[1,2]`, or another method, which
stands in round brackets when it has fields: `speculate:draft=(selfdraft:prune=(uniform:keep=0.3)),length=3`. Text with
a comma, a bracket or a quote stands in double quotes, as in JSON. What is parsed has the form of a plan file:
{"method": name, field: value, ...}.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from vlmfast.core import UserError, shown, to_json

DEPTH = 16  # methods and lists inside each other
LENGTH = 10_000  # characters of a spec
SIZE = 2**20  # bytes of a plan file
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
CONSTANTS = {"none": None, "null": None, "true": True, "false": False}
BARE = re.compile(r"[^,\[\]()\"]*")
PLAIN = re.compile(r"[A-Za-z_./~][\w./~:=@-]*", re.ASCII)  # text that needs no quotes


def parse(text: str) -> dict[str, Any]:
    """{"method": name, field: value, ...} of a spec. Raises UserError saying what is wrong with it, and where."""
    if not isinstance(text, str):
        raise UserError(f"a spec is text such as vidcom2:keep=0.25, not {shown(text)}")
    if len(text) > LENGTH:
        raise UserError(f"the spec {shown(text)} has {len(text)} characters, more than {LENGTH}: use a plan file")
    reader = _Reader(text)
    out = reader.method(end="")
    if reader.at < len(text):
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

    def method(self, end: str) -> dict[str, Any]:
        """`name` or `name:field=value,...`, up to `end` or the end of the text."""
        found = re.compile(r"[^:,\[\]()\"=]*").match(self.text, self.at)
        assert found is not None
        name, self.at = found[0].strip(), found.end()
        if not name:
            raise self.wrong("a method's name is missing")
        out: dict[str, Any] = {"method": name}
        if not self.take(":"):
            return out
        while self.peek() not in ("", end):
            if self.take(","):  # an empty field says nothing
                continue
            found = re.compile(r"\s*([\w-]+)\s*=").match(self.text, self.at)
            if found is None:
                raise self.wrong("what follows is not field=value,")
            key, self.at = found[1], found.end()
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
            return self.bracketed()
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

    def bracketed(self) -> dict[str, Any]:
        self.take("(")
        self.inside()
        value = self.method(end=")")
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


def write(method: Any) -> str:
    """The spec of a method object: the fields that are not at their defaults. `plan.parse` reads it back.

    Raises UserError for what has no text form: models and functions.
    """
    return _method(to_json(method), method)


def _method(data: dict[str, Any], method: Any = None) -> str:
    usual = {f.name: _usual(f) for f in dataclasses.fields(method)} if method is not None else {}
    fields = [
        f"{key}={_value(value, getattr(method, key, None))}"
        for key, value in data.items()
        if key != "method" and (method is None or getattr(method, key) != usual[key])
    ]
    return data["method"] + (":" + ",".join(fields) if fields else "")


def _usual(field: dataclasses.Field) -> Any:
    """A field's value where none is given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _value(value: Any, source: Any) -> str:
    if isinstance(value, dict):
        return f"({_method(value, source)})"
    if isinstance(value, list):
        return "[" + ",".join(_value(v, None) for v in value) + "]"
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) and value.lower() not in CONSTANTS else json.dumps(value)
    return "none" if value is None else json.dumps(value)


# ---------------------------------------------------------------- JSON


def loads(text: str, where: str) -> Any:
    """JSON as Python has it. Raises UserError, naming `where`, for anything else: also for a key that comes twice,
    numbers that are none, digits without end, lists inside lists without end."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) < len(pairs):
            keys = [k for k, _ in pairs]
            twice = next(k for i, k in enumerate(keys) if k in keys[:i])
            raise UserError(f"{where}: the key {shown(twice)} is given twice")
        return out

    def refuse(word: str) -> None:
        raise UserError(f"{where}: {word} is no number of JSON")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except json.JSONDecodeError as e:
        raise UserError(f"{where} is not JSON ({e.msg}, line {e.lineno}, column {e.colno})") from None
    except RecursionError:
        raise UserError(f"{where} is not usable: its lists or objects are nested without end") from None
    except UserError:
        raise
    except ValueError:
        raise UserError(f"{where} is not usable: a number in it has thousands of digits") from None


def read_text(path: str | os.PathLike[str], what: str, most: int = SIZE) -> str:
    """The UTF-8 text of a regular file of at most `most` bytes. Raises UserError, which calls the file `what`."""
    name = shown(os.fspath(path))
    try:
        held = Path(path).stat()
        if stat.S_ISDIR(held.st_mode):
            raise UserError(f"{name} is a folder: give {what}")
        if not stat.S_ISREG(held.st_mode):
            raise UserError(f"{name} is not a regular file: give {what}")
        if held.st_size > most:
            raise UserError(f"{name} has {held.st_size} bytes, more than {what} may have ({most})")
        return Path(path).read_bytes().decode()
    except UnicodeDecodeError as e:
        raise UserError(f"{name} is not UTF-8 text (byte {e.start}): give {what}") from None
    except FileNotFoundError:
        raise UserError(f"no file at {name}: give {what}") from None
    except OSError as e:
        raise UserError(f"{name} cannot be read ({e.strerror}): give {what}") from None
    except UserError:
        raise
    except ValueError:  # a zero byte in the path
        raise UserError(f"no file at {name}: give {what}") from None
