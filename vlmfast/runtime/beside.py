"""Runs one piece of work beside another: in a thread with cores of its own on a CPU, on a stream of its own on CUDA.

    beside.start(work)   # before the other is launched; `work` is given what tells it to stop
    ...                  # launch the other
    beside.launched()
    ...                  # wait for the other
    beside.over()        # the work is told to stop
    beside.join()        # it has stopped; raises what it raised, returns its milliseconds
    beside.close()       # no thread is left, and the number of threads is what it was

Everything but `join` and `close` may be called where nothing was started. CUDA launches do not wait for the device, so
no thread is needed there: the work is launched, and its results are read, while the device is busy with the other.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Protocol

import torch

SHARE = 4  # one in so many of torch's threads works beside, at least one
Work = Callable[[Callable[[], bool]], None]


class Beside(Protocol):
    """See the head of this file."""

    def start(self, work: Work) -> None: ...

    def launched(self) -> None: ...

    def over(self) -> None: ...

    def join(self) -> float: ...

    def close(self) -> None: ...


def beside(device: torch.device) -> Beside:
    """What runs work of this device beside other work of it."""
    return OnStream(device) if device.type == "cuda" else InThread()


def _timed(work: Work, stopped: Callable[[], bool]) -> float:
    start = time.perf_counter()
    with torch.no_grad():  # a thread does not inherit it
        work(stopped)
    return (time.perf_counter() - start) * 1e3


class InThread:
    """A thread, made for the first work. While work runs, the caller's operations take fewer of torch's threads: those
    of the two together are as many as the caller had, two at least. Torch counts them per thread."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._future: Future[float] | None = None
        self._stop = Event()
        self._threads: int | None = None  # of the caller, while they are fewer

    def start(self, work: Work) -> None:
        """Begin."""
        total = torch.get_num_threads()
        of_work = max(1, total // SHARE)
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, "vlmfast-beside")
            try:
                self._executor.submit(torch.set_num_threads, of_work).result()
            finally:
                torch.set_num_threads(total)  # threads that begin later take the number that was set last
        self._stop.clear()
        self._future = self._executor.submit(_timed, work, self._stop.is_set)
        if total > of_work:
            self._threads = total
            torch.set_num_threads(total - of_work)

    def launched(self) -> None:
        """On a CPU the other work is done by now."""

    def over(self) -> None:
        """Tell the work to stop, and give the caller all threads again."""
        self._stop.set()
        if self._threads is not None:
            torch.set_num_threads(self._threads)
            self._threads = None

    def join(self) -> float:
        """Wait for the work; its milliseconds. Raises what it raised."""
        future, self._future = self._future, None
        return 0.0 if future is None else future.result()

    def close(self) -> None:
        """Stop the work, whatever became of it, and end the thread."""
        self.over()
        if self._executor is not None:
            self._executor.shutdown()
        self._executor = self._future = None


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class OnStream:
    """A CUDA stream. The work must read its last result on the host: nothing of it is pending when it returns."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._work: Work | None = None
        self._before: torch.cuda.Event | None = None
        self._elapsed_ms = 0.0

    def start(self, work: Work) -> None:
        """Mark what the device was given so far: the work follows it, and not what is launched next."""
        self._work, self._before = work, torch.cuda.Event()
        self._before.record()

    def launched(self) -> None:
        """Run the work until the device has ended what was launched since `start`."""
        work, self._work = self._work, None
        if work is None or self._before is None:
            return
        computing, stream, ended = torch.cuda.current_stream(self.device), _stream(self.device), torch.cuda.Event()
        ended.record()
        stream.wait_event(self._before)
        try:
            with torch.cuda.stream(stream):
                self._elapsed_ms = _timed(work, ended.query)
        finally:
            computing.wait_stream(stream)

    def over(self) -> None:
        """The work has ended."""

    def join(self) -> float:
        """Its milliseconds on the host."""
        elapsed_ms, self._elapsed_ms = self._elapsed_ms, 0.0
        return elapsed_ms

    def close(self) -> None:
        """Nothing is left."""
        self._work = None
