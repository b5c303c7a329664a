"""Watch rules on pocket clips: when what a rule names is really there, what was told of it, and what asking costs.

`python -m evals.stream.rules --clips 6 --out FILE.json` reads rules on clips that are not reported, and says for every
threshold and every time that an answer must last how many alerts are right, and how many appearances are told. With
`--reported` it asks the reported clips under the defaults, with intervals, and times 0, 1 and 8 rules.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer

from evals.stream import runs
from vlmfast.bench import records, stats
from vlmfast.cli.errors import application
from vlmfast.files import write_text
from vlmfast.pocket.clips import LongClip, clip
from vlmfast.stream import StreamSession
from vlmfast.stream.watch_rules import LASTING, THRESHOLD, WatchRule

Span = tuple[float, float]
RULES = 8  # watched at once
COOLDOWN = 4.0  # seconds; a scene lasts 8
LATE = 1.0  # seconds that a reading may lie behind what it read
MINUTES = 10.0  # of a clip
TIMED = (0, 1, RULES)  # rules, of the rates
RULE = "a {} appears"
THRESHOLDS, LASTINGS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99), (0.0, 1.0, 2.0, 3.0)  # that are tried


def watched(drawn: LongClip, count: int) -> list[str]:
    """The things that rules name: in turn what occurs, the rarest first, each by its colour and shape."""
    seen = [event.what for event in drawn.events if event.what != "scene" and not event.what.endswith("star")]
    return sorted(set(seen), key=lambda what: (seen.count(what), what))[:count]


def appearances(drawn: LongClip, what: str) -> list[Span]:
    """The seconds (start, end) in which a thing is to be seen; scenes without a cooldown between them are one."""
    spans: list[Span] = []
    for event in sorted((e for e in drawn.events if e.what == what), key=lambda e: e.start):
        if spans and event.start - spans[-1][1] < COOLDOWN:
            spans[-1] = spans[-1][0], max(spans[-1][1], event.end)
        else:
            spans.append((event.start, event.end))
    return spans


def judged(told: Sequence[float], spans: Sequence[Span]) -> tuple[list[float], list[float]]:
    """(for every alert, is it within an appearance; for every appearance, was it told of), 1.0 or 0.0 each."""
    right = [float(any(start < at <= end + LATE for start, end in spans)) for at in told]
    found = [float(any(start < at <= end + LATE for at in told)) for start, end in spans]
    return right, found


def watch(model: Any, processor: Any, config: dict[str, Any], seed: int) -> dict[str, Any]:
    """One clip under `RULES` rules: what -> {"told": seconds of its alerts, "spans": of its appearances}."""
    drawn = clip(seed, round(MINUTES * 60), questions=16)
    told: dict[str, list[float]] = {what: [] for what in watched(drawn, RULES)}
    encoded(model, processor, drawn, told, config).close(discard=True)
    return {what: {"told": seconds, "spans": appearances(drawn, what)} for what, seconds in told.items()}


def scores(model: Any, processor: Any, config: dict[str, Any], seed: int) -> dict[str, dict[str, Any]]:
    """What the rules of one clip read: what -> {"read": (second, score) of every reading, "spans": appearances}."""
    drawn = clip(seed, round(MINUTES * 60), questions=16)
    named = watched(drawn, RULES)
    found: dict[str, dict[str, Any]] = {what: {"read": [], "spans": appearances(drawn, what)} for what in named}
    take = WatchRule.read

    def spied(rule: WatchRule, seconds: float, score: float) -> bool:
        found[next(what for what in named if rule.text == RULE.format(what))]["read"].append((seconds, score))
        return take(rule, seconds, score)

    with mock.patch.object(WatchRule, "read", spied):
        encoded(model, processor, drawn, {what: [] for what in named}, config).close(discard=True)
    return found


def alerts(read: Sequence[tuple[float, float]], threshold: float, lasting: float) -> list[float]:
    """Seconds of the alerts that a rule would have given over these readings."""
    rule = WatchRule("", "", print, COOLDOWN, threshold, lasting, [])
    return [seconds for seconds, score in read if rule.read(seconds, score)]


def choice_rows(found: Sequence[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Precision and recall at every threshold and lasting. found: `scores` of every clip."""
    out = []
    for lasting in LASTINGS:
        for threshold in THRESHOLDS:
            right: list[float] = []
            met: list[float] = []
            for seen in (each for clip_found in found for each in clip_found.values()):
                correct, was_told = judged(alerts(seen["read"], threshold, lasting), seen["spans"])
                right, met = right + correct, met + was_told
            precision, recall = sum(right) / max(1, len(right)), sum(met) / max(1, len(met))
            metrics = {
                "clips": len(found), "alerts": len(right), "appearances": len(met), "precision": precision,
                "recall": recall, "f1": 2 * precision * recall / max(1e-9, precision + recall),
            }  # fmt: skip
            params = {"threshold": threshold, "lasting": lasting}
            out.append(records.row("rules", params=params, metrics=metrics))
    return out


