"""The samples of a speed suite on disk: a killed suite goes on where it stopped.

    store = open_store(Path("runs/speed/encode.jsonl"), {"suite": "encode", ...}, force=False)
    timing.beside(runs, baselines, rounds, store=store)       # asks only for what the file does not hold
    store.close()                                             # the suite is whole: the file goes

Kept is a competitor with the baselines beside it, in one round, or nothing of them: what is compared ran together.
A suite with turns of its own keeps each of them by `once`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlmfast import files
from vlmfast.bench.journal import Journal, plan_hash, run_name
from vlmfast.core import UserError

Samples = dict[str, dict[str, float]]  # name of a run -> its sample


class SampleStore:
    """Samples by call of `timing.beside`, round and competitor. The file is made with the first of them.

    path: of the file; identity: what must be the same for samples to be of one run.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity, self.num_calls = path, identity, 0
        self.journal = self._open() if path.exists() else None

    def _open(self, force: bool = False) -> Journal:
        plans: dict[str, str] = defaultdict(str)
        return Journal(self.path, run_name(self.identity), plans, force)

    def begin(self, names: Sequence[str]) -> str:
        """The next call of `timing.beside`, over these competitors; a suite always makes its calls in one order."""
        self.num_calls += 1
        return f"{self.num_calls} {plan_hash({'names': list(names)})}"

    def find(self, call: str, round_number: int, name: str) -> Any:
        """What was measured of a competitor and its baselines in that round, None where it was not."""
        record = None if self.journal is None else self.journal.records.get((f"{call} {round_number}", name))
        return None if record is None else record["samples"]

    def add(self, call: str, round_number: int, name: str, samples: Samples | Any) -> None:
        """Keep what was measured."""
        if self.journal is None:
            self.journal = self._open(force=True)
        self.journal.add([{"id": f"{call} {round_number}", "method": name, "samples": samples}])

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, made once and kept under this name: plain JSON values, whole or not at all."""
        made = self.find("once", 0, name)
        if made is None:
            made = make()
            self.add("once", 0, name, made)
        return made

    def close(self) -> None:
        """The suite is whole and written: remove the file."""
        self.path.unlink(missing_ok=True)


def open_store(path: Path, identity: dict[str, Any], force: bool) -> SampleStore:
    """The samples of an unfinished run, or none yet. Those of another run (commit, machine, versions, ...) raise
    `UserError`, or with `force` make place for new ones."""
    files.claim(path, True, (".jsonl",), "--samples")
    try:
        return SampleStore(path, identity)
    except UserError:
        if not force:
            raise
        path.unlink()
        return SampleStore(path, identity)
