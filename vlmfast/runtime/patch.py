"""Records every change made to a model, and undoes them in reverse order."""

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
        # by the id of a module's hook dict: that dict, a copy of it, and the ids of our hooks in it
        earlier_hooks: dict[int, tuple[Any, dict[int, Any], set[int]]] = {}
        for hook_handle in self._handles:
            hooks = hook_handle.hooks_dict_ref()
            if hooks is not None and hook_handle.id in hooks:
                earlier_hooks.setdefault(id(hooks), (hooks, dict(hooks), set()))[2].add(hook_handle.id)
        for hooks, _, own_ids in earlier_hooks.values():
            for own_id in own_ids:
                del hooks[own_id]
        try:
            yield
        finally:
            for hooks, hooks_before, own_ids in earlier_hooks.values():  # others may have come and gone meanwhile
                hooks_now = dict(hooks)
                hooks.clear()
                wanted_ids = own_ids | hooks_now.keys()
                hooks.update(
                    {hook_id: hook for hook_id, hook in hooks_before.items() if hook_id in wanted_ids} | hooks_now
                )

    def set(self, obj: Any, name: str, value: Any) -> None:
        """Set an instance attribute; undone to what the instance itself held before (or nothing)."""
        earlier_value = vars(obj).get(name, _MISSING)
        object.__setattr__(obj, name, value)
        if earlier_value is _MISSING:
            self._undo.append(lambda: vars(obj).pop(name, None))
        else:
            self._undo.append(lambda: object.__setattr__(obj, name, earlier_value))

    def call(self, undo: Callable[[], Any]) -> None:
        """Own an arbitrary undo step."""
        self._undo.append(undo)

    def remove(self) -> None:
        first_error: Exception | None = None
        self._handles = []
        while self._undo:
            try:
                self._undo.pop()()
            except Exception as undo_error:  # the rest must still be undone
                first_error = first_error or undo_error
        if first_error is not None:
            raise first_error
