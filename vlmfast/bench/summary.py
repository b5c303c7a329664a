"""Summarises records as table rows: accuracy with intervals, the paired difference to plain, times of the stages."""

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
    ids = [question_id for question_id in ids if all((question_id, method_name) in records for method_name in plans)]
    baseline = [records[question_id, "plain"] for question_id in ids]
    rows = []
    for method, plan in plans.items():
        own_records = [records[question_id, method] for question_id in ids]
        rows.append(_row(method, plan, own_records, baseline, metric, (broken or {}).get(method)))
    if metric == "accuracy" and ids and not set(floors.ASKED).isdisjoint(plans):
        rows.append(_row(floors.MAJORITY, Plan(), floors.majority(baseline), baseline, metric, "no model is asked"))
    return rows


def _row(
    method: str, plan: Plan, own_records: list[dict], baseline: list[dict], metric: str, broken: str | None
) -> dict[str, Any]:
    metrics, notes = quality(own_records, baseline, metric, method != "plain"), []
    metrics["failed"] = sum("error" in record for record in own_records)
    if metrics["failed"]:
        failure = next(record for record in own_records if "error" in record)
        notes.append(
            f"{metrics['failed']} of {len(own_records)} questions failed, counted as wrong; first: {failure['error']}"
        )
    host_means = _means(("kv_host_bytes",), [record for record in own_records if "error" not in record])
    if host_means and (reason := validity.without_host_heads(plan.json(), host_means)):
        broken = broken or reason
    unfailed = [
        (record, stock)
        for record, stock in zip(own_records, baseline, strict=True)
        if "error" not in record and "error" not in stock
    ]
    timed = [(record, stock) for record, stock in unfailed if "no_speed" not in record]
    comparisons: dict[str, dict[str, list[float]]] = {}
    metrics |= _means(COUNTS, [record for record, _ in unfailed])
    if broken or not timed:
        reason = broken or (next((record["no_speed"] for record, _ in unfailed), "no question was answered"))
        notes.append(f"no speed figure: {reason}")
    else:
        metrics |= {
            name: statistics.median(values)
            for name in TIMES
            if (values := [record[name] for record, _ in timed if name in record])
        }
        if len(timed) < len(unfailed):
            notes.append(f"speed over {len(timed)} of {len(unfailed)} questions; others: "
                         f"{next(record['no_speed'] for record, _ in unfailed if 'no_speed' in record)}")  # fmt: skip
        if method != "plain":
            ratios = {}
            for stage_name in COMPARED:
                compared = [
                    (stock[stage_name], record[stage_name], record["cluster"])
                    for record, stock in timed
                    if stage_name in record and stage_name in stock
                ]
                interval = stats.median_ratio(*zip(*compared, strict=True)) if compared else []
                if interval:
                    ratios[stage_name] = interval
            comparisons["plain"] = ratios
    kinds = sorted({record["kind"] for record in own_records})
    by_kind = {}
    if len(kinds) > 1:
        for kind in kinds:
            indices = [index for index, record in enumerate(own_records) if record["kind"] == kind]
            by_kind[kind] = quality(
                [own_records[index] for index in indices],
                [baseline[index] for index in indices],
                metric,
                method != "plain",
            )
    params = {**methods.keep(plan), "questions": len(own_records), 
              "clusters": len({record["cluster"] for record in own_records}),
              "batch": max((record["batch"] for record in own_records), default=1)}  # fmt: skip
    extra_fields: dict[str, Any] = {"by_kind": by_kind} if by_kind else {}
    return row(method, plan=public(plan), params=params, metrics=metrics, vs=comparisons, **extra_fields, notes=notes)


def quality(mine: list[dict], plain: list[dict], metric: str = "accuracy", compare: bool = True) -> dict[str, Any]:
    """The mean score with its interval, and the paired difference to plain with its own."""
    scores, clusters = [record["score"] for record in mine], [record["cluster"] for record in mine]
    interval = stats.mean(scores, clusters)
    figures: dict[str, Any] = {metric: _short(interval.mean), "ci95": [_short(interval.low), _short(interval.high)]}
    if compare:
        plain_scores = [stock["score"] for stock in plain]
        difference = stats.paired(scores, plain_scores, clusters)
        figures["diff_vs_plain"] = _short(difference.mean)
        figures["diff_ci95"] = [_short(difference.low), _short(difference.high)]
        figures["diff_p"] = _short(stats.clustered_p(scores, plain_scores, clusters))
        figures["mcnemar_p"] = _short(stats.mcnemar(scores, plain_scores))
        figures["same_answer"] = _short(
            statistics.fmean(record["answer"] == stock["answer"] for record, stock in zip(mine, plain, strict=True))
        )
    figures["questions"] = len(mine)
    return figures


def _means(keys: tuple[str, ...], records: list[dict]) -> dict[str, float]:
    return {
        name: round(statistics.fmean(values), 3)
        for name in keys
        if (values := [record[name] for record in records if name in record])
    }


def _short(value: float) -> float:
    return round(value, 5)


def public(plan: Plan) -> dict[str, Any]:
    """A plan's JSON with model folders of this checkout written relative to it."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: short(item) for name, item in value.items()}
        return value.removeprefix(f"{ROOT}/") if isinstance(value, str) else value

    return short(plan.json())
