"""The GPU suite: `python -m evals.gpu --out FOLDER [--minutes 8] [--dry] [--parts a,b] [--long]`; no network.

One command that asks a card everything, what matters most first:

* `methods`: every method's tokens against the CPU's, in float32 on tiny models (needs a checkout);
* `kernels`: every kernel against its reference;
* `first_token`: request to first token in Qwen2.5-VL-3B's shapes, stage by stage, beside its bound;
* `choose`: what every pruner takes to choose a quarter of 8,192 tokens;
* `decode`: milliseconds a token, one row and eight, beside the bytes that a token must read;
* `stream`: frames a second and the wait for an answer;
* `profile`: which kernels the time goes to.

Every part is a process of its own with its own time: a crash, a hang or what this version lacks ends that part alone,
its last lines go into the record, and the next begins. Checks run side by side, whatever is timed runs alone. The
record, FOLDER/<device>.json, is written anew with every row. `rows` are as in every record, `params.part` says whose;
`parts` how each ended; `skipped` what was not measured and why. A time is the median of calls over prompt lengths not
used before, `*_low_ms` and `*_high_ms` the least and largest of them, `warm_ms` the first call, which may compile;
`*_floor_ms` is what arithmetic and bytes allow at the rates measured on this card (`config`); `vs.plain` is stock
over this. `--dry` runs all of it in toy shapes on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from evals import gpu_decode, gpu_kernels, gpu_methods, gpu_prefill, gpu_profile, gpu_stream, gpu_tables, records
from evals.gpu_run import Run, enter
from vlmfast.cli import console
from vlmfast.cli.errors import application
from vlmfast.core import UserError

LAST = 6  # lines of a failed part that go into the record
GRACE = 2.0  # seconds between a part's own end of work and its being killed


@dataclass(frozen=True)
class Job:
    """One process of a part."""

    part: str
    function: Callable[..., None]
    seconds: float  # at most
    arguments: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " ".join([self.part, *self.arguments[:1]])


CHECKS = [Job("methods", gpu_methods.methods, 110, (group,)) for group in gpu_methods.GROUPS]
CHECKS += [Job("kernels", gpu_kernels.kernels, 110, case) for case in gpu_kernels.FILES]
CHECKS += [Job("kernels", gpu_kernels.ragged, 60)]
TIMED = [
    Job("first_token", gpu_prefill.first_token, 110),
    Job("choose", gpu_prefill.choose, 45),
    Job("decode", gpu_decode.decode, 110),
    Job("stream", gpu_stream.stream, 45),
    Job("profile", gpu_profile.profile, 45),
]
PARTS = tuple(dict.fromkeys(job.part for job in [*CHECKS, *TIMED]))


def card(run: Run) -> None:
    """The record's head: what runs here, on what, and the rates it reaches."""
    import torch

    from evals import timing

    if not run.dry and not torch.cuda.is_available():
        run.skip("card", "no CUDA device here; --dry runs the suite in toy shapes on the CPU")
        return
    if not run.dry:
        torch.zeros(1, device="cuda")  # a device that a process cannot use says so here
    machine = timing.rates(run.device, torch.bfloat16, 0.05 if run.dry else 0.5)
    head = records.head("gpu", seed=0, repeats=1 if run.dry else 3, device=run.device, dtype="bfloat16", config={
        **run.shape.json(), "dry": run.dry, "long": run.long,
        "matmul_gflops": round(machine.flops / 1e9, 1), "copy_gbytes": round(machine.bytes / 1e9, 2)})  # fmt: skip
    head["versions"] |= versions(run.dry)
    with run.lines.open("a") as file:
        file.write(json.dumps({"head": head, "flops": machine.flops, "bytes": machine.bytes}) + "\n")


def versions(dry: bool) -> dict[str, str]:
    """Triton, CUDA and the driver, where there are any."""
    import torch

    found = {"cuda": str(torch.version.cuda)}
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    if not dry:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(ask, capture_output=True, text=True, timeout=10).stdout.split("\n")[0]
    return found


