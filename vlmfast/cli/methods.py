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
    stage_lists = [(title, option, listing(package, table)) for title, package, table, option in STAGES]
    if as_json:
        print(json.dumps({title: method_rows for title, _, method_rows in stage_lists if method_rows}, indent=1))
        return
    from rich import box
    from rich.table import Table

    page = console.out()
    for title, option, method_rows in stage_lists:
        if not method_rows:
            continue
        table = Table(title=f"{title}  [dim]{option}[/dim]", title_justify="left", title_style="bold", box=box.SIMPLE)
        table.add_column("method", style="cyan", no_wrap=True)
        table.add_column("what it does, what it needs, paper, fields and their defaults")
        for method_row in method_rows:
            needs = "needs " + (", ".join(method_row["needs"]) or "nothing") if method_row["needs"] is not None else ""
            fields = listed_fields(method_row["fields"])
            detail_line = "  ·  ".join(filter(None, (needs, method_row["paper"], fields)))
            table.add_row(method_row["name"], f"{method_row['summary']}\n[dim]{detail_line}[/dim]")
        page.print(table)


def listed_fields(fields: dict[str, Any]) -> str:
    """Fields and their defaults; those that are options in round brackets."""
    return ", ".join(
        f"{name}=({listed_fields(default_value)})" if isinstance(default_value, dict) else f"{name}={default_value}"
        for name, default_value in fields.items()
    )


def listing(package: str, table: str) -> list[dict[str, Any]]:
    """Name, summary, needs, paper and fields with defaults of every method in one table; [] without the package."""
    package_spec = importlib.util.find_spec(package)
    if package_spec is None or package_spec.origin is None:
        return []
    classes: dict[str, type] = getattr(importlib.import_module(package), table)
    modules = [method_class.__module__ for method_class in classes.values()]
    return [
        describe(name, method_class, modules.count(method_class.__module__) == 1)
        for name, method_class in classes.items()
    ]


def describe(name: str, cls: type, own: bool) -> dict[str, Any]:
    """One method, as its class says it, and its module when that is its own (`own`)."""
    class_text = inspect.getdoc(cls) or ""
    module_text = inspect.getdoc(inspect.getmodule(cls)) or ""
    paper = re.search(
        r"arXiv[: ]*(\d{4}\.\d{4,5})", f"{class_text}\n{module_text}" if own else class_text, re.IGNORECASE
    )
    return {
        "name": name,
        "summary": summary(module_text.partition(": ")[2] or class_text if own else class_text),
        "needs": list(cls.needs) if hasattr(cls, "needs") else None,
        "paper": f"arXiv {paper.group(1)}" if paper else "",
        "fields": defaults(cls) if dataclasses.is_dataclass(cls) else {},
    }


def defaults(cls: Any) -> dict[str, Any]:
    """Every field's default."""
    return {field.name: default(field) for field in dataclasses.fields(cls) if field.init}


def summary(text: str) -> str:
    """The first sentence, without references, with a capital."""
    text = " ".join(text.split("\n\n")[0].split())
    text = re.sub(r"\s*\([^()]*arXiv[^()]*\)", "", text)
    sentence = re.split(r"(?<=[^.][.])\s+(?=[A-Z])", text)[0].rstrip(".:") + "."
    return sentence[:1].upper() + sentence[1:]


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
