"""For the API reference: fields that a docstring names in running text (`keep: fraction kept. floor: ...`) as a list.

A field begins at the start of a line or after a full stop or semicolon, and is known by the names of the parameters.
A line that begins a sentence without one begins a new paragraph.
"""

from __future__ import annotations

import re
from typing import Any

import griffe


def listed(text: str, names: set[str]) -> str:
    """The docstring with one list item for each field (or several that share a sentence) of `names`."""
    if not names:
        return text
    name = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    field = re.compile(rf"(?:^|(?<=[.;)] )|(?<=\n))\s*((?:{name})(?:, (?:{name}))*): ")
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        if block.lstrip().startswith(("*", "-", "|", "```")) or block.startswith("    "):
            paragraphs.append(block)
            continue
        block = re.sub(r"(?<=[.:])\n(?=[A-Z`(])", "\n\n", block)
        parts = re.split(r"\n\s*\n", field.sub(lambda m: f"\n\n* **{m[1]}**: ", block).strip())
        paragraphs += [part.strip().removesuffix(";") for part in parts]
    return "\n\n".join(paragraphs)


class FieldsAsList(griffe.Extension):
    """Rewrites the docstrings of functions and classes before they are rendered."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        self._rewrite(func, {p.name for p in func.parameters})

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Classes wait until the whole package is read: fields may come from their bases."""
        for module in pkg.modules.values():
            if not module.is_alias:
                self.on_package(pkg=module)
        for kind in pkg.classes.values():
            if not kind.is_alias:
                self._rewrite(kind, {*kind.all_members, *(p.name for p in kind.parameters)})

    @staticmethod
    def _rewrite(obj: Any, names: set[str]) -> None:
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value, names - {"self", "cls"})
