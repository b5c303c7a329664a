"""The GPU suite's processes: one for each part, watched, ended when late; and the record that their rows go into."""

from __future__ import annotations

import contextlib
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
from typing import Any

from evals.gpu.run import Run, enter
from vlmfast.bench import records
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
        return " ".join([self.part, *self.arguments])


def card(run: Run) -> None:
    """The record's head: what runs here, on what, and the rates it reaches."""
    import torch

    from vlmfast.bench import timing

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


class Suite:
    """Runs jobs and keeps the record."""

    def __init__(
        self, folder: Path, minutes: float, dry: bool, long: bool, commit: str | None = None, only: tuple[str, ...] = ()
    ) -> None:
        self.folder, self.dry, self.long, self.commit, self.only = folder, dry, long, commit, only
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
        run = Run(job.part, suite.dry, suite.long, self.lines, self.ends - 1, only=suite.only, **suite.rates)
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
