"""Result files as one self-contained HTML page: curves, tables, where the time went, the commands that made them.

records = read(["evals/results"])          # result files (JSON), or folders of them
write(records, "page.html")                # needs matplotlib (the extra `plot`) where accuracy is drawn

Everything that comes from a file is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vlmfast import files
from vlmfast.core import UserError
from vlmfast.curves import Record, check_drawing, curves, drawable, number

__all__ = ["check_drawing", "curves", "floors_above", "read", "render", "write"]

STAGES = (
    ("encode_ms", "vision tower", "#7fb3d5"),
    ("select_ms", "choosing", "#f5b041"),
    ("prefill_ms", "prefill", "#2a6fdb"),
    ("rest", "decode and the rest", "#95a5a6"),
)
HIDDEN = {"questions", "mcnemar_p", "diff_p", "same_answer"}
WORDS = {
    "accuracy": "accuracy, %", "f1": "facts F1, %", "diff_vs_plain": "against plain, points", "failed": "failed",
    "kept_tokens": "tokens kept", "kv_fast_bytes": "KV cache, MB", "total_ms": "whole answer, ms",
    "ttft_ms": "first token, ms", "encode_ms": "vision tower, ms", "select_ms": "choosing, ms",
    "prefill_ms": "prefill, ms", "decode_ms_per_token": "each further token, ms", "visual_tokens": "visual tokens",
    "cached_tokens": "columns cached", "kv_host_bytes": "KV in host memory, MB",
    "accepted_length": "draft tokens accepted a round", "verify_rounds": "rounds",
}  # fmt: skip
ACROSS = 6  # columns of figures beside each other
BUSY = "busy machine: floor above measurement"
FLOORS = {"encode_floor_ms": "encode_ms", "prefill_floor_ms": "prefill_ms", "attention_floor_ms": "attention_ms",
          "decode_floor_ms": "decode_ms_per_token"}  # fmt: skip


def read(paths: Iterable[str | Path], mixed: bool = False) -> list[tuple[str, Record]]:
    """(file name, record) of every result file among `paths` (files or folders).

    Raises UserError for what is no result file, and, unless `mixed`, for files made with different versions.
    """
    result_files: list[Path] = []
    for result_path in map(Path, paths):
        if result_path.is_dir():
            folder_files = sorted(result_path.glob("*.json"))
            if not folder_files:
                raise UserError(f"{result_path} holds no result files (*.json)")
            result_files += folder_files
        elif result_path.exists():
            result_files.append(result_path)
        else:
            raise UserError(f"no result file at {result_path}")
    records = [(result_file.name, _checked(result_file)) for result_file in result_files]
    first_name, first_record = records[0]
    for name, record in records[1:]:
        for key in ("vlmfast", "transformers", "torch"):
            expected, actual = first_record["versions"].get(key), record["versions"].get(key)
            if expected != actual and not mixed:
                raise UserError(
                    f"{name} was made with {key} {actual} and {first_name} with {expected}: make them anew, "
                    "or pass --mixed to show them side by side"
                )
    return records


def _checked(file: Path) -> Record:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UserError(f"{file} is not JSON: result files are what the evaluation commands write") from None
    if not isinstance(record, dict):
        raise UserError(f"{file} is not a result file: it holds a {type(record).__name__}")
    field_types = {"command": str, "versions": dict, "hardware": dict, "config": dict, "rows": list}
    for key, field_type in field_types.items():
        if key not in record:
            raise UserError(f"{file} is not a result file: field {key!r} is missing")
        if not isinstance(record[key], field_type):
            raise UserError(f"{file} is not a result file: field {key!r} holds a {type(record[key]).__name__}")
    if not ("suite" in record or "task" in record):
        raise UserError(f"{file} is not a result file: field 'suite' or 'task' is missing")
    for row_number, row in enumerate(record["rows"]):
        _check_row(row, f"{file} is not a result file: row {row_number}")
    return record


def _check_row(row: Any, where: str) -> None:
    """Raise UserError unless the row has what every reader counts on, ratios of three numbers among it."""
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        raise UserError(f"{where} has no name")
    for key in ("plan", "params", "metrics", "vs"):
        if not isinstance(row.get(key), dict):
            raise UserError(f"{where} has no object {key!r}")
    for ratios in row["vs"].values():
        for key, ratio in ratios.items() if isinstance(ratios, dict) else [("vs", None)]:
            if not (isinstance(ratio, list) and len(ratio) == 3 and all(map(number, ratio))):
                raise UserError(f"{where} has no [median, low, high] for {str(key)[:40]!r}")
    if not isinstance(row.get("notes", []), list):
        raise UserError(f"{where} has notes that are no list")


def write(
    records: Sequence[tuple[str, Record]], out: str | Path, title: str = "vlmfast results", note: str = ""
) -> None:
    """Write the page, whole or not at all; `note` is HTML shown first (`tune` explains its choice there)."""
    files.write_text(out, render(records, title, note))


def render(records: Sequence[tuple[str, Record]], title: str = "vlmfast results", note: str = "") -> str:
    """The page as one HTML document that refers to nothing outside it."""
    parts = [f"<h1>{html.escape(title)}</h1>", note]
    if any(drawable(result) for _, result in records):
        png = io.BytesIO()
        curves(records).savefig(png, format="png", dpi=130)
        encoded = base64.b64encode(png.getvalue()).decode()
        parts.append(
            "<p>Up and to the left is better. Bars are paired 95 % intervals of the difference to the plain model; "
            "numbers beside points are the kept percentages; the broad line joins what nothing beats in both.</p>"
            f'<img alt="score against seconds and KV bytes" src="data:image/png;base64,{encoded}">'
        )
    for name, record in records:
        parts += _section(name, record)
    parts.append("<h2>How these numbers were made</h2>")
    for name, result in records:
        hardware, settings = result["hardware"], f"seed {result.get('seed')}, {result.get('repeats')} repeats"
        versions = ", ".join(f"{library} {version}" for library, version in result["versions"].items())
        size = f"{hardware.get('cores')} cores, {hardware.get('memory_gb')} GB"
        machine = f"{hardware.get('name')} ({hardware.get('device')}, {size}, {hardware.get('dtype')})"
        origin = f"{name}: commit {result.get('commit')}; {versions}; {machine}; {settings}"
        parts.append(f"<pre>{html.escape(result['command'])}</pre><p class=dim>{html.escape(origin)}</p>")
    body = "\n".join(parts)
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>{STYLE}"
    return f"{head}<body>{body}</body></html>\n"


def _section(name: str, record: Record) -> list[str]:
    title = record.get("task") or f"speed: {record.get('suite')}"
    sections = [f"<h2>{html.escape(str(title))}</h2>", *_tables(record["rows"])]
    breakdown = _breakdown(record["rows"])
    if breakdown:
        sections += ["<h3>Where the time goes</h3>", breakdown]
    notes = []
    for row in record["rows"]:
        row_notes = (*row.get("notes", []), *floors_above(row["metrics"]))
        notes += [f"<li>{html.escape(row['name'])}: {html.escape(str(note))}" for note in row_notes]
    return sections + (["<ul class=dim>", *notes, "</ul>"] if notes else [])


def floors_above(metrics: dict[str, Any]) -> list[str]:
    """Remarks on stages that took less than their floor: the rates were measured while others used the machine."""
    floor_metrics = {"encode_floor_ms": "ttft_ms", "attention_floor_ms": "decode_ms_per_token"}  # what `floor_ms` is of
    whole = next((metric for floor_name, metric in floor_metrics.items() if floor_name in metrics), "total_ms")
    floor_pairs = {**FLOORS, "floor_ms": whole}
    stages = [
        words(stage_metric).partition(",")[0]
        for floor_name, stage_metric in floor_pairs.items()
        if number(metrics.get(stage_metric))
        and number(metrics.get(floor_name))
        and metrics[floor_name] > 1.02 * metrics[stage_metric] > 0
    ]
    return [f"{BUSY} ({', '.join(stages)})"] if stages else []


def words(key: str) -> str:
    """A field's name as a heading, its unit last."""
    if key in WORDS:
        return WORDS[key]
    for suffix, unit in (("_ms_per_token", " a token, ms"), ("_ms", ", ms"), ("_bytes_per_hour", " an hour, MB"),
                      ("_bytes", ", MB")):  # fmt: skip
        if key.endswith(suffix):
            return key.removesuffix(suffix).replace("_", " ") + unit
    return key.replace("_", " ")


