"""What bytes and FLOPs allow: the bound of a ratio, and a mark on every ratio that lies above its own.

    marked([3.48, 3.19, 5.16], 1.94)  ->  "3.48x (bound 1.94x)"

A ratio above what fewer bytes or FLOPs can give says something about its baseline, not about the method. Tables print
ratios through `marked` or `ratio_of` alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
#: metric -> the metrics whose sum is its floor
FLOORS = {
    "attention_ms": ("attention_floor_ms",),
    "encode_ms": ("encode_floor_ms",),
    "prefill_ms": ("prefill_floor_ms",),
    "ttft_ms": ("encode_floor_ms", "prefill_floor_ms"),
    "decode_ms_per_token": ("decode_floor_ms",),
}
METHOD = {"keep", "prune_keep", "kv_keep", "after_block", "equal", "of"}  # parameters of a method, not of what is asked


def above(ratio: Sequence[float], bound: float | None) -> bool:
    """Does the ratio, [median, low, high], lie above its bound?"""
    return bound is not None and ratio[0] > bound * (1 + 1e-9)


def marked(ratio: Sequence[float] | None, bound: float | None, interval: bool = False) -> str:
    """A ratio as one reads it, "-" for none, with its interval where asked, and with its bound where it is above it."""
    if not ratio:
        return "-"
    digits = 1 if ratio[0] >= 9.95 else 2
    text = f"{ratio[0]:.{digits}f}x"
    text += f" [{ratio[1]:.{digits}f}, {ratio[2]:.{digits}f}]" if interval else ""
    return f"{text} (bound {bound:.2f}x)" if bound is not None and above(ratio, bound) else text


def beside(ratio: Sequence[float] | None, bound: float | None) -> tuple[str, str]:
    """A ratio and its bound as two cells of a table, for tables that have a column for bounds."""
    return marked(ratio, None), marked(None if bound is None else [bound], None)


def bound_of(row: Row, key: str, rows: Iterable[Row], base: str = "plain") -> float | None:
    """The most that bytes and FLOPs allow of the row's ratio `key` to its baseline; None where the record has no floor.

    As the row says it (`bounds`), or the baseline's floor over its own.
    """
    said = row.get("bounds", {}).get(base, {}).get(key)
    if said is not None:
        return float(said)
    metrics = row["metrics"]
    if key == "decode_ms_per_token" and "bound_vs_full" in metrics:  # plain holds the columns that full holds
        return float(metrics["bound_vs_full"])
    other = baseline(row, rows, base)
    if other is None:
        return None
    floors = [floor(r["metrics"], key) for r in (other, row)]
    return floors[0] / floors[1] if floors[0] is not None and floors[1] else None


def ratio_of(row: Row, key: str, rows: Iterable[Row], base: str = "plain", interval: bool = False) -> str:
    """The row's paired ratio to a baseline of the same record, marked where it lies above its bound."""
    return marked(row["vs"].get(base, {}).get(key), bound_of(row, key, rows, base), interval)


def floor(metrics: dict[str, Any], key: str) -> float | None:
    """Milliseconds that FLOPs and bytes take at best, where the row says so; a draft's accepted tokens share a step."""
    shared = 1 + metrics.get("accepted_length", 0) if key == "decode_ms_per_token" else 1
    parts = [metrics.get(p) for p in FLOORS.get(key, ())]
    known = [float(p) for p in parts if isinstance(p, (int, float))]
    return sum(known) / shared if known and len(known) == len(parts) else None


def baseline(row: Row, rows: Iterable[Row], base: str) -> Row | None:
    """The baseline's row of the same group: every parameter is the same but those of the method."""
    asked = {k: v for k, v in row["params"].items() if k not in METHOD}
    for other in rows:
        if other["name"] == base and other.get("end_to_end") == row.get("end_to_end"):
            mine = {k: v for k, v in other["params"].items() if k not in METHOD}
            if all(asked.get(k) == v for k, v in mine.items()):
                return other
    return None


def step(weights: float, kv: float, base_kv: float) -> float:
    """The ratio that bytes alone allow of a decode step: the weights and all keys and values are read once.

    weights, kv, base_kv: bytes of the weights and of what the method and its baseline read.
    """
    return math.inf if not weights + kv else (weights + base_kv) / (weights + kv)


def shares(metrics: dict[str, Any], plain: dict[str, Any]) -> dict[str, float]:
    """Bytes of keys and values over those of plain: `fast`, `host`, `total`, `allocated` (total with free slots)."""
    whole = plain.get("kv_fast_bytes")
    if not whole or "kv_fast_bytes" not in metrics:
        return {}
    host = metrics.get("kv_host_bytes", 0)
    out = {"fast": metrics["kv_fast_bytes"], "host": host, "total": metrics["kv_fast_bytes"] + host}
    if "kv_fast_allocated_bytes" in metrics:
        out["allocated"] = metrics["kv_fast_allocated_bytes"] + host
    return {k: v / whole for k, v in out.items()}
