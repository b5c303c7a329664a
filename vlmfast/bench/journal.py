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
    return ";".join(f"{field}={value}" for field, value in fields.items())


def plan_hash(plan_json: dict[str, Any]) -> str:
    """Eight hex digits of a plan's JSON."""
    return hashlib.sha256(json.dumps(plan_json, sort_keys=True).encode()).hexdigest()[:8]


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
        except OSError as error:
            raise UserError(f"{shown(str(path))} cannot be a file of answers ({error.strerror}): {WAY_OUT}") from None

    def _read(self, file_bytes: bytes) -> None:
        *lines, unfinished = file_bytes.split(b"\n")
        for line_number, line in enumerate(lines, 1):
            record = unsealed(line)
            if record is None:
                self.damaged.append(line_number)
                continue
            record_key, line_run, line_plan = (record["id"], record["method"]), record["run"], record["plan"]
            if line_run != self.run:
                raise UserError(f"{self.path} line {line_number} {difference(line_run, self.run)}: {WAY_OUT}")
            if self.plans.get(record_key[1], line_plan) != line_plan:
                raise UserError(
                    f"{self.path} line {line_number}: method {record_key[1]!r} was run with another plan: {WAY_OUT}"
                )
            self.records.setdefault(record_key, record)
        if not self.records and (self.damaged or not begins(unfinished)):
            first_damaged = f"line {self.damaged[0]}" if self.damaged else "line 1"
            raise UserError(
                f"{self.path} {first_damaged} is no record with a checksum (a file of an older "
                f"version has none): {WAY_OUT}"
            )
        if self.damaged:
            damaged_lines = ", ".join(map(str, self.damaged[:8])) + (", ..." if len(self.damaged) > 8 else "")
            self._say(f"damaged: line {damaged_lines} disagrees with its checksum; what it answered is asked again")
        if unfinished:
            self._say("the last line was cut off, as when a run is killed; its question is asked again")
            with self.path.open("r+b") as file:
                file.truncate(len(file_bytes) - len(unfinished))

    def _say(self, message: str) -> None:
        print(f"{self.path}: {message}", file=sys.stderr)

    def missing(self, keys: Iterable[Key]) -> list[Key]:
        """Those of `keys` that have no record yet."""
        return [key for key in keys if key not in self.records]

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records that are not there yet, in one write."""
        new_lines = []
        for record in records:
            record_key = record["id"], record["method"]
            if record_key not in self.records:
                self.records[record_key] = record = record | {"plan": self.plans[record["method"]], "run": self.run}
                new_lines.append(sealed(record))
        if new_lines:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n".join(new_lines) + "\n")


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
        undamaged = record.pop("sum") == checksum(record) and sealed(record).encode() == line
        return (
            record
            if undamaged and all(isinstance(record[field], str) for field in ("id", "method", "run", "plan"))
            else None
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def begins(last_bytes: bytes) -> bool:
    """Could these bytes, which no line end follows, be the beginning of a line of ours?"""
    return HEAD.encode().startswith(re.sub(rb"[0-9a-f]", b"#", last_bytes[: len(HEAD)]))


def difference(old_name: str, new_name: str) -> str:
    """The first field in which two run names differ, in words."""
    old_fields, new_fields = (
        dict(pair.partition("=")[::2] for pair in run_text.split(";")) for run_text in (old_name, new_name)
    )
    for field in [*new_fields, *old_fields]:
        if old_fields.get(field) != new_fields.get(field):
            return f"comes from another run ({field} {old_fields.get(field, '?')}, now {new_fields.get(field, '?')})"
    return "comes from another run"
