"""What choosing and compressing ask of a GPU, from the budgets that the tests hold (`tests/support/budgets.json`)."""

from __future__ import annotations

import json
from collections.abc import Callable

from evals.report.tables import markdown
from vlmfast.bench import records

FILE = records.ROOT / "tests" / "support" / "budgets.json"
Counts = dict[str, dict[str, float]]  # case -> kind -> how many


def group(name: str) -> Counts:
    """The cases of one group of the file."""
    return json.loads(FILE.read_text())[name]  # type: ignore[no-any-return]


def choosing() -> str:
    """Every pruner's choice; those between layers by the cut."""
    parts = (("a choice", group("chooser call")), ("a cut", group("cut between layers")))
    rows = [
        [f"`{name}`", what, f"{counts['launches']:g}", f"{counts['waits']:g}"]
        for what, cases in parts
        for name, counts in sorted(cases.items(), key=lambda case: case[1]["launches"])
    ]
    return markdown(["pruner", "what is counted", "launches", "host waits"], rows)


def policies() -> str:
    """Every policy's prefill beside one under none: what a layer adds, and what the host waits for in all."""
    none, in_all = group("prefill, a layer")["loop"], group("prefill under every policy, in all")
    rows = []
    for name, layer in sorted(group("prefill under every policy, a layer").items(), key=lambda c: c[1]["launches"]):
        more = [f"{layer[kind] - none[kind]:g}" for kind in ("launches", "copies")]
        rows.append([f"`{name}`", *more, f"{in_all[name]['waits']:g}"])
    return markdown(["policy", "launches a layer", "copies a layer", "host waits in all"], rows)


TABLES: dict[str, Callable[[], str]] = {"choosing-launches": choosing, "policy-launches": policies}
