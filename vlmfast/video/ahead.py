"""Makes the next parts of something in a thread while the earlier ones are used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

Part = TypeVar("Part")


@contextmanager
def ahead(make: Callable[[threading.Event], Generator[Part, None, None]], waiting: int = 1) -> Iterator[Iterator[Part]]:
    """The parts that `make` yields, in order; it runs in a thread, which makes `waiting` more than were asked for.

    make: gets an event that is set when the block is left: it should look at it often and return, since leaving waits
    for the thread. What it raises is raised where the parts are iterated over.
    """
    stopped, parts = threading.Event(), queue.Queue[tuple[Part | None, BaseException | None]](waiting)

    def hand_over(part: Part | None, error: BaseException | None) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                parts.put((part, error), timeout=0.05)
                return

    def run() -> None:
        made = make(stopped)
        try:
            for part in made:
                hand_over(part, None)
                if stopped.is_set():
                    return
            hand_over(None, None)
        except BaseException as error:
            hand_over(None, error)
        finally:
            made.close()

    def arriving() -> Iterator[Part]:
        while True:
            part, error = parts.get()
            if error is not None:
                raise error
            if part is None:
                return
            yield part

    thread = threading.Thread(target=run, name="vlmfast-reading", daemon=True)
    thread.start()
    try:
        yield arriving()
    finally:
        stopped.set()
        thread.join()
