"""Saves a session, and restores it or rebuilds it after a crash."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.core import UserError, to_json
from vlmfast.plan import Plan, resolve
from vlmfast.preconditions import unwrap
from vlmfast.stream import levels
from vlmfast.stream.archive import manifest
from vlmfast.stream.archive.fingerprint import fingerprint
from vlmfast.stream.archive.folder import Damaged, NoRoom, StoreError
from vlmfast.stream.archive.segments import BlockLost, Segments
from vlmfast.stream.archive.store import Store
from vlmfast.stream.intake import Intake
from vlmfast.version import __version__

SHAPED = ("window", "redundancy", "keep_as", "positions", "text_after")  # what stored blocks depend on
COPY_BYTES = 8 << 20  # of a segment, when an archive is copied


_KINDS: dict[str, tuple[type, ...]] = {
    "window": (int,), "ram": (int, float, str), "disk_limit": (int, float, str, type(None)),
    "redundancy": (int, float, type(None)), "keep_as": (str,), "positions": (str,), "text_after": (str,),
    "queue": (int,), "fps": (int, float), "flush_seconds": (int, float), "recent": (int, float, type(None)),
    "coarsen": (str, type(None)),
}  # fmt: skip


def head(model: nn.Module, config: dict[str, Any], prune: Any) -> dict[str, Any]:
    """The head of a folder's manifest: what made the stored blocks."""
    import transformers

    versions = {
        "vlmfast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    # as earlier versions read it
    known_config = {name: value for name, value in config.items() if name != "coarsen" or value is not None}
    return {"model": fingerprint(model), "versions": versions, "config": known_config, "prune": to_json(prune)}


class SavedIntake(Intake):
    """The half of `StreamSession` that takes frames, and saves itself. What it saves besides: the conversation."""

    plan: Plan
    config: dict[str, Any]
    notes: list[str]
    turns: list[tuple[str, str]]  # questions and answers
    lost_seconds: float  # of the stream, by crashes

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that `restore` needs: tensors, the window at full precision, and what JSON can hold."""
        tensors, saved = self.encoder.snapshot()
        tensors |= {f"pending.{index}": frame.contiguous() for index, (frame, _) in enumerate(self.pending)}
        return tensors, saved | {
            "pending": [seconds for _, seconds in self.pending], "last": self.newest, "gap": self.interval,
            "accepted": self.accepted, "turns": self.turns, "counts": self.counts, "dropped": self.queue.dropped,
            "evicted": self.store.evicted, "lost_seconds": self.lost_seconds, "beat": _last_beat(self.store, []),
        }  # fmt: skip

    def restore(self, tensors: dict[str, Tensor], saved: dict[str, Any]) -> None:
        """Be as when `snapshot` was taken, bit for bit. Raises KeyError, TypeError, ... for what no snapshot holds."""
        self.encoder.restore(tensors, saved)
        self.pending = [(tensors[f"pending.{index}"], seconds) for index, seconds in enumerate(saved["pending"])]
        self.newest, self.interval, self.accepted = saved["last"], saved["gap"], saved["accepted"]
        self.turns = [(asked, answered) for asked, answered in saved["turns"]]
        self.counts, self.queue.dropped = saved["counts"], saved["dropped"]
        self.store.evicted, self.lost_seconds = saved["evicted"], saved["lost_seconds"]

    def rebuild(self) -> None:
        """Go on from the stored blocks alone, as after a crash: the window is made of the newest of them."""
        store, dtype = self.store, self.vision.text.embed_tokens.weight.dtype
        stream_start = store.disk.head["stream"]  # type: ignore[union-attr]
        while store.blocks:
            blocks = list(store.blocks.values())
            try:
                first, extent = stream_start["first"], stream_start["span"]
                self.encoder.rebuild(blocks, first, extent, lambda block, layer: store.layer(block, layer, dtype))
                break
            except BlockLost:  # it is forgotten, and `lost` says so
                continue
        else:
            return
        last_block = blocks[-1]
        self.interval = (last_block.end - last_block.start) / (last_block.frames or 1)
        self.newest = self.accepted = last_block.end - self.interval
        self.counts["frames"] = sum(block.frames for block in blocks)

    def take_up(self) -> None:
        """Be as the store's folder says: the window as it was saved, or from the blocks; and what a crash lost."""
        disk, state = self.store.disk, self.store.read_state()
        assert disk is not None
        last_id, saved_beat = max(self.store.blocks) if self.store.blocks else -1, None
        if state is not None:
            try:
                if state[1]["state"]["blocks"] > last_id:
                    self.restore(*state)
                    saved_beat = state[1]["beat"]
            except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as e:
                file = disk.path / disk.state["file"]  # type: ignore[index]
                raise UserError(
                    f"{file} does not fit this session ({e}): delete it to go on from the archive"
                ) from None
        if self.encoder.progress.blocks == 0 and self.store.blocks:
            self.rebuild()
        heartbeat = _last_beat(self.store, self.store.lost)
        if heartbeat is not None:
            start = self.encoder.progress.first or 0.0
            known_seconds = [seconds for seconds in (self.accepted, saved_beat) if seconds is not None]
            self.lost_seconds += max(0.0, heartbeat - max(known_seconds, default=start))

    def save(self, path: str | os.PathLike[str] | None = None) -> None:
        """Write everything, the window at full precision, to the session's disk folder or a new one."""
        self._check_open()
        with self._lock:
            self._drain()
            self._save(path)

    def _save(self, path: str | os.PathLike[str] | None) -> None:
        disk = self.store.disk
        if path is None and disk is None:
            raise UserError("this session has no disk folder: name one, save(path)")
        if disk is not None and (path is None or Path(path).resolve() == disk.path.resolve()):
            self.settle()
            self.store.flush()
            disk.write_state(*self.snapshot())
            return
        assert path is not None
        self._copy(path)
        if len(self.queue):
            self.notes.append(f"{len(self.queue)} frames that still waited to be encoded are not in {path}")

    def _copy(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a new folder. It is a stream's when all of it is written: after an error or a crash it is
        none."""
        copy = Segments(path, None, head(self.model, self.config, self.plan.prune))
        copy.began(self.encoder.progress.first, self.encoder.first_extent)
        copy.create()
        try:
            batch: list[Any] = []
            for block in list(self.store.blocks.values()):
                try:
                    batch.append((block, self.store.whole(block.id)))
                except BlockLost:  # `lost` says so, and which others were in its segment
                    continue
                if sum(packed.nbytes() for _, packed in batch) > COPY_BYTES:
                    copy.write(batch, commit=False)
                    batch = []
            batch += self.unstored
            if batch:
                copy.write(batch, commit=False)
            copy.beat(float("-inf") if self.accepted is None else self.accepted)
            copy.write_state(*self.snapshot())
        except BaseException:
            copy.abandon()
            raise
        copy.close()

    def _finish(self) -> None:
        """Encode what waits and write everything; older blocks that are given up for it are told in `notes` and a
        warning. Raises StoreError where the disk refuses."""
        store, evicted = self.store, self.store.evicted
        try:
            self.settle()
            self._drain()
            self.settle()
            store.flush()
            self._save(None)
        except NoRoom as e:
            if store.unwritten or self.unstored:
                raise _stays_open(e) from None
            self.notes.append(f"the window was not saved: {e}")
        except StoreError as e:
            raise _stays_open(e) from None
        finally:
            if store.evicted > evicted:
                self.notes.append(
                    f"closing gave up {store.evicted - evicted} older blocks: disk_limit={store.disk_limit:,} bytes "
                    "has no room for them beside the newest"
                )
                warnings.warn(self.notes[-1], stacklevel=4)


def _last_beat(store: Store, damage: list[str]) -> float | None:
    """How far the stream had come by the heartbeat; a damaged one is added to `damage`."""
    if store.disk is None:
        return None
    try:
        return store.disk.folder.last_beat()
    except Damaged as e:
        damage.append(f"heartbeat: {e}; how much of the stream's end a crash lost cannot be told")
        return None


def _stays_open(error: StoreError) -> StoreError:
    return StoreError(f"{error}; the session stays open: close() it again then, or close(discard=True) to let it go")


def open_archive(
    path: str | os.PathLike[str], model: nn.Module, changed: dict[str, Any]
) -> tuple[Store, dict[str, Any], list[str]]:
    """The store of a saved session, the arguments for the session to come, and notes for it.

    changed: arguments that should differ. Raises UserError for those that shaped the stored blocks, and for another
    model."""
    body, _, _ = manifest.read(Path(path))
    saved = _head_of(Path(path), body)
    config = saved["config"]
    for name in changed:
        if name in SHAPED and changed[name] != config[name]:
            raise UserError(
                f"{name}={changed[name]!r}: the stored blocks were made with {name}={config[name]!r}; leave it"
            )
    plan = Plan.from_json({"prune": saved["prune"]}) if changed.get("plan") is None else resolve(changed["plan"])
    if to_json(plan.prune) != saved["prune"]:
        raise UserError(f"the stored blocks were made with prune={saved['prune']}, not {to_json(plan.prune)}: leave it")
    own_fingerprint = fingerprint(unwrap(model))
    if own_fingerprint != saved["model"]:
        differs = ", ".join(
            f"{field_name} {saved['model'].get(field_name)} -> {own_fingerprint[field_name]}"
            for field_name in own_fingerprint
            if saved["model"].get(field_name) != own_fingerprint[field_name]
        )
        raise UserError(
            f"{path} was made by another model ({differs}): load the model that encoded it, or start a new folder"
        )
    limits = {limit: changed.get(limit, config[limit]) for limit in ("ram", "disk_limit", "flush_seconds")}
    schedule = levels.parse(changed.get("coarsen", config.get("coarsen")))
    store = Store(
        limits["ram"], path, limits["disk_limit"], config["keep_as"], limits["flush_seconds"], saved, schedule
    )
    store.open()
    import transformers

    notes = []
    if saved["versions"].get("transformers") != transformers.__version__:
        notes.append(
            f"encoded with transformers {saved['versions'].get('transformers')}, running {transformers.__version__}: "
            "position rules may differ"
        )
    return store, {**config, **changed, "plan": plan}, notes


def _head_of(path: Path, body: dict[str, Any]) -> dict[str, Any]:
    """The head of a manifest, every field of the right type."""
    saved = body["head"]
    stream_start = saved.get("stream")
    config = saved.get("config")
    is_valid = all(isinstance(saved.get(part), dict) for part in ("model", "versions", "config")) and "prune" in saved
    if isinstance(config, dict):
        config = {"recent": None, "coarsen": None} | config  # older archives have none
    is_valid = is_valid and set(config) == set(_KINDS)
    is_valid = is_valid and all(isinstance(config[name], kinds) for name, kinds in _KINDS.items())
    if stream_start is not None or body["segments"]:
        is_valid = is_valid and isinstance(stream_start, dict) and set(stream_start) == {"first", "span"}
        is_valid = is_valid and isinstance(stream_start["first"], float) and isinstance(stream_start["span"], int)
    if not is_valid:
        raise UserError(f"{path} was made with settings that no session has ({saved!r:.80}): it is refused")
    return dict(saved)
