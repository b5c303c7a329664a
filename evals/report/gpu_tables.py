"""The GPU suite's tables: what it prints when a part ends, and Markdown for the documents."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from evals.report.tables import markdown
from vlmfast.bench.bounds import Row, beside, bound_of, floor, ratio_of

Cell = Callable[[Row, list[Row]], str]  # of a row among its record's rows
Column = tuple[str, Cell]


def number(value: Any, digits: int = 3) -> str:
    """Three digits, thousands apart; "-" for none."""
    if not isinstance(value, (int, float)):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.{digits}g}"


def metric(key: str) -> Cell:
    """A column of one metric."""
    return lambda r, rows: number(r["metrics"].get(key))


def param(key: str) -> Cell:
    """A column of one parameter."""
    return lambda r, rows: number(r["params"].get(key))


def within(stem: str, key: str) -> Cell:
    """A median with its least and largest."""

    def cell(r: Row, rows: list[Row]) -> str:
        m = r["metrics"]
        low, high = m.get(f"{stem}_low_ms"), m.get(f"{stem}_high_ms")
        return number(m.get(key)) + (f" [{number(low)}, {number(high)}]" if low is not None else "")

    return cell


def over(key: str, *baselines: str) -> Cell:
    """How much faster than the first of the baselines that ran beside it, `plain` if none is named. "-" for a time
    below its own floor, which is an error of measuring."""

    def cell(r: Row, rows: list[Row]) -> str:
        least, base = floor(r["metrics"], key), next((b for b in baselines or ("plain",) if b in r["vs"]), None)
        if base is None or (least is not None and r["metrics"].get(key, least) < least):
            return "-"
        return ratio_of(r, key, rows, base, interval=True)

    return cell


def token(r: Row, rows: list[Row]) -> str:
    """Milliseconds a token; records before timed it by short calls, and a longer answer, which is better, once."""
    steady = r["metrics"].get("steady_ms_per_token")
    return within("decode", "decode_ms_per_token")(r, rows) if steady is None else number(steady)


def gigabytes(r: Row, rows: list[Row]) -> str:
    """Peak memory."""
    peak = r["metrics"].get("peak_bytes")
    return "-" if not peak else f"{peak / 1e9:.1f}"


def engine(r: Row, rows: list[Row]) -> str:
    """What decoded, as the report says it."""
    return str(r.get("report", {}).get("engine") or r.get("said", {}).get("engine", "-"))[:12]


CHECK: list[Column] = [
    (k, metric(k)) for k in ("cases", "equal", "ran", "refused", "different", "passed", "skipped", "failed", "seconds")
]
BESIDE = (("faster", "plain"), ("than without cuDNN", "plain without cuDNN"),
          ("than at repeated lengths", "plain at repeated lengths"))  # fmt: skip
FIRST: list[Column] = [
    ("visual", param("visual_tokens")), ("first token ms", within("ttft", "ttft_ms")),
    *((head, over("ttft_ms", base)) for head, base in BESIDE),
    ("tower", metric("encode_ms")), ("bound", metric("encode_floor_ms")), ("choose", metric("select_ms")),
    ("language", metric("prefill_ms")), ("bound ", metric("prefill_floor_ms")),
]  # fmt: skip
CHOOSE: list[Column] = [
    ("choose ms", metric("select_ms")), ("first token ms", metric("ttft_ms")), ("kept", metric("kept_tokens")),
    ("first call", metric("warm_ms")),
]  # fmt: skip
DECODE: list[Column] = [
    ("visual", param("visual_tokens")), ("rows", param("batch")), ("ms a token", token),
    *((head, over("decode_ms_per_token", base)) for head, base in BESIDE),
    ("than ours", over("decode_ms_per_token", "ours", "ours, repeating", "ours, steps")),
    ("reported", metric("reported_ms_per_token")), ("bound", metric("decode_floor_ms")),
    ("accepted", metric("accepted_length")), ("GB", gigabytes), ("by", engine),
]  # fmt: skip
STREAM: list[Column] = [
    ("side", metric("side")), ("frames/s", metric("fps")), ("pair by pair", metric("pairs_fps")),
    ("answer ms", metric("latency_ms")), ("choose", metric("select_ms")), ("prefill", metric("prefill_ms")),
    ("ms a token", metric("decode_ms_per_token")), ("GB", gigabytes), ("by", engine),
]  # fmt: skip
REQUEST: list[Column] = [
    ("asked", lambda r, rows: str(r["params"].get("asked", "-"))), ("ms", within("total", "total_ms")),
    ("of the longer half", metric("of_longer")), ("faster", over("total_ms")),
]  # fmt: skip
PROFILE: list[Column] = [
    ("visual", param("visual_tokens")), ("device ms", metric("device_ms")), ("kernels", metric("launches")),
]  # fmt: skip
COLUMNS = {"methods": CHECK, "kernels": CHECK, "first_token": FIRST, "decode": DECODE, "decode_7b": DECODE,
           "stream": STREAM, "choose": CHOOSE, "request": REQUEST, "profile": PROFILE}  # fmt: skip


def of(part: str, rows: list[Row]) -> list[Row]:
    """A part's rows; how the model and the clip were made is left out."""
    found = [r for r in rows if r["params"].get("part") == part and r["name"] not in ("build", "clip")]
    return together(found) if part == "methods" else found