def _tables(rows: list[dict[str, Any]]) -> list[str]:
    """The rows' figures, so many columns beside each other as a page is wide, the rest below."""
    keys = dict.fromkeys(key for row in rows for key in row["metrics"])
    columns = [key for key in keys if key not in HIDDEN and "ci95" not in key]
    columns = [key for key in columns if any(_shown(row["metrics"].get(key)) for row in rows)]
    known_keys = list(WORDS)
    columns.sort(key=lambda key: known_keys.index(key) if key in known_keys else len(known_keys))
    column_groups = [columns[start : start + ACROSS] for start in range(0, len(columns), ACROSS)]
    return [_table(rows, part) for part in column_groups]


def _shown(value: Any) -> bool:
    """Is it worth a column? Zeros everywhere are not, nor are lists."""
    return bool(value) and not isinstance(value, (list, dict))


def _params(row: dict[str, Any]) -> str:
    """What distinguishes rows of one name."""
    repeated = ("prune_keep", "kv_keep") if "keep" in row["params"] else ()
    omitted = ("questions", "clusters", "batch", *repeated)
    remaining = {name: str(value) for name, value in row["params"].items() if name not in omitted}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in remaining.items() if len(value) <= 40)


def _table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    headings = "".join(f"<th>{html.escape(column)}</th>" for column in ["method", *map(words, columns)])
    table_rows = []
    for row in rows:
        row_cells = [f"<td title='{html.escape(json.dumps(row['plan']), quote=True)}'>{html.escape(row['name'])}"
                 f"<br><span class=dim>{html.escape(_params(row))}</span></td>"]  # fmt: skip
        row_cells += [f"<td>{_cell(row, column)}</td>" for column in columns]
        table_rows.append(f"<tr{' class=plain' if row['name'] == 'plain' else ''}>{''.join(row_cells)}</tr>")
    return f"<div class=wide><table><tr>{headings}</tr>{''.join(table_rows)}</table></div>"


