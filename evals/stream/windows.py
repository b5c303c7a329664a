"""What it costs to encode changed windows alone: `python -m evals.stream.windows [--minutes 1,10] --out FILE.json`.

Pocket clips of 192 pixels, nine windows of the tower each, are streamed twice over one model: every grid that is not
the one before again encoded whole (`whole`), and of every grid the windows that changed (`windows`). Both are asked
every question at its own second by the retriever `internal` of `evals.stream`. Rows, one per length and way:

* right answers about past events and about the present, and the difference to `whole` on the same questions, with its
  interval over clips;
* how much of the grids went through the tower, how many tokens were kept, and how far the features are from those of
  grids encoded whole (cosine, the worst twentieth of tokens);
* frames a second, paired clip by clip.

`--set choosing` takes the clips that settings are chosen on. The speed at real shapes is in
`python -m evals.speed --suite ingest`.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from evals.stream import runs
from vlmfast.bench import records, stats
from vlmfast.bench.question_sets import STREAMS
from vlmfast.cli.errors import application
from vlmfast.core import UserError

SIZE, WHOLE, WINDOWS = 192, "whole", "windows"


def streamed(loaded: Any, retriever: Any, minutes: float, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """{way: answers, and what the stream counted} of one clip."""
    from vlmfast.pocket.clips import clip

    drawn, name = clip(seed, round(minutes * 60), size=SIZE, questions=8 if minutes <= 2 else 16), f"{minutes:g}-{seed}"
    streams = {way: runs.opened(loaded.model, loaded.processor, drawn, **options) for way in (WHOLE, WINDOWS)}
    streams[WHOLE].session.encoder.tower.window_side = None
    results = {way: runs.Result() for way in streams}
    distances: list[float] = []

    def ask(question: runs.Asked) -> None:
        for way, opened in streams.items():
            runs.ask(opened.session, question, retriever, results[way])
        whole, windows = (opened.session.encoder.tower.newest for opened in streams.values())
        assert whole is not None and windows is not None
        same = torch.cosine_similarity(whole.features.features.float(), windows.features.features.float(), dim=-1)
        distances.extend((1 - same).flatten().tolist())

    try:
        order = [WHOLE, WINDOWS] if seed % 2 else [WINDOWS, WHOLE]  # either goes first as often
        runs.watch([streams[way] for way in order], runs.questions(drawn, name), ask)
        counted = {way: opened.session.stats() for way, opened in streams.items()}
    finally:
        for opened in streams.values():
            opened.close()
    return {way: {"result": results[way], "stats": counted[way], "distances": distances} for way in streams}


def row(way: str, done: list[dict[str, Any]], minutes: float) -> dict[str, Any]:
    """One way at one length over all clips."""
    mine, theirs = runs.Result(), runs.Result()
    for of_clip in done:
        mine.extend(of_clip[way]["result"])
        theirs.extend(of_clip[WHOLE]["result"])
    counted = [of_clip[way]["stats"] for of_clip in done]
    metrics: dict[str, Any] = {
        "clips": len(done), "questions": len(mine.scores),
        "tower_share": statistics.mean(each["tower_share"] for each in counted),
        "kept": statistics.mean(each["kept_tokens"] / each["visual_tokens"] for each in counted),
        "fps": statistics.median(each["fps"] for each in counted),
    }  # fmt: skip
    for part in ("past", "now"):
        picked = [i for i, kind in enumerate(mine.kinds) if (kind == "now") == (part == "now")]
        clips = [mine.questions[i][0] for i in picked]
        scores, base = [mine.scores[i] for i in picked], [theirs.scores[i] for i in picked]
        mean = stats.mean(scores, clips)
        metrics |= {f"accuracy_{part}": mean.mean, f"ci95_{part}": [mean.low, mean.high]}
        if way != WHOLE:
            gap = stats.paired(scores, base, clips)
            metrics |= {f"diff_vs_whole_{part}": gap.mean, f"diff_vs_whole_{part}_ci95": [gap.low, gap.high]}
    vs = {}
    if way != WHOLE:
        distances = sorted(distance for of_clip in done for distance in of_clip[way]["distances"])
        metrics["distance_95"] = distances[int(0.95 * len(distances))]
        seconds = [[1 / of_clip[each]["stats"]["fps"] for of_clip in done] for each in (WHOLE, way)]
        vs = {WHOLE: {"seconds_per_frame": stats.median_ratio(*seconds)}}
    return records.row(way, params={"minutes": minutes, "size": SIZE}, metrics=metrics, vs=vs)


def main(
    out: Annotated[Path, typer.Option(help="result file (JSON)")],
    minutes: Annotated[str, typer.Option(help="lengths in minutes")] = "1,10",
    clips: Annotated[int, typer.Option(help="clips of each length", min=1)] = 20,
    questions: Annotated[Literal["choosing", "reporting"], typer.Option("--set", help="which clips")] = "reporting",
    model: Annotated[str, typer.Option(help="'pocket', or a checkpoint folder of the same world")] = "pocket",
    frames: Annotated[int, typer.Option(help="blocks retrieved", min=1)] = 16,
    redundancy: Annotated[float, typer.Option(help="cosine distance below which a token is dropped", min=0)] = 0.01,
    layers: Annotated[
        str | None, typer.Option(help="layers that choose, e.g. 2,3; by default those found best")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an existing result")] = False,
) -> None:
    """Stream the same clips both ways and write the record."""
    from evals.speed.suites import show
    from evals.stream.suite import lengths_of
    from vlmfast import loading, spec

    lengths = lengths_of(minutes)
    records.claim(out, force)
    seeds = STREAMS[questions]
    if clips > len(seeds):
        raise UserError(f"--clips {clips}: {questions} has {len(seeds)} clips")
    loaded = loading.load(model)
    options: dict[str, Any] = {"redundancy": redundancy, "window": 1024, "ram": "64MiB"}
    if layers is None:
        chosen, _ = runs.best_layers(loaded.model, loaded.processor, frames, keep_as="int8", **options)
    else:
        chosen = tuple(spec.items(layers))
    retriever = runs.internal(frames, chosen)
    config = {"minutes": lengths, "set": questions, "clips": clips, "model": model, "frames": frames,
              "layers": list(chosen), "size": SIZE, **options}  # fmt: skip
    record = records.head("stream-windows", config=config, repeats=1, seed=seeds[0])
    record["rows"] = []
    for length in lengths:
        done = []
        for seed in seeds[:clips]:
            done.append(streamed(loaded, retriever, length, seed, options))
            said = {way: f"{found['stats']['tower_share']:.2f}" for way, found in done[-1].items()}
            print(f"{length:g} min, clip {seed}: share of the tower {said}", file=sys.stderr, flush=True)
        record["rows"] += [row(way, done, length) for way in (WHOLE, WINDOWS)]
    record["show"] = ["tower_share", "kept", "accuracy_past", "diff_vs_whole_past", "accuracy_now", "diff_vs_whole_now",
                      "distance_95", "fps"]  # fmt: skip
    records.write(out, record, force)
    show(record)


if __name__ == "__main__":
    application(main)()
