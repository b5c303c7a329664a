"""Draws accuracy against seconds and against KV bytes, with intervals, from summaries of accuracy.

figure = curves(page.read(["evals/results"], mixed=True))        # needs matplotlib (the extra `plot`)
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

from vlmfast.core import UserError

Record = dict[str, Any]
KV = ("kv_fast_bytes", "kv_host_bytes")  # what a policy moves to host memory is still held
COLOURS = ("#2a6fdb", "#d9822b", "#2f9e6e", "#b5479b", "#7a5cd1", "#c0392b", "#4b8a99", "#8a6d3b", "#5f6b7a", "#9aa23c")
MARKERS = "osD^vPX"  # the next one is used once all colours are


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats: lower x and higher y are better; ascending in x."""
    ascending = sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1]))
    on_front, best_score = [], float("-inf")
    for index in ascending:
        if points[index][1] > best_score:
            on_front.append(index)
            best_score = points[index][1]
    return on_front


def score_of(row: dict[str, Any]) -> tuple[str, float] | None:
    """The score's name and value, for rows that have one with its interval."""
    metrics = row["metrics"]
    score = next(((metric, metrics[metric]) for metric in ("accuracy", "f1") if number(metrics.get(metric))), None)
    bounds = metrics.get("ci95" if row["name"] == "plain" else "diff_ci95")
    paired = row["name"] == "plain" or number(metrics.get("diff_vs_plain"))
    return score if paired and isinstance(bounds, list) and len(bounds) == 2 and all(map(number, bounds)) else None


def number(value: Any) -> bool:
    """Is it a number that can be drawn?"""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def drawable(record: Record) -> bool:
    """Does the record hold a task's scores, plain's among them?"""
    return "task" in record and any(row["name"] == "plain" and score_of(row) for row in record["rows"])