def _cell(row: dict[str, Any], key: str) -> str:
    """One figure as HTML: its value, the paired ratio to a baseline, the interval."""
    metrics = row["metrics"]
    value = metrics.get(key)
    if value is None:
        return ""
    if key in ("accuracy", "f1", "diff_vs_plain") and number(value):
        sign = "+" if key == "diff_vs_plain" else ""
        interval = metrics.get("diff_ci95" if key == "diff_vs_plain" else "ci95")
        cell_text = f"{100 * value:{sign}.1f}"
        if isinstance(interval, list) and len(interval) == 2 and all(map(number, interval)):
            cell_text += f"<br><span class=dim>[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]</span>"
        return cell_text
    megabytes = "_bytes" in key and number(value)
    cell_text = html.escape(figure(value / 1e6 if megabytes else value))
    for compared_with, ratios in row["vs"].items():
        if key in ratios:
            median, lowest, highest = ratios[key]
            baseline = "" if compared_with == "plain" else f" vs {html.escape(compared_with)}"
            cell_text += f"<br><b>{median:.2f}x</b>{baseline}<br><span class=dim>[{lowest:.2f}, {highest:.2f}]</span>"
    return cell_text


def figure(value: Any) -> str:
    """A number as one reads it, three digits at least and thousands apart; anything else as short text."""
    if not number(value):
        return str(value)[:80]
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 1 else f"{value:#.3g}"


def _breakdown(rows: list[dict[str, Any]]) -> str:
    """Stacked bars of the stages' milliseconds, all to one scale."""
    timed = [row for row in rows if all(number(row["metrics"].get(key)) for key in ("total_ms", "prefill_ms"))]
    longest_ms = max((row["metrics"]["total_ms"] for row in timed), default=0)
    if longest_ms <= 0:
        return ""
    legend = (f"<span class=key style='background:{colour}'></span>{title}" for _, title, colour in STAGES)
    html_lines = ["<p>" + " ".join(legend) + "</p>"]
    for row in timed:
        metrics = {key: value for key, value in row["metrics"].items() if number(value)}
        metrics["rest"] = max(0.0, metrics["total_ms"] - sum(metrics.get(key, 0.0) for key, _, _ in STAGES[:-1]))
        stage_bars = "".join(
            f"<span class=bar title='{title} {figure(metrics.get(key, 0))} ms' "
            f"style='width:{60 * max(0.0, metrics.get(key, 0)) / longest_ms:.2f}%;background:{colour}'></span>"
            for key, title, colour in STAGES
        )
        html_lines.append(
            f"<div class=line><span class=who title='{html.escape(row['name'], quote=True)}'>{html.escape(row['name'])}"
            f"</span>{stage_bars} {figure(float(metrics['total_ms']))} ms</div>"
        )
    return "".join(html_lines)


STYLE = """<style>
body{font:15px/1.45 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#1c2833}
h1{font-size:1.6em}h2{margin-top:2em;border-bottom:1px solid #d5d8dc;padding-bottom:.2em}h3{margin-bottom:.2em}
img{max-width:100%}table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:1em 0}
.wide{overflow-x:auto}td,th{padding:.25em .8em;text-align:right;border-bottom:1px solid #eaeded;vertical-align:top}
th{max-width:9em;vertical-align:bottom}td{white-space:nowrap;overflow-wrap:anywhere}
td:first-child,th:first-child{text-align:left;white-space:normal;min-width:12em;max-width:20em}
tr.plain td{background:#f4f6f7}.dim{color:#7b8a97;font-size:.88em}
pre{background:#f4f6f7;padding:.6em;white-space:pre-wrap;overflow-wrap:anywhere}
.bar{display:inline-block;height:1em;vertical-align:middle}.line{white-space:nowrap;margin:.15em 0}
.who{display:inline-block;width:26%;overflow:hidden;text-overflow:ellipsis;vertical-align:middle}
.key{display:inline-block;width:.9em;height:.9em;margin:0 .35em 0 1em}
</style>"""
