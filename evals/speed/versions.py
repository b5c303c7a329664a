"""Has anything become slower? This tree against an earlier commit, paired in one run: `python -m evals.speed.versions`.

One process holds the package as it is here, two hold it as it was (`git archive`); all run the same code
(`evals/speed/version_runs.py`, public names only) on the same weights, in turns. The second of the two earlier ones is
a null: what its ratio is, a process does to a time. Ratios are earlier over now: above 1, this tree is faster. A method
that the earlier commit does not have is left out and named in the record.

Real widths, few and narrow layers behind a narrow tower: choosing, compressing and what runs between products of
matrices weigh far more here than in use. So a ratio of a whole call is not what a user gains.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmfast.bench import records, timing
from vlmfast.cli.errors import application
from vlmfast.core import UserError

ROUNDS, FIRST_EDITION = 6, "e094074"
RUNS = Path(__file__).with_name("version_runs.py")
START = "import sys; file = sys.argv[1]; exec(compile(open(file).read(), file, 'exec'))"


class Version:
    """A process that holds the package of one tree. names: what it can run."""

    def __init__(self, tree: Path, quick: bool) -> None:
        arguments = [str(RUNS), str(tree), *(["quick"] if quick else [])]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tree)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, *arguments], cwd=tree, env=environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        self.names: list[str] = self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise UserError(f"a process of the comparison ended with exit code {self.process.wait()}: its lines are above")

    def run(self, name: str) -> timing.Sample:
        """One run by name."""
        assert self.process.stdin is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def tree_of(commit: str) -> Iterator[Path]:
    """The package as it was at a commit, in a folder that goes afterwards. Raises UserError for an unknown commit."""
    with tempfile.TemporaryDirectory() as folder:
        made = subprocess.run(["git", "archive", commit, "vlmfast"], cwd=records.ROOT, capture_output=True)
        if made.returncode:
            raise UserError(f"no package at commit {commit!r}: {made.stderr.decode().strip()}")
        archive = Path(folder) / "tree.tar"
        archive.write_bytes(made.stdout)
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        yield Path(folder)


def compared(
    now: Callable[[str], timing.Sample],
    before: Callable[[str], timing.Sample],
    null: Callable[[str], timing.Sample],
    names: list[str],
    rounds: int,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """One row per name: medians of now, and the paired ratios of the earlier version, and of its second process, to it.

    `vs.before` is earlier over now; `vs["before again"]` the earlier version's first process over its second.
    """
    rows = []
    for name in names:
        runs = {"now": now, "before": before, "before again": null}
        turns = {who: functools.partial(run, name) for who, run in runs.items()}
        taken = timing.interleaved(turns, rounds, warmup=1, progress=progress)
        vs = {"before": timing.ratios(taken["before"], taken["now"])}
        vs["before again"] = timing.ratios(taken["before"], taken["before again"])
        group, _, method = name.partition(" ")
        metrics = dict[str, Any](timing.medians(taken["now"]))
        metrics |= {f"before_{key}": value for key, value in timing.medians(taken["before"]).items()}
        rows.append(records.row(method, params={"group": group}, metrics=metrics, vs=vs))
    return rows


def main(
    out: Annotated[Path, typer.Option(help="result file (JSON)")],
    against: Annotated[str, typer.Option(help="the earlier commit")] = FIRST_EDITION,
    only: Annotated[str | None, typer.Option(help="runs whose name begins so, joined by semicolons")] = None,
    rounds: Annotated[int, typer.Option(help="how often each is run, in turns", min=1)] = ROUNDS,
    quick: Annotated[bool, typer.Option("--quick", help="tiny sizes, one round")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace an existing result")] = False,
) -> None:
    """Compare this tree with an earlier commit and write the record."""
    from evals.speed.suites import show

    records.claim(out, force)
    rounds = 1 if quick else rounds
    config = {"against": against, "quick": quick}
    record = records.head("versions", config=config, seed=0, repeats=rounds, dtype=timing.half())
    with tree_of(against) as tree, contextlib.ExitStack() as stack:
        versions = [Version(at, quick) for at in (records.ROOT, tree, tree)]
        for version in versions:
            stack.callback(version.close)
        wanted = tuple(only.split(";")) if only else ("",)
        names = [name for name in versions[0].names if name.startswith(wanted)]
        if not names:
            raise UserError(f"no run begins with {only!r}; there are: {', '.join(versions[0].names)}")
        common = [name for name in names if name in versions[1].names]
        record["config"]["left_out"] = [name for name in names if name not in common]
        tick = timing.ticker(3 * (rounds + 1) * len(common))
        record["rows"] = compared(*(version.run for version in versions), common, rounds, tick)
    record["show"] = ["select_ms", "compress_ms", "ttft_ms", "decode_ms_per_token", "encode_ms", "total_ms"]
    records.write(out, record, force)
    show(record)


if __name__ == "__main__":
    application(main)()