def preload() -> None:
    """Load what the parts need, before their processes are forked: seconds for each. Asks nothing of the card."""
    import transformers

    from vlmfast import decode, encode, pocket, prefill, stream

    loaded = [decode.Speculate, encode.METHODS, prefill.METHODS, stream.StreamSession, pocket.load]
    loaded += [transformers.Qwen2_5_VLForConditionalGeneration, transformers.AutoProcessor]
    assert all(loaded)


class Suite:
    """Runs jobs and keeps the record."""

    def __init__(self, folder: Path, minutes: float, dry: bool, long: bool, commit: str | None = None) -> None:
        self.folder, self.dry, self.long, self.commit = folder, dry, long, commit
        self.ends = time.monotonic() + 60 * minutes
        self.record: dict[str, Any] = {"rows": [], "parts": [], "skipped": []}
        self.rates: dict[str, float] = {}
        self.path: Path | None = None
        # a child that is forked has all libraries loaded; where the card does not bear that, children begin anew
        self.start = "fork"

    def begin(self, minutes: float, force: bool) -> None:
        """Ask the card who it is; names the record."""
        job = Job("card", card, 60)
        with tempfile.TemporaryDirectory() as scratch:
            self.together([job], Path(scratch))
            if self.record["parts"][-1]["state"] != "done" and self.start == "fork":
                self.start = "spawn"
                self.together([job], Path(scratch))
        if "hardware" not in self.record:
            last = self.record["parts"][-1].get("last", ["?"])
            raise UserError(next((s.partition(": ")[2].partition(": ")[2] for s in self.record["skipped"]), last[-1]))
        self.record["config"]["minutes"] = minutes
        self.record["command"], self.record["commit"] = records.command(), self.commit or records.commit()
        name = "dry" if self.dry else self.record["hardware"]["name"].lower().replace("nvidia ", "").replace(" ", "-")
        self.path = self.folder / f"{name}.json"
        records.claim(self.path, force)

    def together(self, jobs: list[Job], scratch: Path) -> None:
        """Run jobs side by side; every row is in the record's file as it comes."""
        running = [Child(self, job, scratch) for job in jobs]
        try:
            while running:
                time.sleep(0.02 if self.dry else 0.1)
                for child in list(running):
                    over = child.over()
                    if child.read(self.record):
                        self.save()
                    if over:
                        running.remove(child)
                        self.record["parts"].append(child.end())
                        self.save()
        finally:
            for child in running:
                child.kill()

    def save(self) -> None:
        """Write the record, once it has a name and a row."""
        if self.path is not None and self.record["rows"]:
            records.write(self.path, self.record, force=True)


class Child:
    """A job's process."""

    def __init__(self, suite: Suite, job: Job, scratch: Path) -> None:
        self.job, self.began, self.at = job, time.monotonic(), 0
        stem = scratch / job.name.replace(" ", "-").replace("/", "-")
        self.lines, self.log = stem.with_suffix(".jsonl"), stem.with_suffix(".log")
        self.log.unlink(missing_ok=True)
        self.ends = min(self.began + job.seconds, suite.ends)
        run = Run(job.part, suite.dry, suite.long, self.lines, self.ends - 1, **suite.rates)
        context: Any = multiprocessing.get_context(suite.start)
        given = (job.function.__module__, job.function.__name__, run, job.arguments, self.log)
        self.process = context.Process(target=enter, args=given)
        self.state = ""
        if self.ends - self.began < (0 if suite.dry else 5):
            self.state = "out of time"
        else:
            self.process.start()

    def over(self) -> bool:
        """Has it ended? One that is late is killed."""
        if self.state:
            return True
        if self.process.is_alive():
            if time.monotonic() < self.ends + GRACE:  # a part looks at its time itself
                return False
            self.kill()
            self.state = f"stopped after {time.monotonic() - self.began:.0f} s"
        else:
            code = self.process.exitcode
            self.state = "done" if code == 0 else f"failed (exit {code})"
        return True

    def kill(self) -> None:
        """End it and whatever it started."""
        if self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            self.process.join(5)

    def read(self, record: dict[str, Any]) -> bool:
        """Take what it has written since; True when that was something."""
        if not self.lines.exists():
            return False
        with self.lines.open("rb") as file:
            file.seek(self.at)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        self.at += len(new)
        for line in new.splitlines():
            put(record, json.loads(line))
        return bool(new)

    def end(self) -> dict[str, Any]:
        """How it ended, for the record."""
        out = {"part": self.job.name, "state": self.state, "seconds": round(time.monotonic() - self.began, 1)}
        if self.state != "done" and self.log.exists():
            lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
            out["last"] = [line[:300] for line in lines[-LAST:]]
        return out


