"""Decode speed: the pocket pair on captions, the curve of quality against speed, and the loop at 3B widths.

python -m evals.speed --suite decode --out FILE.json     (or this file alone: python -m evals.speed.decode)

Groups of rows: every competitor in float32 (faster on a CPU for so small a model), the main ones in bfloat16, the loop
at 3B widths, and four rows in one call. Loose rules against luck, on many captions: `evals.speed.random_baseline`.

Every competitor describes every picture, in turns, so that a noisy machine disturbs all alike; ratios are paired per
picture. They also differ from one process to the next, so the main ones are measured in `PROCESSES` of them; a
picture's ratio is the geometric mean over processes, so that an interval is over pictures. `plain again` is a null.
`f1` counts the facts of a caption against the scene. `decode_ms_per_token` runs from the first token to the last and
holds everything that speculation adds, the draft's own encoding and prefill included.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from evals.speed import decode_batch
from evals.speed import decode_runs as runs
from evals.speed.decode_shapes import rows as shape_rows
from vlmfast.bench.records import ROOT, claim, row
from vlmfast.bench.sample_store import SampleStore
from vlmfast.bench.stats import median_ratio, paired
from vlmfast.bench.timing import half as half_dtype
from vlmfast.cli.errors import application
from vlmfast.core import UserError, to_json
from vlmfast.decode import ModelDraft
from vlmfast.decode.speculate import predicted_speedup
from vlmfast.files import write_text

SHOW = ["decode_ms_per_token", "total_ms", "accepted_length", "verify_rounds", "f1", "diff_vs_plain", "same_text",
        "overhead_share"]  # fmt: skip
TIMES = ["decode_ms_per_token", "total_ms", "ttft_ms"]
PROCESSES = 3
DTYPES = ("float32", "bfloat16")
PLOT = ROOT / "docs" / "speculation.png"


def run(quick: bool, pictures: int | None = None, store: SampleStore | None = None) -> dict[str, Any]:
    """The record's rows and configuration. quick: four pictures, fewer competitors, one wide layer.

    store: of an unfinished run, which keeps every picture, every further process and the rows of 3B widths.
    """
    from vlmfast import pocket

    target, processor = pocket.load("target")
    draft, _ = pocket.load("draft")
    n = pictures or (4 if quick else 40)
    items = runs.captions(processor, n)
    who = runs.competitors(draft, quick) + ([] if quick else runs.curve(draft) + runs.ablations(draft))
    results = runs.rotate(target, processor.tokenizer, items, who, store=store)
    rows = _rows(who, results, n, 1 if quick else PROCESSES, "float32", store)
    strict = next(got for c, got in zip(who, results, strict=True) if c.name == "lossless")
    trace = [(drafted, accepted) for r in strict for drafted, accepted in r["trace"] if drafted] or [(1, 0)]
    rows += half(2 if quick else n, 1 if quick else PROCESSES, store)
    rows += kept(store, "3B widths", lambda: shape_rows(trace, quick))
    rows += kept(store, "four rows", lambda: decode_batch.rows(quick))
    out = {
        "rows": rows, "show": SHOW, "seed": 0, "repeats": n,
        "config": {"quick": quick, "pictures": n, "max_new_tokens": runs.TOKENS, "draft_keep": runs.KEEP},
    }  # fmt: skip
    if not quick:
        plot(rows, PLOT)
    return out


def kept(store: SampleStore | None, name: str, make: Callable[[], Any]) -> Any:
    """What `make` returns, from the store where it holds it."""
    return make() if store is None else store.once(name, make)


def half(pictures: int, processes: int, store: SampleStore | None = None) -> list[dict[str, Any]]:
    """The main rows once more in bfloat16, the type the checkpoints are stored in; none where that is much slower."""
    if half_dtype() != "bfloat16":
        return []
    who, results = main_ones(pictures, "bfloat16", store)
    who = [replace(c, params={**c.params, "dtype": "bfloat16"}) for c in who]
    return _rows(who, results, pictures, processes, "bfloat16", store)


def main_ones(
    pictures: int, dtype: str, store: SampleStore | None = None
) -> tuple[list[runs.Competitor], list[list[dict[str, Any]]]]:
    """Stock generate, our plain loop and the rules, in this process."""
    from vlmfast import pocket

    target, processor = pocket.load("target", dtype=dtype)
    draft, _ = pocket.load("draft", dtype=dtype)
    items, who = runs.captions(processor, pictures, dtype=target.dtype), runs.competitors(draft, quick=True)
    return who, runs.rotate(target, processor.tokenizer, items, who, store=store)


def elsewhere(pictures: int, dtype: str) -> list[list[dict[str, Any]]]:
    """The same in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.json"
        command = [sys.executable, "-m", "evals.speed.decode", "--samples", dtype, "--pictures", str(pictures)]
        subprocess.run([*command, "--out", str(path)], check=True, cwd=ROOT)
        return json.loads(path.read_text())


def _rows(
    who: list[runs.Competitor],
    results: list[list[dict[str, Any]]],
    n: int,
    processes: int,
    dtype: str,
    store: SampleStore | None = None,
) -> list[dict[str, Any]]:
    """Result rows; the main competitors, which come first, are measured in more processes than this one."""
    names = [f"{dtype}, process {i}" for i in range(1, processes)]
    more = [kept(store, name, lambda: elsewhere(n, dtype)) for name in names]
    pooled = [got + [r for other in more if j < len(other) for r in other[j]] for j, got in enumerate(results)]
    return [_row(c, got, pooled[0], pooled[1], n) for c, got in zip(who, pooled, strict=True)]


