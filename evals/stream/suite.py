"""Streams, measured: `python -m evals.stream [--minutes 1,10,60] [--quick] [--model pocket] --out FILE.json`.

Pocket clips that no setting was chosen on (40 of a minute, 20 of ten, 10 of an hour) are streamed, and every question
is asked **at its own second while the clip runs**: past events, the needle, and the same asked while it is on screen
(`now`). All ways of retrieving answer it at the same number of blocks, one block being one temporal grid (two frames,
one second), and all read the last `--recent` seconds besides, at full resolution. Rows:

* `layers`: evidence recall of every layer on a clip of the train split; the two best choose for `internal`;
* one per length and way (`internal-always` brings back the best even where the present scores high, `internal-blocks`
  single blocks and not whole scenes, `internal-means` compares mean keys only, `internal-32` brings back twice as many
  blocks, `internal-by-layer` is ReKV's own rule, `external` knows colours only, `oracle` where the evidence lies,
  `window` retrieves nothing): accuracy, evidence recall, latency, tokens read; past and now apart, with intervals over
  clips;
* floors: `majority` says the commonest answer to such a question on other clips, `text-only` sees no video;
* `session`: sustained fps, bytes per tier, archive bytes per hour, plain ReKV's bytes per hour for the same stream;
* `internal-full` and `rekv` (up to 10 minutes): nothing dropped, two bytes per number, what compression costs; with
  the retriever of `internal`, and with inner products per layer;
* `reencode` (up to 10 minutes): all frames through the model again for a question, paired with `internal` on it;
* `natural`: decoding, encoding, retrieval and limits on a real clip, whatever the pocket model makes of it.

Clips are shared among `--jobs` processes; what a clip gave is kept in `--answers`, so that a killed run goes on where
it stopped. A plot of latency and memory against length lies beside the result.
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
    recent: Annotated[
        float | None, typer.Option(help="seconds that every answer reads whole; four frames by default", min=0)
    ] = None,
    clips: Annotated[str | None, typer.Option(help="most clips of each length, e.g. 8,4,2; all by default")] = None,
    jobs: Annotated[int, typer.Option(help="processes, each with its share of the cores", min=1)] = 1,
    answers: Annotated[Path, typer.Option(help="folder of what each clip gave")] = Path("runs/stream"),
    force: Annotated[bool, typer.Option("--force", help="replace an existing result")] = False,
) -> None:
    """Measure the stream and write its record and plot."""
    from evals.stream import runs
    from vlmfast.bench import records

    lengths = [0.3] if quick else lengths_of(minutes)
    records.claim(out, force)
    parse_bytes("--ram", ram)
    config = {
        "minutes": lengths, "quick": quick, "model": model, "frames": frames, "redundancy": redundancy,
        "window": window, "ram": ram, "recent": recent, "keep_as": "int8", "clips": counts_of(clips, lengths),
        "jobs": jobs,
    }  # fmt: skip
    record = records.head("stream", config=config, seed=runs.REPORTED[0], repeats=1)
    record["rows"] = rows(config, answers)
    record["show"] = ["accuracy_past", "accuracy_now", "evidence_recall_past", "total_ms", "fps", "bytes_per_hour"]
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


def counts_of(text: str | None, lengths: list[float]) -> dict[str, int] | None:
    """Length in minutes, as text -> how many clips of it at most, from `8,4,2`."""
    if text is None:
        return None
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if len(counts) != len(lengths) or not all(counts):
        raise UserError(f"--clips {text!r}: give a whole number for each of the {len(lengths)} lengths, e.g. 8,4,2")
    return {f"{minutes:g}": count for minutes, count in zip(lengths, counts, strict=True)}


def rows(config: dict[str, Any], answers: Path) -> list[dict[str, Any]]:
    """All rows of a run."""
    from evals.stream import clips, runs
    from vlmfast import loading
    from vlmfast.bench import records

    loaded, out = loading.load(config["model"]), []
    layers = None
    if not config["quick"]:
        options = {k: config[k] for k in clips.OPTIONS}
        layers, found = runs.best_layers(loaded.model, loaded.processor, config["frames"], **options)
        tell(f"layers {layers} choose; recall of each: {' '.join(f'{x:.2f}' for x in found)}")
        out.append(records.row("layers", params={"chosen": list(layers)}, metrics={"evidence_recall_by_layer": found}))
    for minutes in config["minutes"]:
        results: dict[str, Any] = {}
        done = clips.measured({**config, "layers": layers}, minutes, answers, tell)
        for per_clip in done:
            for way, result in per_clip["results"].items():
                results.setdefault(way, runs.Result()).extend(runs.Result.read(result))
        out.append(session_row(done, minutes))
        out += [
            method_row(way, result, results["internal"], minutes, config["frames"]) for way, result in results.items()
        ]
    if config["quick"]:
        return out
    return [*out, *natural_rows(loaded, config)]


def method_row(way: str, result: Any, base: Any, minutes: float, frames: int) -> dict[str, Any]:
    """One way at one length; compared with `internal` (`base`) on the same questions, clips being the clusters."""
    from vlmfast.bench import records, stats

    clips = [clip for clip, _, _ in result.questions]
    overall = stats.mean(result.scores, clips)
    metrics: dict[str, Any] = {
        "minutes": minutes, "questions": len(result.scores), "clips": len(set(clips)), "accuracy": overall.mean,
        "ci95": [overall.low, overall.high],
    }  # fmt: skip
    place = {question: i for i, question in enumerate(base.questions)}
    for name in ("past", "now"):
        picked = [i for i, kind in enumerate(result.kinds) if (kind == LATE) == (name == "now")]
        if not picked:
            continue
        mean = stats.mean([result.scores[i] for i in picked], [clips[i] for i in picked])
        metrics |= {f"questions_{name}": len(picked), f"accuracy_{name}": mean.mean}
        metrics[f"ci95_{name}"] = [mean.low, mean.high]
        recalls = [result.recalls[i] for i in picked if result.recalls[i] is not None]
        if recalls:
            metrics[f"evidence_recall_{name}"] = sum(recalls) / len(recalls)
        if way != "internal":
            other = [base.scores[place[result.questions[i]]] for i in picked]
            gap = stats.paired([result.scores[i] for i in picked], other, [clips[i] for i in picked])
            metrics |= {f"diff_vs_internal_{name}": gap.mean, f"diff_vs_internal_{name}_ci95": [gap.low, gap.high]}
    vs: dict[str, Any] = {}
    if all("total_ms" in r for r in result.reports):
        metrics["total_ms"] = result.median("total_ms")
        if way != "internal":
            own = [base.reports[place[q]]["total_ms"] for q in result.questions]
            ratio = stats.median_ratio(own, [r["total_ms"] for r in result.reports])
            vs = {"internal": {"total_ms": ratio}}
    if all(key in r for r in result.reports for key in TIMED):
        metrics |= {key: result.median(key) for key in TIMED}
        metrics["latency_ms"] = metrics["total_ms"]
        metrics["kv_fast_bytes"] = max(r["kv_fast_bytes"] for r in result.reports)
    return records.row(way, params={"minutes": minutes, "frames": frames}, metrics=metrics, vs=vs)


def session_row(done: list[dict[str, Any]], minutes: float) -> dict[str, Any]:
    """What one stream of this length cost: medians over clips, the largest peaks."""
    import statistics

    from vlmfast.bench import records

    seen = [clip["session"] for clip in done]
    metrics = {key: statistics.median(s[key] for s in seen) for key in seen[0]}
    metrics |= {"minutes": minutes, "clips": len(seen), "peak_bytes": max(s["peak_bytes"] for s in seen)}
    ratio = metrics["rekv_bytes_per_hour"] / metrics["bytes_per_hour"]
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
