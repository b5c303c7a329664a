"""One stream in one picture: `python -m evals.stream.hour [--minutes 60] [--clip 0] [--schedule TEXT] --out FILE.json`.

A pocket clip is streamed once, its questions about past events are asked at their own seconds, and once a minute it is
written down at which level every stretch of the video is kept (`coarsen=`) and how many bytes that takes. The picture
(`FILE.png` beside the record, or `--picture`) shows it: from left to right the stream goes on, from bottom to top lies
the video that was seen, and its colour is the level kept. A dot is a block that an answer brought back, a ring where
the evidence was.

Nothing is timed, and one clip is no measurement of accuracy: see `evals.stream` and `evals.stream.levels` for those.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmfast.bench.question_sets import STREAMS
from vlmfast.cli.errors import application
from vlmfast.core import UserError

SCHEDULE = "age:four_bit=300,features=1200"
LOST = "given up"
COLOURS = {
    "full": "#3579a8",
    "four_bit": "#74b0d3",
    "features": "#b3d5e8",
    "representative": "#dcebf4",
    LOST: "#f0f0f0",
}
STRETCH = 15.0  # seconds of video that one cell of the picture stands for


def main(
    out: Annotated[Path, typer.Option(help="result file (JSON)")],
    minutes: Annotated[float, typer.Option(help="length of the stream", min=0.5)] = 60.0,
    clip: Annotated[int, typer.Option(help="which of the reported clips", min=0)] = 0,
    schedule: Annotated[str, typer.Option(help="coarsen= of the stream")] = SCHEDULE,
    frames: Annotated[int, typer.Option(help="blocks retrieved", min=1)] = 16,
    picture: Annotated[Path | None, typer.Option(help="the picture, beside the record by default")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an existing result")] = False,
) -> None:
    """Stream one clip, write its record and draw its picture."""
    from evals.stream import runs
    from vlmfast import loading
    from vlmfast.bench import records
    from vlmfast.files import claim
    from vlmfast.stream import levels

    records.claim(out, force)
    picture = picture or out.with_suffix(".png")
    claim(picture, force, (".png",), "--picture")
    levels.parse(schedule)
    if clip >= len(STREAMS["reporting"]):
        raise UserError(f"--clip {clip}: there are {len(STREAMS['reporting'])} reported clips, from 0 on")
    seed = STREAMS["reporting"][clip]
    loaded = loading.load("pocket")
    session = {"redundancy": 0.01, "window": 1024, "ram": "64MiB", "keep_as": "int8", "coarsen": schedule}
    plain = {key: value for key, value in session.items() if key != "coarsen"}
    layers, _ = runs.best_layers(loaded.model, loaded.processor, frames, **plain)
    config = {"minutes": minutes, "clip": seed, "frames": frames, "layers": list(layers), **session}
    record = records.head("stream-hour", config=config, seed=seed, repeats=1)
    record["rows"] = streamed(loaded, minutes, seed, frames, layers, session)
    records.write(out, record, force)
    draw(record).savefig(picture, dpi=130)
    print(told(record))


def streamed(
    loaded: Any, minutes: float, seed: int, frames: int, layers: tuple[int, ...], options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows `question` (one each) and `minute` (what was kept then)."""
    from evals.stream import runs
    from vlmfast.bench import records
    from vlmfast.bench.scoring import exact_fact
    from vlmfast.pocket.clips import clip

    count = 8 if minutes <= 2 else 16
    drawn = clip(seed, round(minutes * 60), questions=count)
    asked = [q for q in runs.questions(drawn, f"{minutes:g}min-{seed}") if q.kind != "now"]
    stream = runs.opened(loaded.model, loaded.processor, drawn, **options)
    retriever, rows = runs.internal(frames, layers), list[dict[str, Any]]()

    def look(second: float) -> None:
        found = stream.session.store.levels()
        metrics = {"second": second, "bytes": {level: of["bytes"] for level, of in found.items()},
                   "kept": kept(stream.session)}  # fmt: skip
        rows.append(records.row("minute", params={"minutes": minutes}, metrics=metrics))

    def ask(question: Any) -> None:
        if question in marks:
            return look(question.time)
        answer = stream.session.ask(question.question, max_new_tokens=runs.TOKENS, retrieve=retriever)
        stream.session.new_conversation()
        metrics = {
            "second": question.time, "right": exact_fact(answer.text, question.answer),
            "evidence": list(question.evidence), "brought_back": [[start, end] for start, end, _ in answer.evidence],
            "answer_tokens": answer.report["tokens"],
        }  # fmt: skip
        rows.append(records.row("question", params={"question": question.question}, metrics=metrics))
        return None

    step = min(60.0, 6.0 * minutes)
    marks = [
        runs.Asked("", at * step, "look", "", "", (0.0, 0.0)) for at in range(1, int(minutes * 60 / step + 1e-6) + 1)
    ]
    runs.watch([stream], [*asked, *marks], ask)
    stream.close()
    return rows


