"""What a stream's archive survives: `python -m evals.stream.crash [--kills 200] [--mutations 200] --out FILE.json`.

A pocket clip is streamed to disk, nothing rounded, and things are done to it; each time what is left must equal the
stream cut at what survived, block by block and in its answer, or be refused or reported in one line:

* `killed in ...`: SIGKILL at a random moment of a push, flush, eviction, save (here or elsewhere), close, or of a push
  that coarsens older blocks; the archive opens, nothing is lost but the unflushed end, no block is there twice or half,
  each is what its level says, and the stream goes on;
* `damaged ...`: one file with flipped bits, cut, grown, swapped with another, deleted, or replaced by a link, a device,
  a pipe or a folder; before the archive is opened, and while it is open; `coarse`: of blocks at every level;
* `full disk ...`: writes refused, files cut off, a full file system; every refused push is repeated;
* `two owners`: another process wants the folder while it is open, or several want it at once.

Exit code 1 when anything went wrong; `wrong` in the record says what.
"""

from __future__ import annotations

import random
import shutil
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmfast.cli.errors import application

SEED = 0
OUTCOMES = ("same", "reported", "refused")


def main(
    out: Annotated[Path, typer.Option(help="result file (JSON)")],
    kills: Annotated[int, typer.Option(min=0, help="children killed, a sixth in each operation")] = 20,
    mutations: Annotated[int, typer.Option(min=0, help="of every file, before opening, and a quarter while open")] = 5,
    disks: Annotated[int, typer.Option(min=0, help="streams over a disk that is full at times, per kind")] = 3,
    force: Annotated[bool, typer.Option("--force", help="replace an existing result")] = False,
) -> None:
    """Kill, damage, fill and contend; write the record and print its table."""
    from vlmfast.bench import records

    records.claim(out, force)
    config = {"kills": kills, "mutations": mutations, "disks": disks, "model": "pocket"}
    record = records.head("stream-crash", config=config, seed=SEED, repeats=1)
    with tempfile.TemporaryDirectory(prefix="vlmfast-") as folder:
        record["rows"] = list(rows(Path(folder), config))
    records.write(out, record, force)
    show(record)
    if any(row["wrong"] for row in record["rows"]):
        raise typer.Exit(1)


def rows(folder: Path, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All rows of a run."""
    from evals.stream import crash_disk as disk
    from evals.stream import crash_runs as runs

    world = the_world()
    for mode in runs.MODES:
        yield kill_row(world, mode, folder, config["kills"] // len(runs.MODES))
    kept = {"": folder / "kept", "coarse ": folder / "coarse"}
    for sort, path in kept.items():
        with world.session(disk=path, flush_seconds=5.0, coarsen=runs.COARSEN if sort else None) as session:
            for at in range(0, runs.KEPT, runs.STEP):
                session.push(world.frames[at : at + runs.STEP])
    rnd = random.Random(SEED)
    for while_open in (False, True):
        for sort, name in (*(("", name) for name in runs.FILES), ("coarse ", "segment")):
            outcomes = []
            for n in range(config["mutations"] // (4 if while_open else 1)):
                kind, path = runs.DAMAGE[n % len(runs.DAMAGE)], folder / "damaged"
                path.mkdir()
                outcome = runs.damaged(world, kept[sort], path / "s", name, kind, rnd.randrange(1 << 30), while_open)
                outcomes.append(outcome if outcome in OUTCOMES else f"{kind}: {outcome}")
                shutil.rmtree(path)
            yield row(f"damaged {sort}{name}", outcomes, {"while_open": while_open})
    for how in disk.FULL:
        found = [disk.full_disk(world, folder / f"{how}{n}", how, n) for n in range(config["disks"])]
        tried = [x for x in found if x is not None]
        outcomes = [wrong or "same" for _, wrong in tried]
        yield row(f"full disk: {how}", outcomes, {}, refused_calls=sum(n for n, _ in tried))
    outcomes = []
    for n in range(config["disks"]):
        for trial in (disk.refused_owner, disk.contest):
            path = folder / f"{trial.__name__}{n}"
            path.mkdir()
            outcomes.append(trial(world, path) or "same")
    yield row("two owners", outcomes, {})


def the_world() -> Any:
    """The pocket model over the frames of one clip."""
    import torch

    from evals.stream.crash_runs import FRAMES, World
    from vlmfast import pocket
    from vlmfast.pocket.clips import clip

    torch.set_num_threads(1)  # children are forked, and threads do not survive that
    model, processor = pocket.load()
    drawn = clip(1, FRAMES // 2, questions=2)
    return World(model, processor, torch.stack([frame for _, frame in drawn.frames()])[:FRAMES])


def kill_row(world: Any, mode: str, folder: Path, count: int) -> dict[str, Any]:
    """So many children killed in one kind of operation."""
    from evals.stream import crash_runs as runs

    results = []
    for n in range(count):
        path = folder / f"{mode}{n}"
        path.mkdir()
        results.append(runs.killed(world, mode, path, n))
        shutil.rmtree(path)
    lost = [r["lost_seconds"] for r in results] or [0.0]
    return row(
        f"killed in {mode}", [r["wrong"] or "same" for r in results], {},
        inside=sum(r["inside"] for r in results), lost_seconds=statistics.median(lost), lost_seconds_most=max(lost),
    )  # fmt: skip


def row(name: str, outcomes: list[str], params: dict[str, Any], **metrics: Any) -> dict[str, Any]:
    """One row: how many trials ended how. "same" is the stream cut at what survived."""
    from vlmfast.bench import records

    counts = Counter(outcomes)
    wrong = [o for o in outcomes if o not in OUTCOMES]
    found = {"trials": len(outcomes), **{o: counts[o] for o in OUTCOMES}, "wrong": len(wrong)}
    print(f"{name}: {found}", file=sys.stderr, flush=True)
    return records.row(name, params=params, metrics=found | metrics, wrong=wrong)


def show(record: dict[str, Any]) -> None:
    """The record's rows as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    columns = {c: c for c in ("trials", *OUTCOMES, "wrong", "inside")} | {"lost_seconds_most": "lost s"}
    table = Table(box=box.SIMPLE, title="what the archive survives", padding=(0, 1, 0, 0))
    table.add_column("what is done", no_wrap=True)
    for name in columns.values():
        table.add_column(name, justify="right", no_wrap=True)
    for r in record["rows"]:
        done = r["name"] + (", open" if r["params"].get("while_open") else "")
        table.add_row(done, *(str(r["metrics"].get(c, "")) for c in columns))
    console = Console()
    (console if console.is_terminal else Console(width=100)).print(table)


if __name__ == "__main__":
    application(main)()
