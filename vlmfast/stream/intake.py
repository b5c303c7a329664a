"""Takes frames into a session: pushed or watched, queued while the model is busy, encoded in chunks, stored."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmfast.core import UserError
from vlmfast.plan import Plan
from vlmfast.runtime.fast_tower import fresh_lengths
from vlmfast.runtime.model_lock import model_lock
from vlmfast.stream.archive.folder import StoreError
from vlmfast.stream.archive.store import Store
from vlmfast.stream.blocks import Block, PackedBlock
from vlmfast.stream.encoder import Checkpoint, Encoder, GridFrames
from vlmfast.stream.frame_queue import FrameQueue, TimedFrame, Watcher, as_frames, as_times, is_live, open_frames
from vlmfast.stream.retrievers import External, Retriever
from vlmfast.stream.vision import VisionEncoder

CHUNK = 32  # temporal grids through the tower at once


class Intake:
    """The half of `StreamSession` that takes frames."""

    model: Any
    plan: Plan
    vision: VisionEncoder
    encoder: Encoder
    store: Store
    retriever: Retriever | None

    def __init__(self, fps: float, queue: int) -> None:
        self.fps, self.queue = fps, FrameQueue(queue)
        self.pending: list[TimedFrame] = []  # frames that wait for the other frame of their grid
        self.newest: float | None = None  # seconds of the newest frame encoded
        self.interval: float | None = None  # seconds between the last two frames encoded
        self.accepted: float | None = None  # seconds of the newest frame accepted, encoded or not
        self.counts: dict[str, Any] = {"frames": 0, "questions": 0, "encode_s": 0.0}
        self.unstored: list[tuple[Block, PackedBlock]] = []  # encoded, and the store had no room: at most one chunk
        self._disk_error: StoreError | None = None
        self._failed: tuple[list[Tensor], Any, int] | None = None  # a push that failed: frames, times, how many taken
        self._lock = model_lock(self.model)  # one for all: a model serves one call at a time
        self._accepting = threading.RLock()  # held from a frame's acceptance until it is queued or being encoded
        self._watchers: list[Watcher] = []
        self.encode_waiting: Callable[[int], Any] | None = None  # of a `StreamGroup`, for all of its streams
        self.closed = False

    def fresh_lengths(self) -> AbstractContextManager[None]:
        """Around forwards: every answer and every push has lengths not seen before."""
        return nullcontext() if self.plan.tower == "stock" else fresh_lengths(self.vision.device)

    def _check_open(self) -> None:
        if self.closed:
            raise UserError("this session is closed: StreamSession.load(path, ...) continues one with a disk folder")

    def push(self, frames: Any, timestamps: Any = None) -> int:
        """Take frames, uint8 RGB (T, H, W, 3), with seconds that increase; returns how many were taken.

        Encodes at once, unless an answer is being generated in another thread: then they wait in the queue, the oldest
        unencoded ones are dropped (and counted) when it is full, and they are encoded with the next push or question.
        Raises UserError for bad frames or times, StoreError when the archive cannot take more: nothing stored is lost,
        and the same push may be repeated when there is room again; frames of it that were taken are not taken twice.
        """
        self._check_open()
        checked_frames = as_frames(frames)
        with self._accepting:
            encoding = self._lock.acquire(blocking=False)
            try:
                if encoding:
                    self.settle()
                accepted_before, num_known = self.accepted, self._known(checked_frames, timestamps)
                new_seconds = np.ravel(timestamps)[num_known:] if num_known and timestamps is not None else timestamps
                new_frames = self._accept(checked_frames[num_known:], new_seconds)
                earlier = self.queue.take(len(self.queue)) if encoding else []
                if not encoding:
                    for frame in new_frames:
                        self.queue.put(frame)
            except BaseException:
                if encoding:
                    self._lock.release()
                raise
        if encoding:
            try:
                self._take([*earlier, *new_frames])
                if self._disk_error is not None:
                    raise self._disk_error
            finally:
                self._give_back(earlier, new_frames, accepted_before, checked_frames, timestamps)
                self._lock.release()
        self._beat()
        self._tell()
        return len(checked_frames)

    def _known(self, frames: list[Tensor], timestamps: Any) -> int:
        """How many of these frames the stream has: those that the last push took, if it failed and this repeats it."""
        failed, self._failed = self._failed, None
        if failed is None or len(failed[0]) != len(frames):
            return 0
        same_times = np.array_equal(np.ravel(failed[1]), np.ravel(timestamps))  # None is equal to None alone
        return failed[2] if same_times and all(map(torch.equal, failed[0], frames)) else 0

    def _reached(self) -> float:
        """Seconds of the newest frame that is encoded or pending."""
        return max([float("-inf") if self.newest is None else self.newest, *(seconds for _, seconds in self.pending)])

    def _give_back(
        self, earlier: list[TimedFrame], new: list[TimedFrame], before: float | None, frames: list[Tensor], times: Any
    ) -> None:
        """After a push: frames that an error kept out wait in the queue again, or were never accepted.

        earlier: frames that had waited. new: those of the push, frames and times as given. before: `accepted` before.
        """
        reached = self._reached()
        with self._accepting:
            self.queue.give_back([frame for frame in earlier if frame[1] > reached])
            kept_out = [frame for frame in new if frame[1] > reached]
            if kept_out and self.accepted is not None and self.accepted > new[-1][1]:
                self.queue.give_back(kept_out)  # others came after them meanwhile
                kept_out = []
            elif kept_out:
                self.accepted = before if len(kept_out) == len(new) else new[-len(kept_out) - 1][1]
            if kept_out or self._disk_error is not None:
                self._failed = frames, times, len(frames) - len(kept_out)

    def _accept(self, frames: list[Tensor], timestamps: Any) -> list[TimedFrame]:
        """Frames of a size that the model takes, with their seconds."""
        for frame in frames:
            self.vision.check_size(*frame.shape[:2])
        seconds = as_times(timestamps, len(frames), self.accepted, 1 / self.fps)
        if seconds:
            self.accepted = seconds[-1]
        return list(zip(frames, seconds, strict=True))

    def _beat(self) -> None:
        if self.store.disk is not None and self.accepted is not None:
            self.store.disk.beat(self.accepted)

    def watch(self, source: Any, background: bool = False, drop: bool | None = None, **options: Any) -> Watcher:
        """Read a source to its end: a file, folder, URL, camera number, or an iterable of (frame, seconds).

        background: return at once and read in a thread (`.wait()`, `.stop()`; `close()` stops all of them). drop: True
        drops the oldest frames when the model is slower than the source (the default for cameras and URLs), False lets
        the source wait.
        options: those of `open_source` (sample_fps, realtime, ...); size may also be "model": frames come at the size
        that the model's processor would scale them to, which is the default of files and folders.
        """
        self._check_open()
        dropping = drop if drop is not None else is_live(source) or bool(options.get("realtime"))
        offset: float | None = None

        def offer(frames: list[Tensor], seconds: float) -> bool:
            nonlocal offset
            with self._accepting:  # accepted and queued at once: no other frame comes in between
                if not (dropping or self.queue.room()):
                    return False
                if offset is None:  # a second source goes on where the first one ended
                    offset = 0.0 if self.accepted is None else self.accepted + 1 / self.fps - seconds
                for frame in self._accept(frames, [seconds + offset]):
                    self.queue.put(frame)
                return True

        def encode() -> None:
            (self.encode_waiting or self.drain)(2 * CHUNK)
            self._beat()

        watcher = Watcher(open_frames(source, options, self.vision.frame_size), self.queue, offer, encode)
        self._watchers = [earlier for earlier in self._watchers if earlier.running] + [watcher]
        watcher.start()
        if not background:
            watcher.wait()
        return watcher

    def drain(self, most: int | None = None) -> int:
        """Encode frames that wait in the queue; returns how many."""
        with self._lock:
            self.settle()
            num_done = self._drain(most)
        self._tell()
        return num_done

    def _drain(self, most: int | None = None) -> int:
        """`drain` of the frames that wait when it is called; none while the disk refuses."""
        num_done, most = 0, len(self.queue) if most is None else most
        while num_done < most and len(self.queue) and self._disk_error is None and not self.closed:
            frames = self.queue.take(min(most - num_done, CHUNK * self.vision.frames_per_grid))
            try:
                self._take(frames)
            finally:
                reached = self._reached()
                kept_out = [frame for frame in frames if frame[1] > reached]
                self.queue.give_back(kept_out)
            num_done += len(frames) - len(kept_out)
        return num_done

    def _take(self, frames: list[TimedFrame]) -> None:
        """Encode frames, in runs of one size, up to the first chunk that the disk does not take. Those that did not
        come so far, or that an error kept out, are neither encoded nor pending afterwards."""
        start_time, pending_before = time.perf_counter(), [second for _, second in self.pending]
        try:
            for frame, seconds in frames:
                if self.pending and self.pending[-1][0].shape != frame.shape:
                    self._encode(pad=True)  # a change of size: the frame without a partner is shown twice
                if self._disk_error is not None:
                    break
                self.pending.append((frame, seconds))
                if len(self.pending) >= CHUNK * self.vision.frames_per_grid:
                    self._encode()
            if self._disk_error is None:
                self._encode()
        except BaseException:
            self.pending = [frame for frame in self.pending if frame[1] in pending_before]
            raise
        finally:
            reached = self._reached()
            self.counts["frames"] += sum(second <= reached for _, second in frames)
            self.counts["encode_s"] += time.perf_counter() - start_time

    def _encode(self, pad: bool = False) -> None:
        """Encode the pending frames whose grids are whole. pad: the others too, the last frame shown twice. After an
        error encoder and store are as before, and the frames still pending."""
        grid_frames = self.vision.frames_per_grid
        frames = list(self.pending)
        while pad and len(frames) % grid_frames:
            frames.append(frames[-1])
        num_whole = len(frames) // grid_frames * grid_frames
        if not num_whole:
            return
        checkpoint, newest, interval = self.encoder.checkpoint(), self.newest, self.interval
        try:
            with torch.inference_mode(False), torch.no_grad(), self._lock, self.fresh_lengths():
                self._store_blocks(self._grid_frames(frames[:num_whole]))
        except BaseException:
            self.newest, self.interval = newest, interval
            self._roll_back(checkpoint)
            raise
        finally:
            self.encoder.forget_checkpoint()
        self.pending = frames[num_whole:]
        if self.store.due() and not self.unstored:
            try:
                self.store.flush()
            except StoreError as e:
                self._disk_error = e

    def _grid_frames(self, frames: list[TimedFrame]) -> GridFrames:
        grid_frames, times, intervals = self.vision.frames_per_grid, [], []
        for first_frame in range(0, len(frames), grid_frames):
            for _, seconds in frames[first_frame : first_frame + grid_frames]:
                if self.newest is not None and seconds > self.newest:
                    self.interval = seconds - self.newest
                self.newest = seconds
            times.append((frames[first_frame][1], frames[first_frame + grid_frames - 1][1]))
            intervals.append(self.interval if self.interval is not None else 1 / self.fps)
        return GridFrames(torch.stack([frame for frame, _ in frames]), times, intervals)

    def _store_blocks(self, grids: GridFrames) -> None:
        """Encode grids and store their blocks; those that the store has no room for wait."""
        embeddings: Tensor | None = None
        if isinstance(self.retriever, External) and self.retriever.frames_to is not None:
            embeddings = self.retriever.frames_to(grids.frames[:: self.vision.frames_per_grid])
        first_block = self.encoder.progress.blocks
        for group in self.encoder.encode(grids):
            if self.store.disk is not None:
                self.store.disk.began(self.encoder.progress.first, self.encoder.first_extent)
            for block, tensors in group:
                tensors.embedding = None if embeddings is None else embeddings[block.id - first_block]
            for block, packed in self.store.packed(group):
                self._store(block, packed)
        self._blocks_stored()

    def _blocks_stored(self) -> None:
        """Called when a chunk's blocks are stored; after an error here the chunk is taken back."""

    def _tell(self) -> None:
        """Called when frames were taken; outside of all locks."""

    def _store(self, block: Block, packed: PackedBlock) -> None:
        if not self.unstored:
            try:
                self.store.insert(block, packed)
                return
            except StoreError as e:
                self._disk_error = e
        self.unstored.append((block, packed))

    def _roll_back(self, checkpoint: Checkpoint) -> None:
        """Take back the blocks of a chunk that failed."""
        first_block = checkpoint.progress.blocks
        self.unstored = [stored for stored in self.unstored if stored[0].id < first_block]
        if not self.unstored:
            self._disk_error = None
        self.encoder.roll_back(checkpoint)
        try:
            self.store.take_back(first_block)
        except StoreError as e:  # written already, and the disk refuses to take them back
            self.closed = True
            self.store.close()
            raise UserError(f"this session cannot go on: load what is stored. {e}") from None

    def flush(self) -> None:
        """Encode what waits, a frame without a partner included (shown twice), and write everything to disk."""
        with self._lock:
            self.settle()
            self._drain()
            if self._disk_error is None:
                self._encode(pad=True)
            self.settle()
            self.store.flush()
        self._tell()

    def settle(self) -> None:
        """After a failed write: store and write again before more is taken, so that a broken disk loses nothing."""
        with torch.inference_mode(False):
            while self.unstored:
                block, packed = self.unstored[0]
                if block.id not in self.store.blocks:
                    self.store.insert(block, packed)
                del self.unstored[0]
        if self._disk_error is not None:
            self.store.flush()
            self._disk_error = None
