"""The tables about streams, from the records of `python -m evals.stream` and its other commands."""

from __future__ import annotations

from evals.report.tables import markdown, percent
from vlmfast.bench.bounds import Row, ratio_of


def stream(rows: list[Row]) -> str:
    """Accuracy with intervals, recall of the evidence and latency per length and way of retrieving."""
    out = []
    for r in rows:
        m = r["metrics"]
        if "accuracy" not in m:
            continue
        length, way = f"{r['params']['minutes']:g} min", r["name"]
        counts = [f"{m.get('clips', '-')}", f"{m.get('questions_past', m['questions'])}"]
        past, now = (_within(m.get(f"accuracy_{name}"), m.get(f"ci95_{name}")) for name in ("past", "now"))
        gap = m.get("diff_vs_internal_past")
        against = "" if gap is None else _points(gap, m["diff_vs_internal_past_ci95"])
        took = f"{m['total_ms']:,.0f} ms" if "total_ms" in m else "-"
        present = m.get("diff_vs_internal_now")
        beside = "" if present is None else _points(present, m["diff_vs_internal_now_ci95"], 1)
        found = percent(m.get("evidence_recall_past"), 0)
        out.append([length, way, *counts, past, against, found, now, beside, took])
    heads = ["length", "way", "clips", "past questions", "right, past", "against internal", "evidence", "right, now",
             "against internal", "answer"]  # fmt: skip
    return markdown(heads, out)


def _within(share: float | None, interval: list[float] | None) -> str:
    if share is None:
        return "-"
    return percent(share, 0) + (f" [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]" if interval else "")


def _points(gap: float, interval: list[float], digits: int = 0) -> str:
    points, low, high = (f"{100 * x:+.{digits}f}" for x in (gap, *interval))
    return f"{points} [{low}, {high}]"


def sessions(rows: list[Row]) -> str:
    """What a stream keeps and costs by its length."""
    out = []
    for r in rows:
        m = r["metrics"]
        if r["name"] != "session":
            continue
        mb = [f"{m[k] / 2**20:,.1f} MB" for k in ("kv_fast_bytes", "kv_host_bytes", "kv_disk_bytes", "bytes_per_hour")]
        out.append([f"{m['minutes']:g} min", f"{m['fps']:.0f}", *mb, ratio_of(r, "bytes_per_hour", rows, "rekv")])
    heads = ["length", "frames/s", "fast memory", "RAM archive", "disk", "archive per hour", "less than plain ReKV"]
    return markdown(heads, out)


def rules(rows: list[Row]) -> str:
    """What watch rules tell and miss, and frames per second by how many there are."""
    out = []
    for r in rows:
        m = r["metrics"]
        if r["name"] == "rules":
            right, found = (_within(m[key], m[f"{key}_ci95"]) for key in ("precision", "recall"))
            out.append([f"{m['alerts']:,} alerts, {m['appearances']:,} appearances, {m['clips']} clips", right, found,
                        f"{m['delay_s']:.1f} s"])  # fmt: skip
    return markdown(["of", "alerts that are right", "appearances told", "after"], out)


def degraded(rows: list[Row]) -> str:
    """What damaged video costs the answers about a stream, and what arrives of it."""
    out = []
    for r in rows:
        m = r["metrics"]
        cells = [f"{m['kbit_per_second']:.1f} kbit/s" if "kbit_per_second" in m else "-", percent(m["frames"], 0)]
        for part in ("past", "now"):
            gap = m.get(f"diff_vs_clean_{part}")
            beside = "" if gap is None else _points(gap, m[f"diff_vs_clean_{part}_ci95"], 1)
            cells += [_within(m[f"accuracy_{part}"], m[f"ci95_{part}"]), beside]
        kept, size = percent(m["kept"], 0), f"{m['bytes_per_hour'] / 2**20:,.0f} MB"
        out.append([r["name"], *cells, kept, size, "yes" if m["counters_true"] == 1 else "no"])
    heads = ["video", "sent", "frames that arrive", "right, past", "against clean", "right, now", "against clean",
             "tokens kept", "archive per hour", "counters true"]  # fmt: skip
    return markdown(heads, out)


def levels(rows: list[Row]) -> str:
    """What archives that coarsen with age keep and lose, paired with one that does not."""
    out = []
    for r in rows:
        m = r["metrics"]
        beside = "" if r["name"] == "full" else _points(m["diff_vs_full"], m["diff_vs_full_ci95"], 1)
        size = f"{m['bytes_per_hour'] / 2**20:.1f} MB ({percent(m['bytes_share'], 0)})"
        out.append([f"{m['minutes']:g} min", f"`{r['name']}`", f"{m['right']:.0f} of {m['questions']}", beside,
                    percent(m["evidence_recall"], 0), size, f"{m['prefilled_again_blocks']:.1f}"])  # fmt: skip
    heads = [
        "length",
        "schedule",
        "right, past",
        "against full",
        "evidence",
        "archive per hour",
        "blocks prefilled again",
    ]
    return markdown(heads, out)


def windows(rows: list[Row]) -> str:
    """What streams lose whose tower encodes only the windows that changed, paired with one that encodes grids whole."""
    out = []
    for r in rows:
        m, cells = r["metrics"], []
        for part in ("past", "now"):
            gap = m.get(f"diff_vs_whole_{part}")
            beside = "" if gap is None else _points(gap, m[f"diff_vs_whole_{part}_ci95"], 1)
            cells += [_within(m[f"accuracy_{part}"], m[f"ci95_{part}"]), beside]
        far = f"{m['distance_95']:.4f}" if "distance_95" in m else ""
        out.append([f"{r['params']['minutes']:g} min", r["name"], f"{m['clips']}", percent(m["tower_share"], 0), far,
                    percent(m["kept"], 0), *cells, ratio_of(r, "seconds_per_frame", rows, "whole", True)])  # fmt: skip
    heads = ["length", "encoded", "clips", "through the tower", "distance", "tokens kept", "right, past",
             "against whole", "right, now", "against whole", "frames/s, over whole"]  # fmt: skip
    return markdown(heads, out)


def ingest(rows: list[Row]) -> str:
    """What encoding costs by how much of a frame changes."""
    out = []
    for r in rows:
        m = r["metrics"]
        cells = [r["params"]["changing"], r["name"], percent(m["tower_share"], 0), f"{m['kept_tokens']:,.0f}"]
        out.append([*cells, f"{m['encode_ms']:,.0f}", f"{m['fps']:.1f}", ratio_of(r, "encode_ms", rows, "whole", True)])
    heads = ["what changes", "encoded", "through the tower", "tokens kept", "ms", "frames/s", "over whole"]
    return markdown(heads, out)


def crash(rows: list[Row]) -> str:
    """What happened to an archive, and how often it was then the stream it should be."""
    keys = ("trials", "same", "reported", "refused", "wrong")
    out = []
    for r in rows:
        name = r["name"] + (", while open" if r["params"].get("while_open") else "")
        out.append([name, *(f"{r['metrics'][k]:,}" for k in keys)])
    return markdown(["what is done", *keys], out)


#: marker -> (result file, table)
TABLES = {
    "stream": ("cpu-stream.json", stream),
    "sessions": ("cpu-stream.json", sessions),
    "stream-rules": ("cpu-stream-rules.json", rules),
    "degraded": ("stream-degraded.json", degraded),
    "stream-levels": ("stream-levels.json", levels),
    "stream-windows": ("stream-windows.json", windows),
    "ingest": ("cpu-ingest.json", ingest),
    "crash": ("stream-crash.json", crash),
}
