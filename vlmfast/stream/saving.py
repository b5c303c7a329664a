"""Saving a session and taking it up again, also after a crash."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmfast.core import UserError, to_json
from vlmfast.plan import Plan, resolve
from vlmfast.preconditions import unwrap
from vlmfast.stream.blocks import Block
from vlmfast.stream.encode import State
from vlmfast.stream.segments import Segments, read_index
from vlmfast.stream.store import Store

if TYPE_CHECKING:
    from vlmfast.stream.session import StreamSession

SHAPED = ("window", "redundancy", "keep_as", "positions", "text_after")  # what stored blocks depend on


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What tells one model from another: type, sizes, dtype, and a digest of a few weights of every text layer."""
    text = model.config.get_text_config()  # type: ignore[union-attr,operator]
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            digest.update(p.detach().reshape(-1)[:256].float().cpu().numpy().tobytes())
    return {
        "model_type": model.config.model_type,  # type: ignore[union-attr]
        "hidden_size": text.hidden_size, "layers": text.num_hidden_layers, "heads": text.num_key_value_heads,
        "dtype": str(next(model.parameters()).dtype), "weights": digest.hexdigest()[:16],
    }  # fmt: skip


def head(model: nn.Module, config: dict[str, Any], prune: Any) -> dict[str, Any]:
    """The head of a folder's index."""
    import transformers

    import vlmfast

    versions = {
        "vlmfast": vlmfast.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {"model": fingerprint(model), "versions": versions, "config": config, "prune": to_json(prune)}


def save(session: StreamSession, path: str | os.PathLike[str] | None) -> None:
    """Flush and write the state to the session's own folder, or copy everything to a new one."""
    store = session.store
    here = store.disk is not None and (path is None or Path(path).resolve() == store.disk.path.resolve())
    if path is None and store.disk is None:
        raise UserError("this session has no disk folder: name one, save(path)")
    tensors, meta = _state(session)
    if here:
        store.save_state(tensors, meta)
        return
    assert path is not None
    copy = Segments(path, None, head(session.model, session.config, session.plan.prune))
    copy.head["stream"] = {"first": session.encoder.state.first, "span": session.encoder.span}
    copy.create()
    batch: list[Any] = []
    for block in store.blocks.values():
        batch.append((block, store.whole(block.id)))
        batch[-1][1].rep = torch.stack([store.reps.rep(block.id, i) for i in range(len(store.reps.slabs[0]))])
        if sum(p.nbytes() for _, p in batch) > (8 << 20):
            copy.write(batch)
            batch = []
    if batch:
        copy.write(batch)
    copy.write_state(tensors, meta)
    if session.last is not None:
        copy.beat(session.last)


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
        "lost_seconds": session.lost_seconds,
    }  # fmt: skip
    return tensors, meta


def load(
    cls: type[StreamSession],
    path: str | os.PathLike[str],
    model: nn.Module,
    processor: Any,
    changed: dict[str, Any],
) -> StreamSession:
    """See `StreamSession.load`."""
    index = read_index(Path(path))
    saved = index["head"]
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
    session = cls(model, processor, **{**config, **changed, "plan": plan}, _store=store)  # type: ignore[arg-type]
    found = store.disk.read_state() if store.disk is not None else None
    last = max(store.blocks) if store.blocks else -1
    if found is not None and found[1]["state"]["blocks"] > last:
        _restore(session, *found)
    elif store.blocks:
        _rebuild(session)
    assert store.disk is not None
    store.lost = list(store.disk.skipped)
    beat, held = store.disk.last_beat(), session._accepted
    if beat is not None:
        start = session.encoder.state.first or 0.0
        session.lost_seconds += max(0.0, beat - (held if held is not None else start))
    import transformers

    if saved["versions"]["transformers"] != transformers.__version__:
        session.notes.append(
            f"encoded with transformers {saved['versions']['transformers']}, running {transformers.__version__}: "
            "position rules may differ"
        )
    return session


def _restore(session: StreamSession, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """The window as it was, bit for bit."""
    encoder = session.encoder
    encoder.state = State(**meta["state"])
    encoder.size = tuple(meta["size"]) if meta["size"] else None  # type: ignore[assignment]
    encoder.span = meta["span"]
    if "last" in tensors:
        encoder.last = tensors["last"].to(session.eyes.device)
    encoder.standing.restore(tensors, session.eyes.device)
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
    blocks = list(store.blocks.values())
    room = encoder.window - encoder._segment
    resident: list[Block] = []
    for block in reversed(blocks):
        room -= block.n
        if room < 0:
            break
        resident.insert(0, block)
    last, state, began = blocks[-1], encoder.state, store.disk.head["stream"]  # type: ignore[union-attr]
    state.blocks, state.first, encoder.span = last.id + 1, began["first"], began["span"]
    if not encoder.layout.timed:
        state.cursor = last.origin[0] + last.advance[0]
    state.shift = [a - b for a, b in zip(resident[0].origin, encoder.origin, strict=True)] if resident else []
    layers = range(len(encoder.cache.layers))
    dtype = session.eyes.text.embed_tokens.weight.dtype
    per = [[store.layer(b.id, i, dtype) for b in resident] for i in layers]
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
                torch.empty(shape, dtype=raw.dtype, device=session.eyes.device) for _ in range(3)
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
