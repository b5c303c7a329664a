"""Figures of records as text, for the sentences of the documents: `points("accuracy-turns", "snapkv-10")`.

A row is named by its file, its name and, where several share that, parameters: `row("cpu-decode", "loose",
draft="modeldraft", ratio=0.0)`. A parameter of None must be absent. A file or row that is not there, or two that
answer, is a `LookupError` that says which: no sentence is written without its record.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from evals.report.tables import percent
from vlmfast.bench import records
from vlmfast.bench.bounds import Row, ratio_of

RESULTS = records.ROOT / "evals" / "results"


@cache
def _read(file: Path, changed_at: int) -> dict[str, Any]:
    return dict(json.loads(file.read_text()))


def record(name: str) -> dict[str, Any]:
    """A whole record of `evals/results`, by the name of its file without `.json`."""
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        raise LookupError(f"there is no record {file.name}: run its command first (evals/README.md)")
    return _read(file, file.stat().st_mtime_ns)


def rows(name: str) -> list[Row]:
    """The rows of a record."""
    return list(record(name)["rows"])


def row(file: str, method: str, **params: Any) -> Row:
    """The one row of that name with these parameters."""
    wanted = [
        candidate
        for candidate in rows(file)
        if candidate["name"] == method and all(candidate["params"].get(k) == v for k, v in params.items())
    ]
    if len(wanted) != 1:
        said = ", ".join([method, *(f"{k}={v}" for k, v in params.items())])
        raise LookupError(f"{file}.json has {len(wanted)} rows {said}: a sentence needs exactly one")
    return wanted[0]


def metric(file: str, method: str, key: str, **params: Any) -> float:
    """One metric of one row."""
    value = row(file, method, **params)["metrics"].get(key)
    if not isinstance(value, (int, float)):
        raise LookupError(f"{file}.json: the row {method} has no {key}")
    return float(value)


def share(file: str, method: str, key: str = "accuracy", digits: int = 0, **params: Any) -> str:
    """A share as a percentage: `96 %`."""
    return percent(metric(file, method, key, **params), digits)


def change(file: str, method: str, digits: int = 1, **params: Any) -> str:
    """Points against plain without the interval: `-0.2`."""
    return f"{100 * metric(file, method, 'diff_vs_plain', **params):+.{digits}f}"


def points(file: str, method: str, key: str = "diff_vs_plain", interval: str = "diff_ci95", **params: Any) -> str:
    """Points against plain with the interval: `-0.2 points [-1.5, +1.0]`."""
    found = row(file, method, **params)["metrics"]
    low, high = (f"{100 * bound:+.1f}" for bound in found[interval])
    return f"{100 * found[key]:+.1f} points [{low}, {high}]"


def equal(file: str, method: str, **params: Any) -> bool:
    """Does the interval of the difference to plain hold 0?"""
    low, high = row(file, method, **params)["metrics"]["diff_ci95"]
    return bool(low <= 0 <= high)


def asked(file: str, method: str = "plain") -> str:
    """How many questions were asked: `1,024`."""
    return f"{row(file, method)['params']['questions']:,}"


def ratio(file: str, method: str, key: str, base: str = "plain", **params: Any) -> str:
    """A paired ratio to a baseline, with its bound if it lies above it: `3.37x (bound 1.91x)`."""
    text = ratio_of(row(file, method, **params), key, rows(file), base)
    if text == "-":
        raise LookupError(f"{file}.json: the row {method} has no ratio of {key} to {base}")
    return text


def milliseconds(file: str, method: str, key: str, digits: int = 0, **params: Any) -> str:
    """A time: `65 ms`."""
    return f"{metric(file, method, key, **params):,.{digits}f} ms"