def together(rows: list[Row]) -> list[Row]:
    """One row of those that share a group's cases: counts added up, the longest time."""
    out: dict[str, Row] = {}
    for r in rows:
        if r["name"] not in out:
            out[r["name"]] = {**r, "metrics": dict(r["metrics"]), "wrong": list(r["wrong"])}
            continue
        whole = out[r["name"]]
        whole["wrong"] += r["wrong"]
        whole["by"] = dict(Counter(whole.get("by", {})) + Counter(r.get("by", {})))
        for k, v in r["metrics"].items():
            whole["metrics"][k] = max(whole["metrics"][k], v) if k == "seconds" else whole["metrics"][k] + v
    return list(out.values())


def cells(part: str, rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells; columns that no row fills are left out."""
    heads = ["", *(head.strip() for head, _ in COLUMNS[part])]
    lines = [[r["name"], *(cell(r, rows) for _, cell in COLUMNS[part])] for r in of(part, rows)]
    used = [0, *(c for c in range(1, len(heads)) if any(line[c] != "-" for line in lines))]
    return [heads[c] for c in used], [[line[c] for c in used] for line in lines]


def show(part: str, record: dict[str, Any], top: int = 5) -> None:
    """Print a part: a narrow table, without the intervals of ratios; what was wrong, what was left out."""
    from vlmfast.cli import console

    heads, lines = cells(part, record["rows"])
    lines = [[re.sub(r"(?<=x) \[[^]]*\]", "", cell) for cell in line] for line in lines]
    page = console.out()
    state = [p for p in record["parts"] if p["part"].partition(" ")[0] == part]
    done = [p["seconds"] for p in state if p["state"] == "done"]
    ended = "; ".join(f"{p['part']} {p['state']}, {p['seconds']:.0f} s" for p in state if p["state"] != "done")
    ended = "; ".join(filter(None, [f"{len(done)} done in {max(done, default=0):.0f} s", ended]))
    page.print(f"\n{part}: {ended}", markup=False, soft_wrap=True)
    if lines:
        widths = [max(len(row[c]) for row in [heads, *lines]) for c in range(len(heads))]
        for row in [heads, *lines]:
            text = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
            page.print("  ".join(text).rstrip(), markup=False, soft_wrap=True)
    for r in of(part, record["rows"]):
        for line in r.get("wrong", [])[:8]:
            page.print(f"  WRONG {r['name']}: {line}"[:160], markup=False, soft_wrap=True)
        if r.get("by"):
            page.print(f"  {r['name']} decoded by: {r['by']}", markup=False, soft_wrap=True)
        if r.get("kernels"):
            page.print(f"  {r['name']}", markup=False)
        for k in r.get("kernels", [])[:top]:
            page.print(f"  {k['us']:>9,.0f} us x{k['count']:<5g} {k['kernel'][:56]}", markup=False, soft_wrap=True)
    for line in record["skipped"]:
        if line.startswith(f"{part}:"):
            page.print(f"  left out: {line.partition(': ')[2]}"[:160], markup=False, soft_wrap=True)
    for p in state:
        for line in p.get("last", []):
            page.print(f"  {p['part']} | {line[:140]}", markup=False, soft_wrap=True)


def table(part: str) -> Callable[[list[Row]], str]:
    """A part's Markdown table."""

    def write(rows: list[Row]) -> str:
        heads, lines = cells(part, rows)
        return markdown(["method", *heads[1:]], lines) if lines else markdown(["not measured in this record"], [])

    return write


def kernels(rows: list[Row]) -> str:
    """The longest kernels of every profile."""
    lines = [
        [r["name"] if not i else "", f"{k['us']:,.0f}", f"{k['count']:g}", f"`{k['kernel'][:60]}`"]
        for r in of("profile", rows)
        for i, k in enumerate(r.get("kernels", [])[:8])
    ]
    return markdown(["of", "us", "calls", "kernel"], lines)


#: of the README: what is timed, part, row, visual tokens, rows of the batch, metric
SUMMARY = [
    ("first token, 8,192 visual tokens, all kept", "first_token", "tower", 8192, 1, "ttft_ms"),
    ("the same, `balanced` (two fifths kept)", "first_token", "balanced", 8192, 1, "ttft_ms"),
    ("the same, `fast` (a fifth kept)", "first_token", "fast", 8192, 1, "ttft_ms"),
    ("first token, 2,048 visual tokens, all kept", "first_token", "tower", 2048, 1, "ttft_ms"),
    ("the same, `balanced`", "first_token", "balanced", 2048, 1, "ttft_ms"),
    ("first token, 256 visual tokens, all kept", "first_token", "tower", 256, 1, "ttft_ms"),
    ("each next token, 8,192 visual tokens", "decode", "ours", 8192, 1, "decode_ms_per_token"),
    ("each next step, 8 rows of 2,048 visual tokens", "decode", "ours", 2048, 8, "decode_ms_per_token"),
]


def summary(rows: list[Row]) -> str:
    """The README's table: what a call costs in milliseconds, stock and ours; stock without cuDNN where it was timed."""
    found = {
        (r["params"].get("part"), r["name"], r["params"].get("visual_tokens"), r["params"].get("batch")): r
        for r in rows
    }
    lines = []
    for words, part, name, visual, batch, key in SUMMARY:
        plain, less, ours = (found.get((part, n, visual, batch)) for n in ("plain", "plain without cuDNN", name))
        if plain and ours:
            times = [number(r["metrics"].get(key)) if r else "-" for r in (plain, less, ours)]
            lines.append([words, *times, *beside(ours["vs"].get("plain", {}).get(key), bound_of(ours, key, rows))])
    heads = ["milliseconds", "stock", "stock without cuDNN", "vlmfast", "faster", "by less work"]
    if all(line[2] == "-" for line in lines):
        for line in (heads, *lines):
            del line[2]
    return markdown(heads, lines)


#: marker -> (result file, table)
TABLES = {
    "gpu-summary": ("gpu.json", summary),
    "gpu-methods": ("gpu.json", table("methods")),
    "gpu-first-token": ("gpu.json", table("first_token")),
    "gpu-choose": ("gpu.json", table("choose")),
    "gpu-request": ("gpu.json", table("request")),
    "gpu-decode": ("gpu.json", table("decode")),
    "gpu-decode-7b": ("gpu.json", table("decode_7b")),
    "gpu-stream": ("gpu.json", table("stream")),
    "gpu-kernels": ("gpu.json", kernels),
}
