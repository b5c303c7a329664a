"""Everything done to a model is recorded here, and undone in reverse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_MISSING = object()


class Patch:
    """A stack of undo steps. `remove()` is idempotent and runs every step even when one fails."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def hook(self, handle: Any) -> None:
        """Own a torch hook handle."""
        self._undo.append(handle.remove)

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
        while self._undo:
            try:
                self._undo.pop()()
            except Exception as e:  # the rest must still be undone
                error = error or e
        if error is not None:
            raise error
