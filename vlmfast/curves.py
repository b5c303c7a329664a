"""Accuracy against seconds and against KV bytes as a figure: what stands in summaries of accuracy, with intervals.

figure = curves(page.read(["evals/results"], mixed=True))        # needs matplotlib (the extra `plot`)
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

from vlmfast.core import UserError

Record = dict[str, Any]
COLOURS = ("#2a6fdb", "#d9822b", "#2f9e6e", "#b5479b", "#7a5cd1", "#c0392b", "#4b8a99", "#8a6d3b", "#5f6b7a", "#9aa23c")
MARKERS = "osD^vPX"  # once all colours are used


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats: lower x and higher y are better; ascending in x."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    kept, best = [], float("-inf")
    for i in order:
        if points[i][1] > best:
            kept.append(i)
            best = points[i][1]
    return kept


def score_of(row: dict[str, Any]) -> tuple[str, float] | None:
    """The score's name and value, for rows that have one with its interval."""
    m = row["metrics"]
    found = next(((k, m[k]) for k in ("accuracy", "f1") if number(m.get(k))), None)
    bounds = m.get("ci95" if row["name"] == "plain" else "diff_ci95")
    paired = row["name"] == "plain" or number(m.get("diff_vs_plain"))
    return found if paired and isinstance(bounds, list) and len(bounds) == 2 and all(map(number, bounds)) else None


def number(value: Any) -> bool:
    """Is it a number that can be drawn?"""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def drawable(record: Record) -> bool:
    """Does the record hold a task's scores, plain's among them?"""
    return "task" in record and any(r["name"] == "plain" and score_of(r) for r in record["rows"])


def check_drawing() -> None:
    """Raise UserError where nothing can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("curves need matplotlib: pip install 'vlmfast[plot]'")


def curves(records: Sequence[tuple[str, Record]]) -> Any:
    """A matplotlib figure: one row of panels per task, score against seconds and against KV bytes.

    Error bars are the paired 95 % intervals of the difference to plain (plain: its own interval, as a band).
    """
    tasks = [(n, r) for n, r in records if drawable(r)]
    if not tasks:
        raise UserError("none of these files holds accuracy rows: curves are drawn from evals.accuracy summaries")
    check_drawing()
    from matplotlib.figure import Figure

    names = dict.fromkeys(_series(x["name"]) for _, r in tasks for x in r["rows"] if x["name"] != "plain")
    looks = {n: look(i) for i, n in enumerate(names)}
    figure = Figure(figsize=(11.5, 3.7 * len(tasks) + 0.5), layout="constrained")
    axes = figure.subplots(len(tasks), 2, squeeze=False, sharey="row")
    for row_axes, (_, record) in zip(axes, tasks, strict=True):
        _panel(row_axes[0], record, "total_ms", 1e-3, "seconds per question", looks)
        _panel(row_axes[1], record, "kv_fast_bytes", 1e-6, "KV cache, MB", looks)
        metric = next(filter(None, map(score_of, record["rows"])), None)
        row_axes[0].set_ylabel("caption facts F1, %" if metric and metric[0] == "f1" else "accuracy, %")
        questions = record["rows"][0]["params"].get("questions")
        asked = f"  ({questions:,} questions)" if number(questions) else ""
        row_axes[0].set_title(_text(record["task"]) + asked, loc="left", fontweight="bold")
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(text, handle)
    columns = min(5, len(handles))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    return figure


def look(i: int) -> tuple[str, str]:
    """(colour, marker) of the i-th series, unlike those of every other one."""
    return COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]


def _series(name: str) -> str:
    """The name without its percentages: rows of one series are joined by a line."""
    parts = (p.rpartition("-") for p in name.split("+"))
    return "+".join(a if a and b.replace(".", "").isdigit() else a + dash + b for a, dash, b in parts)


def _panel(axis: Any, record: Record, key: str, scale: float, title: str, looks: dict[str, tuple[str, str]]) -> None:
    points: list[tuple[str, float, float, list[float]]] = []
    for row in record["rows"]:
        found, x = score_of(row), row["metrics"].get(key)
        if found is None or not number(x) or x <= 0:
            continue
        m, y = row["metrics"], 100 * found[1]
        if row["name"] == "plain":
            interval = [100 * v for v in m["ci95"]]
        else:
            base = y - 100 * m["diff_vs_plain"]
            interval = [base + 100 * v for v in m["diff_ci95"]]
        points.append((row["name"], x * scale, y, interval))
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xlabel(title)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    if not points:
        axis.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axis.transAxes, color="0.5")
        return
    xs = [p[1] for p in points]
    if max(xs) > 4 * min(xs):
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    low, high = min(min(p[3]) for p in points), max(max(p[3]) for p in points)
    bottom, top = axis.get_ylim() if axis.has_data() else (low, high)  # panels of a row share the axis
    axis.set_ylim(max(0.0, min(low - 2, bottom)), min(102.0, max(high + 2, top)))  # a share ends at 100 %
    best = front([(p[1], p[2]) for p in points])
    broad: dict[str, Any] = {"color": "#f2c14e", "linewidth": 7, "alpha": 0.45, "solid_capstyle": "round", "zorder": 1}
    axis.step([points[i][1] for i in best], [points[i][2] for i in best], where="post",
              label="front: none is better in both", **broad)  # fmt: skip
    groups: dict[str, list[tuple[str, float, float, list[float]]]] = {}
    for p in points:
        groups.setdefault(_series(p[0]), []).append(p)
    for series, members in groups.items():
        members.sort(key=lambda p: p[1])
        across, heights = [p[1] for p in members], [p[2] for p in members]
        if series == "plain":
            low, high = members[0][3]
            axis.axhspan(low, high, color="0.5", alpha=0.08, zorder=0)
            axis.axhline(heights[0], color="0.35", linewidth=0.8, linestyle=":", zorder=1)
            star: dict[str, Any] = {"markersize": 15, "color": "black", "zorder": 5}
            axis.plot(across, heights, "*", label="plain model (band: its 95 % interval)", **star)
            continue
        errors = [[max(0.0, v - p[3][0]) for v, p in zip(heights, members, strict=True)],
                  [max(0.0, p[3][1] - v) for v, p in zip(heights, members, strict=True)]]  # fmt: skip
        colour, marker = looks[series]
        axis.errorbar(across, heights, yerr=errors, marker=marker, markersize=5.5, linewidth=1.1, elinewidth=1,
                      capsize=2, color=colour, label=_text(series), zorder=3)  # fmt: skip
        for p in members:
            percent = "/".join(q.rpartition("-")[2] for q in p[0].split("+") if "-" in q)
            if percent.replace("/", "").replace(".", "").isdigit():
                axis.annotate(f"{percent}", (p[1], p[2]), textcoords="offset points", xytext=(5, 4), fontsize=7.5,
                              color=colour)  # fmt: skip


def _text(name: object) -> str:
    """A name as matplotlib prints it: no mathematics between dollars, and a leading underscore is shown."""
    text = str(name)[:80].replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
