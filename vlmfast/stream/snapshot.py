"""Saving a session and taking it up again, also after a crash."""

from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmfast.core import UserError, to_json
from vlmfast.plan import Plan, resolve
from vlmfast.preconditions import unwrap
from vlmfast.stream.archive import manifest
from vlmfast.stream.archive.fingerprint import fingerprint
from vlmfast.stream.archive.folder import Damaged, NoRoom, StoreError
from vlmfast.stream.archive.segments import BlockLost, Segments
from vlmfast.stream.archive.store import Store
from vlmfast.stream.blocks import Block
from vlmfast.stream.encoder import State

if TYPE_CHECKING:
    from vlmfast.stream.session import StreamSession

SHAPED = ("window", "redundancy", "keep_as", "positions", "text_after")  # what stored blocks depend on


_KINDS: dict[str, tuple[type, ...]] = {
    "window": (int,), "ram": (int, float, str), "disk_limit": (int, float, str, type(None)),
    "redundancy": (int, float, type(None)), "keep_as": (str,), "positions": (str,), "text_after": (str,),
    "queue": (int,), "fps": (int, float), "flush_seconds": (int, float),
}  # fmt: skip


def head(model: nn.Module, config: dict[str, Any], prune: Any) -> dict[str, Any]:
    """The head of a folder's manifest."""
    import transformers

    import vlmfast

    versions = {
        "vlmfast": vlmfast.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {"model": fingerprint(model), "versions": versions, "config": config, "prune": to_json(prune)}


def save(session: StreamSession, path: str | os.PathLike[str] | None) -> None:
    """Flush and write the state to the session's own folder, or copy everything to a new one.

    The new folder is a stream's when all of it is written: after an error or a crash it is none."""
    store = session.store
    here = store.disk is not None and (path is None or Path(path).resolve() == store.disk.path.resolve())
    if path is None and store.disk is None:
        raise UserError("this session has no disk folder: name one, save(path)")
    if here:
        session._settle()
        store.flush()
        store.save_state(*_state(session))
        return
    assert path is not None
    copy = Segments(path, None, head(session.model, session.config, session.plan.prune))
    copy.head["stream"] = {"first": session.encoder.state.first, "span": session.encoder.span}
    copy.create()
    try:
        batch: list[Any] = []
        for block in list(store.blocks.values()):
            try:
                batch.append((block, store.whole(block.id)))
            except BlockLost:  # `lost` says so, and which others were in its segment
                continue
            if sum(p.nbytes() for _, p in batch) > (8 << 20):
                copy.write(batch, commit=False)
                batch = []
        batch += session._waiting
        if batch:
            copy.write(batch, commit=False)
        copy.beat(float("-inf") if session._accepted is None else session._accepted)
        copy.write_state(*_state(session))
    except BaseException:
        copy.abandon()
        raise
    copy.close()
    if len(session.queue):
        session.notes.append(f"{len(session.queue)} frames that still waited to be encoded are not in {path}")


def finish(session: StreamSession) -> None:
    """Encode what waits and write everything; older blocks that are given up for it are told in `notes` and a warning.

    Raises StoreError where the disk refuses."""
    store, evicted = session.store, session.store.evicted
    try:
        session._settle()
        session._drain()
        session._settle()
        store.flush()
        save(session, None)
    except NoRoom as e:
        if store.dirty or session._waiting:
            raise _stays_open(e) from None
        session.notes.append(f"the window was not saved: {e}")
    except StoreError as e:
        raise _stays_open(e) from None
    finally:
        if store.evicted > evicted:
            session.notes.append(
                f"closing gave up {store.evicted - evicted} older blocks: disk_limit={store.disk_limit:,} bytes has no "
                "room for them beside the newest"
            )
            warnings.warn(session.notes[-1], stacklevel=4)


def _stays_open(error: StoreError) -> StoreError:
    return StoreError(f"{error}; the session stays open: close() it again then, or close(discard=True) to let it go")


def _state(session: StreamSession) -> tuple[dict[str, Tensor], dict[str, Any]]:
    encoder = session.encoder
    n = encoder.cache.layers[0].n
    tensors = {
        "raw": torch.stack([layer.raw[:, :n] for layer in encoder.cache.layers]).cpu().contiguous(),
        "val": torch.stack([layer.val[:, :n] for layer in encoder.cache.layers]).cpu().contiguous(),
    }
    if encoder.last is not None:
        tensors["last"] = encoder.last.cpu().contiguous()
    tensors |= encoder.standing.state()
    for i, (frame, _) in enumerate(session.pending):
        tensors[f"pending.{i}"] = frame.contiguous()
    meta = {
        "state": dataclasses.asdict(encoder.state), "size": encoder.size, "span": encoder.span,
        "resident": [b.json() for b in encoder.resident], "pending": [t for _, t in session.pending],
        "last": session.last, "gap": session.gap, "accepted": session._accepted, "turns": session.turns,
        "counts": session.counts, "dropped": session.queue.dropped, "evicted": session.store.evicted,
        "lost_seconds": session.lost_seconds, "beat": _beat(session.store, []),
    }  # fmt: skip
    return tensors, meta


def _beat(store: Store, damage: list[str]) -> float | None:
    """How far the stream had come by the heartbeat; a damaged one is added to `damage`."""
    if store.disk is None:
        return None
    try:
        return store.disk.folder.last_beat()
    except Damaged as e:
        damage.append(f"heartbeat: {e}; how much of the stream's end a crash lost cannot be told")
        return None


@torch.inference_mode(False)
@torch.no_grad()
def load(
    cls: type[StreamSession],
    path: str | os.PathLike[str],
    model: nn.Module,
    processor: Any,
    changed: dict[str, Any],
) -> StreamSession:
    """See `StreamSession.load`."""
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
    mine = fingerprint(unwrap(model))
    if mine != saved["model"]:
        differs = ", ".join(
            f"{k} {saved['model'].get(k)} -> {mine[k]}" for k in mine if saved["model"].get(k) != mine[k]
        )
        raise UserError(
            f"{path} was made by another model ({differs}): load the model that encoded it, or start a new folder"
        )
    limits = {k: changed.get(k, config[k]) for k in ("ram", "disk_limit", "flush_seconds")}
    store = Store(limits["ram"], path, limits["disk_limit"], config["keep_as"], limits["flush_seconds"], saved).open()
    try:
        session = cls(model, processor, **{**config, **changed, "plan": plan}, _store=store)  # type: ignore[arg-type]
        _take_up(session)
    except BaseException:
        store.close()
        raise
    import transformers

    if saved["versions"].get("transformers") != transformers.__version__:
        session.notes.append(
            f"encoded with transformers {saved['versions'].get('transformers')}, running {transformers.__version__}: "
            "position rules may differ"
        )
    return session


def _head_of(path: Path, body: dict[str, Any]) -> dict[str, Any]:
    """The head of a manifest, every field of the right type."""
    saved = body["head"]
    began = saved.get("stream")
    config = saved.get("config")
    right = all(isinstance(saved.get(k), dict) for k in ("model", "versions", "config")) and "prune" in saved
    right = right and set(config) == set(_KINDS) and all(isinstance(config[k], kinds) for k, kinds in _KINDS.items())
    if began is not None or body["segments"]:
        right = right and isinstance(began, dict) and set(began) == {"first", "span"}
        right = right and isinstance(began["first"], float) and isinstance(began["span"], int)
    if not right:
        raise UserError(f"{path} was made with settings that no session has ({saved!r:.80}): it is refused")
    return dict(saved)


def _take_up(session: StreamSession) -> None:
    """The window as it was saved, or from the archive; and what a crash lost."""
    store = session.store
    assert store.disk is not None
    known = len(store.disk.skipped)
    found = store.disk.read_state()
    store.lost += store.disk.skipped[known:]
    last, beaten = max(store.blocks) if store.blocks else -1, None
    if found is not None:
        try:
            if found[1]["state"]["blocks"] > last:
                _restore(session, *found)
                beaten = found[1]["beat"]
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as e:
            file = store.disk.path / store.disk.state["file"]  # type: ignore[index]
            raise UserError(f"{file} does not fit this session ({e}): delete it to go on from the archive") from None
    if session.encoder.state.blocks == 0 and store.blocks:
        _rebuild(session)
    beat = _beat(store, store.lost)
    if beat is not None:
        start = session.encoder.state.first or 0.0
        held = [x for x in (session._accepted, beaten) if x is not None]
        session.lost_seconds += max(0.0, beat - max(held, default=start))


def _restore(session: StreamSession, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """The window as it was, bit for bit."""
    encoder = session.encoder
    encoder.state = State(**meta["state"])
    encoder.size = tuple(meta["size"]) if meta["size"] else None  # type: ignore[assignment]
    encoder.span = meta["span"]
    if "last" in tensors:
        encoder.last = tensors["last"].to(session.vision.device)
    encoder.standing.restore(tensors, session.vision.device)
    blocks = [Block.from_json(b) for b in meta["resident"]]
    _fill(session, blocks, tensors["raw"][:, :, encoder.base :], tensors["val"][:, :, encoder.base :])
    session.pending = [(tensors[f"pending.{i}"], t) for i, t in enumerate(meta["pending"])]
    session.last, session.gap, session._accepted = meta["last"], meta["gap"], meta["accepted"]
    session.turns = [(q, a) for q, a in meta["turns"]]
    session.counts, session.queue.dropped = meta["counts"], meta["dropped"]
    session.store.evicted, session.lost_seconds = meta["evicted"], meta["lost_seconds"]


def _rebuild(session: StreamSession) -> None:
    """After a crash: the window from the newest blocks of the archive; the next frame is taken whole."""
    encoder, store = session.encoder, session.store
    dtype = session.vision.text.embed_tokens.weight.dtype
    while store.blocks:
        blocks = list(store.blocks.values())
        room = encoder.window - encoder._segment
        resident: list[Block] = []
        for block in reversed(blocks):
            room -= block.n
            if room < 0:
                break
            resident.insert(0, block)
        try:
            per = [[store.layer(b.id, i, dtype) for b in resident] for i in range(len(encoder.cache.layers))]
            break
        except BlockLost:  # it is forgotten, and `lost` says so
            continue
    else:
        return
    last, state, began = blocks[-1], encoder.state, store.disk.head["stream"]  # type: ignore[union-attr]
    state.blocks, state.first, encoder.span = last.id + 1, began["first"], began["span"]
    if not encoder.layout.timed:
        state.cursor = last.origin[0] + last.advance[0]
    state.shift = [a - b for a, b in zip(resident[0].origin, encoder.origin, strict=True)] if resident else []
    if resident:
        raw = torch.stack([torch.cat([k for k, _ in row], 1) for row in per])
        val = torch.stack([torch.cat([v for _, v in row], 1) for row in per])
        _fill(session, resident, raw, val)
    session.last = session._accepted = last.end - (last.end - last.start) / (last.frames or 1)
    session.gap = (last.end - last.start) / (last.frames or 1)
    session.counts["frames"] = sum(b.frames for b in blocks)


def _fill(session: StreamSession, blocks: list[Block], raw: Tensor, val: Tensor) -> None:
    """Put blocks behind the init tokens: raw, val (L, Hk, n, Dh)."""
    encoder = session.encoder
    encoder.resident = blocks
    if not blocks:
        return
    cache, base, n = encoder.cache, encoder.base, raw.shape[2]
    for i, layer in enumerate(cache.layers):
        if not layer.is_initialized:
            shape = (raw.shape[1], cache.capacity, raw.shape[3])
            layer.raw, layer.rot, layer.val = (
                torch.empty(shape, dtype=raw.dtype, device=session.vision.device) for _ in range(3)
            )
            layer.is_initialized = True
        layer.raw[:, base : base + n] = raw[i].to(layer.raw)
        layer.val[:, base : base + n] = val[i].to(layer.val)
        layer.n = base + n
    axes = encoder.layout.axes
    init = torch.arange(base).expand(axes, -1)
    cache.slide(base + n, base + n, torch.cat([init, *(encoder._at(b) for b in blocks)], 1))
    encoder._index()


__all__ = ["fingerprint", "head", "load", "save"]
