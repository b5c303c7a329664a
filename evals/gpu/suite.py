"""The GPU suite: `python -m evals.gpu --out FOLDER [--minutes 9] [--dry] [--parts a,b] [--long]`; no network.

One command that asks a card everything, what matters most first:

* `methods`: every method's tokens against the CPU's, in float32 on tiny models (needs a checkout);
* `kernels`: every kernel against its reference;
* `first_token`: request to first token in Qwen2.5-VL-3B's shapes, stage by stage, beside its bound;
* `decode`: milliseconds a token, one row and eight, beside the bytes that a token must read;
* `decode_7b`: the same in the shapes of the 7B model, and its steps alone over eight rows of 32,768 tokens;
* `request`: from a video file to the first token, reading beside the tower;
* `stream`: frames a second and the wait for an answer;
* `choose`: what every pruner takes to choose a quarter of 8,192 tokens, then `decode` of transformers' compiled step;
* `profile`: which kernels the time goes to.

Every part is a process of its own with its own time: a crash, a hang or what this version lacks ends that part alone,
its last lines go into the record, and the next begins. Checks run side by side, whatever is timed runs alone. The
record, FOLDER/<device>.json, is written anew with every row. `rows` are as in every record, `params.part` says whose;
`parts` how each ended; `skipped` what was not measured and why. A time is the median of `samples` calls over prompt
lengths not used before, `*_low_ms` and `*_high_ms` the least and largest of them, `warm_ms` the first call, which may
compile; `*_floor_ms` is what arithmetic and bytes allow at the rates measured on this card (`config`); `vs` the ratios
to what ran beside this in every round (`evals.gpu.beside`). `--dry` runs all of it in toy shapes on the CPU.
"""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from evals.gpu import decode as gpu_decode
from evals.gpu import kernels as gpu_kernels
from evals.gpu import methods as gpu_methods
from evals.gpu import prefill as gpu_prefill
from evals.gpu import profile as gpu_profile
from evals.gpu import request as gpu_request
from evals.gpu import stream as gpu_stream
from evals.gpu.processes import Job, Suite
from evals.report import gpu_tables
from vlmfast.bench import records
from vlmfast.cli import console
from vlmfast.core import UserError


def checks(dry: bool) -> list[Job]:
    """What runs side by side; a dry run tries one case of a group."""
    shares = {group: 1 if dry else every for group, every in gpu_methods.GROUPS.items()}
    out = [
        Job("methods", gpu_methods.methods, 110, (group, f"{n + 1}/{every}"))
        for group, every in shares.items()
        for n in range(every)
    ]
    out += [Job("kernels", gpu_kernels.kernels, 110, case) for case in gpu_kernels.files()]
    return [*out, Job("kernels", gpu_kernels.ragged, 60)]


TIMED = [
    Job("first_token", gpu_prefill.first_token, 155),
    Job("decode", gpu_decode.decode, 205),
    Job("decode_7b", gpu_decode.decode_7b, 85),
    Job("stream", gpu_stream.stream, 45),
    Job("choose", gpu_prefill.choose, 25),
    Job("request", gpu_request.request, 70),
    Job("decode", gpu_decode.static, 75, ("static",)),
    Job("profile", gpu_profile.profile, 35),
]
PARTS = tuple(dict.fromkeys(job.part for job in [*checks(True), *TIMED]))


def preload() -> None:
    """Load what the parts need, before their processes are forked: seconds for each. Asks nothing of the card."""
    import transformers

    from vlmfast import decode, encode, pocket, prefill, stream

    loaded = [decode.Speculate, encode.METHODS, prefill.METHODS, stream.StreamSession, pocket.load]
    loaded += [transformers.Qwen2_5_VLForConditionalGeneration, transformers.AutoProcessor]
    assert all(loaded)


def measure(
    out: Path, minutes: float, dry: bool, force: bool, parts: list[str], long: bool, commit: str | None = None,
    only: tuple[str, ...] = (),
) -> dict[str, Any]:  # fmt: skip
    """Run the parts, print each when it ends, and return the record. only: rows of `first_token` and `decode`, groups
    of `methods`."""
    preload()
    suite = Suite(out, minutes, dry, long, commit, only)
    suite.begin(minutes, force)
    suite.rates = suite.record.pop("rates")
    record = suite.record
    record["parts"].clear()
    gone = signal.signal(signal.SIGTERM, _stop)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            asked = [job for job in checks(dry) if job.part in parts]
            asked = [job for job in asked if not only or job.part != "methods" or job.arguments[0] in only]
            suite.together(asked, Path(scratch))
            for part in dict.fromkeys(job.part for job in asked):
                show(part, record)
            asked = [job for job in TIMED if job.part in parts]
            for at, job in enumerate(asked):
                suite.together([job], Path(scratch))
                if job.part not in [later.part for later in asked[at + 1 :]]:
                    show(job.part, record)
    finally:
        signal.signal(signal.SIGTERM, gone)
    suite.save()
    return record


def show(part: str, record: dict[str, Any]) -> None:
    """Print a part; what cannot be shown costs no later figure."""
    try:
        gpu_tables.show(part, record)
    except Exception as e:
        print(f"{part} cannot be shown: {type(e).__name__}: {e}", flush=True)


def _stop(*args: Any) -> None:
    raise KeyboardInterrupt  # so that children are ended


def wrong(record: dict[str, Any]) -> list[str]:
    """What a check found, and parts that did not end by themselves."""
    found = [f"{r['name']}: {line}" for r in record["rows"] for line in r.get("wrong", [])]
    return found + [f"{p['part']} {p['state']}" for p in record["parts"] if p["state"] not in ("done", "out of time")]


def main(
    out: Annotated[Path, typer.Option(help="folder for <device>.json")],
    minutes: Annotated[float, typer.Option(help="time for the whole suite", min=0)] = 9.0,
    dry: Annotated[bool, typer.Option("--dry", help="toy shapes on the CPU: does everything run?")] = False,
    parts: Annotated[str, typer.Option(help="which, joined by commas")] = ",".join(PARTS),
    rows: Annotated[str, typer.Option(help="of methods, first_token and decode: which, joined by ;")] = "",
    long: Annotated[bool, typer.Option("--long", help="more rows of decode: 32k tokens, eight pruned rows")] = False,
    commit: Annotated[str | None, typer.Option(help="the commit, where the folder has no git")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an existing record")] = False,
) -> None:
    """Measure a GPU: methods, kernels, first token, a token, streams; one record, a short table a part."""
    asked = [p.strip() for p in parts.split(",") if p.strip()]
    unknown = [p for p in asked if p not in PARTS]
    if unknown or not asked:
        raise UserError(f"--parts {parts!r}: choose from {', '.join(PARTS)}, joined by commas")
    only = tuple(name.strip() for name in rows.split(";") if name.strip())
    known = [*gpu_methods.GROUPS, *gpu_prefill.arms(dry), *gpu_decode.arms(), *gpu_decode.MODELS]
    if unknown := [name for name in only if name not in known]:
        raise UserError(f"--rows {unknown[0]!r}: choose from {'; '.join(dict.fromkeys(known))}")
    if dry:
        records.claim(out / "dry.json", force)
    record = measure(out, minutes, dry, force, asked, long, commit, only)
    if not record["rows"]:
        raise UserError("nothing was measured in the time given")
    found = wrong(record)
    console.out().print(f"\n{len(record['rows'])} rows, {len(found)} wrong", markup=False)
    if found:
        raise typer.Exit(1)
