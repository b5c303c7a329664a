"""Reading a source in a thread of its own, so that neither encoding nor answering makes a camera wait."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vlmfast.core import UserError
from vlmfast.stream.frame_queue import as_frames

if TYPE_CHECKING:
    from vlmfast.stream.intake import Intake


class Watcher:
    """One source being watched. `error` holds what ended it early."""

    def __init__(self, session: Intake, source: Any, drop: bool | None, options: dict[str, Any]) -> None:
        self.session = session
        live = isinstance(source, int) or (isinstance(source, str) and "://" in source)
        self.drop = drop if drop is not None else live or bool(options.get("realtime"))
        self.frames: Iterable[Any] = self._frames(source, options)
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._read = threading.Event()  # the reader has come to the end
        self._reader = threading.Thread(target=self._reading, daemon=True)
        self._encoder = threading.Thread(target=self._encoding, daemon=True)

    @staticmethod
    def _frames(source: Any, options: dict[str, Any]) -> Iterable[Any]:
        from vlmfast.video.live_source import open_source

        if isinstance(source, (str, int)) or hasattr(source, "__fspath__"):
            return open_source(source, **options)
        if options:
            raise UserError(f"{', '.join(options)}: options are for files, cameras and URLs; frames came in ready")
        return iter(source)

    def start(self) -> None:
        self._reader.start()
        self._encoder.start()

    def _reading(self) -> None:
        session = self.session
        offset: float | None = None
        try:
            for frame, seconds in self.frames:
                if self._stop.is_set():
                    break
                pictures = as_frames(frame)
                while not self._stop.is_set():
                    with session._order:  # accepted and queued at once: no other frame comes in between
                        if self.drop or session.queue.room():
                            if offset is None:  # a second source goes on where the first one ended
                                now = session._accepted
                                offset = 0.0 if now is None else now + 1 / session.fps - float(seconds)
                            for item in session._accept(pictures, [float(seconds) + offset]):
                                session.queue.put(item)
                            break
                    session.queue.wait_for_room(0.1)
        except BaseException as e:
            self.error = e
        finally:
            close = getattr(self.frames, "close", None)
            if close is not None:
                close()
            self._read.set()

    def _encoding(self) -> None:
        session = self.session
        try:
            while not (self._read.is_set() and not len(session.queue)):
                if self._stop.is_set():
                    return
                session.queue.wait(0.05)
                session.drain(64)
                self._stop.wait(0.001)  # lets a question, or another call of the model, have its turn
                session._beat()
        except BaseException as e:
            self.error = self.error or e
            self._stop.set()

    @property
    def running(self) -> bool:
        return self._encoder.is_alive() or self._reader.is_alive()

    def wait(self, seconds: float | None = None) -> bool:
        """Until the source has ended and its frames are encoded (or so long); False when it still runs.

        Raises what ended the source early.
        """
        self._encoder.join(seconds)
        if not self._encoder.is_alive() and self.error is not None:
            error, self.error = self.error, None
            raise error
        return not self._encoder.is_alive()

    def stop(self) -> None:
        """End watching; frames in the queue are encoded with the next push or question."""
        self._stop.set()
        for thread in (self._reader, self._encoder):
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(5)