def _row(
    c: runs.Competitor, got: list[dict[str, Any]], plain: list[dict[str, Any]], loop: list[dict[str, Any]], n: int
) -> dict[str, Any]:
    plain, loop = plain[: len(got)], loop[: len(got)]
    keys = [k for k, v in got[0].items() if isinstance(v, (int, float))]
    metrics: dict[str, Any] = {k: statistics.median(r[k] for r in got) for k in keys}
    metrics["f1"] = statistics.fmean(r["f1"] for r in got)
    metrics["same_text"] = runs.tokens_equal(got, plain)
    vs = {}
    if c.name != "plain":
        facts, plainly = _facts(got, n), _facts(plain, n)
        diff = paired(facts, plainly, [str(i) for i in range(n)])
        base = statistics.fmean(r["f1"] for r in plain)
        metrics |= {"diff_vs_plain": diff.mean, "diff_ci95": [diff.low, diff.high]}
        metrics["retention"] = metrics["f1"] / base if base else 0.0
        for name, baseline in (("plain", plain), ("plain_loop", loop)):
            if c.name != name:
                vs[name] = _ratios(baseline, got, n)
    if "drafted" in metrics:
        total = {
            k: sum(r[k] for r in got) for k in ("verify_rounds", "drafted", "draft_ms", "verify_ms", "overhead_ms")
        }
        accepted = sum(r[k] for r in got for k in ("accepted_exact", "accepted_loose", "accepted_shift"))
        rounds = max(1.0, total["verify_rounds"])
        spent = total["draft_ms"] + total["verify_ms"] + total["overhead_ms"]
        metrics["accepted_length"] = accepted / rounds
        metrics["accepted_shares"] = runs.accepted_shares(got)
        metrics["drafted_per_round"] = total["drafted"] / rounds
        metrics["overhead_share"] = total["overhead_ms"] / spent if spent else 0.0
        step = sum(r["verify_ms"] for r in loop) / max(1.0, sum(r["verify_rounds"] for r in loop))
        if total["drafted"]:
            metrics["predicted_speedup"] = predicted_speedup(
                accepted / rounds, total["drafted"] / rounds, total["verify_ms"] / rounds / step,
                total["draft_ms"] / total["drafted"] / step,
            )  # fmt: skip
    plan = {"speculate": _plan(c.speculate)} if c.speculate is not None else {}
    return row(c.name, plan=plan, params={**c.params, "processes": len(got) // n, "batch": 1}, metrics=metrics, vs=vs)


def _facts(got: list[dict[str, Any]], n: int) -> list[float]:
    """Caption F1 of each of n pictures: the mean over processes, which are no further evidence."""
    return [statistics.fmean(r["f1"] for r in got[i::n]) for i in range(n)]


def _ratios(baseline: list[dict[str, Any]], got: list[dict[str, Any]], n: int) -> dict[str, list[float]]:
    """Paired ratios of the times: every picture counts once, however many processes described it."""
    pictures = [i % n for i in range(len(got))]
    return {k: median_ratio([r[k] for r in baseline], [r[k] for r in got], pictures) for k in TIMES}


def _plan(speculate: Any) -> Any:
    """JSON of our plan; the draft model by its name."""
    out = {"length": speculate.length, "accept": to_json(speculate.accept)}
    if speculate.ahead:
        out["ahead"] = True
    draft = speculate.draft
    if isinstance(draft, ModelDraft):
        out["draft"] = {"method": draft.name, "prune": to_json(draft.prune)}
    elif draft is not None:
        out["draft"] = to_json(draft)
    return out


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Retention of plain caption F1 against decode speed-up over stock generate, one line per rule."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4.2), dpi=150)
    marks = {"loose": "o-", "loose-paper": "s--", "randomrelax": "^:"}
    labels = {"loose": "loose, guarded", "loose-paper": "loose as published", "randomrelax": "random relaxation"}
    for name, mark in marks.items():
        by_relax = {  # one point per ratio, also where a ratio is measured twice
            r["params"]["relax"]: (r["vs"]["plain"]["decode_ms_per_token"][0], 100 * r["metrics"]["retention"])
            for r in rows
            if r["name"] == name and "relax" in r["params"] and "dtype" not in r["params"]
        }
        points = [(*at, relax) for relax, at in sorted(by_relax.items())]
        if points:
            axis.plot([p[0] for p in points], [p[1] for p in points], mark, label=labels[name], markersize=5)
            for x, y, relax in points:
                axis.annotate(f"{relax:g}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    strict = next((r for r in rows if r["name"] == "lossless" and r["params"].get("draft") == "modeldraft"), None)
    if strict is not None:
        axis.plot(strict["vs"]["plain"]["decode_ms_per_token"][0], 100, "k*", markersize=11, label="lossless")
    axis.axhline(99.5, color="0.7", linewidth=0.8)
    axis.set_xlabel("decode speed-up over stock generate")
    axis.set_ylabel("caption facts kept, % of plain F1")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.25)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def main(
    out: Annotated[Path, typer.Option(help="file to write (JSON)")],
    samples: Annotated[str, typer.Option(help="float32 or bfloat16")],
    pictures: Annotated[int, typer.Option(help="how many pictures", min=1)] = 40,
) -> None:
    """The main competitors, raw, in a process of their own: what `evals.speed --suite decode` adds to its own."""
    claim(out)
    if samples not in DTYPES:
        raise UserError(f"--samples {samples}: choose one of {', '.join(DTYPES)}")
    write_text(out, json.dumps(main_ones(pictures, samples)[1]))


if __name__ == "__main__":
    application(main)()
