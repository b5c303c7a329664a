"""What coarser blocks cost: `python -m evals.stream.levels [--minutes 1,10,60] [--clips 12] --out FILE.json`.

Each pocket clip is encoded once and its blocks are stored several times, each archive with a schedule of its own, on
disk. Every question about past events is asked at its own second over each of them, by the retriever `internal` of
`evals.stream`. The schedules that end in features are there twice, the second time with the keys of the layers that
choose kept beside them. Rows, one per length and schedule (`full` is none):

* right answers, the difference to `full` on the same questions with its interval over clips, how many won and lost;
* bytes of an hour and their share of those of `full`; blocks and bytes at every level at the end;
* right answers by the level that the evidence had when it was asked for;
* latency of an answer, and how many blocks were prefilled again for it.

`--set choosing` takes the clips that settings are chosen on. What a clip gave is kept in `--answers`.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vlmfast.bench.question_sets import STREAMS
from vlmfast.cli.errors import application
from vlmfast.core import UserError

FULL = "full"
SCHEDULES = (
    "age:four_bit=60",
    "age:features=60",
    "age:four_bit=60,features=300",
)
KEEP = "age:features=1e9"  # features are stored, and nothing comes of age


def main(
    out: Annotated[Path, typer.Option(help="result file (JSON)")],
    minutes: Annotated[str, typer.Option(help="lengths in minutes")] = "1,10,60",
    clips: Annotated[int, typer.Option(help="clips of each length", min=1)] = 12,
    questions: Annotated[Literal["choosing", "reporting"], typer.Option("--set", help="which clips")] = "reporting",
    schedule: Annotated[list[str] | None, typer.Option(help="schedules besides none; several by default")] = None,
    model: Annotated[str, typer.Option(help="'pocket', or a checkpoint folder of the same world")] = "pocket",
    frames: Annotated[int, typer.Option(help="blocks retrieved", min=1)] = 16,
    redundancy: Annotated[float, typer.Option(help="cosine distance below which a token is dropped", min=0)] = 0.01,
    window: Annotated[int, typer.Option(help="tokens of the sliding window", min=1)] = 1024,
    layers: Annotated[
        str | None, typer.Option(help="layers that choose, e.g. 2,3; by default those found best")
    ] = None,
    answers: Annotated[Path, typer.Option(help="folder of what each clip gave")] = Path("runs/stream-levels"),
    force: Annotated[bool, typer.Option("--force", help="replace an existing result")] = False,
) -> None:
    """Measure schedules on the same clips and write the record."""
    from evals.stream import runs
    from evals.stream.clips import identity
    from evals.stream.suite import lengths_of
    from vlmfast import loading, spec
    from vlmfast.bench import records
    from vlmfast.stream import levels

    lengths = lengths_of(minutes)
    records.claim(out, force)
    schedules = list(schedule or SCHEDULES)
    for text in schedules:
        levels.parse(text)
    if clips > len(STREAMS[questions]):
        raise UserError(f"--clips {clips}: {questions} has {len(STREAMS[questions])} clips")
    config: dict[str, Any] = {
        "minutes": lengths, "set": questions, "clips": clips, "model": model, "frames": frames,
        "redundancy": redundancy, "window": window,
    }  # fmt: skip
    loaded = loading.load(model)
    options = {"redundancy": redundancy, "window": window}
    if layers is None:
        chosen, _ = runs.best_layers(loaded.model, loaded.processor, frames, ram="16MiB", keep_as="int8", **options)
    else:
        chosen = runs.internal(frames, spec.items(layers)).layers
    if schedule is None:
        kept = ",".join(map(str, chosen))
        schedules += [f"{text},keys=[{kept}]" for text in SCHEDULES if levels.parse(text).keeps_features]
    config["schedules"] = schedules
    folder = answers / identity({**config, "layers": chosen})
    record = records.head("stream-levels", config={**config, "layers": list(chosen)}, repeats=1,
                          seed=STREAMS[questions][0])  # fmt: skip
    record["rows"] = []
    for length in lengths:
        done = []
        for seed in STREAMS[questions][:clips]:
            path = folder / f"{length:g}-{seed}.json"
            if not path.exists():
                found = streamed(loaded, config, chosen, length, seed)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(found))
                print(f"{length:g} min, clip {seed}: {told(found)}", file=sys.stderr, flush=True)
            done.append(json.loads(path.read_text()))
        record["rows"] += [row(name, done, length) for name in (FULL, *schedules)]
    record["show"] = ["right", "diff_vs_full", "bytes_per_hour", "bytes_share", "total_ms", "prefilled_again_blocks"]
    records.write(out, record, force)
    from evals.speed.suites import show

    show(record)


def streamed(loaded: Any, config: dict[str, Any], layers: tuple[int, ...], minutes: float, seed: int) -> dict[str, Any]:
    """{schedule: {"questions", "scores", "levels", "ms", "again", "cost"}} of one clip."""
    from evals.stream import runs
    from vlmfast.pocket.clips import clip
    from vlmfast.stream.by_seconds import in_time

    count = 8 if minutes <= 2 else 16
    drawn, name = clip(seed, round(minutes * 60), questions=count), f"{minutes:g}min-{seed}"
    asked = [q for q in runs.questions(drawn, name) if q.kind != "now"]
    options = {k: config[k] for k in ("redundancy", "window")}
    main = runs.opened(loaded.model, loaded.processor, drawn, disk=None, ram="4GiB", coarsen=KEEP, **options)
    session, retriever = main.session, runs.internal(config["frames"], layers)
    out: dict[str, Any] = {}
    with Archives(session, [FULL, *config["schedules"]]) as opened:

        def ask(question: Any) -> None:
            for schedule, store in opened.items():
                with Reading(session, store):
                    result = runs.Result()
                    held = in_time(list(store.blocks.values()), None, question.evidence)
                    level = max((block.level for block in held), default=None)
                    runs.ask(session, question, retriever, result)
                of = out.setdefault(
                    schedule, {k: [] for k in ("questions", "scores", "levels", "recalls", "ms", "again")}
                )
                of["questions"].append([name, question.time, question.question])
                of["scores"].append(result.scores[0])
                of["recalls"].append(result.recalls[0])
                of["levels"].append("lost" if level is None else level.name.lower())
                of["ms"].append(result.reports[0]["total_ms"])
                of["again"].append(result.reports[0]["prefilled_again_blocks"])

        runs.watch([main], asked, ask)
        for schedule, store in opened.items():
            store.flush()
            out[schedule]["cost"] = {
                "bytes_per_hour": store.archive_bytes / session.stats()["seconds"] * 3600,
                "disk_bytes": store.disk_bytes, "evicted": store.evicted, "levels": store.levels(),
            }  # fmt: skip
    main.close()
    return out


class Archives:
    """Archives beside a session's own, each in its own folder and with its own schedule: {schedule: store}. Every block
    that the session stores goes into all of them."""

    def __init__(self, session: Any, schedules: list[str]) -> None:
        self.session, self.schedules = session, schedules

    def __enter__(self) -> dict[str, Any]:
        from vlmfast.stream import levels
        from vlmfast.stream.archive.store import Store

        self.folder = tempfile.TemporaryDirectory(prefix="vlmfast-")
        self.opened = {}
        for i, name in enumerate(self.schedules):
            schedule = None if name == FULL else levels.parse(name)
            store = Store("64MiB", Path(self.folder.name) / str(i), keep_as="int8", coarsen=schedule).create()
            assert store.disk is not None
            store.disk.began(0.0, 1)
            self.opened[name] = store
        own = self.session._store

        def store_everywhere(block: Any, packed: Any) -> None:
            own(block, packed)
            for store in self.opened.values():
                schedule = store.coarsening.schedule
                without = {} if schedule and schedule.keeps_features else {"features": None, "feature_scale": None}
                record = dataclasses.replace(block, visual=None) if without else dataclasses.replace(block)
                store.insert(record, dataclasses.replace(packed, **without))
                if store.due():
                    store.flush()

        self.session._store = store_everywhere
        return self.opened

    def __exit__(self, *error: Any) -> None:
        del self.session._store
        for store in self.opened.values():
            store.close()
        self.folder.cleanup()


class Reading:
    """While it lasts a session answers from another store."""

    def __init__(self, session: Any, store: Any) -> None:
        self.session, self.store, self.own = session, store, session.store

    def _use(self, store: Any) -> None:
        self.session.store = self.session.builder.store = self.session.builder.again.store = store

    def __enter__(self) -> None:
        self._use(self.store)

    def __exit__(self, *error: Any) -> None:
        self._use(self.own)


def row(schedule: str, done: list[dict[str, Any]], minutes: float) -> dict[str, Any]:
    """One schedule at one length over all clips, compared with `full` on the same questions."""
    from vlmfast.bench import records, stats

    def joined(name: str, key: str) -> list[Any]:
        return [x for clip in done for x in clip[name][key]]

    scores, base = joined(schedule, "scores"), joined(FULL, "scores")
    clips = [clip for clip, _, _ in joined(schedule, "questions")]
    gap, accuracy = stats.paired(scores, base, clips), stats.mean(scores, clips)
    recalls = [x for x in joined(schedule, "recalls") if x is not None]
    own, ms = (
        ([clip[name]["cost"]["bytes_per_hour"] for clip in done] for name in (schedule, FULL)),
        joined(schedule, "ms"),
    )
    hour, full_hour = (statistics.mean(x) for x in own)
    metrics: dict[str, Any] = {
        "minutes": minutes, "questions": len(scores), "clips": len(done), "right": sum(scores),
        "accuracy": accuracy.mean, "ci95": [accuracy.low, accuracy.high],
        "evidence_recall": sum(recalls) / len(recalls),
        "diff_vs_full": gap.mean, "diff_vs_full_ci95": [gap.low, gap.high],
        "won": sum(a > b for a, b in zip(scores, base, strict=True)),
        "lost": sum(a < b for a, b in zip(scores, base, strict=True)),
        "bytes_per_hour": hour, "bytes_share": hour / full_hour, "total_ms": statistics.median(ms),
        "prefilled_again_blocks": statistics.mean(joined(schedule, "again")),
        "evicted": sum(clip[schedule]["cost"]["evicted"] for clip in done),
    }  # fmt: skip
    levels = joined(schedule, "levels")
    for level in dict.fromkeys(levels):
        of_level = [x for x, y in zip(scores, levels, strict=True) if y == level]
        metrics |= {f"asked_at_{level}": len(of_level), f"right_at_{level}": sum(of_level)}
    for level in dict.fromkeys(x for clip in done for x in clip[schedule]["cost"]["levels"]):
        found = [clip[schedule]["cost"]["levels"].get(level, {"blocks": 0, "bytes": 0}) for clip in done]
        metrics |= {f"{key}_at_{level}": statistics.mean(x[key] for x in found) for key in ("blocks", "bytes")}
    vs = {FULL: {"total_ms": stats.median_ratio(joined(FULL, "ms"), ms)}} if schedule != FULL else {}
    return records.row(schedule, params={"minutes": minutes}, metrics=metrics, vs=vs)


def told(found: dict[str, Any]) -> str:
    """A line about one clip."""
    shown = (
        f"{name} {sum(of['scores']):.0f}/{len(of['scores'])} {of['cost']['bytes_per_hour'] / 1e6:.1f} MB"
        for name, of in found.items()
    )
    return ", ".join(shown)


if __name__ == "__main__":
    application(main)()
