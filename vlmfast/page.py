"""Result files as pictures and as one self-contained HTML page: curves, tables, where the time went, the commands.

records = read(["evals/results"])          # RECORDS-shaped JSON files or folders of them
write(records, "page.html")                # needs matplotlib (the extra `plot`) for the curves
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vlmfast.core import UserError

Record = dict[str, Any]
COLOURS = ("#2a6fdb", "#d9822b", "#2f9e6e", "#b5479b", "#7a5cd1", "#c0392b", "#4b8a99", "#8a6d3b", "#5f6b7a", "#9aa23c")
MARKERS = "osD^vPX"  # once all colours are used
STAGES = (
    ("encode_ms", "encode", "#7fb3d5"),
    ("select_ms", "select", "#f5b041"),
    ("prefill_ms", "prefill", "#2a6fdb"),
    ("rest", "decode and the rest", "#95a5a6"),
)
HIDDEN = {"questions", "mcnemar_p", "same_answer"}


def read(paths: Iterable[str | Path], mixed: bool = False) -> list[tuple[str, Record]]:
    """(file name, record) of every result file among `paths` (files or folders).

    Raises UserError for what is no result file, and, unless `mixed`, for files made with different versions.
    """
    files: list[Path] = []
    for p in map(Path, paths):
        if p.is_dir():
            found = sorted(p.glob("*.json"))
            if not found:
                raise UserError(f"{p} holds no result files (*.json)")
            files += found
        elif p.exists():
            files.append(p)
        else:
            raise UserError(f"no result file at {p}")
    records = [(f.name, _checked(f)) for f in files]
    first_name, first = records[0]
    for name, record in records[1:]:
        for key in ("vlmfast", "transformers", "torch"):
            was, now = first["versions"].get(key), record["versions"].get(key)
            if was != now and not mixed:
                raise UserError(
                    f"{name} was made with {key} {now} and {first_name} with {was}: make them anew, "
                    "or pass --mixed to show them side by side"
                )
    return records


def _checked(file: Path) -> Record:
    try:
        record = json.loads(file.read_text())
    except (ValueError, UnicodeDecodeError):
        raise UserError(f"{file} is not JSON: result files are what the evaluation commands write") from None
    if not isinstance(record, dict):
        raise UserError(f"{file} is not a result file: it holds a {type(record).__name__}")
    for key in ("command", "versions", "hardware", "config", "rows"):
        if key not in record:
            raise UserError(f"{file} is not a result file: field {key!r} is missing")
    if not ("suite" in record or "task" in record):
        raise UserError(f"{file} is not a result file: field 'suite' or 'task' is missing")
    return record


# ---------------------------------------------------------------- curves


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
    return next(((k, row["metrics"][k]) for k in ("accuracy", "f1") if k in row["metrics"]), None)


def curves(records: Sequence[tuple[str, Record]]) -> Any:
    """A matplotlib figure: one row of panels per task, score against seconds and against KV bytes.

    Error bars are the paired 95 % intervals of the difference to plain (plain: its own interval, as a band).
    """
    from matplotlib.figure import Figure

    tasks = [(n, r) for n, r in records if any(score_of(x) for x in r["rows"])]
    if not tasks:
        raise UserError("none of these files holds accuracy rows: curves are drawn from evals.accuracy summaries")
    names = dict.fromkeys(_series(x["name"]) for _, r in tasks for x in r["rows"] if x["name"] != "plain")
    looks = {n: look(i) for i, n in enumerate(names)}
    figure = Figure(figsize=(11.5, 3.7 * len(tasks) + 0.5), layout="constrained")
    axes = figure.subplots(len(tasks), 2, squeeze=False, sharey="row")
    for row_axes, (_, record) in zip(axes, tasks, strict=True):
        _panel(row_axes[0], record, "total_ms", 1e-3, "seconds per question", looks)
        _panel(row_axes[1], record, "kv_fast_bytes", 1e-6, "KV cache, MB", looks)
        metric = next(score_of(x) for x in record["rows"])
        row_axes[0].set_ylabel("caption facts F1, %" if metric and metric[0] == "f1" else "accuracy, %")
        questions = record["rows"][0]["params"].get("questions", "?")
        row_axes[0].set_title(f"{record.get('task', '')}  ({questions:,} questions)", loc="left", fontweight="bold")
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
        if found is None or x is None or x <= 0:
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
                      capsize=2, color=colour, label=series, zorder=3)  # fmt: skip
        for p in members:
            percent = "/".join(q.rpartition("-")[2] for q in p[0].split("+") if "-" in q)
            if percent.replace("/", "").replace(".", "").isdigit():
                axis.annotate(f"{percent}", (p[1], p[2]), textcoords="offset points", xytext=(5, 4), fontsize=7.5,
                              color=colour)  # fmt: skip


# ---------------------------------------------------------------- the page


def write(
    records: Sequence[tuple[str, Record]], out: str | Path, title: str = "vlmfast results", note: str = ""
) -> None:
    """Write the page; `note` is HTML shown first (`tune` explains its choice there)."""
    Path(out).write_text(render(records, title, note))


def render(records: Sequence[tuple[str, Record]], title: str = "vlmfast results", note: str = "") -> str:
    """The page as one HTML document that refers to nothing outside it."""
    parts = [f"<h1>{html.escape(title)}</h1>", note]
    if any(score_of(x) for _, r in records for x in r["rows"]):
        buffer = io.BytesIO()
        curves(records).savefig(buffer, format="png", dpi=130)
        image = base64.b64encode(buffer.getvalue()).decode()
        parts.append(
            "<p>Up and to the left is better. Bars are paired 95 % intervals of the difference to the plain model; "
            "numbers beside points are the kept percentages; the broad line joins what nothing beats in both.</p>"
            f'<img alt="score against seconds and KV bytes" src="data:image/png;base64,{image}">'
        )
    for name, record in records:
        parts += _section(name, record)
    parts.append("<h2>How these numbers were made</h2>")
    for name, r in records:
        h, v = r["hardware"], r["versions"]
        versions = ", ".join(f"{k} {x}" for k, x in v.items())
        machine = (
            f"{h.get('name')} ({h.get('device')}, {h.get('cores')} cores, {h.get('memory_gb')} GB, {h.get('dtype')})"
        )
        text = (
            f"{name}: commit {r.get('commit')}; {versions}; {machine}; seed {r.get('seed')}, {r.get('repeats')} repeats"
        )
        parts.append(f"<pre>{html.escape(r['command'])}</pre><p class=dim>{html.escape(text)}</p>")
    body = "\n".join(parts)
    top = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>{STYLE}"
    return f"{top}<body>{body}</body></html>\n"


def _section(name: str, record: Record) -> list[str]:
    title = record.get("task") or f"speed: {record.get('suite')}"
    out = [f"<h2>{html.escape(str(title))}</h2>", _table(record["rows"])]
    bars = _breakdown(record["rows"])
    if bars:
        out += ["<h3>Where the time goes</h3>", bars]
    notes = [f"<li>{html.escape(r['name'])}: {html.escape(n)}" for r in record["rows"] for n in r.get("notes", [])]
    return out + (["<ul class=dim>", *notes, "</ul>"] if notes else [])


def _table(rows: list[dict[str, Any]]) -> str:
    columns = [k for k in dict.fromkeys(k for r in rows for k in r["metrics"]) if k not in HIDDEN and "ci95" not in k]
    head = "".join(f"<th>{html.escape(c)}</th>" for c in ["method", *columns])
    lines = []
    for r in rows:
        params = ", ".join(f"{k} {v}" for k, v in r["params"].items() if k not in ("questions", "clusters", "batch"))
        cells = [f"<td title='{html.escape(json.dumps(r['plan']), quote=True)}'>{html.escape(r['name'])}"
                 f"<span class=dim> {html.escape(params)}</span></td>"]  # fmt: skip
        cells += [f"<td>{_cell(r, c)}</td>" for c in columns]
        lines.append(f"<tr{' class=plain' if r['name'] == 'plain' else ''}>{''.join(cells)}</tr>")
    return f"<div class=wide><table><tr>{head}</tr>{''.join(lines)}</table></div>"


def _cell(row: dict[str, Any], key: str) -> str:
    m = row["metrics"]
    value = m.get(key)
    if value is None:
        return ""
    interval = {"accuracy": "ci95", "f1": "ci95", "diff_vs_plain": "diff_ci95"}.get(key)
    if interval and isinstance(value, (int, float)):
        sign = "+" if key == "diff_vs_plain" else ""
        low, high = (100 * x for x in m.get(interval, [value, value]))
        return f"{100 * value:{sign}.1f}<span class=dim> [{low:.1f}, {high:.1f}]</span>"
    text = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    for against, ratios in row["vs"].items():
        if key in ratios:
            middle, low, high = ratios[key]
            text += f"<br><b>{middle:.2f}x</b><span class=dim> [{low:.2f}, {high:.2f}] vs {html.escape(against)}</span>"
    return text


def _breakdown(rows: list[dict[str, Any]]) -> str:
    """Stacked bars of the stages' milliseconds, all to one scale."""
    timed = [r for r in rows if "total_ms" in r["metrics"] and "prefill_ms" in r["metrics"]]
    if not timed:
        return ""
    longest = max(r["metrics"]["total_ms"] for r in timed)
    lines = ["<p>" + " ".join(f"<span class=key style='background:{c}'></span>{t}" for _, t, c in STAGES) + "</p>"]
    for r in timed:
        m = dict(r["metrics"])
        m["rest"] = max(0.0, m["total_ms"] - sum(m.get(k, 0.0) for k, _, _ in STAGES[:-1]))
        bars = "".join(
            f"<span class=bar title='{t} {m.get(k, 0):.3g} ms' "
            f"style='width:{70 * m.get(k, 0) / longest:.2f}%;background:{c}'></span>"
            for k, t, c in STAGES
        )
        lines.append(
            f"<div class=line><span class=who>{html.escape(r['name'])}</span>{bars} {m['total_ms']:.3g} ms</div>"
        )
    return "".join(lines)


STYLE = """<style>
body{font:15px/1.45 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#1c2833}
h1{font-size:1.6em}h2{margin-top:2em;border-bottom:1px solid #d5d8dc;padding-bottom:.2em}h3{margin-bottom:.2em}
img{max-width:100%}table{border-collapse:collapse;font-variant-numeric:tabular-nums}.wide{overflow-x:auto}
td,th{padding:.25em .7em;text-align:right;border-bottom:1px solid #eaeded;white-space:nowrap;vertical-align:top}
td:first-child,th:first-child{text-align:left;position:sticky;left:0;background:#fff}tr.plain td{background:#f4f6f7}
.dim{color:#7b8a97;font-size:.88em}pre{background:#f4f6f7;padding:.6em;overflow-x:auto}
.bar{display:inline-block;height:1em;vertical-align:middle}.line{white-space:nowrap;margin:.15em 0}
.who{display:inline-block;width:16%;overflow:hidden;text-overflow:ellipsis;vertical-align:middle}
.key{display:inline-block;width:.9em;height:.9em;margin:0 .35em 0 1em}
</style>"""
