"""From records to rows: accuracy with intervals, the paired difference to plain, honest stage figures."""

from __future__ import annotations

import statistics
from typing import Any

from vlmfast.bench import floors, methods, stats, validity
from vlmfast.bench.records import ROOT, row
from vlmfast.bench.runner import STAGE
from vlmfast.plan import Plan

TIMES = tuple(k for k in STAGE if k.endswith(("_ms", "_per_token")))
COUNTS = ("visual_tokens", "kept_tokens", "cached_tokens", "kv_fast_bytes", "kv_host_bytes",
          "kv_fast_allocated_bytes", "accepted_length",
          "verify_rounds", "drafted", "accepted_exact", "accepted_loose", "accepted_shift")  # fmt: skip
COMPARED = ("encode_ms", "prefill_ms", "ttft_ms", "decode_ms_per_token", "total_ms", "kv_fast_bytes")


def summarise(
    records: dict[tuple[str, str], dict[str, Any]],
    ids: list[str],
    plans: dict[str, Plan],
    metric: str = "accuracy",
    broken: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """One row per method over the questions `ids` that every method has answered (all of them, in a finished run)."""
    ids = [i for i in ids if all((i, m) in records for m in plans)]
    plain = [records[i, "plain"] for i in ids]
    rows = []
    for method, plan in plans.items():
        mine = [records[i, method] for i in ids]
        rows.append(_row(method, plan, mine, plain, metric, (broken or {}).get(method)))
    if metric == "accuracy" and ids and not set(floors.ASKED).isdisjoint(plans):
        rows.append(_row(floors.MAJORITY, Plan(), floors.majority(plain), plain, metric, "no model is asked"))
    return rows


def _row(
    method: str, plan: Plan, mine: list[dict], plain: list[dict], metric: str, broken: str | None
) -> dict[str, Any]:
    metrics, notes = quality(mine, plain, metric, method != "plain"), []
    metrics["failed"] = sum("error" in r for r in mine)
    if metrics["failed"]:
        first = next(r for r in mine if "error" in r)
        notes.append(f"{metrics['failed']} of {len(mine)} questions failed, counted as wrong; first: {first['error']}")
    held = _means(("kv_host_bytes",), [r for r in mine if "error" not in r])
    if held and (why := validity.without_host_heads(plan.json(), held)):
        broken = broken or why
    good = [(r, p) for r, p in zip(mine, plain, strict=True) if "error" not in r and "error" not in p]
    fired = [(r, p) for r, p in good if "no_speed" not in r]
    vs: dict[str, dict[str, list[float]]] = {}
    metrics |= _means(COUNTS, [r for r, _ in good])
    if broken or not fired:
        why = broken or (next((r["no_speed"] for r, _ in good), "no question was answered"))
        notes.append(f"no speed figure: {why}")
    else:
        metrics |= {k: statistics.median(v) for k in TIMES if (v := [r[k] for r, _ in fired if k in r])}
        if len(fired) < len(good):
            notes.append(f"speed over {len(fired)} of {len(good)} questions; others: "
                         f"{next(r['no_speed'] for r, _ in good if 'no_speed' in r)}")  # fmt: skip
        if method != "plain":
            ratios = {}
            for key in COMPARED:
                both = [(p[key], r[key], r["cluster"]) for r, p in fired if key in r and key in p]
                found = stats.median_ratio(*zip(*both, strict=True)) if both else []
                if found:
                    ratios[key] = found
            vs["plain"] = ratios
    kinds = sorted({r["kind"] for r in mine})
    by_kind = {}
    if len(kinds) > 1:
        for kind in kinds:
            at = [i for i, r in enumerate(mine) if r["kind"] == kind]
            by_kind[kind] = quality([mine[i] for i in at], [plain[i] for i in at], metric, method != "plain")
    params = {**methods.keep(plan), "questions": len(mine), "clusters": len({r["cluster"] for r in mine}),
              "batch": max((r["batch"] for r in mine), default=1)}  # fmt: skip
    extra: dict[str, Any] = {"by_kind": by_kind} if by_kind else {}
    return row(method, plan=public(plan), params=params, metrics=metrics, vs=vs, **extra, notes=notes)


def quality(mine: list[dict], plain: list[dict], metric: str = "accuracy", compare: bool = True) -> dict[str, Any]:
    """The mean score with its interval, and the paired difference to plain with its own."""
    scores, clusters = [r["score"] for r in mine], [r["cluster"] for r in mine]
    alone = stats.mean(scores, clusters)
    out: dict[str, Any] = {metric: _short(alone.mean), "ci95": [_short(alone.low), _short(alone.high)]}
    if compare:
        base = [p["score"] for p in plain]
        difference = stats.paired(scores, base, clusters)
        out["diff_vs_plain"] = _short(difference.mean)
        out["diff_ci95"] = [_short(difference.low), _short(difference.high)]
        out["diff_p"] = _short(stats.clustered_p(scores, base, clusters))
        out["mcnemar_p"] = _short(stats.mcnemar(scores, base))
        out["same_answer"] = _short(
            statistics.fmean(r["answer"] == p["answer"] for r, p in zip(mine, plain, strict=True))
        )
    out["questions"] = len(mine)
    return out


def _means(keys: tuple[str, ...], records: list[dict]) -> dict[str, float]:
    return {k: round(statistics.fmean(v), 3) for k in keys if (v := [r[k] for r in records if k in r])}


def _short(x: float) -> float:
    return round(x, 5)


def public(plan: Plan) -> dict[str, Any]:
    """A plan's JSON with model folders of this checkout written relative to it."""

    def short(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: short(v) for k, v in x.items()}
        return x.removeprefix(f"{ROOT}/") if isinstance(x, str) else x

    return short(plan.json())
