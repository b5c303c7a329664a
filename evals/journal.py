"""The JSON lines of a run: appended as questions are answered, so that a killed run goes on where it stopped.

Every line carries `run`, one string that says what the run was (task, model, versions, ...) and `plan`, a hash of the
method's plan. Lines of another run are never mixed in: the first field that differs is named.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlmfast.core import UserError

WAY_OUT = "choose another --out, or pass --force"
FIRST = b'{"id":'  # how every line begins
Key = tuple[str, str]  # (question id, method)


def run_name(fields: dict[str, Any]) -> str:
    """`key=value;...`, the identity of a run."""
    return ";".join(f"{k}={v}" for k, v in fields.items())


def plan_hash(plan: dict[str, Any]) -> str:
    """Eight hex digits of a plan's JSON."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:8]


class Journal:
    """Records of a run on disk. plans: method -> plan hash of the methods that will be asked for."""

    def __init__(self, path: Path, run: str, plans: dict[str, str], force: bool = False) -> None:
        self.path, self.run, self.plans = path, run, plans
        self.records: dict[Key, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if force:
            path.unlink(missing_ok=True)
        if path.exists():
            self._read()

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for n, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                key = record["id"], record["method"]
                run, plan = record["run"], record["plan"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.path} line {n} is no record of evals.accuracy: choose another --out") from None
            if run != self.run:
                raise UserError(f"{self.path} line {n} {difference(run, self.run)}: {WAY_OUT}")
            if self.plans.get(key[1], plan) != plan:
                raise UserError(f"{self.path} line {n}: method {key[1]!r} was run with another plan: {WAY_OUT}")
            self.records.setdefault(key, record)
        tail = data[len(whole) :]
        if tail and not (tail.startswith(FIRST) or FIRST.startswith(tail)):
            raise UserError(f"{self.path} ends in what is no record of evals.accuracy: choose another --out")
        if tail:  # the last line was cut off when the run was killed
            with self.path.open("r+b") as f:
                f.truncate(len(whole))

    def missing(self, keys: Iterable[Key]) -> list[Key]:
        """Those of `keys` that have no record yet."""
        return [k for k in keys if k not in self.records]

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records that are not there yet, in one write."""
        new = []
        for r in records:
            key = r["id"], r["method"]
            if key not in self.records:
                self.records[key] = r = r | {"plan": self.plans[r["method"]], "run": self.run}
                new.append(json.dumps(r, ensure_ascii=False))
        if new:
            with self.path.open("a") as f:
                f.write("\n".join(new) + "\n")


def difference(old: str, new: str) -> str:
    """The first field in which two run names differ, in words."""
    was, now = (dict(p.partition("=")[::2] for p in name.split(";")) for name in (old, new))
    for key in [*now, *was]:
        if was.get(key) != now.get(key):
            return f"comes from another run ({key} {was.get(key, '?')}, now {now.get(key, '?')})"
    return "comes from another run"
