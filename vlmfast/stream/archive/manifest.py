"""The manifest of an archive: which segments it consists of. Two copies, each with a generation and a checksum.

A change is written to the first, then to the second, and only then what it no longer names is deleted: one of the two
is always whole, and what it names is there.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vlmfast.core import UserError
from vlmfast.stream.archive.folder import MANIFESTS, SEGMENT, STATE, Damaged, read_regular

FORMAT = 2
MOST_MANIFEST = 256 << 20  # bytes
MOST_FILE = 64 << 30  # bytes of one segment or state


def dump(body: dict[str, Any]) -> bytes:
    """The bytes of a manifest."""
    text = json.dumps({"format": FORMAT, "body": body})
    return json.dumps({"sha256": _sum(text), "format": FORMAT, "body": body}).encode()


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read(path: Path) -> tuple[dict[str, Any], list[str], bool]:
    """(the newest whole manifest, what was damaged, do the two agree). Raises UserError where there is none, it is of
    another format, or it names what no stream writes."""
    if not any(_there(path / name) for name in MANIFESTS):
        if _first_format(path):
            raise UserError(f"{path} is a stream of format 1, this version reads format {FORMAT}: encode it anew")
        raise UserError(f"{path} holds no stream (no {MANIFESTS[0]}): name the folder given as disk= or to save()")
    bodies: list[dict[str, Any]] = []
    damage: list[str] = []
    for name in MANIFESTS:
        try:
            bodies.append(_whole(path / name))
        except Damaged as e:
            damage.append(f"{name}: {e}")
    if not bodies:
        raise UserError(f"{path} cannot be read: {'; '.join(damage)}. Nothing was changed; restore one of them")
    newest = max(bodies, key=lambda body: body["generation"])
    if newest["generation"] == 1 and not _there(path / MANIFESTS[1]):
        return newest, [], False  # a crash in the middle of creation
    if damage:
        damage = [f"{line}; generation {newest['generation']} was read from the other one" for line in damage]
    return newest, damage, len({body["generation"] for body in bodies}) == 1 and not damage


def holds_stream(path: Path) -> bool:
    """Is there a stream of any format in this folder, whole or damaged?"""
    return _first_format(path) or any(_there(path / name) for name in MANIFESTS)


def _there(path: Path) -> bool:
    try:
        path.lstat()
    except OSError:
        return False
    return True


def _first_format(path: Path) -> bool:
    try:
        return bool(json.loads(read_regular(path / "index.json", MOST_MANIFEST)).get("format") == 1)
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _whole(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(read_regular(path, MOST_MANIFEST))
        text = json.dumps({"format": stored["format"], "body": stored["body"]})
        is_intact = stored["sha256"] == _sum(text)
    except FileNotFoundError:
        raise Damaged("it is missing") from None
    except OSError as e:
        raise Damaged(f"it cannot be read ({e.strerror})") from None
    except Damaged:
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Damaged("it is no manifest, or torn") from None
    if not is_intact:
        raise Damaged("the checksum does not match")
    if stored["format"] != FORMAT:
        raise UserError(f"{path.parent} is of format {stored['format']!r}, this version reads format {FORMAT}")
    return _checked(path, stored["body"])


def _checked(path: Path, body: Any) -> dict[str, Any]:
    """The body, every field of the right type and every name plain; a wrong one was never written by a stream."""

    def must(right: bool, what: Any) -> None:
        if not right:
            raise UserError(f"{path} says {what!r:.80}, which no stream writes: it is refused")

    must(isinstance(body, dict) and set(body) == {"generation", "number", "head", "state", "segments"}, body)
    must(_count(body["generation"]) and _count(body["number"]), [body["generation"], body["number"]])
    head, segments, state = body["head"], body["segments"], body["state"]
    must(isinstance(head, dict) and isinstance(segments, dict), head)
    for file, entry in segments.items():
        must(SEGMENT.fullmatch(file) is not None, file)
        must(_sizes(entry, {"bytes", "crc", "head", "blocks"}), entry)
        must(isinstance(entry["blocks"], list) and all(map(_count, entry["blocks"])), entry)
    ids = [block_id for entry in segments.values() for block_id in entry["blocks"]]
    must(len(ids) == len(set(ids)), "a block in two segments")
    if state is not None:
        must(_sizes(state, {"file", "bytes", "crc"}), state)
        must(isinstance(state["file"], str) and STATE.fullmatch(state["file"]) is not None, state)
    return body  # type: ignore[no-any-return]


def _sizes(entry: Any, keys: set[str]) -> bool:
    return (
        isinstance(entry, dict)
        and set(entry) == keys
        and all(_count(entry[key]) for key in keys & {"bytes", "crc", "head"})
        and entry["bytes"] <= MOST_FILE
    )


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
