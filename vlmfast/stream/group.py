"""`StreamGroup`: several streams over one model, which is loaded once and takes turns between them.

with StreamGroup(model, processor, ram="8GiB") as group:
    door, yard = group.open(disk="door"), group.open(disk="yard")
    door.watch("rtsp://...", background=True)
    yard.watch("rtsp://...", background=True)
    print(door.ask("who came in?").text)
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.core import UserError, parse_bytes
from vlmfast.plan import Plan
from vlmfast.runtime.model_lock import model_lock
from vlmfast.stream.changed_grids import ChangedGrids, encoded_together
from vlmfast.stream.intake import CHUNK
from vlmfast.stream.session import StreamSession


class StreamGroup:
    """Sessions over one model.

    Frames that `watch` has waiting in several streams go through the vision tower in one call, an equal share of each,
    so that a stream with many frames does not keep the others waiting; what is stored is what each stream alone would
    store, up to rounding. A question waits for the call of the model that is running, and is answered before the next.

    ram: most bytes of all archives in memory together. A session that names its own `ram` has that; the others share
    the rest equally, anew whenever one is opened or closed. plan, options: of every session; `open` may change options.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        plan: Plan | str | Path | dict | None = None,
        *,
        ram: int | str = "2GiB",
        **options: Any,
    ) -> None:
        limit = parse_bytes("ram", ram)
        if limit is None:
            raise UserError('ram=None: a group needs a limit for all of its streams, e.g. ram="8GiB"')
        self.model, self.processor, self.plan, self.ram, self.options = model, processor, plan, limit, options
        self._sessions: dict[StreamSession, int | None] = {}  # in the order of turns -> its own ram
        self._failed: set[StreamSession] = set()  # whose frames raised an error in another stream's turn

    @property
    def sessions(self) -> list[StreamSession]:
        """Those that are open, whose turn is next first."""
        return [session for session in list(self._sessions) if not session.closed]

    def open(self, **options: Any) -> StreamSession:
        """A new session with the group's model and options. options: as of `StreamSession`, in place of the group's."""
        given = self.options | options
        own = parse_bytes("ram", given.pop("ram", None))
        ram = self._room(own)
        return self._joined(StreamSession(self.model, self.processor, self.plan, ram=ram, **given), own)

    def load(self, path: str | os.PathLike[str], **changed: Any) -> StreamSession:
        """Take up a saved session, see `StreamSession.load`. Its `ram` is the group's to give, unless named here."""
        own = parse_bytes("ram", changed.pop("ram", None))
        ram = self._room(own)
        return self._joined(StreamSession.load(path, self.model, self.processor, ram=ram, **changed), own)

    def _room(self, own: int | None) -> int:
        """Bytes for one session more: its own, or an equal share of what is not named. Raises UserError."""
        named = [ram for session, ram in self._sessions.items() if ram is not None and not session.closed]
        sharing = sum(ram is None for session, ram in self._sessions.items() if not session.closed) + (own is None)
        left = self.ram - sum(named) - (own or 0)
        if left < 0 or (sharing and left < sharing):
            raise UserError(
                f"{sum(named) + (own or 0):,} bytes of the group's ram={self.ram:,} are named by its streams: nothing "
                "is left for another; raise ram= of the group, or name less for each"
            )
        return own if own is not None else left // sharing

    def _joined(self, session: StreamSession, own: int | None) -> StreamSession:
        session.encode_waiting = lambda most: self.encode(session)
        with model_lock(self.model):
            self._sessions[session] = own
            self._share()
        return session

    def _share(self) -> None:
        """Give every session without a `ram` of its own an equal part of the rest, and forget those that are closed."""
        with model_lock(self.model):
            self._sessions = {s: own for s, own in self._sessions.items() if not s.closed}
            self._failed &= self._sessions.keys()
            sharing = [s for s, own in self._sessions.items() if own is None]
            rest = self.ram - sum(own for own in self._sessions.values() if own is not None)
            for session in sharing:
                session.store.ram = rest // len(sharing)  # a smaller one takes effect with the next block

    def encode(self, caller: StreamSession | None = None) -> int:
        """Encode an equal share of the frames that wait in every stream; returns how many.

        caller: the session whose error alone is raised. The frames of another one that fails wait in its queue as
        before, and its own turn raises the error again. Without a caller the first error is raised, after all had
        their turn.
        """
        with model_lock(self.model):
            if any(session.closed for session in self._sessions):
                self._share()
            resting = set() if caller is None else self._failed - {caller}
            turn = [s for s in self._sessions if s is caller or (len(s.queue) and s not in resting)]
            for session in turn[:1]:  # comes last next time
                self._sessions[session] = self._sessions.pop(session)
            share = max(1, CHUNK // max(1, len(turn)))
            self._together(turn, share)
        done, errors = 0, list[Exception]()
        for session in turn:
            try:
                done += session.drain(share * session.vision.frames_per_grid)
                self._failed.discard(session)
            except Exception as error:
                self._failed.add(session)
                if caller in (None, session):
                    errors.append(error)
        if errors:
            raise errors[0]
        return done

    def _together(self, turn: list[StreamSession], share: int) -> None:
        """One tower call for what changed in all streams whose frames have one size. Features that are not asked for
        after all, since frames were dropped meanwhile, are not used."""
        alike: dict[Any, list[tuple[ChangedGrids, Tensor]]] = {}
        for session in turn:
            tower, size = session.encoder.tower, session.vision.frames_per_grid
            frames = [frame for frame, _ in [*session.pending, *session.queue.next(share * size)]]
            frames = frames[: len(frames) // size * size]
            if not frames or tower.ahead is not None or any(frame.shape != frames[0].shape for frame in frames):
                continue  # nothing whole, about to be encoded by another thread, or of two sizes
            kind = frames[0].shape, frames[0].device, tower.window_side
            alike.setdefault(kind, []).append((tower, torch.stack(frames)))
        for streams in alike.values():
            if len(streams) < 2:
                continue
            with torch.inference_mode(False), torch.no_grad(), turn[0].fresh_lengths():
                made = encoded_together(*zip(*streams, strict=True))
            for (tower, _), of_stream in zip(streams, made, strict=True):
                tower.ahead = of_stream

    def stats(self) -> dict[str, Any]:
        """Open streams, frames that wait in them, and bytes of all together."""
        every = [session.stats() for session in self.sessions]
        keys = ("queue", "dropped_frames", "frames", "blocks", "kv_fast_bytes", "kv_host_bytes", "kv_disk_bytes")
        return {"streams": len(every), "ram": self.ram} | {key: sum(of[key] for of in every) for key in keys}

    def close(self) -> None:
        """Close every session; raises the first error after all were tried."""
        errors: list[Exception] = []
        for session in self.sessions:
            try:
                session.close()
            except Exception as error:
                errors.append(error)
        self._sessions = {s: own for s, own in self._sessions.items() if not s.closed}
        if errors:
            raise errors[0]

    def __enter__(self) -> StreamGroup:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self.close()
        except Exception as e:
            if error is None:
                raise
            error.add_note(f"and a stream could not be closed: {e}")
