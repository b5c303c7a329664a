"""`vlmfast methods`: every registered method with its paper, what it needs, and its fields."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import json
import re
from typing import Any

from vlmfast.cli import console, options

STAGES = (  # title, package, table of methods in it, the option it goes to
    ("encode: visual tokens kept", "vlmfast.encode", "METHODS", "--prune"),
    ("prefill: keys and values kept", "vlmfast.prefill", "METHODS", "--kv"),
    ("decode: drafts", "vlmfast.decode", "DRAFTS", "--speculate draft="),
    ("decode: acceptance", "vlmfast.decode", "ACCEPT", "--speculate accept="),
)


def methods(as_json: options.Json = False) -> None:
    """List the methods of every stage."""
    listed = [(title, option, listing(package, table)) for title, package, table, option in STAGES]
    if as_json:
        print(json.dumps({title: rows for title, _, rows in listed if rows}, indent=1))
        return
    from rich import box
    from rich.table import Table

    page = console.out()
    for title, option, rows in listed:
        if not rows:
            continue
        table = Table(title=f"{title}  [dim]{option}[/dim]", title_justify="left", title_style="bold", box=box.SIMPLE)
        table.add_column("method", style="cyan", no_wrap=True)
        table.add_column("what it does, what it needs, paper, fields and their defaults")
        for row in rows:
            needs = "needs " + (", ".join(row["needs"]) or "nothing") if row["needs"] is not None else ""
            fields = listed_fields(row["fields"])
            facts = "  ·  ".join(filter(None, (needs, row["paper"], fields)))
            table.add_row(row["name"], f"{row['summary']}\n[dim]{facts}[/dim]")
        page.print(table)


def listed_fields(fields: dict[str, Any]) -> str:
    """Fields and their defaults; those that are options in round brackets."""
    return ", ".join(f"{k}=({listed_fields(v)})" if isinstance(v, dict) else f"{k}={v}" for k, v in fields.items())


def listing(package: str, table: str) -> list[dict[str, Any]]:
    """Name, summary, needs, paper and fields with defaults of every method in one table; [] without the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return []
    found: dict[str, type] = getattr(importlib.import_module(package), table)
    homes = [cls.__module__ for cls in found.values()]
    return [describe(name, cls, homes.count(cls.__module__) == 1) for name, cls in found.items()]


def describe(name: str, cls: type, own: bool) -> dict[str, Any]:
    """One method, as its class says it, and its module when that is its own (`own`)."""
    doc = inspect.getdoc(cls) or ""
    module = inspect.getdoc(inspect.getmodule(cls)) or ""
    found = re.search(r"arXiv[: ]*(\d{4}\.\d{4,5})", f"{doc}\n{module}" if own else doc, re.IGNORECASE)
    return {
        "name": name,
        "summary": summary(module.partition(": ")[2] or doc if own else doc),
        "needs": list(cls.needs) if hasattr(cls, "needs") else None,
        "paper": f"arXiv {found.group(1)}" if found else "",
        "fields": defaults(cls) if dataclasses.is_dataclass(cls) else {},
    }


def defaults(cls: Any) -> dict[str, Any]:
    """Every field's default."""
    return {f.name: default(f) for f in dataclasses.fields(cls) if f.init}


def summary(text: str) -> str:
    """The first sentence, without references, with a capital."""
    text = " ".join(text.split("\n\n")[0].split())
    text = re.sub(r"\s*\([^()]*arXiv[^()]*\)", "", text)
    first = re.split(r"(?<=[^.][.])\s+(?=[A-Z])", text)[0].rstrip(".:") + "."
    return first[:1].upper() + first[1:]


def default(field: dataclasses.Field[Any]) -> Any:
    """A field's default as one would type it; "required" without one."""
    from vlmfast.fields import Options

    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if isinstance(value, Options):
        return defaults(value)
    return value if isinstance(value, (int, float, str, bool)) or value is None else type(value).__name__.lower()
