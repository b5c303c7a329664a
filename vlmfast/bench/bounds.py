"""Upper bounds of speed ratios from bytes and FLOPs; a ratio above its bound is marked.

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
    """A ratio as text, "-" for none; with its interval if `interval`, and with its bound if it lies above it."""
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

    Taken from the row's `bounds` if it has them, else the baseline's floor over the row's own.
    """
    stated_bound = row.get("bounds", {}).get(base, {}).get(key)
    if stated_bound is not None:
        return float(stated_bound)
    metrics = row["metrics"]
    if key == "decode_ms_per_token" and "bound_vs_full" in metrics:  # plain holds the columns that full holds
        return float(metrics["bound_vs_full"])
    baseline_row = baseline(row, rows, base)
    if baseline_row is None:
        return None
    floor_values = [floor(record_row["metrics"], key) for record_row in (baseline_row, row)]
    return floor_values[0] / floor_values[1] if floor_values[0] is not None and floor_values[1] else None


def ratio_of(row: Row, key: str, rows: Iterable[Row], base: str = "plain", interval: bool = False) -> str:
    """The row's paired ratio to a baseline of the same record, marked where it lies above its bound."""
    return marked(row["vs"].get(base, {}).get(key), bound_of(row, key, rows, base), interval)


def floor(metrics: dict[str, Any], key: str) -> float | None:
    """Milliseconds that FLOPs and bytes take at best, where the row says so; a draft's accepted tokens share a step."""
    tokens_per_step = 1 + metrics.get("accepted_length", 0) if key == "decode_ms_per_token" else 1
    floor_parts = [metrics.get(part) for part in FLOORS.get(key, ())]
    known_parts = [float(part) for part in floor_parts if isinstance(part, (int, float))]
    return sum(known_parts) / tokens_per_step if known_parts and len(known_parts) == len(floor_parts) else None


def baseline(row: Row, rows: Iterable[Row], base: str) -> Row | None:
    """The baseline's row of the same group: every parameter is the same but those of the method."""
    asked_params = {parameter: value for parameter, value in row["params"].items() if parameter not in METHOD}
    for candidate in rows:
        if candidate["name"] == base and candidate.get("end_to_end") == row.get("end_to_end"):
            baseline_params = {
                parameter: value for parameter, value in candidate["params"].items() if parameter not in METHOD
            }
            if all(asked_params.get(parameter) == value for parameter, value in baseline_params.items()):
                return candidate
    return None


def step(weights: float, kv: float, base_kv: float) -> float:
    """The ratio that bytes alone allow of a decode step: the weights and all keys and values are read once.

    weights, kv, base_kv: bytes of the weights and of what the method and its baseline read.
    """
    return math.inf if not weights + kv else (weights + base_kv) / (weights + kv)


def shares(metrics: dict[str, Any], plain: dict[str, Any]) -> dict[str, float]:
    """Bytes of keys and values over those of plain: `fast`, `host`, `total`, `allocated` (total with free slots)."""
    plain_bytes = plain.get("kv_fast_bytes")
    if not plain_bytes or "kv_fast_bytes" not in metrics:
        return {}
    host_bytes = metrics.get("kv_host_bytes", 0)
    byte_counts = {"fast": metrics["kv_fast_bytes"], "host": host_bytes, "total": metrics["kv_fast_bytes"] + host_bytes}
    if "kv_fast_allocated_bytes" in metrics:
        byte_counts["allocated"] = metrics["kv_fast_allocated_bytes"] + host_bytes
    return {kind: count / plain_bytes for kind, count in byte_counts.items()}
