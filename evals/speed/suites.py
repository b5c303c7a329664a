"""Speed, stage by stage: `python -m evals.speed --suite NAME [--quick] [--force] --out FILE.json`.

A suite (read, encode, prefill, decode, grammar, stream, ingest, presets) is a module `evals/speed/<suite>.py` with
`run(quick, store) -> dict`: a record with at least `rows` (see `vlmfast.bench.records`), and `config`, `seed`,
`repeats`, `device`, `dtype` for the head that is added here. A suite that builds its own head keeps it. Timings come
from `vlmfast.bench.timing`: paired, interleaved, medians. What a killed suite has measured stays in `--samples`, but
for grammar, stream and ingest, and the same command goes on from there.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmfast.cli import console
from vlmfast.core import UserError

SUITES = ("read", "encode", "prefill", "decode", "grammar", "stream", "ingest", "presets")
RESUMED = ("read", "encode", "prefill", "decode", "presets")


def available() -> list[str]:
    """The suites that exist here."""
    return [s for s in SUITES if importlib.util.find_spec(f"evals.speed.{s}") is not None]


def measure(suite: str, quick: bool, store: Any = None) -> dict[str, Any]:
    """Run one suite and return its whole record. store: a `SampleStore`, for suites that go on."""
    from vlmfast.bench import records

    run, commit = importlib.import_module(f"evals.speed.{suite}").run, records.commit()
    result = dict(run(quick, store=store) if suite in RESUMED else run(quick))
    if "hardware" in result:
        return result
    head = records.head(
        suite,
        config={"quick": quick, **result.pop("config", {})},
        seed=result.pop("seed", 0),
        repeats=result.pop("repeats", 1),
        device=result.pop("device", "cpu"),
        dtype=result.pop("dtype", "float32"),
    )
    return {**head, "commit": commit, **result}  # as the tree was when it began: a suite may draw a picture


def main(
    suite: Annotated[str, typer.Option(help=f"one of {', '.join(SUITES)}")],
    out: Annotated[Path, typer.Option(help="result file (JSON)")],
    quick: Annotated[bool, typer.Option("--quick", help="tiny shapes, under a minute")] = False,
    samples: Annotated[Path, typer.Option(help="folder of what a killed suite has measured")] = Path("runs/speed"),
    force: Annotated[bool, typer.Option("--force", help="replace an existing result")] = False,
) -> None:
    """Measure one suite and write its record."""
    from vlmfast.bench import records
    from vlmfast.bench.sample_store import open_store

    if suite not in available():
        raise UserError(f"no suite {suite!r}: choose one of {', '.join(available())}")
    records.claim(out, force)
    store = open_store(samples / f"{suite}.jsonl", identity(suite, quick), force) if suite in RESUMED else None
    record = measure(suite, quick, store)
    records.write(out, record, force)
    if store is not None:
        store.close()
    show(record)


def identity(suite: str, quick: bool) -> dict[str, Any]:
    """What must be the same for samples to be of one run."""
    from vlmfast.bench import records, timing

    head = records.head(suite, config={}, seed=0, repeats=1, dtype=timing.half())
    machine = {k: v for k, v in head["hardware"].items() if k not in ("load", "memory_gb")}
    return {"suite": suite, "quick": quick, "commit": head["commit"], **head["versions"], **machine}


def show(record: dict[str, Any]) -> None:
    """The record's rows as a table: medians, and the paired ratio to the first baseline below.

    A suite names the columns worth showing in `record["show"]`; without it, all metrics are shown.
    """
    from vlmfast.page import floors_above

    metrics = record.get("show") or list(dict.fromkeys(k for r in record["rows"] for k in r["metrics"]))
    rows = []
    for r in record["rows"]:
        versus: dict[str, Any] = next(iter(r["vs"].values()), {})
        params = console.plain(" ".join(f"{k}={v}" for k, v in r["params"].items()))
        name = f"{console.plain(r['name'])}\n[dim]{params}[/dim]" if params else console.plain(r["name"])
        ratios = {m: f"\n{versus[m][0]:.2f}x" for m in metrics if m in versus}
        cells = [number(r["metrics"].get(m)) + ratios.get(m, "") for m in metrics]
        rows.append([name, *cells])
    title = f"{record['suite']} · {record['hardware']['name']} · {record['hardware']['dtype']}"
    console.table(["method", *(m.replace("_", "\n") for m in metrics)], rows, console.plain(title))
    for r in record["rows"]:
        for note in floors_above(r["metrics"]):
            console.out().print(console.plain(f"{r['name']}: {note}"))


def number(value: Any) -> str:
    """A metric as one reads it: three digits, thousands apart, "" for none."""
    if value is None:
        return ""
    if not isinstance(value, (int, float)):
        return console.plain(value)
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