def put(record: dict[str, Any], line: dict[str, Any]) -> None:
    """One line of a part into the record."""
    if "head" in line:
        rows = {k: record[k] for k in ("rows", "parts", "skipped")}
        record.update({**line["head"], **rows})
        record["rates"] = {"flops": line["flops"], "bytes": line["bytes"]}
    elif "skipped" in line:
        record["skipped"].append(line["skipped"])
    else:
        row = line["row"]
        key = (row["name"], row["params"])
        at = next((i for i, r in enumerate(record["rows"]) if (r["name"], r["params"]) == key), None)
        if at is None:
            record["rows"].append(row)
        else:
            record["rows"][at] = row


def measure(
    out: Path, minutes: float, dry: bool, force: bool, parts: list[str], long: bool, commit: str | None = None
) -> dict[str, Any]:
    """Run the parts, print each when it ends, and return the record."""
    preload()
    suite = Suite(out, minutes, dry, long, commit)
    suite.begin(minutes, force)
    suite.rates = suite.record.pop("rates")
    record = suite.record
    record["parts"].clear()
    gone = signal.signal(signal.SIGTERM, functools.partial(_stop))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            checks = [job for job in CHECKS if job.part in parts]
            suite.together(checks, Path(scratch))
            for part in dict.fromkeys(job.part for job in checks):
                gpu_tables.show(part, record)
            for job in TIMED:
                if job.part in parts:
                    suite.together([job], Path(scratch))
                    gpu_tables.show(job.part, record)
    finally:
        signal.signal(signal.SIGTERM, gone)
    suite.save()
    return record


def _stop(*args: Any) -> None:
    raise KeyboardInterrupt  # so that children are ended


def wrong(record: dict[str, Any]) -> list[str]:
    """What a check found, and parts that did not end by themselves."""
    found = [f"{r['name']}: {line}" for r in record["rows"] for line in r.get("wrong", [])]
    return found + [f"{p['part']} {p['state']}" for p in record["parts"] if p["state"] not in ("done", "out of time")]


def main(
    out: Annotated[Path, typer.Option(help="folder for <device>.json")],
    minutes: Annotated[float, typer.Option(help="time for the whole suite", min=0)] = 8.0,
    dry: Annotated[bool, typer.Option("--dry", help="toy shapes on the CPU: does everything run?")] = False,
    parts: Annotated[str, typer.Option(help="which, joined by commas")] = ",".join(PARTS),
    long: Annotated[bool, typer.Option("--long", help="32k tokens and transformers' own compiled loop too")] = False,
    commit: Annotated[str | None, typer.Option(help="the commit, where the folder has no git")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an existing record")] = False,
) -> None:
    """Measure a GPU: methods, kernels, first token, a token, streams; one record, a short table a part."""
    asked = [p.strip() for p in parts.split(",") if p.strip()]
    unknown = [p for p in asked if p not in PARTS]
    if unknown or not asked:
        raise UserError(f"--parts {parts!r}: choose from {', '.join(PARTS)}, joined by commas")
    if dry:
        records.claim(out / "dry.json", force)
    record = measure(out, minutes, dry, force, asked, long, commit)
    if not record["rows"]:
        raise UserError("nothing was measured in the time given")
    found = wrong(record)
    console.out().print(f"\n{len(record['rows'])} rows, {len(found)} wrong", markup=False)
    if found:
        raise typer.Exit(1)


if __name__ == "__main__":
    application(main)()