def kept(session: Any) -> list[tuple[str, int]]:
    """At which level most of a stretch of the video is kept, for how many stretches: from the beginning up to now."""
    found: dict[int, Counter[str]] = {}
    for block in session.store.blocks.values():
        found.setdefault(int(block.start // STRETCH), Counter())[block.level.name.lower()] += 1
    levels = [found[i].most_common(1)[0][0] if i in found else LOST for i in range(max(found, default=-1) + 1)]
    return [(level, len(list(run))) for level, run in itertools.groupby(levels)]


def draw(record: dict[str, Any]) -> Any:
    """The picture: what is kept of the video at every minute and where answers came from; under it the bytes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    looks = [r["metrics"] for r in record["rows"] if r["name"] == "minute"]
    asked = [r["metrics"] for r in record["rows"] if r["name"] == "question"]
    width = (looks[1]["second"] - looks[0]["second"]) / 60 if len(looks) > 1 else looks[0]["second"] / 60
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8.4, 7.2), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    for look in looks:
        at, bottom = look["second"] / 60 - width, 0.0
        for level, stretches in look["kept"]:
            height = stretches * STRETCH / 60
            above.bar(at, height, width, bottom, align="edge", color=COLOURS[level])
            bottom += height
    for question in asked:
        at, colour = question["second"] / 60, "#2b2b2b" if question["right"] else "#c8372d"
        begun, ended = (second / 60 for second in question["evidence"])
        above.plot(at, (begun + ended) / 2, "o", markersize=13, fillstyle="none", color=colour, markeredgewidth=1.4)
        for start, end in question["brought_back"]:
            above.plot(at, (start + end) / 120, ".", markersize=5, color=colour)
    bottoms = [0.0] * len(looks)
    for level in COLOURS:
        heights = [look["bytes"].get(level, 0) / 1e6 for look in looks]
        if any(heights):
            lefts = [look["second"] / 60 - width for look in looks]
            below.bar(lefts, heights, width, bottoms, align="edge", color=COLOURS[level])
            bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
    shown = [level for level in COLOURS if any(level == run[0] for look in looks for run in look["kept"])]
    marks: list[Any] = [Patch(color=COLOURS[level], label=level.replace("_", " ")) for level in shown]
    marks += [Line2D([], [], marker=".", linestyle="", color="#2b2b2b", label="brought back for an answer"),
              Line2D([], [], marker="o", markersize=10, fillstyle="none", linestyle="", color="#2b2b2b",
                     label="where the evidence was"),
              Line2D([], [], marker="s", linestyle="", color="#c8372d", label="the answer was wrong")]  # fmt: skip
    above.legend(handles=marks, loc="upper left", fontsize=9, framealpha=0.95)
    above.set_ylabel("minute of the video")
    below.set_ylabel("MB kept")
    below.set_xlabel("minute of the stream")
    above.set_title(
        f"What is kept of {looks[-1]['second'] / 60:g} minutes ({record['config']['coarsen']})", fontsize=11
    )
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(0, looks[-1]["second"] / 60)
    above.set_ylim(0, looks[-1]["second"] / 60)
    return figure


def told(record: dict[str, Any]) -> str:
    """One line about the stream."""
    looks = [r["metrics"] for r in record["rows"] if r["name"] == "minute"]
    asked = [r["metrics"] for r in record["rows"] if r["name"] == "question"]
    held = ", ".join(f"{level} {size / 1e6:.1f} MB" for level, size in looks[-1]["bytes"].items())
    right = sum(question["right"] for question in asked)
    return f"{looks[-1]['second'] / 60:g} min: kept {held}; {right:.0f} of {len(asked)} answers right"


if __name__ == "__main__":
    application(main)()