def check_drawing() -> None:
    """Raise UserError where nothing can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("curves need matplotlib: pip install 'vlmfast[plot]'")


def curves(records: Sequence[tuple[str, Record]]) -> Any:
    """A matplotlib figure: one row of panels per task, score against seconds and against KV bytes.

    Error bars are the paired 95 % intervals of the difference to plain (plain: its own interval, as a band).
    """
    tasks = [record for _, record in records if drawable(record)]
    if not tasks:
        raise UserError("none of these files holds accuracy rows: curves are drawn from evals.accuracy summaries")
    check_drawing()
    from matplotlib.figure import Figure

    rows = [row for record in tasks for row in record["rows"]]
    series_names = dict.fromkeys(_series(row["name"]) for row in rows if row["name"] != "plain")
    styles = {name: look(index) for index, name in enumerate(series_names)}
    figure = Figure(figsize=(11.5, 3.7 * len(tasks) + 0.5), layout="constrained")
    panel_axes = figure.subplots(len(tasks), 2, squeeze=False, sharey="row")
    for row_axes, record in zip(panel_axes, tasks, strict=True):
        _panel(row_axes[0], record, ("total_ms",), 1e-3, "seconds per question", styles)
        _panel(row_axes[1], record, KV, 1e-6, "KV cache in all, host memory too, MB", styles)
        metric = next(filter(None, map(score_of, record["rows"])), None)
        row_axes[0].set_ylabel("caption facts F1, %" if metric and metric[0] == "f1" else "accuracy, %")
        questions = record["rows"][0]["params"].get("questions")
        num_asked = f"  ({questions:,} questions)" if number(questions) else ""
        row_axes[0].set_title(_text(record["task"]) + num_asked, loc="left", fontweight="bold")
    handles: dict[str, Any] = {}
    for panel_axis in panel_axes.flat:
        for handle, label in zip(*panel_axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    columns = min(5, len(handles))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    return figure


def look(index: int) -> tuple[str, str]:
    """(colour, marker) of the i-th series, unlike those of every other one."""
    return COLOURS[index % len(COLOURS)], MARKERS[index // len(COLOURS) % len(MARKERS)]


def _series(name: str) -> str:
    """The name without its percentages: rows of one series are joined by a line."""
    parts = (part.rpartition("-") for part in name.split("+"))
    return "+".join(
        prefix if prefix and suffix.replace(".", "").isdigit() else prefix + dash + suffix
        for prefix, dash, suffix in parts
    )


def cost_of(row: Any, keys: tuple[str, ...]) -> float | None:
    """The sum of some metrics of a row, None where it lacks the first of them."""
    found = [row["metrics"].get(key) for key in keys]
    return float(sum(value for value in found if number(value))) if number(found[0]) else None


def _panel(
    axis: Any, record: Record, keys: tuple[str, ...], scale: float, title: str, styles: dict[str, tuple[str, str]]
) -> None:
    points: list[tuple[str, float, float, list[float]]] = []
    for row in record["rows"]:
        score, cost = score_of(row), cost_of(row, keys)
        if score is None or cost is None or cost <= 0:
            continue
        metrics, height = row["metrics"], 100 * score[1]
        if row["name"] == "plain":
            interval = [100 * bound for bound in metrics["ci95"]]
        else:
            plain_percent = height - 100 * metrics["diff_vs_plain"]
            interval = [plain_percent + 100 * bound for bound in metrics["diff_ci95"]]
        points.append((row["name"], cost * scale, height, interval))
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xlabel(title)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    if not points:
        axis.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axis.transAxes, color="0.5")
        return
    costs = [point[1] for point in points]
    if max(costs) > 4 * min(costs):
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    lowest, highest = min(min(point[3]) for point in points), max(max(point[3]) for point in points)
    bottom, top = axis.get_ylim() if axis.has_data() else (lowest, highest)  # panels of a row share the axis
    axis.set_ylim(max(0.0, min(lowest - 2, bottom)), min(102.0, max(highest + 2, top)))  # a share ends at 100 %
    front_indices = front([(point[1], point[2]) for point in points])
    best_points = [points[index] for index in front_indices]
    front_style: dict[str, Any] = {"color": "#f2c14e", "linewidth": 7, "alpha": 0.45, "solid_capstyle": "round"}
    axis.step([point[1] for point in best_points], [point[2] for point in best_points], where="post", zorder=1,
              label="front: none is better in both", **front_style)  # fmt: skip
    series_points: dict[str, list[tuple[str, float, float, list[float]]]] = {}
    for point in points:
        series_points.setdefault(_series(point[0]), []).append(point)
    for series, members in series_points.items():
        members.sort(key=lambda point: point[1])
        x_values, y_values = [point[1] for point in members], [point[2] for point in members]
        if series == "plain":
            lowest, highest = members[0][3]
            axis.axhspan(lowest, highest, color="0.5", alpha=0.08, zorder=0)
            axis.axhline(y_values[0], color="0.35", linewidth=0.8, linestyle=":", zorder=1)
            plain_style: dict[str, Any] = {"markersize": 15, "color": "black", "zorder": 5}
            axis.plot(x_values, y_values, "*", label="plain model (band: its 95 % interval)", **plain_style)
            continue
        errors = [[max(0.0, point[2] - point[3][0]) for point in members],
                  [max(0.0, point[3][1] - point[2]) for point in members]]  # fmt: skip
        colour, marker = styles[series]
        axis.errorbar(x_values, y_values, yerr=errors, marker=marker, markersize=5.5, linewidth=1.1, elinewidth=1,
                      capsize=2, color=colour, label=_text(series), zorder=3)  # fmt: skip
        for point in members:
            percent = "/".join(part.rpartition("-")[2] for part in point[0].split("+") if "-" in part)
            if percent.replace("/", "").replace(".", "").isdigit():
                axis.annotate(f"{percent}", (point[1], point[2]), textcoords="offset points", xytext=(5, 4),
                              fontsize=7.5, color=colour)  # fmt: skip


def _text(name: object) -> str:
    """A name as matplotlib prints it: no mathematics between dollars, and a leading underscore is shown."""
    text = str(name)[:80].replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
