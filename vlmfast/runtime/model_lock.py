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
        locked_functions = _LOCKED.get(model)
        return locked_functions is not None and locked_functions.streams > 0


def lock_functions(model: nn.Module, stream: bool = False) -> Callable[[], None]:
    """Make `generate` and `forward` of a model take its lock; returns what undoes it.

    Several holders may ask (a session, and a handle inside it); the functions are the model's own again when the last
    one has undone it. Undoing twice is harmless. stream: the holder is a stream session.
    """
    with _GUARD:
        locked_functions = _LOCKED.setdefault(model, _Locked())
        locked_functions.holders += 1
        locked_functions.streams += stream
        if locked_functions.holders == 1:
            _lock_all(model, locked_functions)
    pending, reference = [True], weakref.ref(model)

    def undo() -> None:
        with _GUARD:
            locked_model = reference()
            if not pending or locked_model is None or locked_model not in _LOCKED:
                return
            pending.clear()
            locked_functions = _LOCKED[locked_model]
            locked_functions.holders -= 1
            locked_functions.streams -= stream
            if locked_functions.holders == 0:
                del _LOCKED[locked_model]
                locked_functions.patch.remove()

    return undo


def _lock_all(model: nn.Module, locked_functions: _Locked) -> None:
    family, shared_lock = families.get(model), model_lock(model)
    base_model = family.base(model)
    for module in (model, base_model, family.text(model)):
        locked_functions.forwards.append((module, module.forward))
        locked_functions.patch.set(module, "forward", _take(shared_lock, module.forward))
    locked_functions.patch.set(model, "generate", _take(shared_lock, model.generate))  # type: ignore[arg-type]


@contextmanager
def without_lock(model: nn.Module) -> Iterator[None]:
    """Inside the block `forward` is the model's own: for a call that holds the lock and may compile it."""
    own_forwards = Patch()
    locked_functions = _LOCKED.get(model)
    try:
        for module, forward in locked_functions.forwards if locked_functions is not None else ():
            own_forwards.set(module, "forward", forward)
        yield
    finally:
        own_forwards.remove()


def _take(lock: threading.RLock, inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def locked(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return inner(*args, **kwargs)

    locked.model_lock = lock  # type: ignore[attr-defined]
    return locked