def main(
    out: Annotated[Path, typer.Option(help="result file (JSON)")],
    clips: Annotated[int, typer.Option(help="how many clips", min=1, max=20)] = 6,
    reported: Annotated[bool, typer.Option("--reported", help="the reported clips, under the defaults")] = False,
    answers: Annotated[Path, typer.Option(help="folder of what each reported clip gave")] = Path("runs/rules"),
    force: Annotated[bool, typer.Option("--force", help="replace an existing result")] = False,
) -> None:
    """Read rules on the choosing clips, for every threshold and lasting, or on the reported ones."""
    from evals.speed.suites import show
    from vlmfast import loading

    records.claim(out, force)
    config: dict[str, Any] = {"redundancy": 0.01, "window": 1024, "ram": "16MiB", "recent": None}
    config |= {"clips": {f"{MINUTES:g}": clips}, "threshold": THRESHOLD, "lasting": LASTING}
    seeds = runs.REPORTED if reported else runs.CHOSEN_ON
    record = records.head("rules", config={"reported": reported, **config}, seed=seeds[0], repeats=1)
    loaded = loading.load("pocket")
    if reported:
        row = accuracy_row(loaded.model, loaded.processor, config, answers / f"{THRESHOLD:g}-{LASTING:g}")
        record["rows"] = [row, rate_row(loaded.model, loaded.processor, config)]
    else:
        read = [scores(loaded.model, loaded.processor, config, seed) for seed in seeds[:clips]]
        record["rows"], record["show"] = choice_rows(read), ["precision", "recall", "f1", "alerts"]
    records.write(out, record, force)
    show(record)


def accuracy_row(model: Any, processor: Any, config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Precision and recall of `RULES` rules over reported clips, with intervals over clips; what a clip gave is kept in
    `folder`."""
    right: list[float] = []
    found: list[float] = []
    of_right: list[str] = []
    of_found: list[str] = []
    delays: list[float] = []
    seeds = [seed for seed, _ in runs.clips_of(MINUTES, False, config["clips"])]
    for seed in seeds:
        file = folder / f"rules-{seed}.json"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(watch(model, processor, config, seed)))
        for seen in json.loads(file.read_text()).values():
            correct, met = judged(seen["told"], seen["spans"])
            right, found = right + correct, found + met
            of_right += [str(seed)] * len(correct)
            of_found += [str(seed)] * len(met)
            delays += [min(at - start for at in seen["told"] if start < at <= end + LATE)
                       for (start, end), was in zip(seen["spans"], met, strict=True) if was]  # fmt: skip
    precision, recall = stats.mean(right, of_right), stats.mean(found, of_found)
    metrics = {
        "minutes": MINUTES, "clips": len(seeds), "alerts": len(right), "appearances": len(found),
        "precision": precision.mean, "precision_ci95": [precision.low, precision.high],
        "recall": recall.mean, "recall_ci95": [recall.low, recall.high], "delay_s": sum(delays) / max(1, len(delays)),
    }  # fmt: skip
    return records.row("rules", params={"rules": RULES, "cooldown": COOLDOWN}, metrics=metrics)


def rate_row(model: Any, processor: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Frames a second with 0, 1 and `RULES` rules, of one clip pushed in turns; a live camera's pushes, one second
    each, and a file's."""
    drawn = clip(runs.REPORTED[0], 120, questions=8)
    frames = list(drawn.frames())
    metrics: dict[str, Any] = {}
    for push, name in ((runs.BATCH, "file"), (round(drawn.fps), "live")):
        for count in TIMED:
            told: dict[str, list[float]] = {what: [] for what in watched(drawn, count)}
            began = time.perf_counter()
            encoded(model, processor, drawn, told, config, frames, push).close(discard=True)
            metrics[f"fps_{name}_{count}_rules"] = len(frames) / (time.perf_counter() - began)
    return records.row("rules-rate", params={"seconds": drawn.seconds}, metrics=metrics)


def encoded(
    model: Any, processor: Any, drawn: LongClip, told: dict[str, list[float]], config: dict[str, Any],
    frames: Sequence[Any] | None = None, push: int = runs.BATCH,
) -> StreamSession:  # fmt: skip
    """A session that has seen a clip, with a rule for everything that `told` names; seconds of alerts go there."""
    options = {key: config[key] for key in ("redundancy", "window", "ram", "recent")}
    stream = StreamSession(model, processor, retrieve=None, fps=drawn.fps, **options)
    for what, seconds in told.items():
        stream.when(RULE.format(what), lambda alert, into=seconds: into.append(alert.seconds), COOLDOWN)
    every = iter(drawn.frames() if frames is None else frames)
    while some := [pair for _, pair in zip(range(push), every, strict=False)]:
        stream.push(torch.stack([frame for _, frame in some]), [seconds for seconds, _ in some])
    return stream


if __name__ == "__main__":
    application(main)()
