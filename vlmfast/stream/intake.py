"""Frames into a session: pushed or watched, queued while the model is busy, encoded in chunks, archived."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from vlmfast.core import UserError
from vlmfast.runtime.model_lock import model_lock
from vlmfast.runtime.video import Eyes
from vlmfast.stream.encode import Clip, Encoder
from vlmfast.stream.feed import Queue, Timed, as_frames, as_times
from vlmfast.stream.retrieve import External, Retriever
from vlmfast.stream.segments import StoreError
from vlmfast.stream.store import Store
from vlmfast.stream.watch import Watcher

CHUNK = 32  # temporal grids through the tower at once


class Intake:
    """The half of `StreamSession` that takes frames."""

    model: Any
    eyes: Eyes
    encoder: Encoder
    store: Store
    retriever: Retriever | None

    def __init__(self, fps: float, queue: int) -> None:
        self.fps, self.queue = fps, Queue(queue)
        self.pending: list[Timed] = []  # frames that wait for their partner (Qwen reads two as one)
        self.last: float | None = None  # seconds of the newest frame encoded
        self.gap: float | None = None  # seconds between the last two frames
        self.counts: dict[str, Any] = {"frames": 0, "questions": 0, "encode_s": 0.0}
        self._accepted: float | None = None  # seconds of the newest frame accepted, encoded or not
        self._disk_error: StoreError | None = None
        self._lock = model_lock(self.model)  # one for all: a model serves one call at a time
        self._watcher: Watcher | None = None
        self._closed = False

    def _open(self) -> None:
        if self._closed:
            raise UserError(
                "this session is closed: StreamSession.load(path, ...) continues one that has a disk folder"
            )

    def push(self, frames: Any, timestamps: Any = None) -> int:
        """Take frames, uint8 RGB (T, H, W, 3), with seconds that increase; returns how many were taken.

        Encodes at once, unless an answer is being generated in another thread: then they wait in the queue, the oldest
        unencoded ones are dropped (and counted) when it is full, and they are encoded with the next push or question.
        Raises UserError for bad frames or times, StoreError when the archive cannot take more: nothing stored is lost.
        """
        self._open()
        items = self._accept(frames, timestamps)
        if self._lock.acquire(blocking=False):
            try:
                self._retry_disk()
                self._drain()
                self._take(items)
            finally:
                self._lock.release()
            self._report_disk()
        else:
            for item in items:
                self.queue.put(item)
        if self.store.disk is not None and self._accepted is not None:
            self.store.disk.beat(self._accepted)
        return len(items)

    def _accept(self, frames: Any, timestamps: Any) -> list[Timed]:
        """Checked frames with their seconds."""
        pictures = as_frames(frames)
        for picture in pictures:
            self.eyes.check_size(*picture.shape[:2])
        times = as_times(timestamps, len(pictures), self._accepted, 1 / self.fps)
        if times:
            self._accepted = times[-1]
        return list(zip(pictures, times, strict=True))

    def watch(self, source: Any, background: bool = False, drop: bool | None = None, **options: Any) -> Watcher:
        """Read a source to its end: a file, folder, URL, camera number, or an iterable of (frame, seconds).

        background: return at once and read in a thread (`.wait()`, `.stop()`). drop: True drops the oldest frames when
        the model is slower than the source (the default for cameras and URLs), False lets the source wait.
        options: those of `open_source` (sample_fps, size, realtime, ...).
        """
        self._open()
        self._watcher = Watcher(self, source, drop, options)
        self._watcher.start()
        if not background:
            self._watcher.wait()
        return self._watcher

    def drain(self, most: int | None = None) -> int:
        """Encode frames that wait in the queue; returns how many."""
        with self._lock:
            self._retry_disk()
            return self._drain(most)

    def _drain(self, most: int | None = None) -> int:
        done = 0
        while len(self.queue) and (most is None or done < most):
            items = self.queue.take(CHUNK * self.eyes.frames)
            self._take(items)
            done += len(items)
        return done

    def _take(self, items: list[Timed]) -> None:
        """Encode frames, in runs of one size."""
        clock = time.perf_counter()
        for frame, seconds in items:
            if self.pending and self.pending[-1][0].shape != frame.shape:
                self._encode(pad=True)  # a change of size: the frame without a partner is shown twice
            self.pending.append((frame, seconds))
            if len(self.pending) >= CHUNK * self.eyes.frames:
                self._encode()
        self._encode()
        self.counts["frames"] += len(items)
        self.counts["encode_s"] += time.perf_counter() - clock

    def _encode(self, pad: bool = False) -> None:
        size = self.eyes.frames
        while pad and len(self.pending) % size:
            self.pending.append(self.pending[-1])
        whole = len(self.pending) // size * size
        if not whole:
            return
        items, self.pending = self.pending[:whole], self.pending[whole:]
        times, spans = [], []
        for i in range(0, whole, size):
            first, last = items[i][1], items[i + size - 1][1]
            for _, seconds in items[i : i + size]:
                if self.last is not None and seconds > self.last:
                    self.gap = seconds - self.last
                self.last = seconds
            times.append((first, last))
            spans.append(self.gap if self.gap is not None else 1 / self.fps)
        clip = Clip(torch.stack([f for f, _ in items]), times, spans)
        embedded: Tensor | None = None
        if isinstance(self.retriever, External) and self.retriever.frames_to is not None:
            embedded = self.retriever.frames_to(clip.frames[::size])
        with self._lock:
            for n, (block, payload) in enumerate(self.encoder.encode(clip)):
                payload.embedding = None if embedded is None else embedded[n]
                self.store.add(block, payload)
        if self.store.disk is not None:
            state = self.encoder.state
            self.store.disk.head["stream"] = {"first": state.first, "span": self.encoder.span}
        if self.store.due():
            try:
                self.store.flush()
            except StoreError as e:
                self._disk_error = e

    def flush(self) -> None:
        """Encode what waits, a frame without a partner included (shown twice), and write everything to disk."""
        with self._lock:
            self._drain()
            self._encode(pad=True)
            self.store.flush()
            self._disk_error = None

    def _retry_disk(self) -> None:
        """After a failed write: write again before more is taken, so that a broken disk loses nothing."""
        if self._disk_error is not None:
            self.store.flush()
            self._disk_error = None

    def _report_disk(self) -> None:
        if self._disk_error is not None:
            raise self._disk_error
