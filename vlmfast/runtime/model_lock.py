"""One model serves one call at a time: a re-entrant lock per model, and the functions of the model that take it.

Hooks, caches and switched attention belong to the call that is running. Another thread that calls `generate`, `forward`
or a feature function of a model that is accelerated or streamed waits until that call is over. The thread that holds
the lock may call the model again: streamers and logits processors do.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from vlmfast import families
from vlmfast.runtime.patch import Patch

_GUARD = threading.RLock()  # re-entrant: a handle may be collected, and undone, while this module runs
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_LOCKED: weakref.WeakKeyDictionary[nn.Module, _Locked] = weakref.WeakKeyDictionary()


def model_lock(model: nn.Module) -> threading.RLock:
    """The lock of this model: the same object for every handle and session over it."""
    with _GUARD:
        return _LOCKS.setdefault(model, threading.RLock())


class _Locked:
    """The locked functions of one model, and how many holders want them locked."""

    def __init__(self) -> None:
        self.holders = 0
        self.streams = 0  # how many of the holders are open stream sessions
        self.patch = Patch()
        self.forwards: list[tuple[nn.Module, Any]] = []  # modules and the forward they had


def streamed(model: nn.Module) -> bool:
    """Is a stream session open over this model?"""
    with _GUARD:
        locked = _LOCKED.get(model)
        return locked is not None and locked.streams > 0


def lock_functions(model: nn.Module, stream: bool = False) -> Callable[[], None]:
    """Make `generate` and `forward` of a model take its lock; returns what undoes it.

    Several holders may ask (a session, and a handle inside it); the functions are the model's own again when the last
    one has undone it. Undoing twice is harmless. stream: the holder is a stream session.
    """
    with _GUARD:
        locked = _LOCKED.setdefault(model, _Locked())
        locked.holders += 1
        locked.streams += stream
        if locked.holders == 1:
            _lock_all(model, locked)
    waiting, reference = [True], weakref.ref(model)

    def undo() -> None:
        with _GUARD:
            held = reference()
            if not waiting or held is None or held not in _LOCKED:
                return
            waiting.clear()
            locked = _LOCKED[held]
            locked.holders -= 1
            locked.streams -= stream
            if locked.holders == 0:
                del _LOCKED[held]
                locked.patch.remove()

    return undo


def _lock_all(model: nn.Module, locked: _Locked) -> None:
    family, lock = families.get(model), model_lock(model)
    base = family.base(model)
    for module in (model, base, family.text(model)):
        locked.forwards.append((module, module.forward))
        locked.patch.set(module, "forward", _take(lock, module.forward))
    locked.patch.set(model, "generate", _take(lock, model.generate))  # type: ignore[arg-type]


@contextmanager
def without_lock(model: nn.Module) -> Iterator[None]:
    """Inside the block `forward` is the model's own: for a call that holds the lock and may compile it."""
    scope = Patch()
    locked = _LOCKED.get(model)
    try:
        for module, forward in locked.forwards if locked is not None else ():
            scope.set(module, "forward", forward)
        yield
    finally:
        scope.remove()


def _take(lock: threading.RLock, inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def locked(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return inner(*args, **kwargs)

    locked.model_lock = lock  # type: ignore[attr-defined]
    return locked
