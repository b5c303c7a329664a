"""Frames into a session: pushed or watched, queued while the model is busy, encoded in chunks, archived."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmfast.core import UserError
from vlmfast.runtime.model_lock import model_lock
from vlmfast.stream.archive.folder import StoreError
from vlmfast.stream.archive.packing import Packed, pack
from vlmfast.stream.archive.store import Store
from vlmfast.stream.blocks import Block
from vlmfast.stream.encoder import Clip, Encoder
from vlmfast.stream.frame_queue import FrameQueue, Timed, as_frames, as_times
from vlmfast.stream.retrievers import External, Retriever
from vlmfast.stream.vision import VisionEncoder
from vlmfast.stream.watch import Watcher

CHUNK = 32  # temporal grids through the tower at once


class Intake:
    """The half of `StreamSession` that takes frames."""

    model: Any
    vision: VisionEncoder
    encoder: Encoder
    store: Store
    retriever: Retriever | None

    def __init__(self, fps: float, queue: int) -> None:
        self.fps, self.queue = fps, FrameQueue(queue)
        self.pending: list[Timed] = []  # frames that wait for their partner (Qwen reads two as one)
        self.last: float | None = None  # seconds of the newest frame encoded
        self.gap: float | None = None  # seconds between the last two frames
        self.counts: dict[str, Any] = {"frames": 0, "questions": 0, "encode_s": 0.0}
        self._accepted: float | None = None  # seconds of the newest frame accepted, encoded or not
        self._disk_error: StoreError | None = None
        self._waiting: list[tuple[Block, Packed]] = []  # encoded, and the store had no room: at most one chunk
        self._failed: tuple[list[Tensor], Any, int] | None = (
            None  # frames and timestamps of the last push, if it failed
        )
        self._lock = model_lock(self.model)  # one for all: a model serves one call at a time
        self._order = threading.RLock()  # held from a frame's acceptance until it is queued or being encoded
        self._watchers: list[Watcher] = []
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
        Raises UserError for bad frames or times, StoreError when the archive cannot take more: nothing stored is lost,
        and the same push may be repeated when there is room again; frames of it that were taken are not taken twice.
        """
        self._open()
        pictures = as_frames(frames)
        with self._order:
            encoding = self._lock.acquire(blocking=False)
            try:
                if encoding:
                    self._settle()
                before, known = self._accepted, self._known(pictures, timestamps)
                rest = np.ravel(timestamps)[known:] if known and timestamps is not None else timestamps
                items = self._accept(pictures[known:], rest)
                earlier = self.queue.take(len(self.queue)) if encoding else []
                if not encoding:
                    for item in items:
                        self.queue.put(item)
            except BaseException:
                if encoding:
                    self._lock.release()
                raise
        if encoding:
            try:
                self._take([*earlier, *items])
                self._report_disk()
            finally:
                self._give_back(earlier, items, before, (pictures, timestamps, known))
                self._lock.release()
        self._beat()
        return len(pictures)

    def _known(self, pictures: list[Tensor], timestamps: Any) -> int:
        """How many of these frames the stream has: those that the last push took, if it failed and this repeats it."""
        failed, self._failed = self._failed, None
        if failed is None or len(failed[0]) != len(pictures) or (failed[1] is None) != (timestamps is None):
            return 0
        if timestamps is not None and not np.array_equal(np.ravel(failed[1]), np.ravel(timestamps)):
            return 0
        return failed[2] if all(map(torch.equal, failed[0], pictures)) else 0

    def _reach(self) -> float:
        """Seconds of the newest frame that is encoded or waits for its partner."""
        return max([float("-inf") if self.last is None else self.last, *(t for _, t in self.pending)])

    def _give_back(self, earlier: list[Timed], items: list[Timed], before: float | None, pushed: Any) -> None:
        """After a push: frames that an error kept out wait in the queue again, or were never accepted."""
        reach = self._reach()
        with self._order:
            self.queue.give_back([x for x in earlier if x[1] > reach])
            left = [x for x in items if x[1] > reach]
            if left and self._accepted is not None and self._accepted > items[-1][1]:
                self.queue.give_back(left)  # others came after them meanwhile
                left = []
            elif left:
                self._accepted = before if len(left) == len(items) else items[-len(left) - 1][1]
            if left or self._disk_error is not None:
                pictures, timestamps, _ = pushed
                self._failed = pictures, timestamps, len(pictures) - len(left)

    def _accept(self, frames: Any, timestamps: Any) -> list[Timed]:
        """Checked frames with their seconds."""
        pictures = as_frames(frames)
        for picture in pictures:
            self.vision.check_size(*picture.shape[:2])
        times = as_times(timestamps, len(pictures), self._accepted, 1 / self.fps)
        if times:
            self._accepted = times[-1]
        return list(zip(pictures, times, strict=True))

    def _beat(self) -> None:
        if self.store.disk is not None and self._accepted is not None:
            self.store.disk.beat(self._accepted)

    def watch(self, source: Any, background: bool = False, drop: bool | None = None, **options: Any) -> Watcher:
        """Read a source to its end: a file, folder, URL, camera number, or an iterable of (frame, seconds).

        background: return at once and read in a thread (`.wait()`, `.stop()`; `close()` stops all of them). drop: True
        drops the oldest frames when the model is slower than the source (the default for cameras and URLs), False lets
        the source wait.
        options: those of `open_source` (sample_fps, size, realtime, ...).
        """
        self._open()
        watcher = Watcher(self, source, drop, options)
        self._watchers = [w for w in self._watchers if w.running] + [watcher]
        watcher.start()
        if not background:
            watcher.wait()
        return watcher

    def drain(self, most: int | None = None) -> int:
        """Encode frames that wait in the queue; returns how many."""
        with self._lock:
            self._settle()
            return self._drain(most)

    def _drain(self, most: int | None = None) -> int:
        """`drain` of the frames that wait when it is called; none while the disk refuses."""
        done, most = 0, len(self.queue) if most is None else most
        while done < most and len(self.queue) and self._disk_error is None and not self._closed:
            items = self.queue.take(CHUNK * self.vision.frames)
            try:
                self._take(items)
            finally:
                reach = self._reach()
                left = [x for x in items if x[1] > reach]
                self.queue.give_back(left)
            done += len(items) - len(left)
        return done

    def _take(self, items: list[Timed]) -> None:
        """Encode frames, in runs of one size, up to the first chunk that the disk does not take.

        Those that did not come so far, or that an error kept out, are neither encoded nor pending afterwards."""
        clock, before = time.perf_counter(), [t for _, t in self.pending]
        try:
            for frame, seconds in items:
                if self.pending and self.pending[-1][0].shape != frame.shape:
                    self._encode(pad=True)  # a change of size: the frame without a partner is shown twice
                if self._disk_error is not None:
                    break
                self.pending.append((frame, seconds))
                if len(self.pending) >= CHUNK * self.vision.frames:
                    self._encode()
            if self._disk_error is None:
                self._encode()
        except BaseException:
            self.pending = [x for x in self.pending if x[1] in before]
            raise
        finally:
            reach = self._reach()
            self.counts["frames"] += sum(t <= reach for _, t in items)
            self.counts["encode_s"] += time.perf_counter() - clock

    def _encode(self, pad: bool = False) -> None:
        """Encode the frames that have their partners. After an error encoder and store are as before, and the frames
        still pending."""
        size = self.vision.frames
        items = list(self.pending)
        while pad and len(items) % size:
            items.append(items[-1])
        whole = len(items) // size * size
        if not whole:
            return
        mark, last, gap = self.encoder.mark(), self.last, self.gap
        try:
            with torch.inference_mode(False), torch.no_grad(), self._lock:
                self._blocks(self._clip(items[:whole]))
        except BaseException:
            self.last, self.gap = last, gap
            self._undo(mark)
            raise
        finally:
            self.encoder.forget_mark()
        self.pending = items[whole:]
        if self.store.due() and not self._waiting:
            try:
                self.store.flush()
            except StoreError as e:
                self._disk_error = e

    def _clip(self, items: list[Timed]) -> Clip:
        times, spans = [], []
        for i in range(0, len(items), self.vision.frames):
            first, last = items[i][1], items[i + self.vision.frames - 1][1]
            for _, seconds in items[i : i + self.vision.frames]:
                if self.last is not None and seconds > self.last:
                    self.gap = seconds - self.last
                self.last = seconds
            times.append((first, last))
            spans.append(self.gap if self.gap is not None else 1 / self.fps)
        return Clip(torch.stack([f for f, _ in items]), times, spans)

    def _blocks(self, clip: Clip) -> None:
        """Encode a clip and store its blocks; those that the store has no room for wait."""
        embedded: Tensor | None = None
        if isinstance(self.retriever, External) and self.retriever.frames_to is not None:
            embedded = self.retriever.frames_to(clip.frames[:: self.vision.frames])
        for n, (block, payload) in enumerate(self.encoder.encode(clip)):
            if self.store.disk is not None:
                self.store.disk.head["stream"] = {"first": self.encoder.state.first, "span": self.encoder.span}
            embedding = None if embedded is None else embedded[n]
            packed = pack(payload.keys, payload.values, payload.rep, self.store.fmt, embedding)
            if not self._waiting:
                try:
                    self.store.insert(block, packed)
                    continue
                except StoreError as e:
                    self._disk_error = e
            self._waiting.append((block, packed))

    def _undo(self, mark: Any) -> None:
        """Take back the blocks of a chunk that failed."""
        first, evicted = mark.state.blocks, self.store.evicted
        self._waiting = [x for x in self._waiting if x[0].id < first]
        if not self._waiting:
            self._disk_error = None
        self.encoder.reset(mark)
        made = [i for i in self.store.blocks if i >= first]
        try:
            self.store.remove(made)
            self.store.evicted = evicted
        except StoreError as e:  # written already, and the disk refuses to take them back
            self._closed = True
            self.store.close()
            raise UserError(f"this session cannot go on: load what is stored. {e}") from None

    def flush(self) -> None:
        """Encode what waits, a frame without a partner included (shown twice), and write everything to disk."""
        with self._lock:
            self._settle()
            self._drain()
            if self._disk_error is None:
                self._encode(pad=True)
            self._settle()
            self.store.flush()

    def _settle(self) -> None:
        """After a failed write: store and write again before more is taken, so that a broken disk loses nothing."""
        with torch.inference_mode(False):
            while self._waiting:
                block, packed = self._waiting[0]
                if block.id not in self.store.blocks:
                    self.store.insert(block, packed)
                del self._waiting[0]
        if self._disk_error is not None:
            self.store.flush()
            self._disk_error = None

    def _report_disk(self) -> None:
        if self._disk_error is not None:
            raise self._disk_error
