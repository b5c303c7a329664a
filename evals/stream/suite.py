"""The stream, measured: `python -m evals.stream [--minutes 1,10,60] [--quick] [--model pocket] --out FILE.json`.

Pocket clips of every length are encoded once; their questions (past events, the needle, and the same asked while it
is on screen: `now`) are answered with every retriever at the same number of blocks, one block being one temporal grid
(two frames, one second). Rows:

* `layers`: evidence recall of every layer on a clip of the train split; the two best choose for `internal`;
* one per length and retriever (`internal-by-layer` is ReKV's own rule, `external` knows colours only, `oracle` where
  the evidence lies): accuracy, evidence recall, latency, tokens read;
* `session`: sustained fps, bytes per tier, archive bytes per hour, plain ReKV's bytes per hour for the same stream;
* `internal-full` and `rekv` (up to 10 minutes): nothing dropped, two bytes per number, what compression costs; with
  the retriever of `internal`, and with inner products per layer;
* `reencode` (up to 10 minutes): all frames through the model again for every question;
* `natural`: decoding, encoding, retrieval and limits on a real clip, whatever the pocket model makes of it.

A plot of latency and memory against length lies beside the result.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmfast.core import UserError, parse_bytes

TIMED = ("select_ms", "fetch_ms", "prefill_ms", "decode_ms_per_token", "context_tokens", "retrieved_blocks")
LATE = "now"  # kind of the questions that are asked while their evidence is on screen


def main(
    out: Annotated[Path, typer.Option(help="result file (JSON)")],
    minutes: Annotated[str, typer.Option(help="lengths in minutes")] = "1,10,60",
    quick: Annotated[bool, typer.Option("--quick", help="one short clip, under a minute")] = False,
    model: Annotated[str, typer.Option(help="'pocket', or a checkpoint folder of the same world")] = "pocket",
    frames: Annotated[int, typer.Option(help="blocks retrieved", min=1)] = 16,
    redundancy: Annotated[float, typer.Option(help="cosine distance below which a token is dropped", min=0)] = 0.01,
    window: Annotated[int, typer.Option(help="tokens of the sliding window", min=1)] = 1024,
    ram: Annotated[str, typer.Option(help="archive in memory")] = "16MiB",
    questions: Annotated[int | None, typer.Option(help="most questions per length", min=1)] = None,
    first: Annotated[int, typer.Option(help="seed of the first clip, not one a setting was chosen on", min=0)] = 1,
    force: Annotated[bool, typer.Option("--force", help="replace an existing result")] = False,
) -> None:
    """Measure the stream and write its record and plot."""
    from vlmfast.bench import records

    lengths = [0.3] if quick else lengths_of(minutes)
    records.claim(out, force)
    parse_bytes("--ram", ram)
    config = {
        "minutes": lengths, "quick": quick, "model": model, "frames": frames, "redundancy": redundancy,
        "window": window, "ram": ram, "keep_as": "int8", "first": first,
    }  # fmt: skip
    record = records.head("stream", config=config, seed=1, repeats=1)
    record["rows"] = rows(config, questions)
    record["show"] = ["accuracy", "evidence_recall", "total_ms", "context_tokens", "fps", "bytes_per_hour"]
    records.write(out, record, force)
    plot(record, out.with_suffix(".png"))
    from evals.speed.suites import show

    show(record)


def lengths_of(text: str) -> list[float]:
    """The lengths in `1,10,60`, minutes."""
    try:
        lengths = [float(part) for part in text.split(",")]
    except ValueError:
        lengths = [0.0]
    if not all(0 < minutes <= 60 * 24 * 7 for minutes in lengths):
        raise UserError(f"--minutes {text!r}: give lengths in minutes, joined by commas, e.g. 1,10,60")
    return lengths


def rows(config: dict[str, Any], most: int | None) -> list[dict[str, Any]]:
    """All rows of a run."""
    from evals.stream import runs
    from vlmfast import loading
    from vlmfast.bench import records
    from vlmfast.pocket.clips import clip
    from vlmfast.stream import Internal

    loaded = loading.load(config["model"])
    options = {k: config[k] for k in ("redundancy", "window", "ram", "keep_as")}
    layers, out = None, []
    if not config["quick"]:
        layers, found = runs.best_layers(loaded.model, loaded.processor, config["frames"], **options)
        tell(f"layers {layers} choose; recall of each: {' '.join(f'{x:.2f}' for x in found)}")
        out.append(records.row("layers", params={"chosen": list(layers)}, metrics={"evidence_recall_by_layer": found}))
    ways = runs.methods(config["frames"], layers)
    if config["quick"]:
        ways = {k: ways[k] for k in ("internal", "recency", "oracle")}
    for minutes in config["minutes"]:
        results = {name: runs.Result() for name in ways}
        rekv, whole, plain = runs.Result(), runs.Result(), runs.Result()
        clips = runs.plan_of(minutes, config["quick"], config["first"])
        for seed, count in clips:
            drawn = clip(seed, round(minutes * 60), questions=count)
            name = f"{minutes:g}min-{seed}"
            done = runs.encode(loaded.model, loaded.processor, drawn, name, **options)
            asked = _spread(runs.questions(drawn, name), most and max(1, most // len(clips)))
            tell(f"{name}: {done.fps:.0f} fps, {len(asked)} questions")
            for question in asked:
                for way, make in ways.items():
                    runs.ask(done.session, question, make(question), results[way])
            if seed == clips[-1][0]:
                out.append(session_row(done, minutes))
            done.close()
            if minutes <= 10 and not config["quick"]:
                full = {"redundancy": None, "keep_as": "bf16", "window": config["window"]}
                done = runs.encode(loaded.model, loaded.processor, drawn, name, **full)
                for question in asked:
                    tool = Internal(frames=config["frames"], similarity="inner")
                    runs.ask(done.session, question, tool, rekv)
                    runs.ask(done.session, question, runs.internal(config["frames"], layers), whole)
                done.close()
                for question in asked if minutes <= 1 else _spread(asked, 2):
                    score, ms = runs.reencode(loaded.model, loaded.processor, drawn, question)
                    plain.scores.append(score)
                    plain.clips.append(name)
                    plain.reports.append({"total_ms": ms})
        results |= {"internal-full": whole, "rekv": rekv, "reencode": plain}
        for way, result in results.items():
            if result.scores:
                out.append(method_row(way, result, results, minutes, config["frames"]))
    return out if config["quick"] else [*out, *natural_rows(loaded, config)]


def _spread(items: list[Any], most: int | None) -> list[Any]:
    """At most so many of the items, evenly."""
    if most is None or len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / max(1, most - 1))] for i in range(most)]


def method_row(way: str, result: Any, all_: dict[str, Any], minutes: float, frames: int) -> dict[str, Any]:
    """One method at one length."""
    from vlmfast.bench import records, stats

    overall = stats.mean(result.scores, result.clips)
    metrics: dict[str, Any] = {
        "minutes": minutes, "questions": len(result.scores), "accuracy": overall.mean,
        "ci95": [overall.low, overall.high],
    }  # fmt: skip
    if result.reports:
        metrics["total_ms"] = result.median("total_ms")
    if result.kinds:
        past = [i for i, kind in enumerate(result.kinds) if kind != LATE]
        for name, picked in (("past", past), ("now", [i for i in range(len(result.kinds)) if i not in set(past)])):
            if picked:
                metrics[f"accuracy_{name}"] = sum(result.scores[i] for i in picked) / len(picked)
                metrics[f"evidence_recall_{name}"] = sum(result.recalls[i] for i in picked) / len(picked)
        metrics["evidence_recall"] = sum(result.recalls) / len(result.recalls)
        if result.reports:
            metrics |= {key: result.median(key) for key in TIMED}
            metrics["latency_ms"] = metrics["total_ms"]
            metrics["kv_fast_bytes"] = max(r["kv_fast_bytes"] for r in result.reports)
        base = all_["internal"]
        if way != "internal" and len(base.scores) == len(result.scores):
            gap = stats.paired(result.scores, base.scores, result.clips)
            metrics |= {"diff_vs_internal": gap.mean, "diff_vs_internal_ci95": [gap.low, gap.high]}
    vs: dict[str, Any] = {}
    if way == "internal" and all_["reencode"].reports:
        slow = all_["reencode"].median("total_ms") / metrics["total_ms"]
        vs = {"reencode": {"total_ms": [slow, slow, slow]}}
    return records.row(way, params={"minutes": minutes, "frames": frames}, metrics=metrics, vs=vs)


def session_row(done: Any, minutes: float) -> dict[str, Any]:
    """What one stream cost."""
    from evals.stream.runs import rekv_bytes_per_hour, resident_bytes
    from vlmfast.bench import records

    session, stats = done.session, done.session.stats()
    per_hour = stats["archive_bytes"] / stats["seconds"] * 3600
    metrics = {
        "minutes": minutes, "fps": done.fps, "visual_tokens": stats["visual_tokens"],
        "kept_tokens": stats["kept_tokens"], "kv_fast_bytes": stats["kv_fast_bytes"],
        "kv_host_bytes": stats["kv_host_bytes"], "kv_disk_bytes": stats["kv_disk_bytes"],
        "archive_bytes": stats["archive_bytes"], "bytes_per_hour": per_hour,
        "rekv_bytes_per_hour": rekv_bytes_per_hour(session), "peak_bytes": resident_bytes(),
        "evicted": stats["evicted"], "dropped_frames": stats["dropped_frames"],
    }  # fmt: skip
    ratio = metrics["rekv_bytes_per_hour"] / per_hour
    vs = {"rekv": {"bytes_per_hour": [ratio, ratio, ratio]}}
    return records.row("session", params={"minutes": minutes}, metrics=metrics, vs=vs)


def natural_rows(loaded: Any, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Public clips: everything must run and stay within its limits; accuracy is not claimed."""
    import tempfile

    from evals.stream import runs
    from vlmfast.bench import records
    from vlmfast.stream import Internal, StreamSession

    out = []
    for name, path in runs.natural():
        with tempfile.TemporaryDirectory() as folder:
            limits = {"ram": "1MiB", "disk": Path(folder) / "s", "disk_limit": "16MiB"}
            clock = time.perf_counter()
            with StreamSession(
                loaded.model, loaded.processor, retrieve=Internal(frames=config["frames"]), window=config["window"],
                redundancy=config["redundancy"], **limits,
            ) as session:  # fmt: skip
                session.watch(path, size=(96, 160), sample_fps=4)
                watched = time.perf_counter() - clock
                answer = session.ask("what colour is the object ?", max_new_tokens=runs.TOKENS)
                stats = session.stats()
                lies = sum(f.stat().st_size for f in (Path(folder) / "s").iterdir())
                metrics = {
                    "minutes": stats["seconds"] / 60, "fps": stats["frames"] / watched,
                    "total_ms": answer.report["total_ms"],
                    "visual_tokens": stats["visual_tokens"], "kept_tokens": stats["kept_tokens"],
                    "kv_host_bytes": session.store.peak_ram, "kv_disk_bytes": lies, "evicted": stats["evicted"],
                    "within_limits": int(session.store.peak_ram <= 1 << 20 and lies <= 16 << 20),
                }  # fmt: skip
            out.append(records.row("natural", params={"clip": name}, metrics=metrics))
    return out


def plot(record: dict[str, Any], path: Path) -> None:
    """Latency and memory against stream length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for way in ("internal", "uniform", "reencode"):
        taken = [r["metrics"] for r in record["rows"] if r["name"] == way]
        points = [(m["minutes"], m["total_ms"]) for m in taken if "total_ms" in m]
        if points:
            left.plot(*zip(*points, strict=True), marker="o", label=way)
    left.set(xlabel="stream length (minutes)", ylabel="answer latency (ms)", xscale="log", yscale="log")
    left.legend()
    kept = [r["metrics"] for r in record["rows"] if r["name"] == "session"]
    for key, label in (
        ("kv_fast_bytes", "window and working set"),
        ("kv_host_bytes", "archive in RAM"),
        ("kv_disk_bytes", "archive on disk"),
    ):
        right.plot([m["minutes"] for m in kept], [m[key] / 1e6 for m in kept], marker="o", label=label)
    right.set(xlabel="stream length (minutes)", ylabel="MB", xscale="log", yscale="log")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def tell(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)
