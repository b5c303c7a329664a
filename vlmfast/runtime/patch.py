"""Everything done to a model is recorded here, and undone in reverse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_MISSING = object()


class Patch:
    """A stack of undo steps. `remove()` is idempotent and runs every step even when one fails."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []
        self._handles: list[Any] = []

    def hook(self, handle: Any, stays: bool = False) -> None:
        """Own a torch hook handle. stays: also inside `lifted()`."""
        self._undo.append(handle.remove)
        if not stays:
            self._handles.append(handle)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Inside the block none of our hooks is on the model; afterwards all are back, in the order they had."""
        before: dict[int, tuple[Any, dict[int, Any], set[int]]] = {}  # per hook dict: what it held, which were ours
        for handle in self._handles:
            hooks = handle.hooks_dict_ref()
            if hooks is not None and handle.id in hooks:
                before.setdefault(id(hooks), (hooks, dict(hooks), set()))[2].add(handle.id)
        for hooks, _, ours in before.values():
            for key in ours:
                del hooks[key]
        try:
            yield
        finally:
            for hooks, held, ours in before.values():  # others may have come and gone meanwhile
                now = dict(hooks)
                hooks.clear()
                hooks.update({k: v for k, v in held.items() if k in ours or k in now} | now)

    def set(self, obj: Any, name: str, value: Any) -> None:
        """Set an instance attribute; undone to what the instance itself held before (or nothing)."""
        before = vars(obj).get(name, _MISSING)
        object.__setattr__(obj, name, value)
        if before is _MISSING:
            self._undo.append(lambda: vars(obj).pop(name, None))
        else:
            self._undo.append(lambda: object.__setattr__(obj, name, before))

    def call(self, undo: Callable[[], Any]) -> None:
        """Own an arbitrary undo step."""
        self._undo.append(undo)

    def remove(self) -> None:
        error: Exception | None = None
        self._handles = []
        while self._undo:
            try:
                self._undo.pop()()
            except Exception as e:  # the rest must still be undone
                error = error or e
        if error is not None:
            raise error
