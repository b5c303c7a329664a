"""Is the whole the product of its parts? Rows `a+b` of a record beside what their single parts predict."""

from __future__ import annotations

from typing import Any

MEASURES = ("total_ms", "prefill_ms", "decode_ms_per_token", "kv_fast_bytes")


def products(record: dict[str, Any], measures: tuple[str, ...] = MEASURES) -> list[dict[str, Any]]:
    """Per composed row and measure: the measured ratio to plain, the product of its parts' ratios, measured / product.

    Rows whose parts were not measured alone are left out. `interval` is that of the measured ratio; `says` is "less
    than its parts" when the product lies above it, "more" when below, else "the product".
    """
    ratios = {r["name"]: r["vs"].get("plain", {}) for r in record["rows"]}
    out = []
    for name, whole in ratios.items():
        parts = name.split("+")
        if len(parts) < 2 or any(p not in ratios for p in parts):
            continue
        for key in measures:
            if key not in whole:
                continue
            product = 1.0
            for p in parts:
                product *= ratios[p].get(key, [1.0])[0]
            middle, low, high = whole[key]
            says = (
                "less than its parts" if product > high else "more than its parts" if product < low else "the product"
            )
            out.append({"name": name, "measure": key, "measured": middle, "interval": [low, high],
                        "product": round(product, 4), "share": round(middle / product, 4), "says": says})  # fmt: skip
    return out


def accuracy_sums(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Per composed row: its loss against plain beside the sum of its parts' losses."""
    losses = {r["name"]: r["metrics"].get("diff_vs_plain", 0.0) for r in record["rows"]}
    intervals = {r["name"]: r["metrics"].get("diff_ci95") for r in record["rows"]}
    return [
        {
            "name": n,
            "measured": losses[n],
            "interval": intervals[n],
            "sum": round(sum(losses[p] for p in n.split("+")), 5),
        }
        for n in losses
        if "+" in n and all(p in losses for p in n.split("+"))
    ]
