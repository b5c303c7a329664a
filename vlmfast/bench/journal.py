"""The JSON lines of a run: appended as questions are answered, so that a killed run goes on where it stopped.

Every line carries `run`, one string that says what the run was (task, model, versions, ...) and `plan`, a hash of the
method's plan. Lines of another run are never mixed in: the first field that differs is named. A line begins with `sum`,
a checksum of the rest. A line that does not agree with its sum is damaged: it is left out, named on stderr, and its
question is asked again. A last line without an end is what a killed run leaves: it is cut off.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlmfast.core import UserError, shown

WAY_OUT = "choose another --out, or pass --force"
FIRST = b'{"id":'  # how every line begins
Key = tuple[str, str]  # (question id, method)
HEAD = '{"sum": "################", '  # how every line begins, a digit for each #


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
        self.damaged: list[int] = []  # lines that were left out, from 1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if force:
                path.unlink(missing_ok=True)
            if path.exists():
                self._read(path.read_bytes())
        except OSError as e:
            raise UserError(f"{shown(str(path))} cannot be a file of answers ({e.strerror}): {WAY_OUT}") from None

    def _read(self, data: bytes) -> None:
        *lines, tail = data.split(b"\n")
        for n, line in enumerate(lines, 1):
            record = unsealed(line)
            if record is None:
                self.damaged.append(n)
                continue
            key, run, plan = (record["id"], record["method"]), record["run"], record["plan"]
            if run != self.run:
                raise UserError(f"{self.path} line {n} {difference(run, self.run)}: {WAY_OUT}")
            if self.plans.get(key[1], plan) != plan:
                raise UserError(f"{self.path} line {n}: method {key[1]!r} was run with another plan: {WAY_OUT}")
            self.records.setdefault(key, record)
        if not self.records and (self.damaged or not begins(tail)):
            at = f"line {self.damaged[0]}" if self.damaged else "line 1"
            raise UserError(
                f"{self.path} {at} is no record of evals.accuracy with a checksum (a file of an older version has "
                f"none): {WAY_OUT}"
            )
        if self.damaged:
            named = ", ".join(map(str, self.damaged[:8])) + (", ..." if len(self.damaged) > 8 else "")
            self._say(f"damaged: line {named} disagrees with its checksum; what it answered is asked again")
        if tail:
            self._say("the last line was cut off, as when a run is killed; its question is asked again")
            with self.path.open("r+b") as f:
                f.truncate(len(data) - len(tail))

    def _say(self, what: str) -> None:
        print(f"{self.path}: {what}", file=sys.stderr)

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
                new.append(sealed(r))
        if new:
            with self.path.open("a", encoding="utf-8") as f:
                f.write("\n".join(new) + "\n")


def checksum(record: dict[str, Any]) -> str:
    """16 hex digits of a record's canonical JSON."""
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=8).hexdigest()


def sealed(record: dict[str, Any]) -> str:
    """The line of a record."""
    record = json.loads(json.dumps(record))  # as it will be read: keys are text, tuples are lists
    return json.dumps({"sum": checksum(record)} | record)


def unsealed(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None when it is none, or not what was written."""
    try:
        record = json.loads(line)
        good = record.pop("sum") == checksum(record) and sealed(record).encode() == line
        return record if good and all(isinstance(record[k], str) for k in ("id", "method", "run", "plan")) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def begins(tail: bytes) -> bool:
    """Could these bytes, which no line end follows, be the beginning of a line of ours?"""
    return HEAD.encode().startswith(re.sub(rb"[0-9a-f]", b"#", tail[: len(HEAD)]))


def difference(old: str, new: str) -> str:
    """The first field in which two run names differ, in words."""
    was, now = (dict(p.partition("=")[::2] for p in name.split(";")) for name in (old, new))
    for key in [*now, *was]:
        if was.get(key) != now.get(key):
            return f"comes from another run ({key} {was.get(key, '?')}, now {now.get(key, '?')})"
    return "comes from another run"
